"""Times of cut models, taken in a process of their own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mhacut
from helpers.jobs import Recorder
from mhacut.checkpoint.load import read_model
from mhacut.commands import fresh_timing, prune_latency, prune_timing
from mhacut.commands.prune_latency import TimeTarget
from mhacut.commands.stopwatch import Stopwatch
from mhacut.errors import OutputError
from mhacut.measuring.latency import Comparison
from mhacut.options.base import TimingOptions
from mhacut.plan import Plan
from mhacut.runtime.progress import SILENT

FRESH = Comparison((2.0, 1.4), (2.0, 1.4), (1.0, 0.7), 0.0)
HERE = Comparison((2.0, 1.0), (2.0, 1.0), (1.0, 0.5), 0.0)


@pytest.fixture
def cut(pruned, tiny_vit):
    """A slim model with its record, and a stopwatch that has its dense model."""
    slim = read_model(pruned.output)
    dense = read_model(tiny_vit.path, model=tiny_vit.architecture, model_args=tiny_vit.args).model
    timing = TimingOptions(latency_batch_size=2, threads=1)
    return slim, Stopwatch(timing, dense, (3, 32, 32), torch.device("cpu"), SILENT)


def afresh(cut):
    slim, watch = cut
    records = {"dense": replace(slim.record, plan=Plan(())), "slim": slim.record}
    return fresh_timing.compare_afresh(watch, records, slim.model, seconds=0.1, precision=1.0)


@pytest.mark.slow
def test_both_models_are_timed_in_another_process(cut, monkeypatch):
    monkeypatch.setattr(Stopwatch, "beside", None)  # not in this one
    found = afresh(cut)
    assert isinstance(found, Comparison)
    assert found.ratios[0] == 1.0
    assert 0.05 < found.ratios[1] < 20
    assert all(time > 0 for time in (*found.milliseconds, *found.wall))


def test_without_a_result_there_is_none(cut, monkeypatch):
    monkeypatch.setattr(fresh_timing, "in_new_process", lambda *_: None)
    assert afresh(cut) is None

    def full(*_):
        raise OutputError("no space left")

    monkeypatch.setattr(fresh_timing, "slim_content", full)
    assert afresh(cut) is None


@pytest.mark.parametrize(
    ("runtime", "device", "ratio"), [("eager", "cpu", 0.7), ("onnx", "cpu", 0.5), ("eager", "meta", 0.5)]
)
def test_pytorch_on_the_cpu_is_timed_afresh(cut, monkeypatch, runtime, device, ratio):
    slim, watch = cut
    monkeypatch.setattr(prune_latency, "compare_afresh", lambda *_, **__: FRESH)
    monkeypatch.setattr(Stopwatch, "beside", lambda *_, **__: HERE)
    watch.timing, watch.device = replace(watch.timing, runtime=runtime), torch.device(device)
    assert target_of(cut).time(slim.model, slim.record).ratio == ratio


def target_of(cut, budget="60%"):
    target = TimeTarget(budget, cut[1], Plan(()))
    target.times = prune_latency.TimeTable((), (), 1.0, dense=1000)
    return target


def test_times_of_this_process_are_announced_once(cut, monkeypatch):
    slim, watch = cut
    watch.reporter = Recorder()
    asked = []
    monkeypatch.setattr(prune_latency, "compare_afresh", lambda *_, **__: asked.append(1))
    monkeypatch.setattr(Stopwatch, "beside", lambda *_, **__: HERE)
    target = target_of(cut)
    for _ in range(2):
        assert not target.time(slim.model, slim.record).fresh
    assert len(asked) == 1
    (line,) = watch.reporter.messages
    assert "no new process can time this model" in line


def test_milliseconds_are_those_of_the_new_process(cut, monkeypatch):
    slim, _ = cut
    found = iter([FRESH, replace(FRESH, milliseconds=(4.0, 2.8))])  # the machine got slower, nothing else
    monkeypatch.setattr(prune_latency, "compare_afresh", lambda *_, **__: next(found))
    target = target_of(cut, "1.5ms")
    for _ in range(2):
        timed = target.time(slim.model, slim.record)
        assert (timed.nanoseconds, timed.most) == (1_400_000, 1_500_000)


def test_a_miss_is_not_overruled_by_this_process(cut, monkeypatch):
    slim, _ = cut
    found = iter([replace(FRESH, ratios=(1.0, 0.7)), None])
    monkeypatch.setattr(prune_latency, "compare_afresh", lambda *_, **__: next(found))
    monkeypatch.setattr(Stopwatch, "beside", lambda *_, **__: HERE)
    monkeypatch.setattr(prune_timing, "slim_record", lambda *_: slim.record)
    inputs = SimpleNamespace(time_target=target_of(cut), options=SimpleNamespace(dry_run=True))
    timed = prune_timing.time_file(inputs, SimpleNamespace(model=slim.model, planned=None, flops=0), SILENT)
    assert timed.ratio == 0.7


@pytest.mark.slow
def test_a_slim_file_that_is_cut_again_is_timed_beside_itself(pruned, tmp_path, monkeypatch):
    records = []

    def compared(watch, given, slim, **how):
        records.append(given)
        assert fresh_timing.compare_afresh(watch, given, slim, seconds=0.1, precision=1.0) is not None
        return replace(FRESH, ratios=(1.0, 0.97))

    monkeypatch.setattr(prune_latency, "compare_afresh", compared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"effort": "fast", "calibration_images": 8, "batch_size": 4, "threads": 1}
    mhacut.prune(pruned.output, max_latency="99%", output=tmp_path / "again.safetensors", **options)
    assert all(given["dense"].plan == read_model(pruned.output).record.plan for given in records)
    assert records
