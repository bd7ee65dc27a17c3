"""Compare a file's tensors with a model's; say what differs and what to try next."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mhacut.checkpoint.fingerprints import read_table
from mhacut.checkpoint.header import FLOAT_DTYPES, TensorInfo
from mhacut.checkpoint.identity import ModelIdentity
from mhacut.errors import CheckpointError, option_name
from mhacut.text import dtype_name

_MAX_NAMES = 5
"""Names of tensors in a message, of each kind of difference."""
_SELF_CONTRADICTION = (
    "the file's metadata does not match its tensors: it was edited or damaged; prune the dense model again"
)
_ABOUT_POSITIONS = re.compile(r"pos_embed|rel_pos|relative_position|attention_bias")
_HEADS_OF_TABLES = {"relative_position_bias_table": -1, "attention_biases": 0}
"""Dimension of these tables that counts heads."""


def check_tensors(
    where: str,
    found: Mapping[str, TensorInfo],
    expected: nn.Module,
    identity: ModelIdentity,
    *,
    stated: bool = False,
) -> None:
    """Raise a :class:`CheckpointError` unless the file holds exactly the tensors of ``expected``.

    The message has counts and the first few names of tensors that are missing, unexpected, or of another
    shape or kind of dtype.

    Args:
        where: the file, for the message.
        found: tensors of the file, under the names they have in the model.
        expected: the model, on any device.
        identity: identity of the dense model, for the message.
        stated: the file says itself which model it is, so that other arguments cannot help.
    """
    wanted: dict[str, Tensor] = expected.state_dict()
    shared = [name for name in wanted if name in found]
    odd = [
        name for name in shared if (wanted[name].dtype in FLOAT_DTYPES) != (found[name].dtype in FLOAT_DTYPES)
    ]
    if odd:
        shown = ", ".join(f"{name!r:.150} ({dtype_name(found[name].dtype)})" for name in odd[:_MAX_NAMES])
        raise CheckpointError(
            f"{where}: quantised or complex weights are not supported: {len(odd)} tensors are not of the "
            f"kind {identity.architecture} has: {shown}{', ...' if len(odd) > _MAX_NAMES else ''}; "
            "give the float32, float16 or bfloat16 checkpoint"
        )
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    other = [name for name in shared if tuple(wanted[name].shape) != found[name].shape]
    if missing or unexpected or other:
        listed = "" if stated else _listed_models(found, identity)
        counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(other)} of another shape"
        if not stated and is_foreign(wanted, found):  # name by name there is nothing to learn
            instead = f", not {missing[0]!r:.150}" if missing else ""
            raise CheckpointError(
                f"{where}: its tensors do not fit {identity.architecture}: {counts}; most tensor names are "
                f"not that model's (the file has {unexpected[0]!r:.150}{instead}): give "
                f"{option_name('model')} the architecture of the file{f' ({listed})' if listed else ''}"
            )
        lines = [f"{where}: its tensors do not fit {_named(identity)}: {counts}"]
        lines += _listed("missing", missing)
        lines += _listed("unexpected", unexpected)
        lines += _listed(
            "another shape",
            other,
            lambda name: (
                f"{name!r:.150} expected {list(wanted[name].shape)}, found {list(found[name].shape)}"
            ),
        )
        hints = [_SELF_CONTRADICTION] if stated else _hints(wanted, found, missing, unexpected, other)
        hints += [f"its names and shapes are those of {listed}"] if listed else []
        lines += [f"  {hint}" for hint in hints]
        raise CheckpointError("\n".join(lines))


def _listed_models(found: Mapping[str, TensorInfo], identity: ModelIdentity) -> str:
    """Return the names of other architectures that have just these tensors; empty if there is none."""
    names = read_table().exactly({name: info.shape for name, info in found.items()})
    if identity.architecture in names:
        return ""  # as it is by default: the arguments are wrong
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")


def _named(identity: ModelIdentity) -> str:
    args = ", ".join(f"{name}={value!r:.60}" for name, value in identity.model_args.items())
    return f"{identity.architecture} ({args})"


def _listed(title: str, names: list[str], line: Any = None) -> Iterable[str]:
    if not names:
        return []
    shown = [line(name) if line else f"{name!r:.150}" for name in names[:_MAX_NAMES]]
    return [f"  {title}: {', '.join(shown)}{', ...' if len(names) > _MAX_NAMES else ''}"]


def is_foreign(wanted: Iterable[str], found: Iterable[str]) -> bool:
    """Whether most names in the file are of a kind that the model does not have."""
    kinds_wanted, kinds_found = (
        {_without_number(name) for name in wanted},
        {_without_number(name) for name in found},
    )
    return len(kinds_wanted & kinds_found) < len(kinds_found) / 2


def _hints(
    wanted: Mapping[str, Tensor],
    found: Mapping[str, TensorInfo],
    missing: list[str],
    unexpected: list[str],
    other: list[str],
) -> list[str]:
    """Return what to try next, inferred from the pattern of the differences."""
    hints = []
    blocks = {name.split(".")[1] for name in found if re.match(r"blocks\.\d+\.", name)}
    of_blocks = [name for name in missing + unexpected if re.match(r"blocks\.\d+\.", name)]
    expected_blocks = {name.split(".")[1] for name in wanted if re.match(r"blocks\.\d+\.", name)}
    if of_blocks and blocks and blocks != expected_blocks:
        hints.append(
            f"the file has {len(blocks)} blocks, expected {len(expected_blocks)}: {_arg(depth=len(blocks))}?"
        )
    if "fc_norm.weight" in unexpected and "norm.weight" in missing:
        hints.append(f"the file has fc_norm instead of norm: {_arg(global_pool='avg')}?")
    if any(re.match(r"head", name) for name in missing + unexpected + other):
        rows = next(iter(found["head.weight"].shape), None) if "head.weight" in other else None
        if rows is None:
            hints.append(f"the head differs: {option_name('num_classes')} (0 for no classifier)?")
        elif rows != wanted["head.weight"].shape[0]:
            hints.append(f"the head differs: {option_name('num_classes', rows)}?")
    if "patch_embed.proj.weight" in other and len(found["patch_embed.proj.weight"].shape) == 4:
        rows, channels, _, side = found["patch_embed.proj.weight"].shape
        expected = tuple(wanted["patch_embed.proj.weight"].shape)
        if side != expected[3]:
            hints.append(f"the patch embedding differs: {_arg(patch_size=side)}?")
        if channels != expected[1]:
            hints.append(f"the patch embedding differs: {_arg(in_chans=channels)}?")
        if rows != expected[0]:
            hints.append(
                f"the model found is {rows} wide, expected {expected[0]}: another {option_name('model')}, or "
                f"{_arg(embed_dim=rows, num_heads='N')} (no shape shows num_heads)?"
            )
    elif any(map(_ABOUT_POSITIONS.search, other)):
        hints.append(_hint_of_positions(wanted, found, other))
        other = [name for name in other if not _ABOUT_POSITIONS.search(name)]
    inner = [name for name in other if re.search(r"\.(attn|mlp)\.", name)]
    if inner and len(inner) == len(other):
        hints.append(
            "only attention or MLP layers differ: was it pruned by another tool? mhacut reads dense models "
            "and its own slim files"
        )
    return hints


def _hint_of_positions(
    wanted: Mapping[str, Tensor], found: Mapping[str, TensorInfo], other: Iterable[str]
) -> str:
    """Return why tables of positions differ, some of which have a column or a row for each head."""
    for name in other:
        head_dim = next((dim for table, dim in _HEADS_OF_TABLES.items() if table in name), None)
        if head_dim is not None and len(found[name].shape) == wanted[name].dim():
            heads, expected = found[name].shape[head_dim], wanted[name].shape[head_dim]
            if heads != expected:
                return f"{name} is of {heads} heads, expected {expected}: {_arg(num_heads='N')}?"
    if any("pos_embed" in name for name in other):
        found_by = f"the image size differs: {_arg(img_size='SIDE')} of the file?"
    else:
        found_by = f"the image or window size differs: {_arg(img_size='SIDE')} (or window_size) of the file?"
    return (
        f"{found_by} (For images of another size: {option_name('img_size')}, maybe with "
        f"{_arg(dynamic_img_size=True)})"
    )


def _arg(**args: object) -> str:
    """Return further arguments of ``timm.create_model`` in the notation of the reader."""
    return option_name("model_args", args)


def _without_number(name: str) -> str:
    """Return ``blocks.attn.qkv.weight`` for ``blocks.7.attn.qkv.weight``; the depth decides the number."""
    return re.sub(r"\.\d+\.", ".", name)
