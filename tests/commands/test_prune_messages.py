"""Messages of ``prune``: what it logs, and what it refuses before any work."""

from __future__ import annotations

import re
from functools import partial

import pytest
from safetensors.torch import save_file

import mhacut
from helpers.data import write_image
from helpers.jobs import Recorder
from helpers.pruning import BALANCED, prune_quickly
from mhacut.errors import BudgetError, DataError, OutputError, UnsupportedModelError, UsageError

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
def test_a_missing_validation_split_is_logged(tiny_vit, tmp_path):
    from PIL import Image

    for label in range(7):
        folder = tmp_path / "images" / "train" / str(label)
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (label * 30, 0, 0)).save(folder / "0.png")

    reporter = Recorder()
    result = prune(tiny_vit, tmp_path / "slim.safetensors", data_dir=tmp_path / "images", reporter=reporter)
    assert result.slim.evaluation is None
    assert any("accuracy is not measured: no labelled split 'val'" in note for note in reporter.messages)


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"flops": "100%"}, BudgetError, "nothing to prune: .* already within 100%"),
        ({"flops": "1G"}, BudgetError, "nothing to prune"),
        ({"flops": "1%"}, BudgetError, r"out of reach: the lowest is .*round_to=8"),
        ({"flops": "50%", "scope": "attention"}, BudgetError, "out of reach.*scope='attention' "),
        ({"flops": "2,0G"}, UsageError, "2,0G"),
        ({"init": "magic"}, UsageError, "attention-difference, uniform"),
        ({"steps": 0}, UsageError, "steps=0"),
        ({"stepz": 1}, UsageError, "did you mean 'steps'"),
        ({"device": "tpu9"}, UsageError, "not a device"),
        ({"model": "swin_tiny_patch4_window7_224", "model_args": {}}, Exception, "swin_tiny"),
    ],
)
def test_refusals_leave_nothing_behind(tiny_vit, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        prune(tiny_vit, tmp_path / "slim.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_out_of_reach_is_refused_before_the_dense_model_is_measured(digits_vit, tmp_path):
    images, checkpoint = digits_vit
    reporter, output = Recorder(), tmp_path / "slim.safetensors"
    with pytest.raises(BudgetError, match="out of reach"):
        mhacut.prune(checkpoint, flops="5%", data_dir=images, reporter=reporter, output=output)
    assert "loading images" in reporter.stages
    assert "evaluating" not in reporter.stages


def test_unsupported_attention_is_refused_by_class(tmp_path):
    import timm

    path = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("bat_resnext26ts", num_classes=5).state_dict(), path)
    with pytest.raises(UnsupportedModelError, match="BilinearAttnTransform"):
        mhacut.prune(
            path, flops="50%", model="bat_resnext26ts", output=tmp_path / "slim.safetensors", **BALANCED
        )
    assert not (tmp_path / "slim.safetensors").exists()


def test_bad_validation_images_are_found_before_anything_is_written(tiny_vit, tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for label in range(7):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (label * 30, 0, 0)).save(folder / "0.png")
    (tmp_path / "images" / "val" / "3" / "0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"0\.png"):
        prune(tiny_vit, tmp_path / "slim.safetensors", data_dir=tmp_path / "images")
    assert not (tmp_path / "slim.safetensors").exists()


def test_the_output_is_checked_before_any_work(tiny_vit, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match="overwrite=True"):
        prune(tiny_vit, tmp_path / "there.safetensors", checkpoint=tmp_path / "no-such-file")
    assert (tmp_path / "there.safetensors").read_bytes() == b"precious"


def test_what_is_left_whole_is_logged(tmp_path):
    import timm

    args = {
        "depth": 1,
        "embed_dim": 48,
        "num_heads": 3,
        "img_size": 32,
        "patch_size": 8,
        "global_pool": "prr",
    }
    path = tmp_path / "prr.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=5, **args).state_dict(), path)
    result = mhacut.prune(
        path,
        flops="80%",
        output=tmp_path / "slim.safetensors",
        model="vit_tiny_patch16_224",
        model_args=args,
        **BALANCED,
    )
    assert result.not_prunable == ("attn_pool (AttentionPoolPrr): this pooling head is not pruned",)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"steps": 100}, ["steps has no effect without allocation='indicator'"]),
        ({"method": "paper", "steps": 1}, []),
    ],
    ids=str,
)
def test_options_without_effect_are_named_before_any_work(tiny_vit, tmp_path, options, expected):
    class Stopped(Exception):
        pass

    class Stopping(Recorder):
        def start(self, stage):
            if stage == "loading images":
                raise Stopped

    reporter = Stopping()
    with pytest.raises(Stopped):
        prune(tiny_vit, tmp_path / "slim.safetensors", reporter=reporter, **{"gain_steps": None, **options})
    assert [note for note in reporter.messages if "no effect" in note] == expected


def test_training_on_a_single_image_is_left_out(tiny_vit, tmp_path):
    reporter, options = Recorder(), {"calibration_images": 1, "gain_steps": 1}
    prune(tiny_vit, tmp_path / "slim.safetensors", reporter=reporter, **options)
    assert "recovery skipped: a single calibration image leaves none to check the result" in reporter.messages
    assert not any("no effect" in note for note in reporter.messages)
