"""Times of layers that ``prune --max-latency`` keeps on disk, and when it measures anew."""

from __future__ import annotations

import json
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
from mhacut.options.timing import TimingOptions
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
    key = TimeTarget("50%", watch)._key(SimpleNamespace(choices={}), dense)
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
