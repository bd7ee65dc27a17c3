"""What is learnt from, and what is refused."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from safetensors.torch import load_file

from helpers.cli import FAST, run, succeed
from helpers.data import write_image
from helpers.files import save_dense
from helpers.finetuning import CLASSES
from helpers.jobs import Recorder
from mhacut.checkpoint.load import read_model
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError, DataError, UsageError
from mhacut.finetuning.images import StepBatches, training_images, training_loader
from mhacut.finetuning.objective import make_objective
from mhacut.options.base import DataOptions
from mhacut.options.finetune import AugmentationOptions, FinetuneOptions
from mhacut.runtime.progress import Silent

SIZES = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": CLASSES}
PREPROCESSING = Preprocessing((3, 32, 32), (0.5,), (0.5,), "bicubic", 1.0, "center")


def test_missing_data_is_refused(tune, images, slim, tmp_path):
    with pytest.raises(UsageError, match="give data_dir or dataset"):
        tune(data_dir=None)
    with pytest.raises(DataError, match="no such directory"):
        tune(data_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no split 'other'.*train_split"):
        tune(train_split="other")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes((images / "train" / "c0" / "0.png").read_bytes())
    with pytest.raises(DataError, match="no labels; give a teacher"):
        tune(data_dir=tmp_path / "flat")
    with pytest.raises(DataError, match="42 training images, but a step takes 64"):
        tune(batch_size=64)


def test_validation_images_without_labels_are_left_out_unless_accuracy_is_asked_for(tune, tiny_vit, tmp_path):
    for split in ("train", "val"):
        for number in range(12):
            write_image(tmp_path / "flat" / split / f"{number}.png", 20 * number)
    given, reporter = {"teacher": tiny_vit.path, "data_dir": tmp_path / "flat", "epochs": 1}, Recorder()
    result = tune(reporter=reporter, **given)
    assert (result.steps, result.after) == (1, None)
    assert any(
        "accuracy is not measured" in note and "images without class folders" in note
        for note in reporter.messages
    )
    with pytest.raises(DataError, match="accuracy needs val/<class>/<image>"):
        tune("asked", eval_images=5, **given)


@pytest.mark.slow
def test_one_in_a_hundred_unreadable_images_is_counted_and_ten_are_named(slim, images, tmp_path):
    root, source = tmp_path / "many", images / "train" / "c0" / "0.png"
    broken = [source.read_bytes()[:60], b"", b"not found"]
    for number in range(1300):
        path = root / "train" / f"c{number % CLASSES}" / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 100 == 50:
            path.write_bytes(broken[number // 100 % 3])
        else:
            path.hardlink_to(source)
    command = ["finetune", slim, "--data-dir", root, "-o", tmp_path / "run", "-b", "100", "--epochs", "1"]
    done = succeed(*command, "-j", "0")
    # Some of the thirteen are among the images held out to choose the learning rate.
    found = re.search(r"(\d+) unreadable images were replaced by other images; the first is ", done.stdout)
    assert 10 <= int(found[1]) <= 13
    assert done.stderr.count(": unreadable, replaced by another image (") == 10
    command = ["prune", slim, "--data-dir", root, "--flops", "50%", "-o", tmp_path / "smaller.safetensors"]
    done = succeed(*command, *FAST, "--calibration-images", "1300")
    assert "1287 of 1300 images under train/ (with labels), 13 unreadable left out (first " in done.stderr


def test_errors_of_the_teacher_name_its_own_flags(slim, images, tiny_vit, tmp_path):
    deeper = timm.create_model(tiny_vit.architecture, num_classes=CLASSES, **{**tiny_vit.args, "depth": 3})
    given = ["finetune", slim, "--data-dir", images, "-b", "12", "-j", "0", "-o", tmp_path / "run"]
    for teacher, flags, message in (
        (save_dense(deeper, tmp_path / "3.safetensors"), [], "defaults: --teacher-model-arg KEY=VALUE"),
        (tiny_vit.path, ["--teacher-part", "pupil"], ": --teacher-part pupil: no such part"),
        ("timm:resnet18", ["--teacher-model", "x"], "already names the model. Leave out --teacher-model"),
    ):
        result = run(*given, "--teacher", teacher, *flags)
        assert (result.exit_code, result.stdout) == (1, "")
        assert message in result.stderr


def test_the_teacher_is_the_part_that_is_named(tune, tiny_vit, tmp_path):
    state = load_file(tiny_vit.path)
    fewer = {name: tensor[:3] if name.startswith("head.") else tensor for name, tensor in state.items()}
    path = tmp_path / "training.pth"
    torch.save({"state_dict": fewer, "student": state}, path)
    with pytest.raises(CheckpointError, match="has 3 classes, the slim model has 7"):
        tune(teacher=path)
    assert tune("student", teacher=path, teacher_part="student", steps=1).steps == 1
    with pytest.raises(CheckpointError, match=": teacher_part='pupil': no such part"):
        tune("pupil", teacher=path, teacher_part="pupil")


def test_a_folder_that_states_its_preprocessing_is_believed(slim, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5), "input_size": (3, 32, 32)}
    timm.models.save_for_hf(
        model, str(tmp_path), model_config={"pretrained_cfg": cfg}, model_args=SIZES, safe_serialization=True
    )
    options = FinetuneOptions.of(checkpoint=slim, teacher=tmp_path, data_dir=tmp_path)
    opened = read_model(slim)
    teacher = make_objective(options, opened, opened.model, PREPROCESSING, Silent()).teacher
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()((pixels - torch.tensor(cfg["mean"]).view(3, 1, 1)) / 0.5)
    assert torch.allclose(teacher((pixels - 0.5) / 0.5), expected, atol=1e-5)


def test_images_vary_with_epoch_and_seed_alone(images):
    def batch(seed, step):
        found = training_images(
            DataOptions(data_dir=images),
            PREPROCESSING,
            AugmentationOptions(reprob=1.0),
            num_classes=CLASSES,
            use_labels=True,
            need_labels=True,
        )
        batches = StepBatches(found.count, batch_size=42, parts=1, seed=seed)
        arguments = {"start": step, "stop": step + 1, "mine": [0], "workers": 0, "pin_memory": False}
        (batch,) = training_loader(found, batches, **arguments)
        order = torch.tensor(batches.of_step(step)[1]).argsort()
        return batch.images[order]

    assert torch.equal(batch(0, 0), batch(0, 0))
    assert not torch.equal(batch(0, 0), batch(0, 1))
    assert not torch.equal(batch(0, 0), batch(1, 0))


def test_a_teacher_that_cannot_take_the_images_is_refused_before_anything_is_written(tune, tmp_path):
    teacher = timm.create_model("flatten_pvt_v2_b0", img_size=64, num_classes=CLASSES)
    timm.models.save_for_hf(teacher, str(tmp_path / "teacher"), safe_serialization=True)
    with pytest.raises(CheckpointError, match="the teacher fails on the slim model's input size 3x32x32"):
        tune(teacher=tmp_path / "teacher", name="none")
    assert not (tmp_path / "none").exists()
