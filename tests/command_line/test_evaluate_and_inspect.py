"""``mhacut evaluate`` and ``mhacut inspect``."""

from __future__ import annotations

import json
import re

import pytest

from helpers.cli import run


def test_evaluate(slim, images):
    result = run("evaluate", slim, "--data-dir", images, "--workers", "0", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
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


def test_image_size_the_model_does_not_take(slim, images):
    result = run("evaluate", slim, "--data-dir", images, "--img-size", "64")
    assert result.exit_code == 2
    assert "takes only images of 32x32" in result.stderr
    assert "Build the dense model with --model-arg img_size=64" in result.stderr


def test_inspect_dense(tiny_vit):
    result = run("inspect", *tiny_vit.flags)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    blank = lines.index("")
    document = json.loads(run("inspect", *tiny_vit.flags, "--json").stdout)
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
    document = json.loads(run("inspect", slim_of("coat"), "--shapes", "--json").stdout)
    assert document["layers"][0]["coupled_with"] == {"qk": "v"}
