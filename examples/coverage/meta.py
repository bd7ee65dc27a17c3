"""Models that run without weights and without memory, on torch's meta device: counted, and looked into."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_TRACER = "Tracer"


class Remembering(TorchDispatchMode):
    """Looks up what operators give on the meta device: models repeat themselves, and torch is slow at it."""

    known: ClassVar[dict[Any, Any]] = {}
    """Of all models, by operator and the shapes of what it is given."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.shapes_of(func, args, kwargs or {})

    def shapes_of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``func(*args, **kwargs)``."""
        key = (func, _described(args), _described(tuple(kwargs.items()))) if _makes_new(func) else None
        try:
            known = self.known.get(key)
        except TypeError:  # of what cannot be looked up, numbers in tensors among it
            key = known = None
        if known is not None:
            several, like = known
            made = [torch.empty_strided(*sizes, dtype=dtype, device="meta") for *sizes, dtype in like]
            return tuple(made) if several else made[0]
        given = func(*args, **kwargs)
        tensors = given if isinstance(given, tuple) else (given,)
        if key is not None and all(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
            like = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors]
            self.known[key] = isinstance(given, tuple), like
        return given


@functools.cache
def _makes_new(func: Any) -> bool:
    """Whether what ``func`` gives shares no memory with what it is given, and it writes to nothing."""
    schema = func._schema
    return all(item.alias_info is None for item in (*schema.arguments, *schema.returns))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Tensors of other devices have numbers, which tell them apart: a list has no hash.
        return (tuple(value.shape), value.stride(), value.dtype) if value.is_meta else []
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


class TraceableOnMeta(Remembering):
    """Lets ``torch.jit.trace``, on which fvcore stands, run a model on the meta device.

    While torch traces, every size is a tensor, which its own shape checks for the meta device do not accept.
    So each operator is recorded as ever, and computed as if nobody traced. Convolutions are recorded one
    level further down: where a mode looks on, torch forgets to.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        state = torch._C._get_tracing_state()
        if state is None:
            return self.shapes_of(func, args, kwargs or {})
        excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(_TRACER)
        torch._C._dispatch_tls_set_dispatch_key_excluded(_TRACER, False)
        try:
            if func is torch.ops.aten.convolution.default:
                with self:
                    return torch.ops.aten._convolution.default(*args, False, False, True, True)
            torch._C._set_tracing_state(None)
            try:
                return self.shapes_of(func, args, kwargs or {})
            finally:
                torch._C._set_tracing_state(state)
        finally:
            torch._C._dispatch_tls_set_dispatch_key_excluded(_TRACER, excluded)


class _Products(Remembering):
    """Notes in which module batches of matrices are multiplied, as q by k and attention by v are."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running = running
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("bmm", "baddbmm") or name.startswith("_scaled_dot_product"):
            self.found[self.running[-1]] = None
        return self.shapes_of(func, args, kwargs or {})


@contextmanager
def products(model: nn.Module) -> Iterator[dict[str, None]]:
    """The names of the modules of ``model`` that multiply activations while it runs, in their order."""
    running = [""]
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda _module, _args, name=name: running.append(name))
        )
        handles.append(module.register_forward_hook(lambda _module, _args, _output: _left(running)))
    mode = _Products(running)
    try:
        with mode:
            yield mode.found
    finally:
        for handle in handles:
            handle.remove()


def _left(running: list[str]) -> None:
    running.pop()
