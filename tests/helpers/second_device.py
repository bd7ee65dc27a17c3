"""A second device made of main memory, which shows what stays behind on the CPU.

Without a GPU nobody notices that an operator's tensors are on two devices. Here a tensor of the device
:data:`NAME` wraps one of the CPU: an operator runs on what its tensors wrap, and ends in torch's error where
tensors of both devices, or a generator of the other one, come together.

Not shown: autocast, which is without effect here, kernels that a GPU lacks, their rounding, and what asks for
``cuda`` by name.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as tree
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)

import mhacut

NAME = "lazy"
"""A device that every torch knows, and that does nothing unless a program asks for it."""
aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.copy_.default)
_INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
_ON_THE_CPU = torch.device("cpu")


class OnSecond(Tensor):
    """A tensor of the device, around the one of the CPU that has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> OnSecond:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        device = torch.device(NAME, 0)
        return cls._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=device, **layout)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        new: Tensor = OnSecond(self.detach().values.clone())
        is_parameter = isinstance(self, nn.Parameter)
        new = (
            nn.Parameter(new, self.requires_grad) if is_parameter else new.requires_grad_(self.requires_grad)
        )
        return memo.setdefault(id(self), new)

    def tolist(self) -> Any:
        return self.detach().values.tolist()

    def numpy(self, *args: object, **options: object) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.detach().values.untyped_storage()


class _Calls(TorchDispatchMode):
    """Operators that make or receive tensors of the device out of others'."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree.tree_leaves((args, kwargs))
        if any(isinstance(x, OnSecond) or (isinstance(x, torch.device) and x.type == NAME) for x in leaves):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


class _Constructors(TorchFunctionMode):
    """``torch.tensor`` and its kin, which no dispatch mode sees."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            return function(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if function.overloadpacket is aten.to:  # in inference mode it arrives whole
        return _converted(function, args, kwargs)
    if function is aten._has_compatible_shallow_copy_type.default:
        return False
    if function is aten._fused_sdp_choice.default:
        return 0  # products and a softmax
    tensors = [x for x in tree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnSecond)]
    asked = kwargs.get("device")
    onto = isinstance(args[0], OnSecond) if function in _COPIES else bool(there)
    onto = onto if asked is None else torch.device(asked).type == NAME
    _refuse_mixed(function, tensors, onto and kwargs.get("generator") is not None)
    args_there, kwargs_there = args, kwargs
    args, kwargs = tree.tree_map(lambda x: x.values if isinstance(x, OnSecond) else x, (args, kwargs))
    if asked is not None:
        kwargs = {**kwargs, "device": _ON_THE_CPU}
    out = function(*args, **kwargs)
    if not onto:
        return out
    aliases = any(argument.alias_info for argument in function._schema.arguments)
    # What shares memory with a tensor made outside of inference mode is not made in it either.
    with torch.inference_mode(
        torch.is_inference_mode_enabled() and not (aliases and not tensors[0].is_inference())
    ):
        out = tree.tree_map(lambda x: OnSecond(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(function, args_there, kwargs_there, out) if there else out


def _converted(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor, *to = args
    like = [x for x in to if isinstance(x, Tensor)]
    device = next((x for x in [*to, kwargs.get("device")] if isinstance(x, torch.device)), None)
    dtype = next((x for x in [*to, kwargs.get("dtype")] if isinstance(x, torch.dtype)), None)
    device = device or (like[0].device if like else tensor.device)
    dtype = dtype or (like[0].dtype if like else tensor.dtype)
    copied = kwargs.get("copy") or True in to
    if (device.type, dtype) == (tensor.device.type, tensor.dtype) and not copied:
        return tensor
    return _run(aten._to_copy.default, (tensor,), {"device": device, "dtype": dtype})


def _refuse_mixed(function: Any, tensors: list[Tensor], generator: bool) -> None:
    """Raise CUDA's errors: of two devices, but for copies, numbers, and indices that are on the CPU."""
    if generator:
        raise RuntimeError(f"{function}: expected a generator of the device {NAME}, found one of the CPU")
    number = 0 if function.overloadpacket in (aten.cat, aten.stack) else 1
    behind = [x for x in tensors if not isinstance(x, OnSecond) and x.dim() >= number]
    if function in _COPIES or not behind or len(behind) == len(tensors):
        return
    if function.overloadpacket in _INDEXED and isinstance(tensors[0], OnSecond):
        behind = [x for x in behind if x.is_floating_point()]
    if behind:
        shapes = ", ".join(str(tuple(x.shape)) for x in behind)
        raise RuntimeError(f"{function}: expected all tensors on {NAME}, found on the CPU: {shapes}")


@contextmanager
def second_device() -> Iterator[str]:
    for module in pkgutil.walk_packages(
        mhacut.__path__, "mhacut."
    ):  # what comes later would keep what is patched
        if not module.name.endswith(("__main__", "_timm_hook")):
            importlib.import_module(module.name)
    with pytest.MonkeyPatch.context() as patch, _Constructors(), _Calls():
        _everywhere(
            patch,
            "resolve_device",
            lambda real, name: torch.device(NAME, 0) if name.startswith(NAME) else real(name),
        )
        _everywhere(patch, "count_flops", _count_on_the_cpu)
        autocast = torch.autocast

        def without(device_type: str, *args: Any, **options: Any) -> Any:
            return nullcontext() if device_type == NAME else autocast(device_type, *args, **options)

        patch.setattr("torch.autocast", without)
        enabled = torch.is_autocast_enabled
        patch.setattr("torch.is_autocast_enabled", lambda *type: NAME not in type and enabled(*type))
        yield NAME


def _count_on_the_cpu(real: Any, model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """torch.jit, with which fvcore counts, takes wrapped tensors for constants, and sees into operators."""
    model, inputs = copy.deepcopy(model).to("cpu"), tuple(x.to("cpu") for x in inputs)
    with _disable_current_modes():
        return real(model, inputs)


def _everywhere(patch: pytest.MonkeyPatch, name: str, of: Any) -> None:
    """Call ``of`` with the function of this name first, wherever mhacut has imported it."""
    for module in [module for key, module in sys.modules.items() if key.startswith("mhacut.")]:
        if (real := getattr(module, name, None)) is not None:
            patch.setattr(module, name, lambda *args, real=real, **named: of(real, *args, **named))
