"""Recognise a checkpoint of another library and work out its conversion to a timm model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.families import FAMILIES
from mhacut.checkpoint.foreign.family import Built, Family, Shapes
from mhacut.checkpoint.foreign.images import flips_channels, image_side, label_names, transformers_cfg
from mhacut.checkpoint.foreign.open_clip import OPEN_CLIP, preprocess_cfg
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.checkpoint.foreign.wrapped import OPEN_CLIP_TRUNK, TIMM_WRAPPER, TRUNK, WRAPPED
from mhacut.checkpoint.header import FileHeader, TensorInfo
from mhacut.errors import CheckpointError, option_name
from mhacut.runtime.files import show

_HEADS = ("head.", "head_dist.")
"""Beginnings of the names of classifiers, and of norms before them, in timm."""
_NAMED = ("classifier", "heads.head")
"""Names of classifiers in other libraries."""
_CLASSIFIERS = ("head.weight", "head.fc.weight", "head.linear.weight")
_WRAPPERS = {"clip": "vision_config", "siglip": "vision_config", "siglip2": "vision_config"}
"""Part of a configuration that is the image tower's, by the model types of an image and a text tower."""
_SMALL_EPS = 5e-7
"""Epsilon of norms below which a note says that timm's model adds 1e-6."""


@dataclass(frozen=True)
class Conversion:
    """Conversion of another library's file to a timm model."""

    family: Family
    renaming: Renaming
    headless: bool
    """Whether the classifier is left out, as the user asked."""
    tensors: Mapping[str, TensorInfo]
    """Tensors of the file under timm's names, without :attr:`heads`."""
    heads: Mapping[str, TensorInfo]
    """Tensors of heads among those left out; a head's norm may belong to the model without classes too."""
    built: Built | None
    """The timm model; None where a file without a configuration does not show it."""
    cfg: Mapping[str, Any]
    """Preprocessing and class names, as timm's pretrained_cfg has them."""
    notes: tuple[str, ...]
    """Lines for the user."""

    def apply(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the file's tensors under timm's names, in their dtypes, those of heads included."""
        return _converted(self.renaming, tensors, self.headless)


def recognise(
    header: FileHeader, *, headless: bool = False, given: Collection[str] = (), model: str | None = None
) -> Conversion | None:
    """Return the conversion of another library's file; None if it is not recognised as one.

    Args:
        header: header of a dense file, and of its folder's configuration.
        headless: leave the classifier out.
        given: names of the values of the preprocessing that the user gave.
        model: name in timm that the user gave.

    Raises:
        CheckpointError: it is such a file, and cannot be converted; the message says why.
    """
    config, family = _stated(header)
    if config is None and header.config is None:
        family = _family_by_names(header.tensors, model or "")
    if family is None:
        return None
    try:
        return _conversion(header, family, config, headless, given)
    except (KeyError, IndexError, ZeroDivisionError) as error:  # a tensor is missing, or has another shape
        raise CheckpointError(
            f"{show(header.path)}: {family.title}: a tensor is missing or has an unexpected shape "
            f"({error!s:.150}); expected all tensors of the model"
        ) from None
    except CheckpointError as error:
        where = show(header.path)
        text = str(error)
        if config is not None and text.startswith(config.where):
            raise
        raise CheckpointError(f"{where}: {family.title}: {text}") from None


def _stated(header: FileHeader) -> tuple[Config | None, Family | None]:
    """Return the configuration of another library, and the family that it states; None, None for timm's."""
    stated = header.config
    if stated is None or ("architecture" in stated and not _is_wrapped(header.tensors)):
        return None, None
    if isinstance(stated.get("model_cfg"), dict):
        config = Config(stated, show(header.path.parent / "open_clip_config.json"))
        return config, _family_of_open_clip(config, header.tensors)
    if isinstance(stated.get("model_type"), str):
        config = Config(stated, show(header.path.parent / "config.json"))
        return config, _family_of(config)
    return None, None


def _conversion(
    header: FileHeader, family: Family, config: Config | None, headless: bool, given: Collection[str]
) -> Conversion:
    renaming = family.renaming(header.shapes)
    if header.naming.classifier is not None:
        renaming = _with_layer(renaming)
    processor = _processor(header)
    if config is not None and flips_channels(processor):
        renaming = _flipped(renaming, family.stem)
    meta = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for name, info in header.tensors.items()
    }
    renamed = _converted(renaming, meta, headless)
    found = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in renamed.items()}
    heads = {name: info for name, info in found.items() if headless and name.startswith(_HEADS)}
    tensors = {name: info for name, info in found.items() if name not in heads}
    shapes = {name: info.shape for name, info in tensors.items()}
    built: Built | None = None
    cfg: dict[str, Any] = dict(family.cfg)
    notes: list[str] = []
    if config is not None:
        assert family.build is not None
        built = family.build(_of_images(config), shapes)
        cfg, notes = _cfg(processor, config, built, shapes, given)
        eps = config.number("layer_norm_eps", 1e-6)
        if eps < _SMALL_EPS:
            notes.append(
                f"layer_norm_eps {eps:g} becomes timm's 1e-06, which changes only tokens of tiny activations"
            )
    elif family.guess is not None:
        built = family.guess(shapes, header.shapes)
        if family.cfg:
            notes.append("images are prepared as for the library's own ImageNet weights")
        if built is not None:
            side = built.args["img_size"]
            cfg = {"input_size": [built.args["in_chans"], side, side], **built.cfg}
    left_out = renaming.what_is_left_out(header.tensors)
    if left_out:
        notes.append(f"left out: {', '.join(left_out)}")
    return Conversion(family, renaming, headless, tensors, heads, built, cfg, tuple(notes))


