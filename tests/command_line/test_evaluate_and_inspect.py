"""``mhacut evaluate`` and ``mhacut inspect``."""

from __future__ import annotations

import re

import pytest

from helpers.cli import document_of, run, succeed


def test_evaluate(slim, images):
    document = document_of("evaluate", slim, "--data-dir", images, "--workers", "0")
    evaluation = document["evaluation"]
    assert evaluation["images"] == 14
    assert 0 <= evaluation["top1"] <= evaluation["top5"] <= 100
    assert document["preprocessing"]["input_size"] == [3, 32, 32]
    shown = run("evaluate", slim, "--data-dir", images, "--workers", "0", "--mean", "0.5")
    top1 = re.escape(f"{evaluation['top1']:.2f}%")
    assert re.fullmatch(rf"top-1 +{top1} \(± [\d.]+\)", shown.stdout.splitlines()[0])
    assert "mean 0.5,0.5,0.5" in shown.stdout
    shown = run("evaluate", slim, "--data-dir", images, "--workers", "0", "--mean", "0.1,0.2,0.3")
    assert "mean 0.1,0.2,0.3" in shown.stdout


def test_inspect_dense(tiny_vit):
    result = succeed("inspect", *tiny_vit.flags)
    lines = result.stdout.splitlines()
    blank = lines.index("")
    document = document_of("inspect", *tiny_vit.flags)
    assert lines[:blank] == [document["verdict"]]
    spent = sum(layer["share"] for layer in document["layers"] if layer["heads"])
    assert document["verdict"].startswith(f"attention {100 * spent:.0f} % of 1.16M; ")
    assert document["verdict"].endswith("(by weights alone)")
    cells = [line.split() for line in lines[blank + 1 :]]
    assert cells[0] == ["layer", "heads", "qk", "sim", "r99", "v", "sim", "r99", "FLOPs", "params"]
    assert [*cells[1][:3], cells[1][5]] == ["blocks.0.attn", "3", "16", "16"]
    assert cells[5][:2] == ["blocks.0.mlp", "192"]
    assert "7 classes: 1.16M FLOPs, 67.1K" in result.stdout
    assert max(len(line) for line in lines if line.startswith(("layer", "blocks."))) <= 80


@pytest.mark.slow
def test_inspect_names_coupled_channels(slim_of):
    shown = run("inspect", slim_of("coat"), "--shapes").stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("serial_blocks1.0.factoratt_crpe ")]
    assert " as v " in line
    document = document_of("inspect", slim_of("coat"), "--shapes")
    assert document["layers"][0]["coupled_with"] == {"qk": "v"}
