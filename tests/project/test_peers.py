"""The table of ``examples/coverage/peers.py``: what becomes of a tool that works, refuses, hangs or dies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

COVERAGE = Path(__file__).parents[2] / "examples" / "coverage"
sys.path.insert(0, str(COVERAGE))  # the scripts import each other

import cell  # noqa: E402
import peers  # noqa: E402
from process import TooLongError, run  # noqa: E402

from tools import Done  # noqa: E402


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(TooLongError, match=r"more than 0\.5 s"):
        run([sys.executable, "-c", "import time; time.sleep(60)"], 1, 0.5)
    assert run([sys.executable, "-c", "print(3)"], 1, 60).stdout == "3\n"


class Tool:
    """Does to a model what a test asks for."""

    def __init__(self, cut):
        self.cut = cut

    def save(self, done, folder):
        pass


def small(monkeypatch) -> None:
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.proj((q @ k.mT).softmax(-1) @ v)

    class Model(nn.Sequential):
        pretrained_cfg = {"input_size": (5, 4)}  # noqa: RUF012

    def build(architecture: str) -> nn.Module:
        torch.manual_seed(0)
        return Model(Attention())

    monkeypatch.setattr(cell, "build", build)


def outcome(monkeypatch, tmp_path, cut) -> dict:
    small(monkeypatch)
    return cell.run_cut("any", Tool(cut), tmp_path)


def test_what_a_tool_leaves_whole_is_told_from_what_it_cuts(monkeypatch, tmp_path):
    def nothing(model, x):
        return Done(model, "inner", lambda dense: dense, silent=True)

    found = outcome(monkeypatch, tmp_path, nothing)
    assert (found["attention_cut"], found["attention"], found["difference"]) == (0, 1, 0.0)
    assert peers.as_words(found).startswith("attention whole (silent), 0e+00, no reload")

    def halve(model, x):
        dense = torch.ones(4)
        attention = model[0]
        attention.qkv.weight = nn.Parameter(attention.qkv.weight.view(3, 4, 4)[:, :2].flatten(0, 1))
        attention.qkv.bias = nn.Parameter(attention.qkv.bias.view(3, 4)[:, :2].flatten())
        attention.proj.weight = nn.Parameter(attention.proj.weight[:, :2])
        dense[2:] = 0

        def masked(model):
            for parameter in model[0].qkv.parameters():
                parameter.data.view(3, 4, -1).mul_(dense[:, None])
            return model

        return Done(model, "inner", masked)

    found = outcome(monkeypatch, tmp_path, halve)
    assert (found["attention_cut"], found["attention"]) == (1, 1)
    assert found["difference"] < 1e-6
    assert peers.as_words({**found, "reloads": True}).startswith("**cut**, ")


def test_refusals_and_failures_are_cells(monkeypatch, tmp_path):
    def refuse(model, x):
        raise cell.RefusedError("no | such\nclass")

    def fail(model, x):
        raise IndexError("\x1b[1mindex 4\x1b[0m is out of bounds")

    def broken(model, x):
        model[0].proj = nn.Linear(3, 4)
        return Done(model, "inner", None)

    assert peers.as_words(outcome(monkeypatch, tmp_path, refuse)) == r"refused: no \| such class"
    assert (
        peers.as_words(outcome(monkeypatch, tmp_path, fail)) == "fails: IndexError: index 4 is out of bounds"
    )
    assert outcome(monkeypatch, tmp_path, broken)["outcome"] == "breaks"


def test_the_table_is_kept_and_goes_on(monkeypatch, tmp_path, capsys):
    asked = []

    def made(architecture, tool, limit):
        asked.append((architecture, tool))
        return {"outcome": "too long", "why": "more than 1 s"}

    monkeypatch.setattr(peers, "TOOLS", {"mhacut": ("mhacut", "mhacut_tool"), "absent": ("no_such", "none")})
    monkeypatch.setattr(peers, "cell", made)
    flags = ["levit*", "hiera*", "--json", str(tmp_path / "cells.json")]
    for _ in range(2):
        assert peers.main(flags) == 0
    assert asked == [("levit_128s", "mhacut_tool"), ("hiera_tiny_224", "mhacut_tool")]
    assert len(json.loads((tmp_path / "cells.json").read_text())["cells"]) == 2
    printed = capsys.readouterr().out
    assert "| levit_128s | too long: more than 1 s |" in printed
    assert "| out of time | 2 of 2 |" in printed


@pytest.mark.slow
def test_mhacut_in_its_own_processes():
    found = peers.cell("vit_tiny_patch16_224", "mhacut_tool", 120.0)
    assert (found["outcome"], found["attention_cut"], found["reloads"]) == ("cut", 12, True)
    assert found["difference"] < 1e-5
