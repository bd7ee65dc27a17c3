"""What a run learns from, and that it is the same whatever the way there."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml

import mhacut
from helpers.checkpoints import make_slim
from helpers.cli import run, succeed
from helpers.files import save_dense
from helpers.finetuning import Killed, resume, weights
from helpers.jobs import Recorder
from helpers.models import same
from mhacut.checkpoint.load import open_checkpoint
from mhacut.errors import UsageError
from mhacut.finetuning.folder import BEST, RunFolder
from mhacut.finetuning.images import StepBatches
from mhacut.finetuning.training import Trainer, _checkpoint_gradients


@pytest.mark.slow
def test_labels_alone_are_learnt(tune, slim):
    result = tune(epochs=8, aug=False, lr=3e-3)
    assert result.steps == 24
    losses = [row.train_loss for row in result.epochs]
    assert losses[-1] < 0.7 * losses[0]
    assert result.after.top1 == max(row.eval_top1 for row in result.epochs)
    assert result.after.top1 > result.before.top1
    assert result.improved
    assert result.output.name == "best.safetensors"


def test_the_start_is_the_best_where_no_epoch_is_better(tune, slim):
    result = tune(lr=1e-12)  # and so none is
    assert not result.improved
    assert max(row.eval_top1 for row in result.epochs) <= result.before.top1 == result.after.top1
    assert result.output.name == "best.safetensors"
    start, best = mhacut.load_model(slim).state_dict(), mhacut.load_model(result.output).state_dict()
    assert all(torch.equal(best[name], start[name]) for name in start)
    assert open_checkpoint(result.output).record.history[-1]["steps"] == 0


@pytest.mark.slow
def test_without_validation_images_the_best_is_judged_on_held_out_ones(tune, slim):
    better = tune("better", eval_images=0, lr=3e-3, epochs=6, aug=False)
    assert better.data == "42 images under train/ (with labels), 4 of them held out"
    losses = [row.eval_loss for row in better.epochs]
    assert (better.improved, better.before, better.output.name) == (True, None, "best.safetensors")
    best = open_checkpoint(better.output).record.history[-1]["steps"] // 3 - 1
    assert losses[best] == min(losses) == better.losses[1] < better.losses[0]
    assert f"{better.losses[1]:.4f}" in repr(better)
    worse = tune("worse", eval_images=0, lr=10.0, steps=2)
    assert worse.improved is False
    start = mhacut.load_model(slim).state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(worse.folder, BEST).items())


@pytest.mark.slow
def test_the_learning_rate_is_tried_and_nothing_else_depends_on_the_trial(tune, tmp_path, at_call):
    reporter = Recorder()
    undo = at_call(Trainer, "step", 2)  # in the trial
    with pytest.raises(Killed):
        tune(lr=None)
    undo()
    resume(tmp_path / "run", reporter=reporter)
    rate = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())["lr"]
    begin = f"learning rate {rate:g}: after 3 steps"
    (message,) = [text for text in reporter.messages if text.startswith(begin)]
    after, before = re.findall(r"images (\S+) \(before (\S+)\)$", message)[0]
    assert float(after) < float(before)
    assert same(weights(tmp_path / "run"), weights(tune("given", lr=rate).folder))


def test_few_images_are_learnt_from_in_small_steps(tune):
    tuned = tune(batch_size=None, epochs=1)
    assert tuned.steps == 42 // 16
    assert open_checkpoint(tuned.output).record.history[-1]["images_per_step"] == 16


@pytest.mark.slow
def test_the_dense_model_beside_the_slim_file_teaches_it(tiny_vit, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    dense, slim = home / "dense.safetensors", home / "slim.safetensors"
    (tmp_path / "store").mkdir()
    dense.symlink_to(shutil.copy(tiny_vit.path, tmp_path / "store"))  # as in the cache of the hub
    given = {**tiny_vit.options, "effort": "fast", "latency": False}
    mhacut.prune(dense, flops="60%", calibration_images=8, output=slim, **given)

    def tuned(name, *flags):
        given = [slim, "--data-dir", images, "-b", "12", "-j", "0", "--steps", "1", "--lr", "1e-3"]
        done = succeed("finetune", *given, "-o", tmp_path / name, *flags)
        record = open_checkpoint(tmp_path / name / "last.safetensors").record
        return done.stderr, record.history[-1]["teacher_sha256"]

    digest = open_checkpoint(dense).sha256
    said, teacher = tuned("beside", "--no-labels")
    assert f"distilling from the dense model {dense} (--no-find-teacher trains on labels only)" in said
    assert (teacher, resume(tmp_path / "beside").steps) == (digest, 1)
    assert tuned("off", "--no-find-teacher", "--label-weight", "1")[1] is None
    other = mhacut.load_model(slim)  # given another classifier, of which the dense model knows nothing
    other.reset_classifier(9)
    mhacut.save_model(other, home / "nine.safetensors", like=slim)
    refused = run("finetune", home / "nine.safetensors", "--data-dir", images, "--no-labels", "-b", "12")
    assert "error: --no-labels: expected a --teacher" in refused.stderr
    shutil.move(dense, tmp_path)  # the working directory
    assert tuned("here")[1] == digest
    dense.write_bytes(slim.read_bytes())  # another file of that name is not what it was cut from
    (tmp_path / "dense.safetensors").unlink()
    said, teacher = tuned("other")
    assert (
        "training on labels only. Distilling the dense model usually gives more accuracy: --teacher dense.saf"
        in said
    )
    assert teacher is None


@pytest.mark.slow
def test_a_teacher_is_learnt_from_without_labels(tune, tiny_vit, slim, images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(sorted((images / "train").rglob("*.png"))):
        (flat / f"{number}.png").write_bytes(path.read_bytes())
    result = tune(data_dir=flat, teacher=tiny_vit.path, epochs=20, lr=3e-3, aug=False)
    assert "without labels" in result.data
    assert result.after is None
    assert result.output.name == "best.safetensors"
    before, after = (
        mhacut.inspect(path, compare=tiny_vit.path, data_dir=flat).comparison.divergence
        for path in (slim, result.output)
    )
    assert after < 0.8 * before


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
    shown = run("inspect", result.folder / "last.safetensors")
    assert "step 2: finetune, 6 steps of 12 images, no teacher, seed 42" in shown.stdout


@pytest.mark.slow
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


def test_a_model_without_grad_checkpointing_says_so():
    model = timm.create_model("convit_tiny", img_size=32, embed_dim=12, depth=1)
    with pytest.raises(UsageError, match="grad_checkpointing=True: this model does not support it"):
        _checkpoint_gradients(model)


@pytest.mark.slow
def test_the_average_is_what_is_written(tune):
    tune("plain")
    averaged = tune("average", model_ema=True, model_ema_decay=0.9, model_ema_warmup=False)
    folder = averaged.folder
    state = RunFolder(folder).read_state()["trainer"]
    assert same(state["average"], weights(folder))
    assert not same(state["model"], weights(folder))
    assert same(state["model"], weights(folder.parent / "plain"))


def test_accuracy_of_mixed_precision_is_what_evaluate_measures(tune, slim, images):
    result = tune(amp=True, epochs=1)
    for measured, file in ((result.before, slim), (result.after, result.output)):
        expected = mhacut.evaluate(file, data_dir=images, workers=0).evaluation
        assert (measured.top1, measured.loss) == (expected.top1, expected.loss)


@pytest.mark.slow
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


@pytest.mark.slow
def test_workers_change_nothing(tune):
    alone, helped = tune("alone", workers=0, reprob=0.5), tune("helped", workers=2, reprob=0.5)
    assert same(weights(alone.folder), weights(helped.folder))


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


def test_a_single_output_is_learnt_from_the_teacher_and_not_from_labels(tiny_vit, images, tmp_path):
    dense, slim = tmp_path / "dense.safetensors", tmp_path / "slim.safetensors"
    args = {**tiny_vit.args, "num_classes": 1}
    torch.manual_seed(0)
    save_dense(timm.create_model(tiny_vit.architecture, **args), dense)
    make_slim(dense, slim, model=tiny_vit.architecture, model_args=args)
    given = {"data_dir": images, "batch_size": 12, "lr": 1e-3, "aug": False, "workers": 0}
    result = mhacut.finetune(slim, teacher=dense, epochs=4, output=tmp_path / "run", **given)
    losses = [row.train_loss for row in result.epochs]
    assert 0 < losses[-1] < 0.7 * losses[0]
    assert result.after is None  # all images are of the only class
    with pytest.raises(UsageError, match="has a single output, so it needs a teacher to learn from"):
        mhacut.finetune(slim, output=tmp_path / "labels", **given)


def test_clipping_by_agc_leaves_the_head_alone_as_timm_does(tune, slim):
    """Its gradient is large when training begins, and would be held back."""
    tuned = tune(opt="sgd", weight_decay=0, steps=1, clip_mode="agc", clip_grad=1e-6)
    before = weights(slim.parent, slim.name)
    moved = {
        name: float((tensor - before[name]).abs().max()) for name, tensor in weights(tuned.folder).items()
    }
    head = moved.pop("head.weight")
    assert head > 100 * max(change for name, change in moved.items() if name != "head.bias")
