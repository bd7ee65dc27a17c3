"""Fine-tuning: what it learns from, what it refuses, and that nothing of a run is lost."""

from __future__ import annotations

import csv
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import mhacut
from mhacut.checkpoint.load import open_checkpoint
from mhacut.cli.app import app
from mhacut.commands import finetune as run_module
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError, DataError, Interrupted, MhacutError, OutputError, UsageError
from mhacut.finetuning import measuring as measuring_module
from mhacut.finetuning import saving
from mhacut.finetuning import training as training_module
from mhacut.finetuning.folder import RunFolder
from mhacut.finetuning.images import StepBatches, training_images, training_loader
from mhacut.finetuning.training import Trainer
from mhacut.options.base import DataOptions
from mhacut.options.config import read_config
from mhacut.options.finetune import AugmentationOptions, FinetuneOptions
from mhacut.runtime.distributed import Processes
from mhacut.runtime.files import write_whole

CLASSES = 7
RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
PREPROCESSING = Preprocessing((3, 32, 32), (0.5,), (0.5,), "bicubic", 1.0, "center")


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


def picture(generator, label):
    """Noise over a tint that tells the class."""
    pixels = generator.integers(0, 120, (32, 32, 3)) + 18 * np.array([label, 6 - label, 3])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six training and two validation images of each class: three steps of 12 to an epoch."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 2)):
        for label in range(CLASSES):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(each):
                picture(generator, label).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def slim(tiny_vit, tmp_path_factory):
    path = tmp_path_factory.mktemp("slim") / "slim.safetensors"
    mhacut.prune(
        tiny_vit.path,
        flops="60%",
        model=tiny_vit.architecture,
        model_args=tiny_vit.args,
        output=path,
        effort="fast",
        calibration_images=8,
        latency=False,
    )
    return path


@pytest.fixture
def tune(slim, images, tmp_path):
    """``mhacut.finetune`` on the small example; its steps are 12 of 42 images, 3 to an epoch."""

    def call(name="run", **options):
        given = {
            "data_dir": images,
            "output": tmp_path / name,
            "batch_size": 12,
            "epochs": 2,
            "lr": 1e-3,
            "workers": 0,
            **options,
        }
        return mhacut.finetune(slim, **given)

    return call


def resume(folder, **options):
    return mhacut.finetune(resume=folder, **options)


def weights(folder, name="last.safetensors"):
    return load_file(folder / name)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- learning --


def test_labels_alone_are_learnt(tune, slim):
    result = tune(epochs=8, aug=False, lr=3e-3)
    assert result.steps == 24
    losses = [row.train_loss for row in result.epochs]
    assert losses[-1] < 0.7 * losses[0]
    assert result.after.top1 == max(row.eval_top1 for row in result.epochs)
    assert result.after.top1 > result.before.top1
    assert result.output.name == "best.safetensors"


