"""Times of layers that ``prune --max-latency`` keeps on disk, and when it measures anew."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch

from helpers.pruning import prune_quickly
from mhacut.commands import prune_latency
from mhacut.commands.prune_latency import TimeTarget
from mhacut.commands.stopwatch import Stopwatch
from mhacut.errors import BudgetError
from mhacut.measuring.kept_times import kept_table
from mhacut.measuring.layer_times import LayerTimes, Point, TimeTable
from mhacut.options.base import TimingOptions
from mhacut.plan import Plan
from mhacut.runtime.progress import SILENT

prune = partial(prune_quickly, latency=True)


@pytest.mark.slow
def test_times_are_measured_once_for_each_machine(tiny_vit, tmp_path, clock):
    first = prune(tiny_vit, tmp_path / "one.safetensors", max_latency="85%")
    assert clock.layers > 0
    measured = clock.layers
    second = prune(tiny_vit, tmp_path / "two.safetensors", max_latency="85%")
    assert clock.layers == measured
    assert second.plan == first.plan
    prune(tiny_vit, tmp_path / "three.safetensors", max_latency="85%", latency_batch_size=2)
    assert clock.layers == 2 * measured


@pytest.mark.slow
def test_times_of_another_version_or_precision_are_not_used(tiny_vit, tmp_path, clock, monkeypatch):
    prune(tiny_vit, tmp_path / "one.safetensors", max_latency="85%")
    measured = clock.layers
    with monkeypatch.context() as other:
        other.setattr(prune_latency, "__version__", "0.0.0")
        prune(tiny_vit, tmp_path / "two.safetensors", max_latency="85%")
    assert clock.layers == 2 * measured
    monkeypatch.setattr("torch.get_float32_matmul_precision", lambda: "medium")
    prune(tiny_vit, tmp_path / "three.safetensors", max_latency="85%")
    assert clock.layers == 3 * measured


def test_a_runtime_may_come_from_a_package_of_another_name(monkeypatch):
    """As onnxruntime does from onnxruntime-gpu."""
    module = ModuleType("onnxruntime")
    module.__version__ = "1.99.0"
    monkeypatch.setitem(sys.modules, "onnxruntime", module)

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    script = ModuleType("onnxscript")
    script.__version__ = "0.1"
    monkeypatch.setitem(sys.modules, "onnxscript", script)
    monkeypatch.setattr(
        "mhacut.commands.stopwatch.timing_device", lambda runtime, device: torch.device("cpu")
    )
    dense = torch.nn.Conv2d(3, 1, 1)
    watch = Stopwatch(TimingOptions(runtime="onnx"), dense, (3, 4, 4), torch.device("cpu"), SILENT)
    key = TimeTarget("50%", watch, Plan(()))._key(SimpleNamespace(choices={}), dense)
    assert key["versions"]["onnxruntime"] == "1.99.0"
    assert key["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_kept_times_that_refuse_the_target_are_measured_anew_once(tiny_vit, tmp_path, clock):
    prune(tiny_vit, tmp_path / "one.safetensors", max_latency="85%")
    measured = clock.layers
    (file,) = (tmp_path / "cache" / "mhacut" / "layer-times").iterdir()
    document = json.loads(file.read_text())
    right = document["table"]["anchors"]
    document["table"]["anchors"] = [[saved, whole / 10] for saved, whole in right]
    file.write_text(json.dumps(document))
    result = prune(tiny_vit, tmp_path / "two.safetensors", max_latency="85%")
    assert result.targets[0].reached <= result.targets[0].most
    assert clock.layers == 2 * measured
    assert json.loads(file.read_text())["table"]["anchors"] == right
    with pytest.raises(BudgetError, match="out of reach"):
        prune(tiny_vit, tmp_path / "three.safetensors", max_latency="1%")
    assert clock.layers == 3 * measured


def test_times_of_layers_on_a_busy_machine_are_not_kept(tiny_vit, tmp_path, clock, monkeypatch):
    def parts(stopwatch, parts, *, seconds, steady=Stopwatch.parts):
        return replace(steady(stopwatch, parts, seconds=seconds), drift=0.1)

    monkeypatch.setattr(Stopwatch, "parts", parts)
    prune(tiny_vit, tmp_path / "one.safetensors", max_latency="85%")
    assert not (tmp_path / "cache").exists()


# --- the file alone ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mhacut" / "layer-times"


class Measurements:
    """Measures a table, and counts how often."""

    def __init__(self):
        self.times, self.log, self.steady = 0, [], True

    def measure(self):
        self.times += 1
        layers = tuple(
            LayerTimes(Point({"hidden": dense}, 0.4), (Point({"hidden": 8}, 0.1),)) for dense in (32, 16)
        )
        return TimeTable((("a", 0), ("b", 1)), layers, 1.0, steady=self.steady)

    def table(self, today=lambda table: table, **key):
        """The table, and whether it was kept before."""
        before = self.times
        return kept_table(key, self.measure, self.log.append, today), self.times == before


def test_a_table_is_measured_once_for_each_machine(cache):
    of = Measurements()
    first, kept = of.table(machine="one")
    assert not kept
    assert of.table(machine="one") == (first, True)
    assert of.times == 1
    assert of.table(machine="other") == (first, False)
    assert of.times == 2
    (line,) = of.log
    assert re.match(r".*/layer-times/\w+\.json: layer times of an earlier run are reused$", line)
    assert len(list(cache.iterdir())) == 2


def test_times_nested_deeper_than_python_reads_are_measured_again(cache):
    of = Measurements()
    first = of.table(machine="one")[0]
    (file,) = cache.iterdir()
    file.write_text("[" * 100_000)
    assert of.table(machine="one") == (first, False)
    assert re.search(r"cannot be read \(.*\); layer times are measured again$", of.log[-1])
    assert of.table(machine="one") == (first, True)


def test_times_of_a_busy_machine_are_not_kept(cache):
    of = Measurements()
    of.steady = False
    assert not of.table(machine="one")[1]
    assert of.log == ["layer times are not saved: this machine was busy while they were measured"]
    assert not cache.exists()
    assert not of.table(machine="one")[1]


def test_times_that_would_refuse_the_target_are_measured_anew(cache):
    of = Measurements()
    of.table(machine="one")
    assert not of.table(lambda table: None, machine="one")[1]
    (file,) = cache.iterdir()
    assert of.log == [
        f"{file}: with these times the target cannot be reached; layer times are measured again"
    ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "key": {"machine": "one"}, "table": {}}']
)
def test_a_damaged_file_is_measured_anew_and_replaced(cache, text):
    of = Measurements()
    of.table(machine="one")
    (file,) = cache.iterdir()
    file.write_text(text)
    assert not of.table(machine="one")[1]
    assert of.times == 2
    (line,) = of.log
    assert str(file) in line
    assert "measured again" in line
    assert of.table(machine="one")[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.update(whole=float("nan")),
        lambda table: table.update(dense=0),
        lambda table: table["calls"].append(["a", 7]),
        lambda table: table["layers"][0].__setitem__(0, [{"hidden": "x"}, 1.0]),
        lambda table: table["layers"].append([]),
    ],
)
def test_times_that_make_no_sense_are_measured_anew(cache, change):
    of = Measurements()
    of.table(machine="one")
    (file,) = cache.iterdir()
    document = json.loads(file.read_text())
    change(document["table"])
    file.write_text(json.dumps(document))
    assert not of.table(machine="one")[1]
    assert len(of.log) == 1


def test_a_cache_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    of = Measurements()
    assert not of.table(machine="one")[1]
    assert "layer times are not saved" in of.log[0]
