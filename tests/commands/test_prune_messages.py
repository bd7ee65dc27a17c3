"""Messages of ``prune``: what it logs, and what it refuses before any work."""

from __future__ import annotations

import re
from functools import partial

import pytest

import mhacut
from helpers.data import write_image
from helpers.jobs import Recorder
from helpers.pruning import BALANCED, prune_quickly
from mhacut.errors import BudgetError, UsageError

prune = partial(prune_quickly, flops="60%", **BALANCED)


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-6, 1e3])
def test_rejected_training_is_logged(tiny_vit, tmp_path, lr):
    reporter = Recorder()
    options = {"gain_steps": 2, "gain_lr": lr, "heal_steps": 2}
    result = prune(tiny_vit, tmp_path / "slim.safetensors", **options, reporter=reporter)
    for what in ("training channel scales", "healing"):
        (note,) = (note for note in reporter.messages if note.startswith(what))
        before, after = map(float, re.search(r"images (\S+) before, (\S+) after", note).groups())
        # Training is rejected if the divergence is NaN or does not fall.
        assert not after > before or note.startswith(f"{what} rejected")
        assert not after < before or not note.startswith(f"{what} rejected")
    assert result.divergence < 1
    assert result.fidelity.images == 2


@pytest.mark.slow
def test_a_validation_split_without_labels_is_logged_unless_accuracy_is_asked_for(tiny_vit, tmp_path):
    root, slim = tmp_path / "images", tmp_path / "slim.safetensors"
    for split in ("train", "val"):
        for number in range(8):
            write_image(root / split / f"{number}.png", 20 * number)
    reporter = Recorder()
    result = prune(tiny_vit, slim, data_dir=root, workers=0, reporter=reporter)
    assert result.slim.evaluation is None
    assert [note for note in reporter.messages if note.startswith("accuracy is not measured")] == [
        f"accuracy is not measured: images without class folders under val/: accuracy needs "
        f"val/<class>/<image>. Folders in {root}: train, val"
    ]
    with pytest.raises(
        UsageError, match=r"max_drop=1.0: expected labelled images .*accuracy needs val/<class>/"
    ):
        prune(tiny_vit, slim, data_dir=root, workers=0, overwrite=True, max_drop=1.0, flops=None)


@pytest.mark.slow
def test_budgets_may_be_numbers(tiny_vit, tmp_path):
    flops = 900_000
    assert prune(tiny_vit, tmp_path / "slim.safetensors", flops=flops, dry_run=True).budget == flops
    with pytest.raises(BudgetError, match=r"did you mean flops='50%'\?"):
        prune(tiny_vit, tmp_path / "other.safetensors", flops=50)
    with pytest.raises(BudgetError, match=r"did you mean flops='50%'\?"):
        prune(tiny_vit, tmp_path / "other.safetensors", flops=0.5)
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        prune(tiny_vit, tmp_path / "slim.pth")


def test_a_budget_out_of_reach_is_refused_before_the_dense_model_is_measured(digits_vit, tmp_path):
    images, checkpoint = digits_vit
    reporter, output = Recorder(), tmp_path / "slim.safetensors"
    with pytest.raises(BudgetError, match="out of reach"):
        mhacut.prune(checkpoint, flops="5%", data_dir=images, reporter=reporter, output=output)
    assert "loading images" in reporter.stages
    assert "evaluating" not in reporter.stages
