"""Build timm models: without memory and within bounds first, then ready for weights."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mhacut.checkpoint.header import TensorInfo
from mhacut.checkpoint.identity import ModelIdentity
from mhacut.errors import CheckpointError, MhacutError
from mhacut.limits import is_int

_DENSE_TO_FILE = 64
"""Largest ratio of a dense model's parameters to those in the file that describes it; no cut goes so deep."""
_FILL = "init_non_persistent_buffers"
"""Method of timm's modules that computes the buffers which no file holds."""
_SPARE_PARAMETERS = 2**24
_SPARE_BUFFERS = 2**26


def build_skeleton(identity: ModelIdentity, limit: Mapping[str, TensorInfo] | None = None) -> nn.Module:
    """Build the dense model on the meta device: shapes, no memory. The global seed is left alone.

    Args:
        identity: what to build.
        limit: tensors of the file that states the identity; building stops when the model is far too large
            for them. None for a model that the user named.

    Raises:
        CheckpointError: timm cannot build it, or it is far too large.
    """
    if limit is not None:
        _check_depth(identity, len(limit))
    with torch.random.fork_rng(devices=[]), without_values(), _limited(identity.architecture, limit):
        model = _create(identity)
    if limit is not None:
        buffers = sum(buffer.numel() for buffer in model.buffers())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if buffers > 4 * parameters + _SPARE_BUFFERS:
            raise CheckpointError(_out_of_proportion(identity.architecture))
    return model


@contextmanager
def without_values() -> Iterator[None]:
    """Create tensors on the meta device, and initialise none of them.

    There, what changes values in place has no effect, yet torch takes up to 10 times as long over a model's
    initial weights as over the model.
    """
    with torch.device("meta"), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    """Skip what changes the values of meta tensors in place."""

    _INITIALISES = frozenset(
        {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_}
        | {Tensor.fill_, Tensor.zero_, Tensor.__setitem__}
        # All of them: within one that asks for its __torch_function__, this mode is not in force.
        | {getattr(nn.init, name) for name in dir(nn.init) if name[0] != "_" and name[-1] == "_"}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._INITIALISES:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def allocate(model: nn.Module) -> None:
    """Give a model on the meta device memory on the CPU, and values to the buffers that no file holds.

    Parameters and persistent buffers wait for a state dict. timm computes the other buffers anew: index
    tables, masks, frequencies. Tensors under several names stay one.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        slots: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in slots:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    if name in module._non_persistent_buffers_set and not hasattr(module, _FILL):
                        raise AssertionError(f"{type(module).__name__} has no {_FILL} to compute {name!r}")
                    if id(tensor) not in made:
                        made[id(tensor)] = (tensor, _on_cpu(tensor))
                    tensors[name] = made[id(tensor)][1]
    with torch.no_grad():
        for module in model.modules():
            fill: Any = getattr(module, _FILL, None)
            if fill is not None:
                fill()


def _on_cpu(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty


def known_model(name: str) -> bool:
    """Whether timm has a model of this name."""
    import timm

    found: bool = timm.is_model(name)
    return found


def unknown_model(name: str) -> str:
    """Return the message for a name that timm does not know, with the closest names that it does."""
    import timm

    names = timm.list_models()
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.6)
    stems = {
        known[: len(name)]: known for known in reversed(names)
    }  # who leaves out `_patch16_224` means this
    begun = [stems[stem] for stem in difflib.get_close_matches(name, stems, n=2, cutoff=0.8)]
    close = list(dict.fromkeys([*begun, *close]))[:5]
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names those it has"
    return f"timm has no model {name!r:.150}; {hint}"


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in the state dict of ``model``."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _create(identity: ModelIdentity) -> nn.Module:
    """Build the dense model on the current default device, its ``pretrained_cfg`` as the identity says."""
    import timm

    _check_heads(identity)
    try:
        model: nn.Module = timm.create_model(
            identity.architecture,
            pretrained=False,
            pretrained_cfg=_as_timm_cfg(identity.pretrained_cfg) or None,
            **identity.model_args,
        )
    except MhacutError:
        raise
    except Exception as error:  # whatever the arguments make timm stumble over
        args = ", ".join(f"{name}={value!r:.60}" for name, value in identity.model_args.items())
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"timm cannot build {identity.architecture} with {args or 'its defaults'}: {reason:.300}"
        ) from error
    return model


def _check_heads(identity: ModelIdentity) -> None:
    """Refuse what timm builds, but does not run."""
    for name, value in identity.model_args.items():
        if name.endswith("heads") and is_int(value) and value < 1:
            raise CheckpointError(f"{identity.architecture}: {name}={value}: expected at least 1")


def _as_timm_cfg(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON as timm keeps it: tuples, and only fields that this timm knows."""
    from timm.models import PretrainedCfg

    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in cfg.items()
        if name in known
    }


def _check_depth(identity: ModelIdentity, tensors: int) -> None:
    """Refuse a depth beyond the number of tensors, which would keep timm busy before it built a block."""
    for name, value in identity.model_args.items():
        depths = value if isinstance(value, list) else [value]
        if name.startswith("depth") and any(isinstance(n, int) and n > tensors for n in depths):
            raise CheckpointError(_out_of_proportion(identity.architecture))


@contextmanager
def _limited(architecture: str, limit: Mapping[str, TensorInfo] | None) -> Iterator[None]:
    """Stop the construction of a model that has many times the tensors or parameters of the file."""
    if limit is None:
        yield
        return
    tensors_left = 4 * len(limit) + 100  # a cut takes no tensor away; some are registered twice
    parameters_left = (
        _DENSE_TO_FILE * sum(math.prod(info.shape) for info in limit.values()) + _SPARE_PARAMETERS
    )

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors_left, parameters_left
        if parameter is not None:
            tensors_left -= 1
            parameters_left -= parameter.numel()
        if tensors_left < 0 or parameters_left < 0:
            raise CheckpointError(_out_of_proportion(architecture))

    with nn.modules.module.register_module_parameter_registration_hook(count):
        yield


def _out_of_proportion(architecture: str) -> str:
    return (
        f"the model that the file describes ({architecture} with its model_args) is far too large for the "
        "tensors in the file; nothing was built"
    )
