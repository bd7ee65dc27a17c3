"""Models that run side by side, batch beside batch, and stop together at modules of one name.

What happens at a stop may change what follows, for all batches, and each module still runs once per batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Stop = Callable[[str, list[list[Tensor]], list[list[Tensor]]], Iterable[int]]
"""Called with the module's name, its inputs and its outputs: a list per model of one tensor per batch. Gives
the models of which it changed the module: their outputs are computed anew."""


@torch.no_grad()
def run_in_lockstep(
    models: Sequence[nn.Module], batches: Sequence[Tensor], stops: Collection[str], stop: Stop
) -> None:
    """Run every model on every batch, all of them stopping at the modules named ``stops``.

    One thread per model and batch, of which one computes at a time: no more is in memory than what waits at a
    stop, and one batch's intermediate results.

    Args:
        models: that run the modules in the same order.
        batches: on the models' device.
        stops: names of modules that run once per batch and take one tensor.
        stop: what to do there.

    Raises:
        ValueError: they run them in another order, or not as often.
        Exception: the first that a model or ``stop`` raised.
    """
    crew = _Crew(models, batches, stop)
    handles = [
        model.get_submodule(name).register_forward_hook(crew.hook(name)) for model in models for name in stops
    ]
    threads = [
        threading.Thread(target=crew.run, args=(model, batch), daemon=True)
        for model in range(len(models))
        for batch in range(len(batches))
    ]
    try:
        for thread in threads:
            thread.start()
        crew.wait_for(threads)
    finally:
        crew.stopped = True
        try:
            crew.barrier.abort()  # of an interrupted run: nobody waits for ever
            crew.wait_for(threads)  # Python aborts where threads are still in torch as it exits
        finally:
            for handle in handles:
                handle.remove()
    if crew.error is not None:
        raise crew.error


class _Crew:
    """The threads of one run."""

    def __init__(self, models: Sequence[nn.Module], batches: Sequence[Tensor], stop: Stop) -> None:
        self.models, self.batches, self.stop = models, batches, stop
        self.error: BaseException | None = None
        self.turn = threading.Lock()
        """Held by the thread that computes."""
        self.stopped = False
        """Whether nobody is to compute any more."""
        self.ended = [[threading.Event() for _ in batches] for _ in models]
        self.barrier = threading.Barrier(len(models) * len(batches), action=self._visit)
        self.mine = threading.local()
        self.names: list[str] = []
        """Of the modules at which threads wait; empty for the end."""
        self.changed: set[int] = set()
        """Models of which the last stop changed the module."""
        self.inputs: list[list[Any]] = [[None] * len(batches) for _ in models]
        self.outputs: list[list[Any]] = [[None] * len(batches) for _ in models]

    def run(self, model: int, batch: int) -> None:
        """What a thread does."""
        self.mine.place = model, batch
        try:
            with self.turn, torch.no_grad():
                if self.stopped:
                    return
                self.models[model](self.batches[batch])
                self._wait("")  # for those that still have a stop to make, which would wait for ever
        except threading.BrokenBarrierError:
            self.barrier.abort()  # the one that broke it says why
        except BaseException as error:
            self.error = self.error or error
            self.barrier.abort()
        finally:
            self.ended[model][batch].set()

    def wait_for(self, threads: Sequence[threading.Thread]) -> None:
        """Until those that were started have left torch; an interrupted join would take one to have ended."""
        ended = [event for of_model in self.ended for event in of_model]
        for thread, event in zip(threads, ended, strict=True):
            if thread.ident is not None:
                event.wait()
                thread.join()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def wait(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            model, batch = self.mine.place
            self.inputs[model][batch], self.outputs[model][batch] = args[0], output
            self._wait(name)
            again: Tensor = module.forward(args[0]) if model in self.changed else output
            return again

        return wait

    def _wait(self, name: str) -> None:
        """Let others compute until all are at a stop."""
        if self.stopped:
            raise threading.BrokenBarrierError
        self.names.append(name)
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def _visit(self) -> None:
        """With all at a stop, in one of the threads; an error here breaks the barrier for all."""
        try:
            if len(set(self.names)) > 1:
                at = " and ".join(name or "nothing more" for name in sorted(set(self.names)))
                raise ValueError(f"models that run in lockstep differ in what they run: {at}")
            if self.names[0]:
                with torch.no_grad():
                    self.changed = set(self.stop(self.names[0], self.inputs, self.outputs))
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.names.clear()
            for kept in (*self.inputs, *self.outputs):
                kept[:] = [None] * len(kept)
