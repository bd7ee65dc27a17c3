"""Many budgets of FLOPs from one calibration."""

from __future__ import annotations

import re

import pytest

import mhacut
from helpers.cli import FAST, document_of, run, succeed
from helpers.pruning import BALANCED, QUICK, prune_quickly
from mhacut.errors import UsageError


@pytest.mark.slow
def test_many_budgets_give_the_files_that_single_runs_give(tiny_vit, tmp_path):
    options, budgets = {**BALANCED, "heal_steps": 2, "tuning_steps": 2}, ("80%", "60%", "900K")
    asked = {**tiny_vit.options, **options}
    results = mhacut.prune_many(tiny_vit.path, flops=budgets, output=tmp_path / "m-{}.safetensors", **asked)
    assert [result.output.stem for result in results] == ["m-80pct", "m-60pct", "m-900K"]
    for budget, result in zip(budgets, results, strict=True):
        alone = prune_quickly(
            tiny_vit, tmp_path / "alone.safetensors", flops=budget, overwrite=True, **options
        )
        assert result.output.read_bytes() == alone.output.read_bytes()
        assert result.divergence == alone.divergence
    assert "calibrating" in results[0].seconds
    assert not {"calibrating", "measuring sensitivity curves", "reading"} & results[1].seconds.keys()


def test_several_flags_write_several_files(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--flops", "80%", "--flops", "60%", *FAST]
    document = document_of("prune", *tiny_vit.flags, *arguments)
    outputs = [one["output"] for one in document["results"]]
    assert [row["budget"] for row in document["pareto"]] == ["dense", "80%", "60%"]
    for row, one in zip(document["pareto"][1:], document["results"], strict=True):
        figures = {key: row[key] for key in ("flops", "parameters", "size", "latency_ms", "top1")}
        assert figures == {key: one["slim"][key] for key in figures}
    assert outputs == ["tiny-80pct.safetensors", "tiny-60pct.safetensors"]
    assert {path.name for path in tmp_path.iterdir()} == set(outputs)
    result = run("prune", *tiny_vit.flags, *arguments, "-o", "one.safetensors")
    assert result.exit_code == 2
    assert "--output one.safetensors: expected {} in the name" in result.stderr


@pytest.mark.slow
def test_the_place_of_a_budget_is_filled_for_one_too(tiny_vit, tmp_path):
    asked = {**tiny_vit.options, **QUICK, "output": tmp_path / "many-{}.safetensors"}
    (result,) = results = mhacut.prune_many(tiny_vit.path, flops=["80%"], **asked)
    assert result.output == tmp_path / "many-80pct.safetensors"
    assert "<th>80%</th>" in results._repr_html_()


@pytest.mark.parametrize("flops", ["80%", 2e9, (), []])
def test_prune_many_needs_a_list_of_budgets(tiny_vit, flops):
    with pytest.raises(UsageError, match="expected a list of budgets"):
        mhacut.prune_many(tiny_vit.path, flops=flops, params="60%")


@pytest.mark.slow
def test_a_report_of_several_budgets_has_a_table_and_charts(digits_vit, tmp_path):
    images, checkpoint = digits_vit
    page = tmp_path / "all.html"
    arguments = ["--data-dir", images, "--workers", "0", "--effort", "fast", "--calibration-images", "8"]
    budgets = ["--flops", "75%", "--flops", "50%"]
    out = tmp_path / "slim-{}.safetensors"
    result = succeed("prune", checkpoint, *budgets, *arguments, "-o", out, "--report", page)
    rows = [line.split() for line in result.stdout.splitlines()[:4]]
    assert rows[0][:4] == ["budget", "top-1,", "%", "FLOPs"]
    assert [row[0] for row in rows[1:]] == ["dense", "75%", "50%"]
    assert f"overview {page}" in result.stdout
    assert {path.name for path in tmp_path.glob("*.html")} == {"all.html", "all-75pct.html", "all-50pct.html"}
    text = page.read_text()
    for value in ("top-1", "KL to dense"):
        assert f"{value} against FLOPs" in text
    # A line and a dot per model. The dense one has no divergence; a rounded 0 has no place on a log axis.
    apart = sum(float(row[-1]) > 0 for row in rows[2:])
    assert text.count("<circle") == 3 + apart
    assert "http" not in text.replace("http-equiv", "")
    assert re.findall(r'<th scope="row">(.*?)</th>', text)[:3] == [
        "dense",
        '<a href="all-75pct.html">75%</a>',
        '<a href="all-50pct.html">50%</a>',
    ]
