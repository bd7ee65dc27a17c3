"""The processes of a run, launched by torchrun or alone, and the exchange of data between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mhacut.errors import PeerFailed, UsageError, option_name
from mhacut.runtime.device import resolve_device
from mhacut.runtime.process import local_rank, world_size

T = TypeVar("T")
_PATIENCE = timedelta(days=1)
"""Processes may wait for the first one for as long as a search takes; torchrun ends them if another dies."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int
    """Number of this process; process 0 writes and prints."""
    size: int
    """Number of processes."""
    device: torch.device
    """Device of this process."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the value of each process, in their order; every process must ask at the same point."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, in float64; every process must ask at the same point."""
        if self.size == 1:
            return list(values)
        # In float64, counts up to 2**53 are exact.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def summed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes of tensors by name; every process must ask at the same point."""
        if self.size == 1:
            return dict(tensors)
        # all_reduce needs the same tensors everywhere: a process without images of a layer sends zeros.
        shapes = self.gather({name: (part.shape, part.dtype) for name, part in tensors.items()})
        sums = {}
        for name, (shape, dtype) in {name: like for part in shapes for name, like in part.items()}.items():
            mine = tensors.get(name)
            if mine is None:
                mine = torch.zeros(shape, dtype=dtype, device=self.device)
            total = mine.contiguous().to(self.device)
            dist.all_reduce(total)
            sums[name] = total.to(mine.device)
        return sums

    def from_first(self, work: Callable[[], T]) -> T:
        """Do ``work`` in the first process only; return its result, of which the others get a copy."""
        held: list[Any] = [None]
        with self.fail_together():
            if self.first:
                held[0] = work()
        if self.size > 1:
            dist.broadcast_object_list(held, src=0)
        result: T = held[0]
        return result

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Context in which a failure in one process ends the block in all, so that none waits for it.

        Inside it, processes must not exchange data. Every process must enter it at the same point.
        """
        if self.size == 1:
            yield
            return
        failed = None
        try:
            yield
        except Exception as error:
            failed = error
        failures = self.gather(None if failed is None else f"{type(failed).__name__}: {failed}")
        if failed is not None and failures[self.rank] not in failures[: self.rank]:
            raise failed
        if any(text is not None for text in failures):
            raise PeerFailed("another process failed; see its message")


@contextmanager
def gathered(device: str) -> Iterator[Processes]:
    """Connect the processes that torchrun started, or this one alone, until the block ends.

    NCCL connects GPUs, gloo CPUs.
    """
    size = world_size()
    if size == 1:
        chosen = resolve_device(device)
        # Generators, and memory that is pinned for transfers, are those of the current GPU.
        current = torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext()
        with current:
            yield Processes(0, 1, chosen)
        return
    local = local_rank()
    if device.startswith("cuda:"):
        asked = option_name("device", device)
        raise UsageError(f"{asked}: {size} processes cannot share it; use {option_name('device', 'cuda')}")
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        chosen = resolve_device(f"cuda:{local}")
        torch.cuda.set_device(chosen)
    if dist.is_initialized():  # by whoever calls mhacut as a library
        yield Processes(dist.get_rank(), size, chosen)
        return
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
    except ValueError as error:  # a variable of torchrun is missing or wrong
        raise UsageError(f"{error}; torchrun sets it, without torchrun unset WORLD_SIZE") from None
    yield Processes(dist.get_rank(), size, chosen)
    # Not after a failure: NCCL waits until the others destroy it too, who wait for this process in an
    # exchange. It would never end, and torchrun not notice that it failed.
    dist.destroy_process_group()