def test_a_teacher_is_learnt_from_without_labels(tune, tiny_vit, slim, images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((images / "train").rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    result = tune(data_dir=flat, teacher=tiny_vit.path, epochs=20, lr=3e-3, aug=False)
    assert "without labels" in result.data
    assert result.after is None
    assert result.output.name == "last.safetensors"
    dense = mhacut.load_model(tiny_vit.path, tiny_vit.architecture, **tiny_vit.args)
    pixels = torch.stack(
        [
            torch.tensor(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
            for path in sorted(flat.iterdir())
        ]
    )
    inputs = (pixels - 0.5) / 0.5
    with torch.no_grad():
        expected = dense(inputs).log_softmax(-1)
        distances = [
            float(
                (expected.exp() * (expected - mhacut.load_model(path)(inputs).log_softmax(-1))).sum(-1).mean()
            )
            for path in (slim, result.output)
        ]
    assert distances[1] < 0.8 * distances[0]


def test_the_result_is_a_slim_file_with_a_longer_history(tune, slim):
    result = tune(dtype="bfloat16")
    before, after = open_checkpoint(slim).record, open_checkpoint(result.output).record
    assert after.plan == before.plan
    assert after.history[:-1] == before.history
    step = after.history[-1]
    assert step["command"] == "finetune"
    assert step["seed"] == 42
    assert step["options"]["lr"] == 1e-3
    assert "data_dir" not in step["options"]
    assert set(open_checkpoint(result.output).dtypes.values()) == {torch.bfloat16}
    shown = cli("inspect", result.folder / "last.safetensors")
    assert "step 2: finetune, 6 steps of 12 images, no teacher, seed 42" in shown.stdout


def test_features_are_matched_block_by_block(tune, tiny_vit):
    """With the weight on features alone, block outputs approach the teacher's."""
    result = tune(teacher=tiny_vit.path, label_weight=0, feature_weight=1.0, epochs=8, lr=3e-3, aug=False)
    plain = tune("plain", teacher=tiny_vit.path, label_weight=0, feature_weight=0.0, epochs=1)
    first, last = result.epochs[0].train_loss, result.epochs[-1].train_loss
    assert first > plain.epochs[0].train_loss  # the errors of the features are counted
    assert last < 0.7 * first


@pytest.mark.parametrize(
    "options",
    [
        {"model_ema": True, "model_ema_decay": 0.9},
        {"layer_decay": 0.7, "opt": "lamb", "sched": "poly", "decay_rate": 1.0, "warmup_epochs": 0.5},
        {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "reprob": 0.3, "aa": "rand-m3", "drop_path": 0.2},
        {"grad_checkpointing": True, "channels_last": True, "amp": True, "clip_mode": "agc"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_timm_has_can_be_asked_for(tune, options):
    result = tune(**options)
    assert result.steps == 6
    assert all(np.isfinite(row.train_loss) for row in result.epochs)


def test_the_average_is_what_is_written(tune):
    tune("plain")
    averaged = tune("average", model_ema=True, model_ema_decay=0.9, model_ema_warmup=False)
    folder = averaged.folder
    state = RunFolder(folder).read_state()["trainer"]
    assert same(state["average"], weights(folder))
    assert not same(state["model"], weights(folder))
    assert same(state["model"], weights(folder.parent / "plain"))


def test_clipping_by_agc_leaves_the_head_alone_as_timm_does(tune, monkeypatch):
    clipped = []
    monkeypatch.setattr(
        training_module, "dispatch_clip_grad", lambda parameters, *_, **__: clipped.append(list(parameters))
    )
    tune(steps=1, clip_mode="agc")
    tune("norm", steps=1)
    assert len(clipped[1]) - len(clipped[0]) == 2  # its weight and bias


# -- the same whatever the way there --


def test_every_step_starts_the_random_numbers_of_the_gpu_too(tune, monkeypatch):
    """No GPU is needed to see that they are started: the step takes it for one, the computation does not."""
    seeds = []
    step, loss = Trainer.step, Trainer._loss

    def on_gpu(self, number, batches):
        self.device = torch.device("cuda")
        return step(self, number, batches)

    def on_cpu(self, number, batch):
        self.device = torch.device("cpu")
        return loss(self, number, batch)

    monkeypatch.setattr(Trainer, "step", on_gpu)
    monkeypatch.setattr(Trainer, "_loss", on_cpu)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    tune(steps=2)
    assert len(set(seeds)) == 2


def test_accumulated_batches_are_one_batch(tune):
    """Mixing included: a step's images are mixed alike however they are shared out."""
    mixed = {"mixup": 0.8, "cutmix": 1.0, "reprob": 0.5}
    whole = tune("whole", batch_size=12, **mixed)
    parts = tune("parts", batch_size=4, grad_accum_steps=3, **mixed)
    for a, b in zip(whole.epochs, parts.epochs, strict=True):
        assert a.train_loss == pytest.approx(b.train_loss, rel=1e-5)
    difference = [
        float((a - b).abs().max())
        for a, b in zip(weights(whole.folder).values(), weights(parts.folder).values(), strict=True)
    ]
    assert max(difference) < 1e-4  # 6 steps of Adam at 1e-3


def test_matched_features_are_the_same_loss_however_a_step_is_shared_out(tune, tiny_vit):
    given = {"teacher": tiny_vit.path, "label_weight": 0, "feature_weight": 1.0, "steps": 1, "aug": False}
    whole, parts = tune("whole", **given), tune("parts", batch_size=4, grad_accum_steps=3, **given)
    assert parts.epochs[0].train_loss == pytest.approx(whole.epochs[0].train_loss, rel=1e-5)


def test_workers_change_nothing(tune):
    alone, helped = tune("alone", workers=0, reprob=0.5), tune("helped", workers=2, reprob=0.5)
    assert same(weights(alone.folder), weights(helped.folder))


def test_the_callers_random_numbers_go_on(tune):
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    tune()
    assert draw() == expected


def test_another_seed_is_another_run(tune):
    assert not same(weights(tune("a").folder), weights(tune("b", seed=1).folder))


@pytest.mark.parametrize(("batch_size", "parts"), [(4, 2), (6, 3), (3, 2), (1, 5)])
def test_every_image_comes_once_an_epoch_and_partners_share_a_part(batch_size, parts):
    batches = StepBatches(47, batch_size=batch_size, parts=parts, seed=3)
    for epoch in (0, 1):
        seen = []
        for within in range(batches.steps_per_epoch):
            step = epoch * batches.steps_per_epoch + within
            whole = batches.of_step(step)[1]
            partner = dict(zip(whole, reversed(whole), strict=True))
            for number in range(parts):
                keys = batches.part(step, number)
                assert {key[0] for key in keys} == {epoch}
                indices = [index for _, index in keys]
                seen += indices
                if batch_size % 2 == 0:
                    assert [partner[index] for index in indices] == indices[::-1]
        assert len(seen) == len(set(seen)) == 47 // (batch_size * parts) * batch_size * parts


# -- nothing is lost --


@pytest.fixture
def kill(monkeypatch):
    """Ends the run at the n-th call of something, as if the process had gone."""

    def at(target, name, call, *, before=True):
        original, calls = getattr(target, name), []

        def stand_in(*args, **kwargs):
            calls.append(None)
            if len(calls) == call and before:
                raise Killed
            found = original(*args, **kwargs)
            if len(calls) == call:
                raise Killed
            return found

        monkeypatch.setattr(target, name, stand_in)

    yield at
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("target", "name", "call", "save_every"),
    [
        (Trainer, "step", 2, 0),  # before anything was saved
        (Trainer, "step", 5, 0),  # in an epoch: back to its beginning
        (Trainer, "step", 6, 1),  # in an epoch: back to the last save
        (saving, "write_slim", 2, 1),  # while last.safetensors is written
        (RunFolder, "write_state", 4, 1),  # between last.safetensors and state.pt
        (RunFolder, "write_summary", 2, 0),
        (measuring_module, "evaluate", 2, 0),
    ],
)
@pytest.mark.parametrize("options", [{"model_ema": True, "drop_path": 0.2, "mixup": 0.5}], ids=["ema"])
def test_a_run_cut_off_anywhere_goes_on_to_the_same_end(
    tune, tmp_path, kill, monkeypatch, target, name, call, save_every, options
):
    whole = tune("whole", epochs=3, save_every=save_every, **options)
    kill(target, name, call)
    with pytest.raises(Killed):
        tune("cut", epochs=3, save_every=save_every, **options)
    monkeypatch.undo()
    again = resume(tmp_path / "cut")
    for file in ("last.safetensors", "best.safetensors"):
        assert same(weights(whole.folder, file), weights(again.folder, file))
    assert again.epochs == whole.epochs
    summaries = [(result.folder / "summary.csv").read_bytes() for result in (whole, again)]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}])
def test_what_a_killed_write_left_behind_is_removed(tune, options):
    folder = tune().folder
    left = folder / ".state.pt.29043ad2701d.tmp"
    left.write_bytes(b"half")
    resume(folder) if "resume" in options else tune(**options)
    assert not left.exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    write_whole(path, b"old", overwrite=True)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_whole(path, b"new", overwrite=True)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_tells_how_to_go_on(tune, tmp_path, monkeypatch, number):
    whole = tune("whole")
    step = Trainer.step

    def stopped_in(self, count, batches):
        if count == 3:
            os.kill(os.getpid(), number)
        return step(self, count, batches)

    monkeypatch.setattr(Trainer, "step", stopped_in)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=r"after step 4 of 6.*mhacut finetune --resume"):
        tune("cut")
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert RunFolder(tmp_path / "cut").read_state()["step"] == 4
    again = resume(tmp_path / "cut")
    assert same(weights(whole.folder), weights(again.folder))
    assert again.epochs == whole.epochs


def interrupt_every_step(monkeypatch):
    step = Trainer.step

    def stopped_in(self, count, batches):
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, count, batches)

    monkeypatch.setattr(Trainer, "step", stopped_in)


