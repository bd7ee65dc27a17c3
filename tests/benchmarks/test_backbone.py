"""The script that scores backbones."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from helpers.benchmarks import paint, script, small_vit

backbone = script("backbone")


def test_neighbours_vote_by_cosine():
    train = torch.tensor([[1.0, 0.0], [2.0, 0.1], [5.0, 0.2], [0.0, 1.0], [0.1, 3.0], [0.2, 2.0]])
    classes = torch.tensor([0, 0, 0, 1, 1, 1])
    val = torch.tensor([[9.0, 0.5], [0.3, 0.9]])
    assert backbone.nearest(train, classes, val, torch.tensor([0, 1])) == 100
    assert backbone.nearest(train, classes, val, torch.tensor([0, 0])) == 50


def test_the_probe_finds_what_is_linear_whatever_the_scale():
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(4, 10, generator=generator)
    labels = torch.randint(4, (600,), generator=generator)
    points = centres[labels] + torch.randn(600, 10, generator=generator)
    fit, val = slice(0, 400), slice(400, 600)
    found = backbone.probed(points[fit], labels[fit], points[val], labels[val], seed=1)
    assert found > 95
    scaled = 100 * points + 5
    again = backbone.probed(scaled[fit], labels[fit], scaled[val], labels[val], seed=1)
    assert again == pytest.approx(found, abs=0.6)
    wrong = backbone.probed(points[fit], labels[fit].flip(0), points[val], labels[val], seed=1)
    assert wrong < 60


@pytest.mark.slow
def test_a_table_is_made_and_reused(tmp_path, monkeypatch, capsys):
    save_file(small_vit().state_dict(), tmp_path / "vit.safetensors")
    data = paint(tmp_path / "images", classes=5, per_class=6, size=16)
    shape = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2}
    args = ["--checkpoint", str(tmp_path / "vit.safetensors"), "--data-dir", str(data), "--keep", "70"]
    args += ["--model", "vit_tiny_patch16_224", "--calibration-images", "10", "--effort", "fast"]
    args += [word for name, value in shape.items() for word in ("--model-arg", f"{name}={value}")]
    args += [
        "--methods",
        "tokens",
        "pooled",
        "last-two",
        "--compared",
        "5",
        "--merge",
        str(tmp_path / "t.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["backbone.py", *args])
    backbone.main()
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "t.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "tokens", "pooled", "last-two"]
    assert (rows[0]["error"], rows[0]["nats"], rows[0]["flops"]) == (0, 0, 100)
    assert all(60 < row["flops"] <= 70 for row in rows[1:])
    assert all(row["error"] > 0 and row["nats"] > 0 and row["cosine"] < 1 for row in rows[1:])
    backbone.main()
    assert capsys.readouterr().out.splitlines() == printed.splitlines()[-len(rows) - 3 :]
