"""Recognise another library's checkpoint and prepare its conversion to a timm model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mhacut.checkpoint.foreign import libraries, transformers
from mhacut.checkpoint.foreign.config import Config, label_names, transformers_cfg
from mhacut.checkpoint.foreign.family import Family, Shapes, TimmSpec, read_families
from mhacut.checkpoint.foreign.libraries import TRUNK, WRAPPED, preprocess_cfg
from mhacut.checkpoint.header import FileHeader, TensorInfo, infos, on_meta
from mhacut.errors import CheckpointError, option_name
from mhacut.runtime.files import show

FAMILIES: dict[str, Family] = {
    family.title: family for family in read_families({**transformers.FUNCTIONS, **libraries.FUNCTIONS})
}
"""Model families by title, in the order in which a file is compared with them."""
_CLASSIFIERS = ("head.weight", "head.fc.weight", "head.linear.weight")


@dataclass(frozen=True)
class Conversion:
    family: Family
    headless: bool
    tensors: Mapping[str, TensorInfo]
    spec: TimmSpec | None
    """The timm model that the configuration file describes; None without a configuration file."""
    cfg: Mapping[str, Any]
    notes: tuple[str, ...]

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.family.convert(tensors, headless=self.headless)


def recognise(header: FileHeader, *, headless: bool = False, model: str | None = None) -> Conversion | None:
    config, family = _stated(header)
    if config is None and header.config is None:
        family = _family_by_names(header.tensors, model or "")
    if family is None:
        return None
    try:
        return _conversion(header, family, config, headless)
    except (KeyError, IndexError, ArithmeticError) as error:  # a tensor is missing, or has another shape
        raise CheckpointError(
            f"{show(header.path)}: {family.title}: a tensor is missing or has an unexpected shape "
            f"({error!s:.150})"
        ) from None
    except CheckpointError as error:
        text = str(error)
        if config is not None and text.startswith(config.where):
            raise
        raise CheckpointError(f"{show(header.path)}: {family.title}: {text}") from None


def _stated(header: FileHeader) -> tuple[Config | None, Family | None]:
    """Return configuration and model family of a transformers or open_clip folder, else (None, None)."""
    stated = header.config
    if stated is None or ("architecture" in stated and not _is_wrapped(header.tensors)):
        return None, None
    # open_clip's configuration does not name the tower's library, but the tensor names do.
    if isinstance(stated.get("model_cfg"), dict):
        config = Config(stated, show(header.path.parent / "open_clip_config.json"))
        for prefix, title in ((TRUNK, "timm in open_clip"), ("visual.transformer.", "CLIP of open_clip")):
            if any(name.startswith(prefix) for name in header.tensors):
                return config, FAMILIES[f"image tower of {title}"]
        raise CheckpointError(
            f"{config.where}: unsupported image tower: expected a ViT (visual.transformer) or a timm model "
            "(visual.trunk)"
        )
    if not isinstance(stated.get("model_type"), str):
        return None, None
    config = Config(stated, show(header.path.parent / "config.json"))
    model_type = config.get("model_type", "")
    named = next((family for family in FAMILIES.values() if model_type in family.model_types), None)
    if named is not None:
        return config, named
    known = ", ".join(name for family in FAMILIES.values() for name in family.model_types)
    raise CheckpointError(
        f"{config.where}: model_type {model_type!r:.80} cannot be converted to timm. Supported: {known}. If "
        f"timm has the model, give {option_name('checkpoint', 'timm:NAME')}"
    )


def _family_by_names(tensors: Mapping[str, object], model: str) -> Family | None:
    if _is_wrapped(tensors):
        return FAMILIES["model of timm in transformers"]
    families = (family for family in FAMILIES.values() if model.startswith(family.named))
    return next((family for family in families if family.recognises(tensors)), None)


def _is_wrapped(tensors: Mapping[str, object]) -> bool:
    return all(name.startswith(WRAPPED) for name in tensors)


def _conversion(header: FileHeader, family: Family, config: Config | None, headless: bool) -> Conversion:
    where = show(header.path.parent / "preprocessor_config.json")
    processor = None if header.preprocessor is None else Config(header.preprocessor, where)
    # Converted on the meta device to get shapes and dtypes under timm's names.
    tensors = infos(family.convert(on_meta(header.tensors), headless=headless))
    shapes = {name: info.shape for name, info in tensors.items()}
    spec: TimmSpec | None = None
    cfg: dict[str, Any] = dict(family.cfg)
    notes: list[str] = []
    if config is not None:
        assert family.build is not None
        towers = (name for name in ("model_cfg", "vision_config") if name in config)
        spec = family.build(next((config.part(name) for name in towers), config), shapes)
        cfg = _cfg(processor, config, spec, shapes)
        if processor is None and not spec.cfg and "preprocess_cfg" not in config:
            notes.append(f"no preprocessor_config.json: uses the normalisation of timm's {spec.architecture}")
    left_out = family.described_as_left_out(header.tensors)
    if left_out:
        notes.append(f"left out: {', '.join(left_out)}")
    return Conversion(family, headless, tensors, spec, cfg, tuple(notes))


def _cfg(processor: Config | None, config: Config, spec: TimmSpec, shapes: Shapes) -> dict[str, Any]:
    channels = int(spec.args.get("in_chans", 3))
    side = spec.side or spec.args.get("img_size")
    cfg: dict[str, Any] = {"input_size": [channels, side, side]} if side is not None else {}
    classes = next((shapes[name][0] for name in _CLASSIFIERS if shapes.get(name)), 0)
    names = label_names(config, classes)
    if names is not None:
        cfg["label_names"] = names
    cfg |= spec.cfg
    if "preprocess_cfg" in config:
        return {**cfg, **preprocess_cfg(config.part("preprocess_cfg"))}
    if spec.cfg or processor is None:
        return cfg
    return {**cfg, **transformers_cfg(processor, channels)}
