"""Find weights and configuration in a folder of timm or transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhacut.checkpoint.untrusted_json import parse_json
from mhacut.errors import CheckpointError, option_name
from mhacut.runtime.files import regular_size, show

_MAX_CONFIG_BYTES = 4 * 2**20
WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "model.pth",
    "model.pt",
)
"""Names of files with weights, in the order in which they are sought."""
_CHECKPOINTS = (".safetensors", ".pth", ".pth.tar", ".pt", ".ckpt", ".bin")
"""Endings of other files that may be meant."""
_NO_MODEL = re.compile(
    r"(state(?!_dict)|optimizer|scheduler|scaler|sampler|rng_state|training_args)([._-].*)?\.|.*-of-\d+\."
)
"""Beginnings of the names of files beside a model's, and of parts of one."""
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Names of the lists of the files that a model is spread over, in the order in which they are sought."""
_MAX_SHARDS = 500
MERGE_FIRST = (
    "merge it into its model first: merged = PeftModel.from_pretrained(MODEL, FOLDER).merge_and_unload(); "
    'torch.save(merged.state_dict(), "weights.pth")'
)
"""Advice for an adapter of PEFT."""


@dataclass(frozen=True)
class Folder:
    """Files of a folder that are read."""

    weights: Sequence[Path]
    """The file with the weights, or the files they are spread over."""
    config: dict[str, Any] | None
    """Content of ``config.json`` or ``open_clip_config.json``; untrusted. None if there is neither."""
    preprocessor: dict[str, Any] | None
    """Content of ``preprocessor_config.json`` of transformers; untrusted."""


def open_folder(folder: Path) -> Folder:
    """Return weights and configuration of a folder.

    Names of shards are those that transformers gives; no name is taken from the index.

    Raises:
        CheckpointError: there are no weights, or not all shards, or one whole file without a configuration.
    """
    one = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    config = _config(folder, one)
    if config is None and one is not None:
        hint = f"it holds {one.name}: give that file, and {option_name('model', 'NAME')}"
        raise CheckpointError(f"{show(folder)}: is a directory without a config.json; {hint}")
    weights = [one] if one is not None else _shards(folder)
    if not weights:
        expected = "holds no weights, expected model.safetensors beside config.json"
        without = f"is a directory without a config.json{_other_files(folder)}"
        found = _in_parts(folder) or (without if config is None else expected)
        raise CheckpointError(f"{show(folder)}: {found}")
    of_timm = config is None or "architecture" in config
    return Folder(weights, config, None if of_timm else _preprocessor(folder))


def _in_parts(folder: Path) -> str | None:
    """Return what a folder without weights of its own holds, and how to get them; None if nobody knows."""
    if (folder / "adapter_config.json").is_file():
        return f"holds an adapter of PEFT and no whole model; {MERGE_FIRST}"
    if (folder / ".metadata").is_file() and any(folder.glob("*.distcp")):
        return (
            "is a distributed checkpoint of torch; convert it, and give the file: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pth"
        )
    if any(folder.glob("global_step*/")) or (folder / "zero_to_fp32.py").is_file():
        return (
            "is a checkpoint of DeepSpeed; convert it there with python zero_to_fp32.py . OUTPUT, and give "
            "what that writes; of a run without ZeRO-3, give global_stepN/mp_rank_00_model_states.pt"
        )
    return None


def _other_files(folder: Path) -> str:
    """Return a hint at the checkpoints of a folder, by their names; a run of finetune leaves such files."""
    named = (path for path in folder.iterdir() if path.name.endswith(_CHECKPOINTS) and path.is_file())
    found = sorted(show(path.name) for path in named if not _NO_MODEL.match(path.name))
    names = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
    return f"; give one of the files that it holds: {names}" if found else ""


def _config(folder: Path, weights: Path | None) -> dict[str, Any] | None:
    """Return the configuration that goes with the weights; None if there is none."""
    plain, of_open_clip = folder / "config.json", folder / "open_clip_config.json"
    config = read_object(plain) if plain.is_file() else None
    for_open_clip = weights is not None and weights.name.startswith("open_clip")
    if of_open_clip.is_file() and (config is None or (for_open_clip and "architecture" not in config)):
        return read_object(of_open_clip)
    return config


def _preprocessor(folder: Path) -> dict[str, Any] | None:
    """Return how images are preprocessed; models of text and images state it beside the same for text."""
    own, shared = folder / "preprocessor_config.json", folder / "processor_config.json"
    if own.is_file():
        return read_object(own)
    images = read_object(shared).get("image_processor") if shared.is_file() else None
    return images if isinstance(images, dict) else None


def _shards(folder: Path) -> list[Path]:
    """Return the shards of a model in order, which must be complete."""
    for index in INDEXES:
        shard = re.compile(_shard_name(index, r"\d{5}", r"\d{5}"))
        found = sorted(path for path in folder.iterdir() if shard.fullmatch(path.name) and path.is_file())
        totals = {path.name.split("-of-")[1][:5] for path in found}
        count = int(totals.pop()) if len(totals) == 1 else 0
        expected = _shard_names(index, count if count <= _MAX_SHARDS else 0)
        if found and [path.name for path in found] != expected:
            missing = sorted(set(expected) - {path.name for path in found})
            what = f"{missing[0]} is missing" if missing else "shards of several models"
            raise CheckpointError(f"{show(folder)}: {what}; download the folder again")
        if found:
            return found
    for index in INDEXES:
        if (folder / index).exists():
            raise CheckpointError(
                f"{show(folder)}: the files that {index} lists are missing, expected "
                f"{_shard_name(index, '00001', '0000N')} and so on; download the folder again"
            )
    return []


def _shard_name(index: str, number: str, count: str) -> str:
    """Return the name of a shard of the model that an index lists, both numbers with five digits."""
    stem, _, ending = index.removesuffix(".index.json").rpartition(".")
    return f"{stem}-{number}-of-{count}.{ending}"


def _shard_names(index: str, count: int) -> list[str]:
    """Return the names of all shards."""
    return [_shard_name(index, f"{number:05d}", f"{count:05d}") for number in range(1, count + 1)]


def shard_names(index: Path) -> list[str]:
    """Return the names of the shards that an index lists, in order.

    The index is untrusted: a name that transformers does not give is refused, not followed.

    Raises:
        CheckpointError: the index cannot be read, or lists other names, or not all shards of one model.
    """
    listed = read_object(index).get("weight_map")
    found = set(map(str, listed.values())) if isinstance(listed, dict) else set()
    count = len(found)
    expected = _shard_names(index.name, count)
    if not 0 < count <= _MAX_SHARDS or found != set(expected):
        odd = min(found - set(expected), default=f"{count} files" if found else "no weight_map")
        raise CheckpointError(
            f"{show(index)}: expected {_shard_name(index.name, '00001', '0000N')} and so on, "
            f"at most {_MAX_SHARDS}, found {odd!r:.150}"
        )
    return expected


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a configuration file.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    size = regular_size(path)
    if size > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{show(path)}: {size} bytes, expected at most {_MAX_CONFIG_BYTES}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{show(path)}: cannot be read: {error}") from None
    document = parse_json(text, show(path))
    if not isinstance(document, dict):
        raise CheckpointError(f"{show(path)}: expected an object, found {type(document).__name__}")
    return document
