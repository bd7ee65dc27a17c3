"""``mhacut evaluate`` and ``mhacut inspect``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers.cli import document_of, run, succeed

DIGITS = Path(__file__).parents[2] / "examples" / "digits"


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


def test_errors_are_printed_as_json():
    result = run("inspect", "missing.safetensors", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"] == "no such file: missing.safetensors"
    assert "error: no such file" in result.stderr


def test_class_folders_in_another_order_are_noticed(tmp_path):
    numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for digit, name in enumerate(numbers):  # sorted by name, not by number
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / name).symlink_to(DIGITS / "images" / "val" / str(digit))
    result = run("evaluate", DIGITS / "model", "--data-dir", tmp_path, "--workers", "0")
    assert result.exit_code == 1
    assert "another order than the model's classes: top-1 is 9.0 %, and 97.7 %" in result.stderr
    assert "--class-map" in result.stderr
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(numbers))
    shown = succeed("evaluate", DIGITS / "model", "--data-dir", tmp_path, "--class-map", classes).stdout
    assert "97.67%" in shown


def test_a_data_folder_that_is_too_high_is_named(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "val").symlink_to(DIGITS / "images" / "val")
    result = run("evaluate", DIGITS / "model", "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert f"try --data-dir {tmp_path / 'a' / 'b'}" in result.stderr
