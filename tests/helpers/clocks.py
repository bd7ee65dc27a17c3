"""Clocks that count parameters, in place of the machine's own."""

from __future__ import annotations

from mhacut.commands.prune_latency import TimeTarget
from mhacut.commands.stopwatch import Stopwatch
from mhacut.measuring.latency import Comparison
from mhacut.surgery.flops import count_parameters


class Counting:
    """A clock by which a model takes 1 ms and 10 ns per parameter, its layers alone 6 ns, a cut one more."""

    def __init__(self, monkeypatch, tmp_path):
        self.layers = self.models = 0
        self.unforeseen = lambda share: 1.0
        """Factor on the time of a model with a share of the dense one's parameters."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        clock = self  # functions become methods of the stopwatch, bound methods do not

        def beside(stopwatch, models, parts=(), *, seconds, precision=None):
            clock.models += len(models)
            times = [clock.time(model, stopwatch.dense) for model in (stopwatch.dense, *models)]
            return found([*times, *map(alone, parts)])

        def parts_alone(stopwatch, parts, *, seconds):
            clock.layers += len(parts)
            return found([*map(alone, parts)])

        monkeypatch.setattr(TimeTarget, "_afresh", lambda *_: None)
        monkeypatch.setattr(Stopwatch, "ready", lambda stopwatch, part: part)
        monkeypatch.setattr(Stopwatch, "beside", beside)
        monkeypatch.setattr(Stopwatch, "parts", parts_alone)

    def time(self, model, dense):
        count, whole = count_parameters(model), count_parameters(dense)
        return (1 + 1e-5 * count) * self.unforeseen(count / whole)


def alone(part):
    return 6e-6 * count_parameters(part)


def found(times):
    return Comparison(tuple(times), tuple(times), tuple(time / times[0] for time in times), 0.0)
