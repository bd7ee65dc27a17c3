"""Compare a file's tensors with a model's, and suggest what to try next."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mhacut.checkpoint.fingerprints import exact_matches
from mhacut.checkpoint.header import FLOAT_DTYPES, TensorInfo
from mhacut.checkpoint.identity import ModelIdentity
from mhacut.checkpoint.record import SAVE_SLIM_ADVICE
from mhacut.checkpoint.visible_args import is_cut, is_foreign
from mhacut.errors import CheckpointError, option_name
from mhacut.text import dtype_name, listed

_MAX_NAMES = 5


def check_tensors(
    where: str,
    tensors: Mapping[str, TensorInfo],
    expected: nn.Module,
    identity: ModelIdentity,
    *,
    stated: bool = False,
) -> None:
    wanted: dict[str, Tensor] = expected.state_dict()
    shared = [name for name in wanted if name in tensors]
    odd = [
        name
        for name in shared
        if (wanted[name].dtype in FLOAT_DTYPES) != (tensors[name].dtype in FLOAT_DTYPES)
    ]
    if odd:
        names = [f"{name!r:.150} ({dtype_name(tensors[name].dtype)})" for name in odd]
        raise CheckpointError(
            f"{where}: expected float weights, found {len(odd)} tensors of other dtypes: "
            f"{listed(names, _MAX_NAMES)}. Save the weights as dense float tensors"
        )
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    other = [name for name in shared if tuple(wanted[name].shape) != tensors[name].shape]
    if not missing and not unexpected and not other:
        return
    file_shapes = {name: info.shape for name, info in tensors.items()}
    fitting = () if stated else exact_matches(file_shapes)
    models = "" if identity.architecture in fitting or not fitting else listed(fitting, _MAX_NAMES)
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(other)} of another shape"
    if not stated and is_foreign(wanted, tensors):
        raise CheckpointError(
            f"{where}: its tensors do not fit {identity.architecture}: {counts}. Most names are of another "
            f"architecture (first {unexpected[0]!r:.150}). Give the file's architecture: "
            f"{option_name('model', 'NAME')}"
            f"{f': {models}' if models else ''}"
        )
    args = ", ".join(f"{name}={value!r:.60}" for name, value in identity.model_args.items())
    lines = [f"{where}: its tensors do not fit {identity.architecture} ({args}): {counts}"]
    shapes = [
        f"{name!r:.150} expected {list(wanted[name].shape)}, found {list(tensors[name].shape)}"
        for name in other
    ]
    for title, names in (("missing", missing), ("unexpected", unexpected)):
        lines += [f"  {title}: {listed([f'{name!r:.150}' for name in names], _MAX_NAMES)}"] if names else []
    lines += [f"  another shape: {listed(shapes, _MAX_NAMES)}"] if shapes else []
    if stated:
        lines.append("  metadata and tensors do not match: the file is damaged. Prune the dense model again")
    else:
        stated_args = option_name("model_args", {"KEY": "VALUE"})
        lines.append(f"  give all arguments that differ from the model's defaults: {stated_args}")
        if is_cut(file_shapes):
            lines.append(f"  seems to be the state dict of a slim model. {SAVE_SLIM_ADVICE}")
    lines += [f"  names and shapes are those of {models}"] if models else []
    raise CheckpointError("\n".join(lines))
