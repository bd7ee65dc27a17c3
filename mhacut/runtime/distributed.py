"""Exchange of data between the processes of a run. Several processes are launched by torchrun."""

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
_TIMEOUT = timedelta(days=1)
"""Maximum wait for another process. Long, because all processes wait while process 0 searches."""


@dataclass(frozen=True)
class Processes:
    """Processes of a torchrun run. All processes must call a method at the same point of the program."""

    rank: int
    """Index of this process, from 0. Process 0 writes files and prints."""
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def total(self, values: Sequence[float]) -> list[float]:
        if self.size == 1:
            return list(values)
        # float64, because counts up to 2**53 are exact in it.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def summed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return sums of tensors over all processes, by name. A name may be missing in some processes."""
        if self.size == 1:
            return dict(tensors)
        # all_reduce needs the same tensors in all processes, so a process without a tensor sends zeros.
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
        """Call ``work`` in process 0, and return its result in all processes."""
        results: list[Any] = [None]
        with self.fail_together():
            if self.first:
                results[0] = work()
        if self.size > 1:
            dist.broadcast_object_list(results, src=0)
        result: T = results[0]
        return result

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Raise an error in all processes if the block fails in 1 process.

        Without it, the other processes would wait forever. The block must not exchange data between
        processes.
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
        # Of processes with the same error, only the first shows it.
        if failed is not None and failures[self.rank] not in failures[: self.rank]:
            raise failed
        if any(text is not None for text in failures):
            raise PeerFailed("another process failed; see its message")


@contextmanager
def gathered(device: str) -> Iterator[Processes]:
    """Connect the processes of a torchrun run inside the block: GPUs by NCCL, CPUs by gloo."""
    size = world_size()
    if size == 1:
        chosen = resolve_device(device)
        # Random generators and pinned memory belong to the current GPU.
        current = torch.cuda.device(chosen) if chosen.type == "cuda" else nullcontext()
        with current:
            yield Processes(0, 1, chosen)
        return
    local = local_rank()
    if device.startswith("cuda:"):
        option, all_gpus = option_name("device", device), option_name("device", "cuda")
        raise UsageError(f"{option}: {size} processes cannot share a GPU; use {all_gpus}")
    chosen = resolve_device(device)
    if chosen.type == "cuda":
        chosen = resolve_device(f"cuda:{local}")
        torch.cuda.set_device(chosen)
    if dist.is_initialized():  # by a program that uses mhacut as a library
        yield Processes(dist.get_rank(), size, chosen)
        return
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=_TIMEOUT)
    except ValueError as error:  # a variable of torchrun is missing or wrong
        raise UsageError(
            f"{error}. torchrun sets this variable. Without torchrun, unset WORLD_SIZE"
        ) from None
    yield Processes(dist.get_rank(), size, chosen)
    # Not after a failure (no "finally"): NCCL would wait for the other processes, which wait for this one
    # in an exchange, and torchrun would not notice the failure.
    dist.destroy_process_group()
