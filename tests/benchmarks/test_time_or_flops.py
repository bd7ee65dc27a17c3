"""``time_or_flops.py``: divergence at equal time, between budgets."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from helpers.benchmarks import script

ROW = {
    "asked": ["70%", "40%"],
    "budgets": ["90%", "50%"],
    "by_time": [[0.7, 0.01], [0.3, 1.0]],
    "by_flops": [[0.8, 0.005], [0.6, 0.08]],
    "drift": 0.01,
}


def test_between_two_budgets_the_logarithm_is_read_linearly():
    at_time = script("time_or_flops").at_time
    points = [(0.5, 4.0), (0.9, 0.1), (0.7, 1.0)]
    for share in (0.0, 0.25, 1.0):
        expected = math.exp((1 - share) * math.log(4.0) + share * math.log(1.0))
        assert at_time(points, 0.5 + 0.2 * share) == pytest.approx(expected)
    assert at_time(points, 0.9) == pytest.approx(0.1)
    assert at_time([(0.5, 1.0), (0.7, 0.0)], 0.7) == pytest.approx(1e-9)
    assert at_time(points, 0.49) is at_time(points, 0.91) is None


def test_a_time_outside_the_budgets_has_no_ratio():
    lines = script("time_or_flops").as_text({"onnx": ROW}).splitlines()
    assert lines[2:] == [
        "| onnx | 70% | 70.0% | 0.0100 | 0.0200 | 0.50 |",
        "| onnx | 40% | 30.0% | 1.0000 | - | - |",
    ]


def test_files_are_made_once_and_judged_together(tmp_path, capsys, monkeypatch):
    module, rows, commands = script("time_or_flops"), tmp_path / "rows.json", []

    def run(command, threads):
        from process import Process

        commands.append(command)
        if "prune" not in command:
            return Process(
                1.0, 1.0, 1.0, json.dumps({"time": [0.7, 0.8, 0.6], "kl": [0.01, 0.005, 0.08], "drift": 0})
            )
        output = command[command.index("--output") + 1]
        budgets = [part for flag, part in pairwise(command) if flag == "--flops"]
        for name in [part.replace("%", "pct") for part in budgets] or [""]:
            Path(output.replace("{}", name)).touch()
        return Process(1.0, 1.0, 1.0, "")

    monkeypatch.setattr(module, "run", run)
    flags = f"--checkpoint a --data-dir b --runtimes eager --times 70% --flops 90% 50% --merge {rows}".split()
    module.main(flags)
    by_flops, by_time, judged = commands
    assert by_flops.count("--flops") == 2
    assert by_time[by_time.index("--max-latency") + 1] == "70%"
    order = json.loads(judged[-1])
    assert [Path(file).name for file in order["files"]] == [
        "eager-70.safetensors",
        "flops-90pct.safetensors",
        "flops-50pct.safetensors",
    ]
    printed = capsys.readouterr().out
    assert "| eager | 70% | 70.0% | 0.0100 | 0.0200 | 0.50 |" in printed
    commands.clear()
    module.main(flags)
    assert not commands  # what is in the file is not run again
    assert capsys.readouterr().out == printed
    module.main([*flags, "--threads", "2"])
    assert len(commands) == 3  # of other settings
