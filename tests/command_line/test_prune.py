"""``mhacut prune``: what it prints, writes and refuses."""

from __future__ import annotations

import re

import pytest
from safetensors.torch import load_file

import mhacut
from helpers.cli import FAST, document_of, research, run, succeed
from helpers.pruning import stated_by


def test_prune_prints_a_table(tiny_vit, tmp_path):
    out = tmp_path / "new" / "out [1].safetensors"
    arguments = [argument for argument in FAST if argument != "--no-latency"]
    result = succeed("prune", *tiny_vit.flags, "--flops", "60%", "-o", out, *arguments)
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"same top-1 .* at 60 % of the FLOPs, \S+x (faster|slower) \(.*\)", lines[0])
    lines = lines[2:]
    assert lines[0].split() == ["vit_tiny_patch16_224", "dense", "slim", "ratio"]
    assert [line.split("  ")[0] for line in lines[1:5]] == [
        "FLOPs",
        "parameters",
        "latency, ms (batch 8, CPU)",
        "file",
    ]
    assert f"saved {out}" in lines
    assert f"loads with: mhacut.load_model({str(out)!r})" in lines
    assert any(line.startswith("searched on 8 synthetic") for line in lines)
    assert lines[5].startswith("same as dense, % of 2 held-out synthetic images  ")
    assert lines[6].startswith("KL to dense, nats (2 held-out synthetic images)  ")
    assert max(map(len, lines[:8])) <= 80
    assert "num_classes 7" in result.stderr
    assert mhacut.load_model(out).num_classes == 7


def test_of_several_processes_the_one_that_says_why_ends_first(tiny_vit, tmp_path, monkeypatch):
    """When one ends with an error, torchrun ends the others, whatever they still had to say."""
    out = tmp_path / "out.safetensors"
    out.touch()
    waits = []
    monkeypatch.setattr("mhacut.cli.running.time.sleep", waits.append)
    for rank, expected in (("0", []), ("1", [pytest.approx(10)])):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        result = run("prune", *tiny_vit.flags, "--flops", "60%", "-o", out, *FAST, env=env)
        assert result.exit_code == 1
        assert ("exists" in result.stderr) == (rank == "0")
        assert waits == expected


def test_prune_json(tiny_vit, tmp_path):
    out = tmp_path / "out.safetensors"
    by_indicators = research(allocation="indicator", steps=2)
    document = document_of("prune", *tiny_vit.flags, "--flops", "45%", "-o", out, *by_indicators, *FAST)
    assert document["schema_version"] == 1
    assert document["output"] == str(out)
    assert document["slim"]["flops"] <= document["budget"] < document["dense"]["flops"]
    assert document["dense"]["latency_ms"] is None
    assert len(document["log"]) == 2
    assert (document["divergence_of"], document["judged_on"]) == ("answers", 2)
    assert 0 < document["divergence"] < 1
    assert {"reading", "searching", "cutting", "writing", "comparing"} <= set(document["seconds"])
    assert {"starting", *document["seconds"]} == set(document["stage_seconds"])
    slim = load_file(out)
    hidden = next(layer for layer in document["layers"] if layer["kind"] == "hidden")
    assert slim[f"{hidden['layer']}.fc1.weight"].shape[0] == hidden["width"] < hidden["dense_width"]
    stated = stated_by(out)
    assert stated["plan"] == document["plan"]
    assert stated["tokens"] == document["tokens"] == {"read": 1}


@pytest.mark.parametrize("budgets", [("60%",), ("80%", "60%")])
def test_a_default_name_that_exists_is_refused_before_the_checkpoint_is_read(
    tiny_vit, tmp_path, monkeypatch, budgets
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-60pct.safetensors").write_bytes(b"precious")
    flags = [part for budget in budgets for part in ("--flops", budget)]
    result = run("prune", *tiny_vit.flags, *flags, *FAST, "-v")
    assert result.exit_code == 1
    assert "tiny-60pct.safetensors: exists" in result.stderr
    assert "reading" not in result.stderr
    assert (tmp_path / "tiny-60pct.safetensors").read_bytes() == b"precious"
