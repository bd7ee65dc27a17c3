"""Forward passes that stop at a module and are resumed there, for any architecture.

Python cannot pause a forward pass. Instead, module calls that were cut short are made again, the innermost
first, with the arguments they had; inside them, calls that had finished return their outputs at once. So one
block of the model runs at a time, on cached inputs, as in GPTQ (Frantar et al. 2023), but the blocks need not
be named. Only computations between the submodules of an unfinished module are repeated.
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
class _Call:
    """One call of a module during a pass."""

    module: nn.Module
    forward: Callable[..., Any]
    value: Any
    """(args, kwargs) of an unfinished call, output of a finished one."""
    finished: bool = False
    calls: list[_Call] = field(default_factory=list)
    """Calls made inside an unfinished one, in order."""
    position: int = 0
    """Number of ``calls`` that the present run has come past."""

    def __post_init__(self) -> None:
        self.versions = _versions(self.value)

    def set(self, value: Any, *, finished: bool) -> None:
        self.value, self.finished, self.calls = value, finished, []
        self.versions = _versions(value)

    @property
    def overwritten(self) -> bool:
        """Whether a tensor in ``value`` was changed in place since."""
        return self.versions != _versions(self.value)

    @property
    def chained(self) -> bool:
        """Whether each call inside takes the output of the one before, which goes nowhere else."""
        return type(self.module).forward is nn.Sequential.forward


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _TargetReached(BaseException):
    """Cuts a pass short. Not an Exception, which a model might catch."""

    def __init__(self, value: Any) -> None:
        """Take arguments or output of the call that was reached."""
        super().__init__()
        self.value = value


class ResumableModel:
    """A model and passes of several batches through it, which stop at one module after another.

    Inside ``with``, the ``forward`` of every module is replaced. A pass keeps the outputs of finished
    modules, but not of those inside them, nor of those whose output a ``Sequential`` has passed on.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        """Prepare to run ``model``, eval mode, on ``batches``, on its device."""
        self.model = model
        # Around the call of forward lies one of the model itself, with its hooks.
        self._stacks = [[_Call(nn.Module(), model, ((batch,), {}))] for batch in batches]
        """Unfinished calls of each batch, the innermost last."""
        self._stack: list[_Call] = []
        """Stack of the batch at work."""
        self._until: nn.Module | None = None
        """Module whose next call ends the run once it is finished."""
        self._before: nn.Module | None = None
        """Module whose next call ends the run before it is made."""
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
        """Run every batch on through the next call of this module; return its output for each."""
        self._until, self._before = self.model.get_submodule(name), None
        return [self._run(stack, name) for stack in self._stacks]

    @torch.no_grad()
    def run_up_to(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Run every batch on to the next call of this module, which is made in the next run."""
        self._until, self._before = None, self.model.get_submodule(name)
        return [self._run(stack, name) for stack in self._stacks]

    @property
    def nbytes(self) -> int:
        """Size of what the passes keep now: of views their own part, and once what they share."""
        calls = [call for stack in self._stacks for call in stack]
        values = [(call.value, [inner.value for inner in call.calls]) for call in calls]
        sizes: dict[int, int] = {}
        for leaf in tree_leaves(values):
            if isinstance(leaf, Tensor):
                sizes[leaf.data_ptr()] = max(sizes.get(leaf.data_ptr(), 0), leaf.nbytes)
        return sum(sizes.values())

    def answer(self, outputs: Sequence[Any]) -> None:
        """Take ``outputs``, one per batch, as those of the calls that :meth:`run_up_to` stopped before."""
        for stack, output in zip(self._stacks, outputs, strict=True):
            stack.pop().set(output, finished=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Give the modules their own ``forward`` back for a while, for calls that belong to no pass."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _run(self, stack: list[_Call], name: str) -> Any:
        """Run one batch until it comes to the module of this name; return what its call holds."""
        self._stack = stack
        try:
            while stack:
                self._run_innermost()
        except _TargetReached as reached:
            return reached.value
        raise ValueError(f"the forward pass does not reach {name} any more")

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer = self._stack[-1]
        if outer.position == len(outer.calls) or outer.calls[outer.position].overwritten:
            outer.calls[outer.position :] = [_Call(module, forward, (args, kwargs))]
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
