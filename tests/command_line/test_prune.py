"""``mhacut prune``: what it prints, writes and refuses."""

from __future__ import annotations

import json
import re

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import mhacut
from helpers.cli import FAST, refusal, research, run


def test_prune_prints_a_table(tiny_vit, tmp_path):
    out = tmp_path / "new" / "out [1].safetensors"
    arguments = [argument for argument in FAST if argument != "--no-latency"]
    result = run("prune", *tiny_vit.flags, "--flops", "60%", "-o", out, *arguments)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    kept, won = (
        r"same top-1 class as dense for \S+ % of .* images \(KL \S+\)",
        r"\S+x (faster|slower) \(batch 8, CPU\)",
    )
    assert re.fullmatch(f"{kept} at 60 % of the FLOPs, {won}", lines[0])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "heading"),
    [
        (["--num-classes", "0"], "divergence of features, nats per token"),
        (["--preserve", "pooled"], "error of features, of their variance"),
    ],
    ids=["dense", "pooled"],
)
def test_divergences_of_features_are_called_what_they_are(tiny_vit, flags, heading):
    given = ["--flops", "90%", "--flops", "80%", "--dry-run", *flags]
    result = run("prune", *tiny_vit.flags, *given, *research(repair=False, heal_steps=0), *FAST)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0].endswith(f"  {heading}")


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
    result = run("prune", *tiny_vit.flags, "--flops", "45%", "-o", out, "--json", *by_indicators, *FAST)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
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
    with safe_open(out, "pt") as file:
        stated = json.loads(file.metadata()["mhacut"])
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


@pytest.mark.parametrize(
    ("budget", "code", "message"),
    [
        ("5G", 1, "nothing to prune: the model's 1.16M FLOPs are already within 5G"),
        ("100%", 1, "nothing to prune"),
        ("10K", 1, "--flops 10K is out of reach: the lowest is "),
        ("2,0G", 2, "--flops 2,0G is not a budget; write 2.0G, 600M, 2e9 or 50%"),
        *((text, 2, "is not a budget") for text in ("nan", "inf", "0", "-1G", "", "2GB", "2.0 G", "1e999")),
        ("101%", 2, "a share is at most 100%"),
    ],
)
def test_budgets_that_are_refused(tiny_vit, tmp_path, monkeypatch, budget, code, message):  # 44 to 46
    monkeypatch.chdir(tmp_path)
    assert message in refusal(tmp_path, "prune", *tiny_vit.flags, f"--flops={budget}", *FAST, code=code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CHECKPOINT is missing"),
        (["a"], "--params, --size, --max-latency, --max-kl or --max-drop"),
        (["a", "--flops", "1G", "--max-kl", "nan"], "--max-kl nan: expected a number"),
        (["a", "--flops", "1G", "--model-arg", "img_size"], "expected KEY=VALUE, like img_size=32"),
        ([__file__, "--flops", "1G", "--device", "gpu"], "--device gpu is not a device"),
    ],
)
def test_usage_errors_exit_2(arguments, message):
    result = run("prune", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
