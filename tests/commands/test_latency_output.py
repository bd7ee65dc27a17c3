"""Latency as it is printed and stated, whether a budget or only measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

import mhacut
from helpers.cli import run
from helpers.pruning import last_step, prune_quickly
from mhacut.cli.prune import time_lines
from mhacut.commands.prune_targets import Reached
from mhacut.errors import MhacutError

prune = partial(prune_quickly, latency=True)


def test_the_time_is_printed(tiny_vit, tmp_path, clock):
    out, page = tmp_path / "slim.safetensors", tmp_path / "page.html"
    flags = ["--calibration-images", "8", "--batch-size", "4", "--effort", "fast", "--max-latency", "85%"]
    arguments = ["prune", *tiny_vit.flags, *flags, "-o", out, "--report", page, "--overwrite"]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    line = r"^--max-latency 85%: \S+ms of at most \S+ms, 8\d\.\d% of the dense model's \S+ms; predicted \S+ms"
    assert re.search(line, result.stdout, re.MULTILINE)
    line = re.search(r"^timed in eager, batch 8, (\d+) thread\(s\), cpu: \S.*", result.stdout, re.MULTILINE)
    assert ("; wall time" in line[0]) == (line[1] == "1")
    assert "target max_latency 85%" in page.read_text()
    (target,) = json.loads(run(*arguments, "--json").stdout)["targets"]
    assert target["reached"] <= target["most"] < target["dense"]
    assert {"predicted", "machine", "threads", "runtime", "batch_size", "corrections"} <= target.keys()


@pytest.mark.parametrize(
    ("threads", "device", "wall"), [(1, "cpu", True), (2, "cpu", False), (1, "cuda", False)]
)
def test_wall_time_is_printed_beside_processor_time(threads, device, wall):
    about = {
        "predicted": 6.0,
        "dense": 10.0,
        "wall": 7.25,
        "corrections": 0,
        "runtime": "eager",
        "int8": False,
    }
    about |= {"batch_size": 8, "threads": threads, "device": device, "machine": "a machine"}
    printed = time_lines("--max-latency 60%", Reached("max_latency", "60%", 6.0, 5.9, measured=about))
    assert printed == (
        "--max-latency 60%: 5.90ms of at most 6.00ms, 59.0% of the dense model's 10.0ms; predicted 6.00ms\n"
        f"timed in eager, batch 8, {threads} thread(s), {device}: a machine{'; wall time 7.25ms' * wall}"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "latency, ms (batch 8, cpu)"),
        ({"runtime": "onnx", "threads": 3}, "latency, ms (batch 8, onnx, cpu)"),
        (
            {"runtime": "onnx", "int8": True, "latency_batch_size": 2},
            "latency, ms (batch 2, onnx, INT8, cpu)",
        ),
    ],
)
def test_a_latency_states_what_it_is_of(tiny_vit, tmp_path, clock, monkeypatch, options, label):
    """Without a budget of time, too, and whatever the device that the rest ran on."""
    monkeypatch.setattr(
        "mhacut.commands.stopwatch.timing_device", lambda runtime, device: torch.device("cpu")
    )
    page = tmp_path / "page.html"
    result = prune(tiny_vit, tmp_path / "slim.safetensors", flops="60%", report=page, **options)
    assert label in [row[0] for row in replace(result, device="cuda").rows()]
    assert label in page.read_text()
    asked = {"runtime": "eager", "int8": False, "batch_size": result.latency_batch_size, "device": "cpu"}
    stated = asked | {name: value for name, value in options.items() if name in result.timing}
    assert stated.items() <= result.timing.items()
    assert result.timing["machine"]


@pytest.mark.slow
def test_the_conditions_of_latency_are_printed(tiny_vit, tmp_path, clock):
    flags = ["--flops", "60%", "--calibration-images", "8", "--batch-size", "4", "--effort", "fast", "--json"]
    arguments = ["prune", *tiny_vit.flags, *flags, "--dry-run", "--threads", "3"]
    assert json.loads(run(*arguments).stdout)["timing"]["threads"] == 3
    assert json.loads(run(*arguments, "--no-latency").stdout)["timing"] == {}


@pytest.mark.slow
def test_yaml_knows_the_option(tiny_vit, tmp_path, clock):
    config = tmp_path / "run.yaml"
    config.write_text("max_latency: 85%\nthreads: 1\neffort: fast\ncalibration_images: 8\nbatch_size: 4\n")
    result = run("prune", *tiny_vit.flags, "--config", config, "-o", tmp_path / "slim.safetensors", "--json")
    assert result.exit_code == 0, result.stderr
    (target,) = json.loads(result.stdout)["targets"]
    assert target["asked"] == "85%"
    assert target["threads"] == 1


@pytest.mark.slow
def test_a_target_by_the_machine_s_own_clock_is_met_or_missed_cleanly(tiny_vit, tmp_path, monkeypatch):
    for package in ("onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mhacut.commands.prune_latency._WHOLE_SECONDS", 0.5)
    out = tmp_path / "new" / "slim.safetensors"
    flags = ["--max-latency", "95%", "--runtime", "onnx", "--threads", "1", "--effort", "fast", "-o", out]
    flags += ["--calibration-images", "8", "--batch-size", "4", "--keep-dead-tokens"]
    flags += ["--exclude", "*attn*", "--round-to", "32"]  # few layers to time
    result = run("prune", *tiny_vit.flags, *flags)
    if result.exit_code == 0:
        (target,) = last_step(out)["targets"]
        assert target["reached"] <= target["most"] == pytest.approx(0.95 * target["dense"], rel=1e-3)
        assert mhacut.load_model(out).num_classes == 7
    else:
        assert (result.exit_code, result.stdout) == (1, "")
        assert re.search(
            "error: --max-latency 95%(: not met: after 3 corrections| is out of reach)", result.stderr
        )
        assert list(out.parent.rglob("*")) == []


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("options", [{"flops": "80%"}, {"max_latency": "90%"}])
def test_what_cannot_be_compiled_is_one_sentence(tiny_vit, tmp_path, options):
    with pytest.raises(
        MhacutError, match=r"^runtime='compile': torch.compile fails \(RuntimeError: no compiler"
    ):
        prune_quickly(tiny_vit, tmp_path / "slim.safetensors", latency=True, runtime="compile", **options)
