"""Who asks for what a processor does slowly is warned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mhacut
from helpers.jobs import Recorder
from mhacut.cli.app import app
from mhacut.runtime.device import warn_of_slow_amp

DIGITS = Path(__file__).parents[1] / "examples" / "digits"


@pytest.fixture
def processor(monkeypatch):
    def become(machine, capability):
        monkeypatch.setattr("platform.machine", lambda: machine)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)

    return become


@pytest.mark.parametrize(
    ("machine", "capability", "device", "warnings"),
    [
        ("x86_64", "AVX2", "cpu", 1),
        ("AMD64", "DEFAULT", "cpu", 1),
        ("x86_64", "AVX2", "cuda", 0),
        ("x86_64", "AVX512", "cpu", 0),
        ("aarch64", "DEFAULT", "cpu", 0),
    ],
)
def test_bfloat16_is_slow_where_the_processor_has_none(processor, machine, capability, device, warnings):
    processor(machine, capability)
    notes = []
    warn_of_slow_amp(torch.device(device), notes.append)
    assert len(notes) == warnings


@pytest.mark.slow
@pytest.mark.parametrize("amp", [True, False])
def test_every_command_that_takes_amp_warns(processor, few_digits, tmp_path, amp):
    processor("x86_64", "AVX2")
    slim, reporter = tmp_path / "slim.safetensors", Recorder()
    options = {"amp": amp, "device": "cpu", "reporter": reporter}
    quick = {"effort": "fast", "calibration_images": 4, "gain_steps": 1, "latency": False}
    mhacut.prune(DIGITS / "model", flops="60%", output=slim, **quick, **options)
    data = {"data_dir": few_digits, "workers": 0, "output": tmp_path / "run"}
    mhacut.finetune(slim, batch_size=8, steps=1, **data, **options)
    assert sum("amp=True: " in note for note in reporter.messages) == 2 * amp
    flags = ["--data-dir", str(few_digits), "--device", "cpu", "--amp" if amp else "--no-amp"]
    found = CliRunner().invoke(app, ["evaluate", str(slim), *flags])
    assert found.exit_code == 0
    assert ("many times slower" in " ".join(found.output.split())) == amp
