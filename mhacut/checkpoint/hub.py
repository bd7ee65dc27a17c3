"""Fetch the files of ``hf-hub:OWNER/NAME`` into the cache of the Hugging Face hub, by timm's own means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.folder import INDEXES, WEIGHT_FILES, read_object, shard_names
from mhacut.checkpoint.identity import ModelHints
from mhacut.errors import CheckpointError, option_name

HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_TIMEOUT = 5
"""Seconds to wait for the hub's answer before files are sought in the cache alone."""
_OTHER_CONFIGS = ("open_clip_config.json", "preprocessor_config.json", "processor_config.json")


def open_from_hub(source: str, hints: ModelHints) -> Checkpoint:
    """Open a folder of the hub as one on disk: of timm, transformers or open_clip.

    Args:
        source: ``hf-hub:OWNER/NAME``, maybe with ``@REVISION``.
        hints: what the user says about the model.

    Raises:
        CheckpointError: there is no such folder, or it is neither in the cache nor online, or cannot be read.
    """
    from timm.models._hub import hf_split

    repository = source.partition(":")[2]
    try:
        name = hf_split(repository)[0]
    except AssertionError as error:
        raise CheckpointError(f"{source}: {error}") from None
    opened = Checkpoint.open(_fetch(source, repository), hints)
    opened.source, opened.stem = source, name.rpartition("/")[2]
    return opened


def hub_answers() -> bool:
    """Whether the hub can be reached; its own client would try for a minute, for each file."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception:  # the client fails in types of its own libraries
        return False
    return True


def _fetch(source: str, repository: str) -> Path:
    """Return the folder of the cache, once it holds a configuration and weights."""
    answers = hub_answers()

    def get(file: str) -> Path | None:
        return _file(source, repository, file, offline=not answers)

    config = get("config.json")
    others = () if config is not None and "architecture" in read_object(config) else _OTHER_CONFIGS
    configs = [config, *map(get, others)]
    weights = next((path for path in map(get, WEIGHT_FILES) if path is not None), None) or _shards(get)
    found = next((path for path in configs if path is not None), None)
    if found is None or weights is None:
        if not answers:
            raise CheckpointError(
                f"{source}: is not in the cache, and the Hugging Face hub cannot be reached; go online once, "
                "or give a folder or file"
            )
        missing = f"holds no weights ({', '.join((*WEIGHT_FILES, *INDEXES))})"
        if found is None:
            missing = "holds no config.json"
        elif listed := [index for index in INDEXES if get(index) is not None]:
            missing = f"lacks files that its {listed[0]} lists"
        raise CheckpointError(
            f"{source}: {missing}; download its weights and give the file, and {option_name('model', 'NAME')}"
        )
    return weights.parent


def _shards(get: Callable[[str], Path | None]) -> Path | None:
    """Return the first of several files with weights, once all are there; None if one is missing."""
    index = next((path for path in map(get, INDEXES) if path is not None), None)
    paths = [] if index is None else list(map(get, shard_names(index)))
    return paths[0] if paths and None not in paths else None


def _file(source: str, repository: str, file: str, *, offline: bool) -> Path | None:
    """Return the path of a file in the cache; None if there is none of this name.

    Raises:
        CheckpointError: there is no such repository, or it may not be read.
    """
    from huggingface_hub.errors import EntryNotFoundError
    from timm.models import _hub

    name, revision = _hub.hf_split(repository)
    download: Any = _hub.hf_hub_download
    try:
        return Path(download(name, file, revision=revision, local_files_only=offline))
    except EntryNotFoundError:
        return None
    except Exception as error:  # the hub, the network and the cache fail in types of their own libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{source}: could not be downloaded ({reason:.200})") from error
