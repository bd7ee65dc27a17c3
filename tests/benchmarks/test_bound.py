"""``bound.py``: a bound on the loss beside a sweep, and the cost of several budgets."""

from __future__ import annotations

import json
from itertools import pairwise

from helpers.benchmarks import script


def test_the_sweep_is_around_what_the_bound_found(tmp_path, capsys, monkeypatch):
    module, kept, commands = script("bound"), tmp_path / "kept.json", []

    def one(flops):
        return {"dense": {"flops": 1000, "top1": 90.0}, "slim": {"flops": flops, "top1": 90 - 500 / flops}}

    def run(command, threads):
        from process import Process

        commands.append(command)
        shares = [float(share.rstrip("%")) for flag, share in pairwise(command) if flag == "--flops"]
        if "--max-drop" in command:
            found = one(510) | {"targets": [{"reached": 0.98, "standard_error": 0.3}]}
            return Process(1.0, 1.0, 1.0, json.dumps(found))
        return Process(1.0, len(shares), 1.0, json.dumps({"results": [one(10 * share) for share in shares]}))

    monkeypatch.setattr(module, "run", run)
    flags = f"--checkpoint a --data-dir b --step 1 --steps 2 --efforts fast --merge {kept}".split()
    module.main(flags)
    assert [share for flag, share in pairwise(commands[1]) if flag == "--flops"] == [
        f"{share}.000%" for share in (49, 50, 51, 52, 53)
    ]
    printed = capsys.readouterr().out
    assert "| 0.0 | 50.00 | 1.0 | smallest of the sweep within the bound |\n" in printed
    assert "| 0.0 | 51.00 | 1.0 | found by --max-drop 1 |\n" in printed
    assert "| fast | 1 | 3 | 3.00 |" in printed
    commands.clear()
    module.main(flags)
    assert not commands  # what is in the file is not run again
    assert capsys.readouterr().out == printed