@pytest.mark.parametrize(("at", "message"), [(2, "after step 3 of 6"), (3, "all 6 steps are done and saved")])
def test_who_asks_to_stop_while_accuracy_is_measured_is_answered_at_once(tune, monkeypatch, at, message):
    told = []
    measure = measuring_module.evaluate
    calls = []  # before the first step, after each of two epochs

    def asked_in(*given, **named):
        calls.append(len(told))
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*given, **named)

    monkeypatch.setattr(measuring_module, "evaluate", asked_in)
    with pytest.raises(Interrupted, match=message):
        tune(reporter=Capture(told))
    answer = "stopping once this is measured and saved; asked again, at once"
    assert told[calls[at - 1]] == answer
    assert told.count(answer) == 1


def test_an_interruption_once_all_is_saved_says_so(tune, monkeypatch):
    measure = measuring_module.evaluate
    calls = []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 4:  # before, after each of two epochs, and the file
            raise KeyboardInterrupt
        return measure(*given, **named)

    monkeypatch.setattr(measuring_module, "evaluate", interrupted)
    with pytest.raises(Interrupted, match=r"all 6 steps are done and saved; .*best\.safetensors was not"):
        tune()


def test_nothing_reads_images_any_more_when_it_is_told_that_training_stopped(tune, monkeypatch):
    # What is told keeps the frames that it passed alive, and in them the loader.
    interrupt_every_step(monkeypatch)
    before = set(multiprocessing.active_children())
    with pytest.raises(Interrupted) as told:
        tune("cut", workers=2)
    assert told.value.__traceback__ is not None
    assert set(multiprocessing.active_children()) <= before


