"""Find weights and configuration in a folder of timm or transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mhacut.errors import CheckpointError, option_name
from mhacut.runtime.files import read_json, show

WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "model.pth",
    "model.pt",
)
"""Names of weight files in a model folder, the preferred name first."""
PRUNED = "pruned.safetensors"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Names of index files that list the shards of a model, the preferred name first."""
MERGE_ADAPTER_ADVICE = (
    "Merge it into its model first: merged = PeftModel.from_pretrained(MODEL, FOLDER).merge_and_unload(); "
    'torch.save(merged.state_dict(), "weights.pth")'
)
_NO_WEIGHTS = {
    PRUNED: "holds a model that was pruned in place. Open it in Python with mhacut.load_pruned",
    "adapter_config.json": f"holds an adapter without its model. {MERGE_ADAPTER_ADVICE}",
    "config.json": "has no weights. Expected model.safetensors next to config.json",
}
"""Error text for a folder without weights, by the name of a file in the folder. The first match is used."""


def open_folder(folder: Path) -> tuple[Sequence[Path], dict[str, Any] | None, dict[str, Any] | None]:
    file = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    config = _config(folder, file)
    if config is None and file is not None:
        raise CheckpointError(
            f"{show(folder)}: has no config.json. Give {file.name} itself and {option_name('model', 'NAME')}"
        )
    weights = [file] if file is not None else _shards(folder)
    if not weights:
        reason = next((text for file, text in _NO_WEIGHTS.items() if (folder / file).is_file()), None)
        raise CheckpointError(f"{show(folder)}: {reason or 'has no config.json. Give one of its files'}")
    is_timm = config is None or "architecture" in config
    return weights, config, None if is_timm else preprocessor_of(folder)


def _config(folder: Path, weights: Path | None) -> dict[str, Any] | None:
    # open_clip folders may also have a config.json of timm or transformers for the same weights.
    plain, of_open_clip = folder / "config.json", folder / "open_clip_config.json"
    config = read_json(plain) if plain.is_file() else None
    for_open_clip = weights is not None and weights.name.startswith("open_clip")
    if of_open_clip.is_file() and (config is None or (for_open_clip and "architecture" not in config)):
        return read_json(of_open_clip)
    return config


def preprocessor_of(folder: Path) -> dict[str, Any] | None:
    plain, shared = (folder / name for name in PREPROCESSORS)
    if plain.is_file():
        return read_json(plain)
    images = read_json(shared).get("image_processor") if shared.is_file() else None
    return images if isinstance(images, dict) else None


def _shards(folder: Path) -> list[Path]:
    # The shard names state their number, so the untrusted index is not needed.
    shard = re.compile(r"(model|pytorch_model)-\d{5}-of-(\d{5})\.(safetensors|bin)")
    paths = sorted(path for path in folder.iterdir() if shard.fullmatch(path.name))
    if not paths:
        return []
    stem, of, ending = shard.sub(r"\1 \2 \3", paths[0].name).split()
    expected = {f"{stem}-{number:05d}-of-{of}.{ending}" for number in range(1, int(of) + 1)}
    other = expected ^ {path.name for path in paths}
    if other:
        fault = "is missing" if min(other) in expected else "is a shard of another model"
        raise CheckpointError(f"{show(folder)}: {min(other)} {fault}. Download the folder again")
    return paths


def shard_names(index: Path) -> list[str]:
    """Return the shard names in an index file. Raise if a name could lead out of the folder."""
    files = read_json(index).get("weight_map")
    names = sorted(set(map(str, files.values()))) if isinstance(files, dict) else []
    # No slash and no dot but the last: a name cannot lead out of the folder.
    odd = next((name for name in names if not re.fullmatch(r"[\w-]+\.(safetensors|bin)", name)), None)
    if not names or odd is not None:
        raise CheckpointError(
            f"{show(index)}: expected a weight_map with names of files in this folder, found {odd!r:.150}"
        )
    return names
