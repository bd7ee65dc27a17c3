"""Build timm models on the meta device, then allocate them for weights."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mhacut.checkpoint.header import TensorInfo
from mhacut.checkpoint.identity import ModelIdentity
from mhacut.errors import CheckpointError
from mhacut.limits import is_int

_FILL = "init_non_persistent_buffers"
"""Name of the method by which timm's modules compute their non-persistent buffers."""


def build_skeleton(identity: ModelIdentity, limit: Mapping[str, TensorInfo] | None = None) -> nn.Module:
    import timm

    args = identity.model_args
    # On the meta device, width and image size cost nothing, but each block costs time and memory.
    for name, value in args.items() if limit is not None else ():
        depths = value if isinstance(value, list) else [value]
        if name.startswith("depth") and any(is_int(depth) and depth > len(limit or ()) for depth in depths):
            raise CheckpointError(
                f"{identity.architecture} with {name}={value!r:.60} is far too large for the tensors "
                "in the file"
            )
    try:
        with torch.random.fork_rng(devices=[]), without_values():
            model: nn.Module = timm.create_model(
                identity.architecture,
                pretrained=False,
                pretrained_cfg=_as_timm_cfg(identity.pretrained_cfg) or None,
                **args,
            )
    except Exception as error:  # timm fails in many types
        shown = ", ".join(f"{name}={value!r:.60}" for name, value in args.items())
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"timm cannot build {identity.architecture} with {shown or 'its defaults'}: {reason:.300}"
        ) from error
    return model


@contextmanager
def without_values() -> Iterator[None]:
    # Meta tensors have no values, yet their initialisation takes torch up to 10 times as long as the model.
    with torch.device("meta"), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    _INITIALISES = frozenset(
        {Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_}
        | {Tensor.fill_, Tensor.zero_, Tensor.__setitem__}
        # All of nn.init: inside a function that calls __torch_function__, this mode is off.
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
    for module in model.modules():
        # The tables of cut layers are on the CPU already.
        waiting = [name for name, tensor in module.named_buffers(recurse=False) if tensor.is_meta]
        if module._non_persistent_buffers_set.intersection(waiting) and not hasattr(module, _FILL):
            raise AssertionError(f"{type(module).__name__} has no {_FILL} to compute {waiting}")
    # Module.to_empty would also empty the tables that the cut of a slim file has made.
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    with torch.no_grad():
        for module in model.modules():
            fill: Any = getattr(module, _FILL, None)
            if fill is not None:
                fill()


def known_model(name: str) -> bool:
    import timm

    return bool(timm.is_model(name))


def unknown_model(name: str) -> str:
    import timm

    names = timm.list_models()
    begun = [known for known in names if known.startswith(name)][:2]
    close = list(dict.fromkeys([*begun, *difflib.get_close_matches(name, names, n=5, cutoff=0.6)]))[:5]
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"
    return f"timm has no model {name!r:.150}; {hint}"


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _as_timm_cfg(cfg: Mapping[str, Any]) -> dict[str, Any]:
    from timm.models import PretrainedCfg

    # A later timm may have written the file with new fields.
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in cfg.items()
        if name in known
    }
