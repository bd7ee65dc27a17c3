"""With ``--overwrite``, an earlier run stays until the new one is saved for the first time."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

import mhacut
from helpers.cli import run, tree
from helpers.finetuning import Killed, resume, same, weights
from helpers.programs import BY_TWO, free_port
from mhacut.commands import finetune as command
from mhacut.errors import MhacutError, OutputError, UsageError
from mhacut.finetuning import folder as folder_module
from mhacut.finetuning.folder import RunFolder
from mhacut.finetuning.training import Trainer
from mhacut.runtime import files

ALL = {"args.yaml", "state.pt", "last.safetensors", "best.safetensors", "summary.csv"}


def names(folder):
    return {path.name for path in folder.iterdir()}


def diverged(monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda self, number, batches: (float("nan"), 12))


def full(monkeypatch):
    def fails(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    step = Trainer.step

    def first(self, number, batches):
        monkeypatch.setattr(files, "sync", fails)
        return step(self, number, batches)

    monkeypatch.setattr(Trainer, "step", first)


@pytest.mark.parametrize(
    ("happens", "message"),
    [(diverged, "nothing was saved yet, {} keeps its earlier run."), (full, "; {} keeps its earlier run\n")],
)
def test_an_overwritten_run_stays_until_the_new_one_is_saved(
    slim, images, finished, monkeypatch, happens, message
):  # 48
    (finished / "curve.png").write_text("of the earlier run")
    before = tree(finished)
    happens(monkeypatch)
    given = ["--data-dir", images, "-b", "12", "-j", "0", "--save-every", "1"]
    result = run("finetune", slim, *given, "--overwrite", "-o", finished)
    assert (result.exit_code, result.stdout) == (1, "")
    assert message.format(finished) in result.stderr
    assert tree(finished) == before


def test_so_it_does_where_images_cannot_be_read(tune, finished, images, tmp_path):
    bad = shutil.copytree(images, tmp_path / "bad")
    for file in list((bad / "train").rglob("*.png"))[::3]:
        file.write_bytes(b"no image")
    before = tree(finished)
    with pytest.raises(MhacutError, match="cannot be read"):
        tune(overwrite=True, data_dir=bad)
    assert tree(finished) == before


def test_a_killed_run_leaves_the_earlier_one_to_resume(tune, finished, finished_run, monkeypatch):
    before, left = tree(finished), finished / ".new-run.29043ad2701d.tmp"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda *given: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            tune(overwrite=True, lr=0.5)
    assert tree(finished) == before
    left.mkdir()
    (left / "last.safetensors").write_bytes(b"of a process that had no time to remove it")
    assert resume(finished).epochs == finished_run.epochs
    assert tree(finished) == before


def test_only_files_of_the_new_run_remain(tune, finished, images, tmp_path):
    shutil.copytree(images / "train", tmp_path / "unmeasured" / "train")
    result = tune(overwrite=True, data_dir=tmp_path / "unmeasured", steps=2, save_every=1)
    assert result.output == finished / "last.safetensors"
    assert names(finished) == ALL - {"best.safetensors"}
    alone = tune("alone", data_dir=tmp_path / "unmeasured", steps=2, save_every=1)
    assert same(weights(finished), weights(alone.folder))
    assert (finished / "summary.csv").read_bytes() == (alone.folder / "summary.csv").read_bytes()
    assert resume(finished).steps == 2


def test_what_was_cut_off_after_the_first_save_is_the_new_run(tune, finished, kill, monkeypatch):
    kill(Trainer, "step", 3)
    with pytest.raises(Killed):
        tune(overwrite=True, lr=1e-4, save_every=1)
    monkeypatch.undo()
    assert names(finished) == ALL - {"summary.csv"}  # the old one has gone, the new one has no epoch
    assert RunFolder(finished).read_state()["step"] == 2
    again = resume(finished)
    assert same(weights(finished), weights(tune("whole", lr=1e-4, save_every=1).folder))
    assert len(again.epochs) == 2


@pytest.mark.parametrize("call", range(2, 11))
def test_files_of_two_runs_are_never_taken_for_one(tune, finished, tmp_path, monkeypatch, call):
    """Killed before each rename of the first save: no later one is done, not even to put files back."""
    new = shutil.copytree(tune("new", lr=1e-4).folder, tmp_path / "hidden")
    before = tree(finished)
    failing(monkeypatch, range(call, 99), Killed)
    with pytest.raises(OutputError, match="cannot be put back: Killed"):
        RunFolder(finished, hidden=new).replace_held()
    monkeypatch.undo()
    assert "args.yaml" not in names(finished)
    assert len(names(finished)) >= 3
    for name in ALL:
        there = [folder / name for folder in (finished, new, new / "old") if (folder / name).exists()]
        held = {file.read_bytes() for file in there}
        assert held == {(tmp_path / "new" / name).read_bytes(), before[name]}  # none is lost
    with pytest.raises(UsageError, match=r"no run to continue, args.yaml"):
        resume(finished)
    assert tune(overwrite=True).steps == 6
    assert names(finished) == ALL


@pytest.fixture
def unsaved(tmp_path):
    """Folder of a small run, and a function that puts another in its place."""
    folder = tmp_path / "small"
    folder.mkdir()
    for name in ALL:
        (folder / name).write_text(f"old {name}")

    def replace_it():
        with ExitStack() as until:
            new = RunFolder(folder).beside_held(until)
            for name in ALL - {"summary.csv"}:
                new.file(name).write_text(f"new {name}")
            new.replace_held()

    return folder, replace_it


def failing(monkeypatch, calls, error):
    """Let the renames of these numbers fail."""
    original, done = os.replace, []

    def rename(*paths):
        done.append(paths)
        if len(done) in calls:
            raise error
        original(*paths)

    monkeypatch.setattr(folder_module.os, "replace", rename)


@pytest.mark.parametrize("call", range(1, 10))
def test_a_file_that_cannot_be_moved_leaves_the_earlier_run_whole(unsaved, monkeypatch, call):
    folder, replace_it = unsaved
    before = tree(folder)
    with monkeypatch.context() as patch:
        failing(patch, [call], PermissionError(errno.EACCES, "Permission denied"))
        with pytest.raises(OutputError) as refused:
            replace_it()
    reason = "cannot be written: Permission denied"
    assert str(refused.value) == f"{folder}: {reason}; {folder} keeps its earlier run"
    assert tree(folder) == before
    replace_it()
    assert names(folder) == ALL - {"summary.csv"}
    assert all((folder / name).read_text() == f"new {name}" for name in names(folder))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_so_does_what_ends_it_otherwise(unsaved, monkeypatch, error):
    folder, replace_it = unsaved
    before = tree(folder)
    failing(monkeypatch, [5], error)
    with pytest.raises(error):
        replace_it()
    assert tree(folder) == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_files_that_cannot_be_put_back_are_left_and_named(unsaved, monkeypatch, error):
    folder, replace_it = unsaved
    failing(monkeypatch, range(5, 99), error)
    reason = getattr(error, "strerror", None) or "KeyboardInterrupt"
    with pytest.raises(OutputError, match=f"its earlier run cannot be put back: {reason}; ") as refused:
        replace_it()
    (old,) = folder.glob(".new-run.*.tmp/old")
    assert f"move the files in {old} to {folder} before the next run" in str(refused.value)
    assert "keeps" not in str(refused.value)
    assert (old / "args.yaml").read_text() == "old args.yaml"
    assert "args.yaml" not in names(folder)


def test_a_directory_in_the_place_of_a_file_is_not_replaced(tune, unsaved, finished):
    folder, replace_it = unsaved
    for place in (folder, finished):
        (place / "summary.csv").unlink()
        (place / "summary.csv").mkdir()
        (place / "summary.csv" / "notes").write_text("mine")
    with pytest.raises(OutputError, match=r"summary.csv: is not a regular file.*; .*keeps its earlier run"):
        replace_it()
    with pytest.raises(OutputError, match=r"run/summary.csv: is not a regular file"):
        tune(overwrite=True)
    for place in (folder, finished):
        assert (place / "summary.csv" / "notes").read_text() == "mine"


def test_a_log_that_cannot_be_removed_stays(unsaved):
    folder, replace_it = unsaved
    (folder / "curve.png").mkdir()
    replace_it()
    assert names(folder) == ALL - {"summary.csv"} | {"curve.png"}
    assert (folder / "args.yaml").read_text() == "new args.yaml"


@pytest.mark.parametrize("name", ["args.yaml", "best.safetensors", "summary.csv", "state.pt"])
def test_a_file_that_cannot_be_written_says_that_the_earlier_run_stays(tune, finished, monkeypatch, name):
    before, sync = tree(finished), files.sync

    def fails(path):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    monkeypatch.setattr(files, "sync", fails)
    with pytest.raises(OutputError) as refused:
        tune(overwrite=True)
    kept = f"; {finished} keeps its earlier run"
    assert str(refused.value).endswith(f"{name}: cannot be written: No space left on device{kept}")
    assert str(refused.value).count("keeps") == 1
    assert tree(finished) == before


def test_where_the_new_files_are_gone_the_earlier_run_stays(finished, tmp_path):
    before = tree(finished)
    with pytest.raises(OutputError, match="run: cannot be written: No such file"):
        RunFolder(finished, hidden=tmp_path / "gone").replace_held()
    assert tree(finished) == before


def test_where_the_folder_is_gone_the_new_weights_are_written_to_its_name(tune, finished, monkeypatch):
    step = Trainer.step

    def late(*given):
        shutil.rmtree(finished)
        return step(*given)

    monkeypatch.setattr(Trainer, "step", late)
    with pytest.raises(OutputError, match=r"removed meanwhile.*last.safetensors there holds its weights"):
        tune(overwrite=True, save_every=1)
    assert names(finished) == {"last.safetensors"}
    assert mhacut.load_model(finished / "last.safetensors") is not None


class Events:
    """A writer that makes its file at once, as TensorBoard's does."""

    def __init__(self, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "events.out.tfevents.2").touch()

    def add_scalar(self, *given): ...
    def flush(self): ...
    def close(self): ...


