"""Warnings of what a device does slowly, and how processes on GPUs end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mhacut.errors import MhacutError
from mhacut.runtime import distributed
from mhacut.runtime.device import warn_of_slow_amp
from mhacut.runtime.distributed import gathered


@pytest.mark.parametrize(("capability", "warnings"), [("AVX2", 1), ("AVX512", 0), ("DEFAULT", 0)])
def test_bfloat16_is_slow_where_the_processor_has_none(monkeypatch, capability, warnings):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    notes = []
    warn_of_slow_amp(torch.device("cpu"), notes.append)
    assert len(notes) == warnings


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_process_that_fails_waits_for_no_other(monkeypatch, device):
    calls = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    group = SimpleNamespace(
        is_initialized=lambda: False,
        init_process_group=lambda *args, **options: None,
        get_rank=lambda: 1,
        destroy_process_group=lambda: calls.append("destroyed"),
    )
    monkeypatch.setattr(distributed, "dist", group)
    monkeypatch.setattr(distributed, "resolve_device", torch.device)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    with pytest.raises(MhacutError, match="of this process"), gathered(device):
        raise MhacutError("of this process")
    assert calls == []
    with gathered(device):
        pass
    assert len(calls) == 1
