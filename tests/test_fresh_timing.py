"""Times of cut models, taken in a process of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mhacut
from mhacut.checkpoint.load import read_model
from mhacut.commands import fresh_timing, prune_latency
from mhacut.commands.prune_latency import TimeTarget
from mhacut.commands.stopwatch import Stopwatch
from mhacut.errors import OutputError
from mhacut.measuring.latency import Comparison
from mhacut.options.timing import TimingOptions
from mhacut.plan import Plan
from mhacut.runtime.progress import SILENT


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
    monkeypatch.setattr(fresh_timing, "_COMMAND", "raise SystemExit(3)")
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
    monkeypatch.setattr(
        prune_latency, "compare_afresh", lambda *_, **__: Comparison((2.0, 1.4), (2.0, 1.4), (1.0, 0.7), 0.0)
    )
    here = Comparison((2.0, 1.0), (2.0, 1.0), (1.0, 0.5), 0.0)
    monkeypatch.setattr(Stopwatch, "beside", lambda *_, **__: here)
    watch.timing, watch.device = replace(watch.timing, runtime=runtime), torch.device(device)
    target = TimeTarget("60%", watch, Plan(()))
    target.times = prune_latency.TimeTable((), (), 1.0, dense=1000)
    assert target.time(slim.model, slim.record).ratio == ratio


@pytest.mark.slow
def test_a_slim_file_that_is_cut_again_is_timed_beside_itself(pruned, tmp_path, monkeypatch):
    records = []

    def compared(watch, given, slim, **how):
        records.append(given)
        assert not slim_size(watch.dense) < slim_size(slim)
        return fresh_timing.compare_afresh(watch, given, slim, seconds=0.1, precision=1.0)

    monkeypatch.setattr(prune_latency, "compare_afresh", compared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"effort": "fast", "calibration_images": 8, "batch_size": 4, "threads": 1}
    mhacut.prune(pruned.output, max_latency="99%", output=tmp_path / "again.safetensors", **options)
    assert all(given["dense"].plan == read_model(pruned.output).record.plan for given in records)
    assert records


def slim_size(model):
    return sum(tensor.numel() for tensor in model.state_dict().values())
