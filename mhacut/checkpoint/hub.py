"""Fetch the files of ``hf-hub:OWNER/NAME`` into the cache of the Hugging Face hub, by timm's own means."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.folder import INDEXES, WEIGHT_FILES, shard_names
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.untrusted_json import read_json
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
    repository = source.partition(":")[2]
    opened = Checkpoint.open(_fetch(source, repository), hints)
    opened.source, opened.stem = source, repository.partition("@")[0].rpartition("/")[2]
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
    """Return the folder of the cache, once it holds a configuration and weights.

    Raises:
        CheckpointError: it cannot; there is no such repository, or it may not be read.
    """
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
            except Exception as error:  # in types of their own libraries
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
            f"{source}: is not in the cache, and the Hugging Face hub cannot be reached; go online once, or "
            "give a folder or file"
        )
    missing = f"all weights ({', '.join((*WEIGHT_FILES, *INDEXES))})" if configs else "config.json"
    raise CheckpointError(
        f"{source}: lacks {missing}; download its weights and give the file, and "
        f"{option_name('model', 'NAME')}"
    )