def test_the_command_to_go_on_with_can_be_pasted(tune, monkeypatch):
    interrupt_every_step(monkeypatch)
    with pytest.raises(Interrupted, match=r"--resume '[^']*/my run'$"):
        tune("my run")


def test_a_run_cut_off_before_anything_was_saved_says_that_it_begins_anew(tune, tmp_path, kill):
    kill(Trainer, "step", 2)
    with pytest.raises(Killed):
        tune("cut", steps=2)
    told = []
    resume(tmp_path / "cut", reporter=Capture(told))
    assert any("no step was saved, beginning with the first" in text for text in told)


def test_resuming_a_finished_run_does_nothing_more(tune):
    result = tune()
    assert resume(result.folder).epochs == result.epochs


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_files(tune, tmp_path, monkeypatch):
    step = Trainer.step

    def diverged(self, number, batches):
        loss, images = step(self, number, batches)
        return (float("nan") if number == 4 else loss), images

    monkeypatch.setattr(Trainer, "step", diverged)
    with pytest.raises(
        MhacutError, match=r"loss became nan at step 5 of 6; .*run keeps .* after step 3.*smaller lr"
    ):
        tune()
    folder = tmp_path / "run"
    assert RunFolder(folder).read_state()["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())
    assert mhacut.load_model(folder / "best.safetensors") is not None


def test_a_run_is_not_written_over(tune, slim, images, tmp_path):
    tune()
    with pytest.raises(OutputError, match=r"holds a run already.*resume="):
        tune()
    assert tune(overwrite=True).steps == 6
    held = tmp_path / "held"
    held.mkdir()
    (held / "last.safetensors").write_bytes(slim.read_bytes())
    with pytest.raises(OutputError, match="is the input"):
        mhacut.finetune(held / "last.safetensors", output=held, overwrite=True, data_dir=images, batch_size=6)
    with pytest.raises(OutputError, match="is the input"):
        tune(teacher=tmp_path / "run" / "best.safetensors", overwrite=True)
    assert (tmp_path / "run" / "best.safetensors").exists()


def test_another_model_or_other_data_are_refused_by_name(tune, slim, images, tiny_vit, tmp_path, monkeypatch):
    result = tune()
    fewer = tmp_path / "fewer"
    for path in (images / "train").rglob("*.png"):
        if path.name != "5.png":
            target = fewer / path.relative_to(images)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="training images"):
        resume(result.folder, data_dir=fewer)
    shutil.copytree(images / "train", tmp_path / "moved" / "train")
    shutil.copytree(images / "val" / "c0", tmp_path / "moved" / "val" / "c0")
    for label in range(1, CLASSES):
        shutil.copytree(images / "val" / "c0", tmp_path / "moved" / "val" / f"c{label}")
    assert resume(result.folder, data_dir=tmp_path / "moved").steps == 6  # the same names and labels
    (tmp_path / "moved" / "val" / "c3" / "0.png").unlink()
    with pytest.raises(CheckpointError, match="validation images"):
        resume(result.folder, data_dir=tmp_path / "moved")
    with pytest.raises(CheckpointError, match="slim file"):
        resume(result.folder, checkpoint=result.output)
    with pytest.raises(CheckpointError, match=r"images per step .12, now 6"):
        resume(result.folder, batch_size=6)
    with pytest.raises(UsageError, match=r"lr=0.5: the run in .* was started with 0.001"):
        resume(result.folder, lr=0.5)
    with pytest.raises(UsageError, match=r"resume=.*no run to go on with"):
        resume(tmp_path / "nothing")
    # Shared out otherwise, the step is the same.
    assert resume(result.folder, batch_size=6, grad_accum_steps=2).steps == 6


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x80\x04K."])
def test_a_damaged_state_is_refused(tune, content):
    result = tune()
    (result.folder / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state.pt"):
        resume(result.folder)


def test_a_state_runs_nothing(tune, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    result = tune()
    torch.save({"version": 1, "step": Evil()}, result.folder / "state.pt")
    with pytest.raises(CheckpointError, match=r"state.pt"):
        resume(result.folder)
    assert not (tmp_path / "ran").exists()


# -- data --


def test_missing_data_is_refused(tune, images, slim, tmp_path):
    with pytest.raises(UsageError, match="give data_dir or dataset"):
        tune(data_dir=None)
    with pytest.raises(DataError, match="no such directory"):
        tune(data_dir=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no split 'other'.*train_split"):
        tune(train_split="other")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes((images / "train" / "c0" / "0.png").read_bytes())
    with pytest.raises(DataError, match="without labels; give a teacher"):
        tune(data_dir=tmp_path / "flat")
    with pytest.raises(DataError, match=r"42 images .* fewer than the 64"):
        tune(batch_size=64)


def test_classes_that_are_not_the_heads_are_refused(tune, images, tmp_path):
    for name in ("c0", "c1"):
        (tmp_path / "two" / "train" / name).mkdir(parents=True)
        for number in range(6):
            source = images / "train" / name / f"{number}.png"
            (tmp_path / "two" / "train" / name / f"{number}.png").write_bytes(source.read_bytes())
    with pytest.raises(DataError, match="2 class folders"):
        tune(data_dir=tmp_path / "two")
    (tmp_path / "two" / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="without images: empty"):
        tune(data_dir=tmp_path / "two")


def test_unreadable_images_are_told_and_another_stands_in(tune, images, tmp_path):
    broken = tmp_path / "broken"
    for path in images.rglob("*.png"):
        target = broken / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        bad = path.parts[-3:] == ("train", "c2", "3.png")
        target.write_bytes(b"no picture" if bad else path.read_bytes())
    result = tune(data_dir=broken, workers=2)
    assert [path.endswith("c2/3.png") for path in result.unreadable] == [True]
    assert result.steps == 6
    for label in range(CLASSES):
        (broken / "train" / f"c{label}" / "0.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"\d of 42 images cannot be read, first"):
        tune("many", data_dir=broken)
    for path in (broken / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="one batch cannot be read, first"):
        tune("all", data_dir=broken)


def test_a_teacher_that_does_not_fit_is_refused(tune, tmp_path):
    import timm
    from safetensors.torch import save_file

    other = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    told = {"teacher_model": "vit_tiny_patch16_224", "teacher_model_args": {"depth": 1, "img_size": 32}}
    with pytest.raises(CheckpointError, match="has 3 classes, the slim model 7"):
        tune(teacher=tmp_path / "other.safetensors", **told)


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


# -- options and the command line --


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opt": "adamv"}, "opt='adamv': no option 'adamv'; did you mean"),
        ({"epochs": 0}, "epochs=0"),
        ({"mixup": 1.0, "batch_size": 7}, "batch_size=7: expected an even number with mixup or cutmix"),
        ({"labels": False}, "labels=False: expected a teacher"),
        ({"feature_weight": 1.0}, "feature_weight=1.0: expected a teacher"),
        ({"scale": (0.5, 1.5)}, "scale=1.5: expected above 0, at most 1"),
        ({"scale": (0.9, 0.5)}, "the smallest, then the largest"),
        ({"aa": "nonsense-m9"}, "^aa='nonsense-m9': timm"),
        ({"amp": True, "amp_dtype": "float16", "device": "cpu"}, "needs CUDA"),
        ({"warmup_epochs": 3.0}, "warmup_epochs=3.0: is 9 steps"),
        ({"learning_rate": 1.0}, "no option 'learning_rate'"),
    ],
)
def test_what_makes_no_sense_is_refused(tune, options, message):
    with pytest.raises(UsageError, match=message):
        tune(**options)


def test_a_dense_file_is_sent_to_prune(tiny_vit, images):
    with pytest.raises(CheckpointError, match="is no slim file; cut it first: mhacut prune"):
        mhacut.finetune(tiny_vit.path, data_dir=images)


def cli(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_and_its_files(slim, images, tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1e-3\nbatch-size: 12\nremode: rand\nworkers: 0\nno-amp: true\n")
    out = tmp_path / "out"
    given = ["finetune", slim, "--data-dir", images, "-o", out, "--config", tmp_path / "run.yaml"]
    result = cli(*given, "--epochs", "2", "--scale", "0.7,1", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["steps"] == 6
    assert document["output"] == str(out / "best.safetensors")
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert list(rows[0]) == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    kept = yaml.safe_load((out / "args.yaml").read_text())
    assert (kept["lr"], kept["remode"], kept["epochs"], kept["scale"]) == (1e-3, "rand", 2, [0.7, 1.0])
    # What was kept is itself a configuration, and gives the same again.
    again = cli("finetune", "--config", out / "args.yaml", "-o", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    assert same(weights(out), weights(tmp_path / "again"))
    assert "top-1, % of 14 images (best epoch)" in again.stdout
    resumed = cli("finetune", "--resume", out, "-j", "1")
    assert resumed.exit_code == 0, resumed.stderr


def test_the_command_refuses(slim, images, tmp_path):
    missing = cli("finetune", "--data-dir", images)
    assert missing.exit_code == 2
    assert "SLIM is missing" in missing.stderr
    (tmp_path / "bad.yaml").write_text("mixup_alfa: 1\n")
    bad = cli("finetune", slim, "--config", tmp_path / "bad.yaml")
    assert bad.exit_code == 2
    assert "no option 'mixup_alfa'; did you mean 'mixup" in bad.stderr


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_options(recipe):
    values = read_config(recipe, FinetuneOptions.options(), recipe.name)
    options = FinetuneOptions.from_flat(checkpoint="a", **values)
    assert {key: options.flat()[key] for key in values} == values
    assert "Cost: " in recipe.read_text()


def test_help_shows_rarer_options_last():
    shown = " ".join(cli("finetune", "--help").stdout.split())
    common, rare = shown.split(" Rarer options: ")
    assert "--mixup ALPHA Alpha of mixup; 0 for none. (default: 0.0)" in common
    assert (
        "--scale A,B Smallest and largest share of the area that a random crop keeps. (default: 0.5,1)"
        in rare
    )
    assert "--ratio A,B Smallest and largest aspect ratio of a random crop. (default: 0.75,1.333)" in rare


def test_flat_names_are_unique_and_round_trip():
    options = FinetuneOptions.from_flat(checkpoint="a", lr=0.5, scale=(0.1, 0.2), teacher="b", workers=3)
    assert FinetuneOptions.from_flat(**options.flat()) == options
    assert len(FinetuneOptions.options()) == len(options.flat())


def test_a_log_that_is_not_installed_is_told_before_the_work(tune, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MhacutError, match=r"pip install 'mhacut\[wandb\]'"):
        tune(log="wandb", output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UsageError, match="log='mlflow': expected one of png"):
        tune(log="mlflow")


def test_a_log_that_fails_does_not_end_the_training(tune, monkeypatch):
    told = []
    monkeypatch.setattr(run_module, "check_logs", lambda names: None)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    assert tune(log="wandb", reporter=Capture(told)).steps == 6
    assert any("log='wandb': gave up" in text for text in told)


def test_rows_reach_a_log(tune, monkeypatch):
    sent = []

    class Run:
        log, finish = staticmethod(sent.append), staticmethod(lambda: sent.append("end"))

    monkeypatch.setattr(run_module, "check_logs", lambda names: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: Run))
    result = tune(log="wandb")
    assert [row["train_loss"] for row in sent[:-1]] == [row.train_loss for row in result.epochs]
    assert sent[-1] == "end"


class Capture:
    """A reporter that remembers log messages."""

    def __init__(self, told):
        self.log = told.append

    def start(self, stage):
        pass

    def advance(self, done, total, detail=""):
        pass


def benchmark(name, monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location(name, RECIPES.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    module.main()


def test_the_table_of_fine_tuning_can_be_made_in_parts(slim, images, tiny_vit, tmp_path, monkeypatch, capsys):
    given = [slim, "--teacher", tiny_vit.path, "--data-dir", images, "--output", tmp_path, "--steps", "2"]
    given += ["--batch-size", "12", "--teaching", "teacher", "--seeds"]
    benchmark("finetune_table", monkeypatch, *given, "1")
    first = json.loads((tmp_path / "slim-2-teacher-1" / "finished.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1].startswith("| slim | 2 | the dense model and labels |")
    written = (tmp_path / "slim-2-teacher-1" / "state.pt").stat().st_mtime_ns
    benchmark("finetune_table", monkeypatch, *given, "1", "2")
    assert (tmp_path / "slim-2-teacher-1" / "state.pt").stat().st_mtime_ns == written
    second = json.loads((tmp_path / "slim-2-teacher-2" / "finished.json").read_text())
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[4].startswith(f"{(first['after'] + second['after']) / 2:.2f} ± ")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves files open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_throughput_benchmark_runs_both_loops(slim, images, monkeypatch, capsys):
    given = [slim, "--data-dir", images, "--batch-size", "6", "--steps", "1", "--turns", "2"]
    benchmark("finetune_throughput", monkeypatch, *given)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("images per second: mhacut ")
    assert "median ratio" in lines[-2]


SCRIPT = """
import os, signal, sys
import mhacut
from mhacut.finetuning.training import Trainer
from mhacut.finetuning import folder

where, at = sys.argv[1], int(sys.argv[2])
calls = 0

def die(original):
    def stand_in(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return stand_in

if where == "step":
    Trainer.step = die(Trainer.step)
else:
    folder.os.replace = die(folder.os.replace)  # its temporary file is complete, its name still the old one
mhacut.finetune(sys.argv[3], data_dir=sys.argv[4], output=sys.argv[5], batch_size=12, epochs=2, lr=1e-3,
                workers=1, save_every=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("where", "at"), [("step", 5), ("write", 9), ("write", 10)])
def test_kill_9_and_resume(tune, slim, images, tmp_path, where, at):
    whole = tune("whole", save_every=1)
    arguments = [where, str(at), str(slim), str(images), str(tmp_path / "cut")]
    killed = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = resume(tmp_path / "cut")
    assert same(weights(whole.folder), weights(again.folder))
    assert same(weights(whole.folder, "best.safetensors"), weights(again.folder, "best.safetensors"))
    assert again.epochs == whole.epochs


@pytest.mark.slow
def test_two_processes_are_one(tune, slim, images, tiny_vit, tmp_path):
    """Losses of every epoch to 1e-5 relative, accuracy the same, mixing included; only the first prints."""
    options = {"teacher": tiny_vit.path, "mixup": 0.8, "save_every": 1}
    alone = tune("alone", batch_size=12, **options)
    flags = ["--data-dir", images, "--teacher", tiny_vit.path, "--mixup", "0.8", "--save-every", "1"]
    flags += ["--epochs", "2", "--lr", "1e-3", "-j", "0", "-b", "6", "-o", tmp_path / "both", "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "mhacut", "finetune", slim, *map(str, flags)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["processes"] == 2
    for row, expected in zip(document["epochs"], alone.epochs, strict=True):
        assert row["train_loss"] == pytest.approx(expected.train_loss, rel=1e-5)
        assert row["eval_loss"] == pytest.approx(expected.eval_loss, rel=1e-4)
        assert row["eval_top1"] == pytest.approx(expected.eval_top1)
    assert document["before"]["images"] == 14
    # What two began, one can end.
    resumed = resume(tmp_path / "both", batch_size=12)
    assert resumed.steps == 6


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_ends_all_and_is_said_once(tune, slim, images, tmp_path):
    """The second process waits for the first, which must not write over a run; or both find no images."""
    held = tune("held", steps=1).folder
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = ["-b", "6", "-j", "0", "--steps", "1"]
    for given, message in (
        (["--data-dir", images, "-o", held], "holds a run already"),
        (["--data-dir", tmp_path / "none", "-o", tmp_path / "new"], "no such directory"),
    ):
        command = [*launcher, "-m", "mhacut", "finetune", slim, *map(str, given), *flags]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        own = done.stderr.partition("torch.distributed.elastic")[0]  # the launcher has more to say
        assert done.returncode != 0
        assert own.count(message) == 1, done.stderr
        assert "did not foresee" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGTERM)]
)
def test_a_command_that_is_asked_to_stop_can_go_on(tune, slim, images, tmp_path, processes, number):
    """All processes stop after the same step, whoever heard it first.

    A terminal's Ctrl-C, and many a scheduler, reach the processes that read images as well.
    """
    workers = 2 if processes == 1 else 0
    flags = ["--data-dir", images, "--epochs", "400", "--lr", "1e-3", "-j", workers, "-b", 12 // processes]
    flags += ["-o", tmp_path / "cut", "--save-every", "1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"]
    command = [sys.executable, *(launcher if processes > 1 else ["-m"]), "mhacut", "finetune", slim, *flags]
    with subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        deadline = time.monotonic() + 200
        while not (tmp_path / "cut" / "summary.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        if processes == 1:
            os.killpg(run.pid, number)
        else:
            run.send_signal(number)
        _, stderr = run.communicate(timeout=200)
    assert "all is saved. Go on with: " in stderr
    assert f"mhacut finetune --resume {tmp_path / 'cut'}" in stderr
    if processes == 1:
        assert run.returncode == 130
    state = RunFolder(tmp_path / "cut").read_state()
    assert f"stopped after step {state['step']} of 1200" in stderr
    assert state["step"] < 1200


def test_a_teacher_that_cannot_take_the_images_is_refused_before_anything_is_written(tune, tmp_path):
    teacher = timm.create_model("flatten_pvt_v2_b0", img_size=64, num_classes=CLASSES)
    timm.models.save_for_hf(teacher, str(tmp_path / "teacher"), safe_serialization=True)
    with pytest.raises(CheckpointError, match="cannot take the slim model's images, 3x32x32"):
        tune(teacher=tmp_path / "teacher", name="none")
    assert not (tmp_path / "none").exists()


def test_nothing_holds_the_group_of_processes_when_they_part(tmp_path):
    # Else its destructor can wait for a thread that waits for Python's lock.
    trainer = object.__new__(Trainer)
    trainer.model, trainer.options = torch.nn.Linear(2, 2), FinetuneOptions.from_flat(checkpoint="a")
    trainer.processes = Processes(0, 2, torch.device("cpu"))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        trainer.connect()
        network = weakref.ref(trainer.network)
        trainer.network(torch.randn(3, 2)).sum().backward()
        assert network() is not trainer.model
        trainer.disconnect()
        assert network() is None
        assert trainer.network is trainer.model
    finally:
        torch.distributed.destroy_process_group()
