"""Preprocessing of a checkpoint, the origin of each value, and a check for a wrong normalisation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.record import SlimRecord
from mhacut.data import Preprocessing
from mhacut.data.preprocessing import is_too_small_to_crop
from mhacut.errors import UsageError, option_name
from mhacut.limits import LICENSE
from mhacut.measuring.normalisation import Batches, better_normalisation
from mhacut.options.base import PreprocessingOptions
from mhacut.runtime.files import REMOTE
from mhacut.surgery.flops import weightless

Origin = Literal[
    "file", "library", "assumed", "default", "tag", "pretrained", "module", "model", "size", "option"
]
_TEXTS: dict[Origin, str] = {
    "file": "from the file",
    "library": "default of the library that wrote the file",
    "assumed": "from the file, which used timm's default for {architecture}",
    "default": "timm's default for {architecture}; the file has none",
    "tag": "timm's, for the tag in {model}",
    "pretrained": "of timm's pretrained weights",
    "module": "of the module",
    "model": "of the model",
    "size": "small images are not cropped",
    "option": "{options}",
}
_UNSURE = ("assumed", "default", "module")
"""Origins of mean and std that may differ from the values at training."""
_OPTIONS = {"input_size": "img_size"}
_HISTORY_KEY = "preprocessing_from"


def resolve_preprocessing(checkpoint: Checkpoint, override: PreprocessingOptions) -> Preprocessing:
    identity = checkpoint.identity
    built_for = checkpoint.input_size
    stated = identity.pretrained_cfg
    if checkpoint.record is not None:
        # Images have the size at pruning time (--img-size), which may differ from the model's default.
        stated = checkpoint.record.preprocessing
        channels, height, width = stated["input_size"]
        built_for = (channels, height, width)
    resolved = Preprocessing.resolve(stated, built_for, override)
    if override.img_size is not None and resolved.input_size != built_for:
        _require_it_runs(checkpoint.skeleton, resolved.input_size, built_for)
    return resolved


@torch.no_grad()
def _require_it_runs(model: nn.Module, size: tuple[int, int, int], built_for: tuple[int, int, int]) -> None:
    # On the meta device the shapes of a forward pass cost nothing.
    stand_in = weightless(model)
    try:
        stand_in(torch.zeros((1, *size), dtype=next(stand_in.parameters()).dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{option_name('img_size', size[1])}: the model takes only images of "
            f"{built_for[1]}x{built_for[2]} ({why:.200}). Build the dense model with "
            f"{option_name('model_args', {'img_size': size[1]})} or "
            f"{option_name('model_args', {'dynamic_img_size': True})}"
        ) from error


# --- origins ---


@dataclass(frozen=True)
class Provenance:
    origins: Mapping[str, Origin]
    architecture: str
    hint: str | None = None

    @property
    def normalisation_is_stated(self) -> bool:
        """Whether mean and std come from the user or from the file of these weights."""
        # Either option counts: the user has looked at the normalisation.
        origins = {self.origins["mean"], self.origins["std"]}
        return "option" in origins or not origins.intersection(_UNSURE)

    def describe(self, preprocessing: Preprocessing) -> str:
        _, height, width = preprocessing.input_size
        parts = {
            "input_size": f"{height}x{width}",
            "crop_pct": f"crop {preprocessing.crop_pct:g} {preprocessing.crop_mode}",
            "interpolation": preprocessing.interpolation,
            "mean": f"mean {','.join(f'{n:.4g}' for n in preprocessing.mean)}",
            "std": f"std {','.join(f'{n:.4g}' for n in preprocessing.std)}",
        }
        groups: dict[Origin, list[str]] = {}
        for name in parts:
            groups.setdefault(self.origins[name], []).append(name)
        lines = []
        for origin, names in groups.items():
            options = ", ".join(option_name(_OPTIONS.get(name, name)) for name in names)
            where = {"architecture": self.architecture, "model": option_name("model"), "options": options}
            values = ", ".join(parts[name] for name in names)
            lines.append(f"{values} ({_TEXTS[origin].format_map(where)})")
        return "; ".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {"preprocessing_from": dict(self.origins), "preprocessing_hint": self.hint}

    def to_history(self) -> dict[str, Any]:
        return {_HISTORY_KEY: dict(self.origins)}


def source_for_history(checkpoint: Checkpoint) -> dict[str, Any]:
    source, digest = checkpoint.source, {"source_sha256": checkpoint.sha256}
    if source.startswith(REMOTE):
        return {"source": source, **digest}
    return digest if checkpoint.header is None else {"source": Path(os.path.abspath(source)).name, **digest}


def provenance(checkpoint: Checkpoint, override: PreprocessingOptions) -> Provenance:
    side = override.img_size
    size = checkpoint.input_size if side is None else (0, side, side)
    small = is_too_small_to_crop(checkpoint.identity.pretrained_cfg, size)
    origins: dict[str, Origin] = {}
    for name in Preprocessing.__dataclass_fields__:
        if _OPTIONS.get(name, name) in override.given:
            origins[name] = "option"
        elif checkpoint.record is not None:
            origins[name] = _of_slim(checkpoint.record, name)
        elif name == "input_size":
            origins[name] = "model"
        else:
            stated: Any = checkpoint.cfg_origins.get(name, "default")
            origins[name] = "size" if name == "crop_pct" and small else stated
    return Provenance(origins, checkpoint.identity.architecture)


def _of_slim(record: SlimRecord, name: str) -> Origin:
    stated = [entry[_HISTORY_KEY] for entry in record.history if _HISTORY_KEY in entry]
    last = stated[-1].get(name) if stated and isinstance(stated[-1], dict) else None
    if last == "module":
        return "module"
    return "assumed" if last in ("assumed", "default") else "file"


def stated_license(checkpoint: Checkpoint) -> str | None:
    """Return the license of these weights. timm's default license for the architecture is ignored."""
    # The text goes into YAML, and the file is untrusted: LICENSE restricts its characters.
    text: Any = None
    if checkpoint.record is not None:
        history = checkpoint.record.history
        text = history[0].get("license") if history else None
    elif checkpoint.cfg_origins.get("license") in ("file", "pretrained"):
        text = checkpoint.identity.pretrained_cfg.get("license")
    return text if isinstance(text, str) and LICENSE.fullmatch(text) else None


def with_hint(
    stated: Provenance,
    model: nn.Module,
    preprocessing: Preprocessing,
    batches: Batches,
    device: torch.device,
    *,
    refuse: bool = True,
) -> Provenance:
    """Add a hint if another mean and std give higher top-1. With ``refuse``, raise if the gain is certain."""
    if stated.normalisation_is_stated:
        return stated
    model.to(device)
    better = better_normalisation(model, batches, preprocessing.mean, preprocessing.std, device)
    if better is None:
        return stated
    (usual, top1), *others = better.ranked
    flags = f"{option_name('mean', usual.mean)} {option_name('std', usual.std)}"
    names = "".join(f"; {other.name} {percent:.1f} %" for other, percent in others)
    hint = (
        f"the normalisation seems wrong: top-1 on {better.images} images is {better.own_top1:.1f} %, with "
        f"{flags} {top1:.1f} % ({usual.name}{names})"
    )
    if refuse and better.certain:
        own = option_name("mean", preprocessing.mean)
        raise UsageError(f"{hint}. Give these 2 options, or {own} to keep the current normalisation")
    return replace(stated, hint=hint)
