"""Clocks that count parameters, in place of the machine's own."""

from __future__ import annotations

from dataclasses import replace

from mhacut.commands import prune_inputs
from mhacut.exporting.stopwatch import Stopwatch
from mhacut.measuring.latency import Comparison
from mhacut.surgery.flops import count_parameters


class Counting:
    """A clock by which a model takes 1 ms and 10 ns per parameter, its layers alone 6 ns, a cut one more."""

    def __init__(self, monkeypatch, tmp_path):
        self.layers = self.models = 0
        self.unforeseen = lambda share: 1.0
        """Factor on the time of a model with a share of the dense one's parameters."""
        self.shares: list[float] = []
        """Times of the next cut models with a budget, relative to the dense one's; after these it counts."""
        clock = self

        class CountingStopwatch(Stopwatch):
            def compare(self, models, parts=(), *, seconds, precision=None, dense=True):
                clock.models += len(models)
                clock.layers += 0 if dense else len(parts)
                models = [self.dense, *models] if dense else models
                times = tuple(clock.time(model, self.dense) for model in models)
                times += tuple(6e-6 * count_parameters(part) for part in parts)
                return Comparison(times, times, tuple(time / times[0] for time in times), 0.0)

            def compare_in_new_process(self, model, records, *, seconds, precision):
                found = self.compare([model], seconds=seconds)
                ratios = (1.0, clock.shares.pop(0) if clock.shares else found.ratios[1])
                return replace(found, ratios=ratios)

            def as_run(self, part):
                return part

        monkeypatch.setattr(prune_inputs, "Stopwatch", CountingStopwatch)

    def time(self, model, dense):
        count, dense_count = count_parameters(model), count_parameters(dense)
        return (1 + 1e-5 * count) * self.unforeseen(count / dense_count)
