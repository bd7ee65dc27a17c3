"""Find the architecture whose tensors a file has: by fingerprints, then by building the few that match."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mhacut.checkpoint.build import known_model, shapes_of
from mhacut.checkpoint.fingerprints import read_table
from mhacut.checkpoint.header import FileHeader
from mhacut.checkpoint.infer import Identified, infer_from_shapes, position_shapes
from mhacut.checkpoint.mismatch import check_tensors
from mhacut.checkpoint.same_function import differences
from mhacut.checkpoint.unlisted import unlisted_models
from mhacut.checkpoint.visible_args import PIXELS, SIZES
from mhacut.errors import CheckpointError, MhacutError, option_name
from mhacut.runtime.files import show
from mhacut.surgery.find import model_input_size

_MOST_NAMED = 4
"""Architectures in a message."""
_PREPROCESSING = ("mean", "std", "interpolation", "crop_mode")


def search(header: FileHeader, args: Mapping[str, Any], given: Collection[str] = ()) -> Identified:
    """Return the model that has exactly the file's names and shapes, with the fewest arguments of its own.

    Several that compute the same count as one; a note names those with another preprocessing, except for the
    values that are given, or for another image size.

    Args:
        header: header of the file.
        args: arguments of ``timm.create_model`` that the user gave.
        given: names of the values of the preprocessing that the user gave.

    Raises:
        CheckpointError: no model has them, or several that compute different things.
    """
    shapes = {name: info.shape for name, info in header.tensors.items()}
    table = read_table()
    fits = _nearest(_build(header, args, table.exactly(shapes)), header)
    fits = fits or _nearest(_build(header, args, _released(table.of_any_size(shapes))), header)
    fits = fits or _nearest(_build(header, args, unlisted_models(shapes, args)), header)
    if not fits:
        fits, built = _similar(header, args)
        if not fits:
            raise CheckpointError(_heads_unknown(header, args) or _nothing_fits(header, built))
    chosen, *others = sorted(fits, key=lambda fit: _plainness(fit.identity.architecture))
    unlike = [(fit, differences(chosen.skeleton, fit.skeleton)) for fit in others]
    if any(differing for _, differing in unlike):
        raise CheckpointError(_several_fit(show(header.path), chosen, unlike))
    return dataclasses.replace(chosen, notes=(*chosen.notes, *_alternatives(chosen, others, given)))


def _image_size(fit: Identified) -> tuple[int, int]:
    identity = fit.identity
    _, height, width = model_input_size(fit.skeleton, identity.pretrained_cfg, identity.model_args)
    return height, width


def _similar(header: FileHeader, args: Mapping[str, Any]) -> tuple[list[Identified], list[Identified]]:
    """Return the models that fit with other arguments than those of sizes, and all that were built.

    One architecture is built of each similar group, and of the nearest group that fits all.
    """
    shapes = {name: info.shape for name, info in header.tensors.items()}
    groups = [_released(group.names()) for group in read_table().similar(shapes)]
    built = _build(header, args, [min(names, key=_plainness) for names in groups if names])
    fits = {fit.identity.architecture: fit for fit in _nearest(built, header)}
    alike = next((names for names in groups if fits.keys() & set(names)), [])
    others = _build(header, args, [name for name in alike if name not in fits])
    return _nearest([*fits.values(), *others], header), built


def _released(names: Iterable[str]) -> list[str]:
    """Names of architectures, without timm's own test models."""
    return [name for name in names if not name.startswith("test_")]


def _build(header: FileHeader, args: Mapping[str, Any], names: Iterable[str]) -> list[Identified]:
    """Build those of the architectures that this timm has and that take these arguments, to fit the file."""
    built = []
    for name in filter(known_model, names):
        try:
            built.append(infer_from_shapes(name, args, {}, header.tensors))
        except MhacutError:
            continue  # does not take these arguments, or not at this image size
    return built


def _nearest(built: Iterable[Identified], header: FileHeader) -> list[Identified]:
    """Return those of the fitting models for which the fewest arguments were inferred."""
    fits = [one for one in built if _fits(one, header)]
    least = min(map(_distance, fits), default=0)
    return [fit for fit in fits if _distance(fit) == least]


def _fits(one: Identified, header: FileHeader) -> bool:
    same_positions = position_shapes(one.tensors) == position_shapes(header.tensors)
    return same_positions and shapes_of(one.skeleton) == {n: info.shape for n, info in one.tensors.items()}


def _distance(fit: Identified) -> tuple[int, int, int]:
    """Number of arguments that were inferred: first those of the structure, then sizes, then the images'."""
    sizes, images = fit.inferred & SIZES, fit.inferred & PIXELS - {"num_classes"}
    return len(fit.inferred - SIZES - PIXELS), len(sizes), len(images)


def _plainness(name: str) -> tuple[bool, int, str]:
    """Order of architectures that fit equally well: ``vit_*`` first, then by the length of the name."""
    return not name.startswith("vit_"), len(name), name


