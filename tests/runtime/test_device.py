"""Which device is used, and warnings of what one does slowly; GPUs are stood in for."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mhacut
from helpers.jobs import Recorder
from mhacut.cli.app import app
from mhacut.errors import MhacutError
from mhacut.finetuning.training import check_precision
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.device import warn_of_slow_amp
from mhacut.runtime.distributed import gathered

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


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
        ("x86_64", "AVX512", "cpu", 0),
        ("aarch64", "DEFAULT", "cpu", 0),
    ],
)
def test_bfloat16_is_slow_where_the_processor_has_none(processor, machine, capability, device, warnings):
    processor(machine, capability)
    notes = []
    warn_of_slow_amp(torch.device(device), notes.append)
    assert len(notes) == warnings


class Gpu:
    """Stand-in for torch.cuda where there is none: notes which device is made the current one."""

    def __init__(self, patch, *, bfloat16=True):
        self.current = []
        patch.setattr("torch.cuda.device", self.made_current)
        patch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: bfloat16)

    @contextmanager
    def made_current(self, device):
        self.current.append(device)
        yield


def test_bfloat16_is_slow_on_gpus_that_emulate_it(monkeypatch):
    notes = []
    device = torch.device("cuda", 1)
    gpu = Gpu(monkeypatch, bfloat16=False)
    warn_of_slow_amp(device, notes.append)
    assert "this GPU has no native bfloat16" in notes[0]
    options = FinetuneOptions.from_flat(
        checkpoint="slim.safetensors", data_dir="images", output="run", amp=True
    )
    with pytest.raises(MhacutError, match="this GPU has no bfloat16; use amp_dtype='float16'"):
        check_precision(options, device)
    assert gpu.current == [device, device]
    Gpu(monkeypatch, bfloat16=True)
    warn_of_slow_amp(device, notes.append)
    check_precision(options, device)
    assert len(notes) == 1


def test_the_gpu_that_is_asked_for_is_the_current_one(monkeypatch):
    gpu = Gpu(monkeypatch)
    device = torch.device("cuda", 1)
    monkeypatch.setattr("mhacut.runtime.distributed.resolve_device", lambda name: device)
    with gathered("cuda:1") as processes:
        assert gpu.current == [device]
    assert processes.device == device


@pytest.mark.parametrize(("device", "destroyed"), [("cuda", 0), ("cpu", 1)])
def test_a_process_that_fails_on_a_gpu_waits_for_no_other(monkeypatch, device, destroyed):
    calls = []
    launch = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("mhacut.runtime.distributed.resolve_device", torch.device)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, **options: None)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: calls.append("destroyed"))
    with pytest.raises(MhacutError, match="of this process"), gathered(device):
        raise MhacutError("of this process")
    assert len(calls) == destroyed
    with gathered(device):
        pass
    assert len(calls) == destroyed + 1


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