def test_the_log_of_a_run_that_is_not_saved_is_not_begun(tune, finished, monkeypatch):
    monkeypatch.setattr(command, "check_logs", lambda names: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Events))
    events = finished / "tensorboard"
    events.mkdir()
    (events / "events.out.tfevents.1").touch()
    with monkeypatch.context() as patch:
        diverged(patch)
        with pytest.raises(MhacutError, match="became nan"):
            tune(overwrite=True, log="tensorboard")
    assert names(events) == {"events.out.tfevents.1"}
    tune(overwrite=True, log="tensorboard")
    assert names(events) == {"events.out.tfevents.2"}


@pytest.mark.slow
def test_two_processes_leave_it_and_replace_it_too(programs, slim, images, finished):
    before = tree(finished)
    given = ["--data-dir", images, "-b", "6", "-j", "0", "--epochs", "1", "--overwrite", "-o", finished]
    failed = programs.run(BY_TWO, free_port(), "finetune", slim, *given, "--lr", "1e30")
    assert failed.returncode == 1
    assert failed.stderr.count(f"nothing was saved yet, {finished} keeps its earlier run") == 1, failed.stderr
    assert tree(finished) == before
    done = programs.run(BY_TWO, free_port(), "finetune", slim, *given)
    assert done.returncode == 0, done.stderr
    assert RunFolder(finished).read_state()["step"] == 3
    assert names(finished) == ALL


def test_a_state_that_cannot_be_written_leaves_no_buffer(tmp_path, monkeypatch):
    """Of one that is still exported Python complains whenever it is collected, in anybody's output."""
    taken = []

    def write(path, content, **options):
        taken.append(content)
        raise OutputError("full")

    monkeypatch.setattr(folder_module, "write_whole", write)
    with pytest.raises(OutputError, match="full"):
        RunFolder(tmp_path).write_state({})
    with pytest.raises(ValueError, match="released"):
        len(taken[0])