def _converted(renaming: Renaming, tensors: Mapping[str, Tensor], headless: bool) -> dict[str, Tensor]:
    return (renaming.without_classifier() if headless else renaming).apply(tensors)


def _processor(header: FileHeader) -> Config | None:
    if header.preprocessor is None:
        return None
    return Config(header.preprocessor, show(header.path.parent / "preprocessor_config.json"))


def _with_layer(renaming: Renaming) -> Renaming:
    """Return the table for a file whose classifier, ``head``, lay beside the network."""
    names, refused = dict(renaming.names), dict(renaming.refused_classifier)
    for name in names.keys() & set(_NAMED):
        names["head"] = names[name]
    if "pooler" in renaming.left_out:
        refused["pooler"] = (
            "the classifier beside the network may read the pooler, for which timm has no place"
        )
    return replace(renaming, names=names, refused_classifier=refused)


def _flipped(renaming: Renaming, stem: str) -> Renaming:
    """Return the table that turns a model of blue, green, red images into one of red, green, blue."""

    def finish(tensors: dict[str, Tensor]) -> None:
        if renaming.finish is not None:
            renaming.finish(tensors)
        tensors[stem] = tensors[stem].flip(1)

    return replace(renaming, finish=finish)


def _family_of(config: Config) -> Family:
    stated = config.text("model_type")
    for family in FAMILIES:
        if stated in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(
        f"{config.where}: models of transformers of model_type {stated!r:.80} are not converted to timm; "
        f"mhacut converts {known}. If timm has the same model, give its weights "
        f"({option_name('checkpoint', 'timm:NAME')})"
    )


def _family_of_open_clip(config: Config, tensors: Mapping[str, object]) -> Family:
    if any(name.startswith(TRUNK) for name in tensors):
        return OPEN_CLIP_TRUNK
    if any(name.startswith("visual.transformer.") for name in tensors):
        return OPEN_CLIP
    raise CheckpointError(
        f"{config.where}: its image tower is not converted to timm: expected a ViT (visual.transformer) or a "
        f"model of timm (visual.trunk), found neither among {len(tensors)} tensors"
    )


def namesakes(header: FileHeader) -> Iterator[FileHeader]:
    """Yield the file under the names of each family that other models of timm share names and shapes with."""
    for family in FAMILIES:
        if family.named and _family_by_names(header.tensors, family.named) is family:
            yield replace(header, tensors=_conversion(header, family, None, False, ()).tensors)


def _family_by_names(tensors: Mapping[str, object], model: str) -> Family | None:
    def has(end: str) -> bool:
        return any(name == end or name.endswith(f".{end}") for name in tensors)

    if _is_wrapped(tensors):
        return TIMM_WRAPPER
    for family in FAMILIES:
        if not model.startswith(family.named) or any(map(has, family.unlike)):
            continue
        if any(all(map(has, sign)) for sign in family.signs):
            return family
    return None


def _is_wrapped(tensors: Mapping[str, object]) -> bool:
    return all(name.startswith(WRAPPED) for name in tensors)


def _of_images(config: Config) -> Config:
    if "model_cfg" in config:
        return config.part("model_cfg")
    part = _WRAPPERS.get(config.text("model_type"))
    return config.part(part) if part is not None and part in config else config


def _cfg(
    processor: Config | None, config: Config, built: Built, shapes: Shapes, given: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return the pretrained_cfg that the folder states, and notes for the user about it."""
    channels = int(built.args.get("in_chans", 3))
    side = built.side or built.args.get("img_size")
    cfg: dict[str, Any] = {"input_size": [channels, side, side]} if side is not None else {}
    notes: list[str] = []
    heads = [shapes[name] for name in _CLASSIFIERS if name in shapes]
    names = label_names(config, heads[0][0] if heads and heads[0] else 0)
    if names is not None:
        cfg["label_names"] = names
    cfg |= built.cfg
    if "preprocess_cfg" in config:
        return {**cfg, **preprocess_cfg(config.part("preprocess_cfg"))}, notes
    if built.cfg:
        return cfg, notes
    if processor is None:
        if not {"mean", "std"} <= set(given):
            notes.append(
                f"no preprocessor_config.json: images are normalised as for timm's {built.architecture}"
            )
        return cfg, notes
    cfg |= transformers_cfg(processor, channels)
    stated = image_side(processor)
    if stated is not None and side is not None and stated != side:
        notes.append(
            f"preprocessor_config.json makes images of {stated}x{stated}, the model is for {side}x{side}"
        )
    return cfg, notes
