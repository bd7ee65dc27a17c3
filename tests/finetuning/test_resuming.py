"""A run that is killed at any point resumes to the same result."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from functools import cache

import pytest
import torch
from timm.optim import list_optimizers

import mhacut
from helpers.checkpoints import Hostile
from helpers.cli import refusal, tree
from helpers.cli import run as cli
from helpers.finetuning import Killed, resume, small_trainer, take_steps, weights
from helpers.jobs import Recorder
from helpers.models import same
from mhacut.errors import CheckpointError, MhacutError, OutputError, UsageError
from mhacut.finetuning import run as run_module
from mhacut.finetuning import saving
from mhacut.finetuning.folder import RunFolder
from mhacut.finetuning.training import Trainer

LONGER = {"epochs": 2, "model_ema": True, "drop_path": 0.2, "mixup": 0.5}
ALL = {"args.yaml", "state.pt", "last.safetensors", "best.safetensors", "summary.csv"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def steps_saved(folder):
    return RunFolder(folder).read_state()["progress"]["step"]


def nan():
    return lambda *given: (float("nan"), 12)


@pytest.fixture(scope="module")
def uncut(tune_in, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    return cache(lambda save_every: tune_in(folder / str(save_every), save_every=save_every, **LONGER))


@pytest.mark.parametrize(
    ("target", "name", "call", "save_every"),
    [
        (Trainer, "step", 2, 0),  # before anything was saved
        (Trainer, "step", 5, 0),  # in an epoch: back to its beginning
        (Trainer, "step", 6, 1),  # in an epoch: back to the last save
        (saving, "write_slim", 3, 1),  # while last.safetensors is written
        (RunFolder, "write_state", 4, 1),  # between last.safetensors and state.pt
        (RunFolder, "write_summary", 2, 0),  # between state.pt and summary.csv
        (run_module, "evaluate", 2, 0),
    ],
)
@pytest.mark.slow
def test_a_run_cut_off_anywhere_goes_on_to_the_same_end(
    tune, uncut, tmp_path, at_call, target, name, call, save_every
):
    expected = uncut(save_every)
    undo = at_call(target, name, call)
    with pytest.raises(Killed):
        tune("cut", save_every=save_every, **LONGER)
    undo()
    again = resume(tmp_path / "cut")
    for file in ("last.safetensors", "best.safetensors"):
        assert same(weights(expected.folder, file), weights(again.folder, file))
    assert again.epochs == expected.epochs
    summaries = [(result.folder / "summary.csv").read_bytes() for result in (expected, again)]
    assert summaries[0] == summaries[1]


@pytest.mark.filterwarnings("ignore:It is highly recommended:UserWarning")
@pytest.mark.parametrize(
    "optimisers",
    [
        ("sgd", "adamw", "adafactor", "radam", "madgrad", "muon"),
        pytest.param(list_optimizers(), marks=pytest.mark.exhaustive),
    ],
)
def test_every_optimiser_goes_on_as_if_never_cut_off(tmp_path, optimisers):
    tried = 0
    for name in optimisers:
        try:
            uncut, again = small_trainer(opt=name), small_trainer(opt=name)
        except UsageError:  # needs a package, or second derivatives
            continue
        tried += 1
        take_steps(uncut, 0, 4)
        RunFolder(tmp_path).write_state({"trainer": uncut.state_dict()})
        take_steps(uncut, 4, 6)
        again.load_state_dict(RunFolder(tmp_path).read_state()["trainer"])
        take_steps(again, 4, 6)
        assert same(uncut.model.state_dict(), again.model.state_dict()), name
    assert tried == len(optimisers) or tried > 50


@pytest.mark.slow
def test_an_interrupted_run_names_the_command_that_continues_it(tune, finished_run, tmp_path, at_call):
    undo = at_call(Trainer, "step", 5, lambda: os.kill(os.getpid(), signal.SIGINT))
    readers, reporter = set(multiprocessing.active_children()), Recorder()
    with pytest.raises(KeyboardInterrupt) as raised:
        tune("my run", workers=2, reporter=reporter)
    # An exception keeps the frames that it passed alive, and in them the loader.
    assert raised.value.__traceback__ is not None
    assert set(multiprocessing.active_children()) <= readers
    undo()
    folder = tmp_path / "my run"
    command = f"Continue from the last save with: mhacut finetune --resume '{folder}'"
    assert f"stopped after step 4 of 6. {command}" in reporter.messages
    again = resume(folder)
    assert same(weights(finished_run.folder), weights(again.folder))
    assert again.epochs == finished_run.epochs


def test_resuming_a_finished_run_does_nothing_more(finished, finished_run):
    reporter, before = Recorder(), tree(finished)
    assert resume(finished, reporter=reporter).epochs == finished_run.epochs
    assert "all 6 steps are done; nothing left to train" in reporter.messages
    assert tree(finished) == before


def test_a_resumed_run_writes_to_its_own_directory_whatever_its_name(finished, finished_run, monkeypatch):
    monkeypatch.chdir(finished.parent)
    stated = finished / "args.yaml"
    stated.write_text(stated.read_text().replace(f"output: {finished_run.folder}", f"output: {finished}"))
    arguments = ["finetune", "--resume", "run"]
    for more in ([], ["-o", "./run/"], ["--config", "run/args.yaml"], ["--scale", "0.5,1"]):
        result = cli(*arguments, *more)
        assert (result.exit_code, "nothing left to train" in result.stderr) == (0, True), result.stderr
    for more, message in (
        (["-o", "other"], "--output other: a resumed run writes to run; leave the option out"),
        (["--overwrite"], "--overwrite: not allowed with --resume run, which continues the run"),
    ):
        assert message in refusal(finished, *arguments, *more, code=2)


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_inputs_only(finished, finished_run, images, tmp_path, monkeypatch):  # 57
    monkeypatch.chdir(tmp_path)
    fewer = shutil.copytree(images, tmp_path / "fewer")
    next((fewer / "train").rglob("*.png")).unlink()
    for flags, code, message in (
        (["-b", "6"], 1, "images per step (12, now 6), steps (6, now 14). Restore them, or"),
        (["--lr", "0.5"], 2, "--lr 0.5: the run in"),
        (["--opt", "sgd"], 2, "uses adamw; leave the option out, or start a new run"),
        (["--epochs", "1"], 2, "--epochs 1: the run in"),
        (["--data-dir", fewer], 1, "training images"),
        ([finished_run.output], 1, "slim file"),
    ):
        assert message in refusal(tmp_path, "finetune", *flags, "--resume", finished, code=code)
    # Shared out otherwise, the step is the same, and so are the images wherever they lie.
    moved = shutil.copytree(images, tmp_path / "moved")
    assert resume(finished, batch_size=6, grad_accum_steps=2, data_dir=moved).steps == 6
    arguments = finished / "args.yaml"
    arguments.write_text(arguments.read_text().replace("epochs: 2", "epochs: 1"))
    assert "inputs differ from the start of the run: steps (6, now 3)" in refusal(
        finished, "finetune", "--resume", finished
    )


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def change(**entries):
    def changed(file):
        state = torch.load(file, weights_only=True)
        torch.save({**state, **entries}, file)

    return changed


@pytest.mark.parametrize(
    ("damage", "how"),
    [
        (lambda file: file.unlink(), "is gone"),
        (lambda file: file.write_bytes(b""), "cannot be read ("),
        (cut, "cannot be read ("),
        (flip, "cannot be read (is damaged)"),
        (change(progress={"step": 1}), "does not fit this run (KeyError: 'before')"),
        (change(trainer={}), "does not fit this run (KeyError: 'optimizer')"),
        (
            change(trainer=small_trainer().state_dict()),
            "does not fit this run (ValueError: loaded state dict",
        ),
    ],
    ids=["gone", "empty", "cut", "flipped", "old", "no optimiser", "other model"],
)
def test_a_damaged_state_is_refused_in_a_line(finished, damage, how):
    damage(finished / "state.pt")
    (finished / "best.safetensors").unlink()  # and nothing is written anew
    line = refusal(finished, "finetune", "--resume", finished).splitlines()[-1]
    assert line.startswith(f"error: {finished / 'state.pt'}: {how}")
    assert "last.safetensors holds its weights; --overwrite instead of --resume starts again" in line


def test_a_state_runs_nothing(finished, tmp_path):
    change(progress=Hostile(os.system, f"touch {tmp_path}/ran"))(finished / "state.pt")
    with pytest.raises(CheckpointError, match=r"state.pt"):
        resume(finished)
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_files(tune, tmp_path, at_call):
    at_call(Trainer, "step", 5, nan)
    with pytest.raises(MhacutError, match=r"loss became nan at step 5 of 6\. .*smaller lr.*last saved"):
        tune()
    folder = tmp_path / "run"
    assert steps_saved(folder) == 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(folder).values())
    assert mhacut.load_model(folder / "best.safetensors") is not None


def test_overwriting_replaces_the_run_and_no_other_files(tune, finished):
    (finished / "tensorboard").mkdir()
    (finished / "tensorboard" / "events").write_text("of the earlier run")
    (finished / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"already holds a run.*resume="):
        tune()
    tune(overwrite=True, lr=1e-4, steps=2, save_every=1)
    assert names(finished) == {*ALL, "notes.txt"}
    assert same(weights(finished), weights(tune("alone", lr=1e-4, steps=2, save_every=1).folder))


def test_what_a_run_reads_is_never_replaced(tune, finished, slim, images, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    (held / "last.safetensors").write_bytes(slim.read_bytes())
    with pytest.raises(OutputError, match="is the input"):
        mhacut.finetune(held / "last.safetensors", output=held, overwrite=True, data_dir=images, batch_size=6)
    with pytest.raises(OutputError, match="is the input"):
        tune(teacher=finished / "best.safetensors", overwrite=True)
    assert names(finished) == ALL
