"""Open ``timm:NAME`` and ``hf-hub:OWNER/NAME``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from mhacut.checkpoint.build import build_skeleton, known_model, unknown_model
from mhacut.checkpoint.checkpoint import Checkpoint, check_finite, sha256_of_tensors
from mhacut.checkpoint.folder import INDEXES, WEIGHT_FILES, shard_names
from mhacut.checkpoint.identity import ModelHints, ModelIdentity, identity_of
from mhacut.checkpoint.timm_cfg import cfg_of_tag, set_resolved_preprocessing, split_tag
from mhacut.errors import CheckpointError, option_name
from mhacut.runtime.files import read_json

TIMM_PREFIX = "timm:"
_MISFIT = "Error(s) in loading state_dict"
HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_TIMEOUT = 5
"""Seconds to wait for the Hugging Face hub. After that, only the local cache is used."""
_OTHER_CONFIGS = ("open_clip_config.json", "preprocessor_config.json", "processor_config.json")


def open_pretrained(source: str, hints: ModelHints) -> Checkpoint:
    if hints.model is not None:
        raise CheckpointError(f"{source}: already names the model. Leave out {option_name('model')}")
    name = source.removeprefix(TIMM_PREFIX)
    architecture = name.partition(".")[0]
    if not known_model(architecture):
        raise CheckpointError(f"{source}: {unknown_model(architecture)}")
    try:
        cfg_of_tag(*split_tag(name))
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    args = hints.all_args
    build_skeleton(ModelIdentity(architecture, args))  # arguments that do not fit fail here, by name
    _check_within_reach(source, name)
    model = _create(source, name, args)
    identity = identity_of(model, architecture, args)
    set_resolved_preprocessing(model, identity, source)
    model.eval()
    check_finite(source, model)
    notes = (f"pretrained weights of timm, {name}", f"num_classes {model.num_classes}, from the weights")
    return Checkpoint.of_model(
        model,
        identity,
        source=source,
        stem=name,
        sha256=sha256_of_tensors(model.state_dict()),
        notes=notes,
        cfg_origin="pretrained",
    )


def _check_within_reach(source: str, name: str) -> None:
    """Raise if the weights are not cached and the hub is unreachable. timm would retry for a minute."""
    import timm
    from huggingface_hub import try_to_load_from_cache
    from timm.models._hub import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return
    files = {HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME}
    if cfg.hf_hub_filename:
        files = {cfg.hf_hub_filename, f"{Path(cfg.hf_hub_filename).stem}.safetensors"}
    # timm looks for the safetensors file first, whatever its record names.
    cached = any(isinstance(try_to_load_from_cache(cfg.hf_hub_id, file), str) for file in files)
    if not cached and not hub_answers():
        raise CheckpointError(_out_of_reach(source, "the Hugging Face hub is unreachable"))


def _out_of_reach(source: str, reason: str) -> str:
    return (
        f"{source}: the weights are not in the cache and could not be downloaded ({reason:.200}). "
        f"Go online once, or give a file and {option_name('model')}"
    )


def _create(source: str, name: str, args: Mapping[str, Any]) -> Any:
    import timm

    # With another number of classes, timm would leave the classifier random.
    own = {key: value for key, value in args.items() if key != "num_classes"}
    try:
        with torch.random.fork_rng(devices=[]):
            model: Any = timm.create_model(name, pretrained=True, **own)
    except Exception as error:  # of the hub, the network or the cache
        lines = str(error).strip().split("\n")
        if lines[0].startswith(_MISFIT):
            raise CheckpointError(_misfit(source, own, lines[1:])) from error
        raise CheckpointError(_out_of_reach(source, lines[0] or type(error).__name__)) from error
    # timm loads some weights in part, and would leave tensors added by arguments random.
    default = build_skeleton(ModelIdentity(name.partition(".")[0])).state_dict()
    added = [key for key in model.state_dict() if key not in default]
    if added:
        raise CheckpointError(_misfit(source, own, [f"no weights of {added[0]}"]))
    num_classes = args.get("num_classes", model.num_classes)
    if num_classes not in (0, model.num_classes):
        raise CheckpointError(
            f"{source}: the classifier has {model.num_classes} classes, not {num_classes}. Leave "
            f"{option_name('num_classes')} out, or fine-tune the model first"
        )
    if num_classes == 0 != model.num_classes:
        model.reset_classifier(0)
    return model


def _misfit(source: str, args: Mapping[str, Any], details: Sequence[str]) -> str:
    advice = f". Leave {option_name('model_args', args)} out" if args else ""
    return f"{source}: the weights do not fit the model ({' '.join(details).strip():.150}){advice}"


# --- folders of the hub ---


def open_from_hub(source: str, hints: ModelHints) -> Checkpoint:
    repository = source.partition(":")[2]
    opened = Checkpoint.open(_fetch(source, repository), hints)
    opened.source, opened.stem = source, repository.partition("@")[0].rpartition("/")[2]
    return opened


def hub_answers() -> bool:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # of the client's own libraries
        return False
    return True


def _fetch(source: str, repository: str) -> Path:
    from huggingface_hub.errors import EntryNotFoundError
    from timm.models import _hub

    answers, download = hub_answers(), cast(Any, _hub.hf_hub_download)

    def get(*names: str) -> list[Path]:
        paths = []
        for file in names:
            try:
                name, revision = _hub.hf_split(repository)
                paths.append(Path(download(name, file, revision=revision, local_files_only=not answers)))
            except EntryNotFoundError:
                continue
            except Exception as error:  # of the hub, the network or the cache
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                raise CheckpointError(f"{source}: could not be downloaded ({reason:.200})") from error
        return paths

    configs = get("config.json")
    if not configs or "architecture" not in read_json(configs[0]):
        configs += get(*_OTHER_CONFIGS)
    # One name after the other: a repository may hold the same weights in several formats.
    weights = next((path for name in WEIGHT_FILES for path in get(name)), None)
    if weights is None:
        index = next((path for name in INDEXES for path in get(name)), None)
        names = [] if index is None else shard_names(index)
        shards = get(*names)
        weights = shards[0] if shards and len(shards) == len(names) else None
    if configs and weights is not None:
        return weights.parent
    if not answers:
        raise CheckpointError(
            f"{source}: not in the cache, and the Hugging Face hub is unreachable. Go online once, or give a "
            "folder or file"
        )
    missing = f"all weights ({', '.join((*WEIGHT_FILES, *INDEXES))})" if configs else "config.json"
    raise CheckpointError(
        f"{source}: lacks {missing}. Download its weights, and give the file and "
        f"{option_name('model', 'NAME')}"
    )