def _alternatives(chosen: Identified, others: Sequence[Identified], given: Collection[str]) -> list[str]:
    """Return a note that names models that compute the same with another preprocessing."""
    named: dict[str, list[str]] = {}
    normalised: set[str] = set()
    for other in others:
        sizes = ["x".join(map(str, _image_size(model))) for model in (other, chosen)]
        prepared = _preprocessing(other, chosen, given)
        normalised |= prepared.keys() & {"mean", "std"}
        texts = [f"for images of {sizes[0]}, not {sizes[1]}"] if sizes[0] != sizes[1] else []
        texts += [f"preprocessed with {_listed(prepared)}"] if prepared else []
        if texts:
            named.setdefault(", ".join(texts), []).append(other.identity.architecture)
    if not named:
        return []
    lines = [f"{_some(names)}, {text}" for text, names in named.items()]
    (_, names), *more = named.items()
    flags = option_name("model", "NAME" if more or len(names) > 1 else names[0])
    if normalised:
        flags += f", or {' and '.join(map(option_name, sorted(normalised)))}"
    return [f"the layers also fit {'; '.join(lines[:_MOST_NAMED])}; to choose one of them, give {flags}"]


def _preprocessing(one: Identified, other: Identified, given: Collection[str] = ()) -> dict[str, Any]:
    """Return the values of the preprocessing of ``one`` that ``other`` has not, except for those given."""
    ours, theirs = one.identity.pretrained_cfg, other.identity.pretrained_cfg
    crop = ("crop_pct",) if ours.get("input_size") == theirs.get("input_size") else ()
    keys = [key for key in (*_PREPROCESSING, *crop) if key not in given]
    return {key: ours.get(key) for key in keys if ours.get(key) != theirs.get(key)}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in values.items())


def _value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _several_fit(where: str, chosen: Identified, others: Sequence[tuple[Identified, tuple[str, ...]]]) -> str:
    """Return the message for models that compute different things, with what they differ in."""
    differing: dict[str, list[str]] = {}
    for other, settings in others:
        text = "; ".join(filter(None, ["; ".join(settings[:3]), _listed(_preprocessing(other, chosen))]))
        differing.setdefault(text or "the same", []).append(other.identity.architecture)
    lines = [f"  {_some(names)}: {text}" for text, names in differing.items()]
    more = [f"  and {len(lines) - _MOST_NAMED} more groups"] if len(lines) > _MOST_NAMED else []
    return "\n".join(
        [
            f"{where}: the model cannot be identified from names and shapes, {len(others) + 1} fit; give "
            f"{option_name('model', 'NAME')}:",
            f"  {chosen.identity.architecture}",
            *lines[:_MOST_NAMED],
            *more,
        ]
    )


def _heads_unknown(header: FileHeader, args: Mapping[str, Any]) -> str | None:
    """Return the message for a file that a model fits once its number of heads is given."""
    fits = [] if "num_heads" in args else _similar(header, {**args, "num_heads": 1})[0]
    if not fits:
        return None
    nearest = min(fits, key=lambda fit: _plainness(fit.identity.architecture)).identity
    sizes = {name: value for name, value in nearest.model_args.items() if name != "num_heads"}
    return (
        f"{show(header.path)}: its tensors are those of {nearest.architecture} "
        f"({', '.join(f'{name}={value}' for name, value in sizes.items())}), but no shape shows how many "
        f"heads it has; give {option_name('model_args', {'num_heads': 'N'})}"
    )


def _nothing_fits(header: FileHeader, built: Sequence[Identified]) -> str:
    """Return the message for a file that no model fits, with the nearest one and how it differs."""
    where = show(header.path)
    text = (
        f"{where}: the model cannot be identified: no timm model that mhacut prunes has exactly its "
        f"{len(header.tensors)} tensors; give {option_name('model', 'NAME')} (and "
        f"{option_name('model_args', {'KEY': 'VALUE'})} for what differs)"
    )
    nearest = max(built, key=_tensors_in_common, default=None)
    if nearest is None:
        return text
    common, names = _tensors_in_common(nearest)
    if 2 * names < len(nearest.tensors):
        return text
    text += f"\n  nearest is {nearest.identity.architecture}, with {common} tensors in common"
    try:
        check_tensors(where, nearest.tensors, nearest.skeleton, nearest.identity)
    except CheckpointError as error:
        first, *lines = str(error).removeprefix(f"{where}: its ").split("\n")
        text = "\n".join([f"{text}; {first}", *lines])
    return text


def _tensors_in_common(one: Identified) -> tuple[int, int]:
    """Number of tensors of the file that the model has, by name and shape, then by name alone."""
    expected = shapes_of(one.skeleton)
    shared = [name for name in one.tensors if name in expected]
    return sum(one.tensors[name].shape == expected[name] for name in shared), len(shared)
