"""Forward passes that stop at a module and resume there, for any architecture.

Python cannot pause a forward pass. A resumed pass repeats the interrupted module calls with their arguments,
innermost first. Inside them, finished calls return their stored outputs. So one block of the model runs at a
time on cached inputs, as in GPTQ (Frantar et al. 2023), without a list of block names. Only computations
between submodules of an unfinished module are repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class _ModuleCall:
    """Recorded call of a module in an unfinished forward pass."""

    module: nn.Module
    forward: Callable[..., Any]
    value: Any
    """Arguments (args, kwargs) of an unfinished call, or the output of a finished call."""
    finished: bool = False
    calls: list[_ModuleCall] = field(default_factory=list)
    """Calls of submodules inside an unfinished call, in order."""
    position: int = 0
    """Number of submodule calls that the current forward pass has reached in this call."""

    def __post_init__(self) -> None:
        self.versions = _versions(self.value)

    def set(self, value: Any, *, finished: bool) -> None:
        self.value, self.finished, self.calls = value, finished, []
        self.versions = _versions(value)

    @property
    def overwritten(self) -> bool:
        return self.versions != _versions(self.value)

    @property
    def chained(self) -> bool:
        return type(self.module).forward is nn.Sequential.forward


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _TargetReached(BaseException):
    """Raised when a forward pass has computed the module whose output the caller wants.

    Models may catch Exception, but not BaseException.
    """

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


class ResumableModel:
    """Forward passes of several batches through a model, stopping at one module after another.

    Inside the context, the ``forward`` of all modules is replaced. Outputs of finished modules are stored,
    and outputs of their submodules are freed.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.model = model
        # Around the call of forward lies one of the model itself, with its hooks.
        self._stacks = [[_ModuleCall(nn.Module(), model, ((batch,), {}))] for batch in batches]
        """Unfinished calls of each batch, innermost last."""
        self._stack: list[_ModuleCall] = []
        """Stack of the running batch."""
        self._until: nn.Module | None = None
        """Module that ends the run after its next call."""
        self._before: nn.Module | None = None
        """Module that ends the run before its next call."""
        self._replaced: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> ResumableModel:
        for module in self.model.modules():
            self._replaced.append((module, vars(module).get("forward")))
            vars(module)["forward"] = partial(self._call, module, module.forward)
        return self

    def __exit__(self, *error: object) -> None:
        for module, replaced in self._replaced:
            del vars(module)["forward"]
            if replaced is not None:
                vars(module)["forward"] = replaced
        self._replaced.clear()

    @torch.no_grad()
    def run_through(self, name: str) -> list[Any]:
        """Run all batches through the next call of module ``name``; return its outputs."""
        self._until, self._before = self.model.get_submodule(name), None
        return [self._run(stack, name) for stack in self._stacks]

    @torch.no_grad()
    def run_up_to(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Run all batches up to the next call of module ``name``; return its (args, kwargs)."""
        self._until, self._before = None, self.model.get_submodule(name)
        return [self._run(stack, name) for stack in self._stacks]

    @property
    def nbytes(self) -> int:
        """Memory of all stored tensors; shared storage counts once."""
        calls = [call for stack in self._stacks for call in stack]
        values = [(call.value, [inner.value for inner in call.calls]) for call in calls]
        sizes: dict[int, int] = {}
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                sizes[leaf.data_ptr()] = max(sizes.get(leaf.data_ptr(), 0), leaf.nbytes)
        return sum(sizes.values())

    def answer(self, outputs: Sequence[Any]) -> None:
        """Provide ``outputs`` as results of the calls at which :meth:`run_up_to` stopped."""
        for stack, output in zip(self._stacks, outputs, strict=True):
            stack.pop().set(output, finished=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Restore the original ``forward`` methods inside the context."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _run(self, stack: list[_ModuleCall], name: str) -> Any:
        """Run a batch to module ``name`` and return the value of its call."""
        self._stack = stack
        try:
            while stack:
                self._run_innermost()
        except _TargetReached as reached:
            return reached.value
        raise ValueError(f"this forward pass does not call the module {name} any more")

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer = self._stack[-1]
        if outer.position == len(outer.calls) or outer.calls[outer.position].overwritten:
            outer.calls[outer.position :] = [_ModuleCall(module, forward, (args, kwargs))]
        call = outer.calls[outer.position]
        outer.position += 1
        if not call.finished:
            self._stack.append(call)
            if module is self._before:
                raise _TargetReached(call.value)
            self._run_innermost()
        return call.value

    def _run_innermost(self) -> None:
        call = self._stack[-1]
        if call.overwritten and len(self._stack) > 1:
            self._stack.pop()  # the call around it makes a new one in its place
            return
        call.position, (args, kwargs) = 0, call.value
        call.set(call.forward(*args, **kwargs), finished=True)
        self._stack.pop()
        if self._stack and self._stack[-1].chained:
            for earlier in self._stack[-1].calls:  # their outputs are freed
                earlier.set(call.value, finished=True)
        if call.module is self._until:
            raise _TargetReached(call.value)
