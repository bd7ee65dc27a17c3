"""Nothing of a run is lost, wherever it is cut off."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
from functools import cache
from pathlib import Path

import pytest
import torch

import mhacut
from helpers.checkpoints import Hostile
from helpers.cli import run as cli
from helpers.finetuning import CLASSES, Killed, resume, same, weights
from helpers.jobs import Recorder
from mhacut.errors import CheckpointError, Interrupted, MhacutError, OutputError, UsageError
from mhacut.finetuning import measuring as measuring_module
from mhacut.finetuning import saving
from mhacut.finetuning.folder import RunFolder, read_arguments
from mhacut.finetuning.resuming import completed
from mhacut.finetuning.training import Trainer
from mhacut.runtime.files import unlock

LONGER = {"epochs": 2, "model_ema": True, "drop_path": 0.2, "mixup": 0.5}


@pytest.fixture(scope="module")
def uncut(tune_in, tmp_path_factory):
    """A longer run that nothing cut off, by how often it was saved."""
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
        (RunFolder, "write_summary", 2, 0),
        (measuring_module, "evaluate", 2, 0),
    ],
)
@pytest.mark.slow
def test_a_run_cut_off_anywhere_goes_on_to_the_same_end(
    tune, uncut, tmp_path, kill, monkeypatch, target, name, call, save_every
):
    whole = uncut(save_every)
    kill(target, name, call)
    with pytest.raises(Killed):
        tune("cut", save_every=save_every, **LONGER)
    monkeypatch.undo()
    again = resume(tmp_path / "cut")
    for file in ("last.safetensors", "best.safetensors"):
        assert same(weights(whole.folder, file), weights(again.folder, file))
    assert again.epochs == whole.epochs
    summaries = [(result.folder / "summary.csv").read_bytes() for result in (whole, again)]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": True}])
def test_what_a_killed_write_left_behind_is_removed(tune, finished, options):
    left = finished / ".state.pt.29043ad2701d.tmp"
    left.mkdir()
    (left / "state.pt").write_bytes(b"half")
    resume(finished) if "resume" in options else tune(**options)
    assert not left.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_names_the_command_to_go_on(
    tune, finished_run, tmp_path, monkeypatch, number
):
    whole = finished_run
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
    reporter = Recorder()
    measure = measuring_module.evaluate
    calls = []  # before the first step, after each of two epochs

    def asked_in(*given, **named):
        calls.append(len(reporter.messages))
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*given, **named)

    monkeypatch.setattr(measuring_module, "evaluate", asked_in)
    with pytest.raises(Interrupted, match=message):
        tune(reporter=reporter)
    answer = "stopping once this is measured and saved; interrupt again to stop at once"
    assert reporter.messages[calls[at - 1]] == answer
    assert reporter.messages.count(answer) == 1


def test_an_interruption_once_all_is_saved_says_so(tune, monkeypatch):
    measure = measuring_module.evaluate
    calls = []

    def interrupted(*given, **named):
        calls.append(1)
        if len(calls) == 4:  # before, after each of two epochs, and the file
            raise KeyboardInterrupt
        return measure(*given, **named)

    monkeypatch.setattr(measuring_module, "evaluate", interrupted)
    with pytest.raises(
        Interrupted, match=r"all 6 steps are done and saved, but the evaluation of .*best\.safetensors was"
    ):
        tune()


def test_nothing_reads_images_any_more_once_training_has_stopped(tune, monkeypatch):
    # An exception keeps the frames that it passed alive, and in them the loader.
    interrupt_every_step(monkeypatch)
    before = set(multiprocessing.active_children())
    with pytest.raises(Interrupted) as raised:
        tune("cut", workers=2)
    assert raised.value.__traceback__ is not None
    assert set(multiprocessing.active_children()) <= before


def test_the_command_to_go_on_with_can_be_pasted(tune, monkeypatch):
    interrupt_every_step(monkeypatch)
    with pytest.raises(Interrupted, match=r"--resume '[^']*/my run'$"):
        tune("my run")


def test_a_run_cut_off_before_anything_was_saved_says_that_it_begins_anew(tune, tmp_path, kill):
    kill(Trainer, "step", 2)
    with pytest.raises(Killed):
        tune("cut", steps=2)
    reporter = Recorder()
    resume(tmp_path / "cut", reporter=reporter)
    assert any("no step was saved; starting from the first" in text for text in reporter.messages)


def test_resuming_a_finished_run_does_nothing_more(finished, finished_run):
    reporter = Recorder()
    assert resume(finished, reporter=reporter).epochs == finished_run.epochs
    assert "all 6 steps are done; there is nothing left to train" in reporter.messages
    assert not any(message.startswith("training on") for message in reporter.messages)


def test_a_resumed_run_writes_to_its_own_directory_whatever_its_name(finished_run, tmp_path, monkeypatch):
    folder = finished_run.folder
    monkeypatch.chdir(folder.parent)
    (tmp_path / "link").symlink_to(folder)
    for output in ("./run", "run/", folder, tmp_path / "link", None):
        assert completed({"resume": "run", "output": output})["output"] == "run"
    with pytest.raises(UsageError, match="output='other': a resumed run writes to its own directory, run"):
        completed({"resume": "run", "output": "other"})
    assert completed({"resume": "run", "scale": [0.5, 1.0]})["scale"] == [0.5, 1.0]
    with pytest.raises(UsageError, match=r"scale=\[0.6, 1.0\]: the run in run was started with"):
        completed({"resume": "run", "scale": [0.6, 1.0]})
    with pytest.raises(UsageError, match="resume=True: expected a path"):
        completed({"resume": True})
    own = read_arguments("run")  # as --config run/args.yaml gives them
    assert completed({**own, "resume": "run"}) == {**own, "resume": "run", "output": "run"}


def test_no_run_is_both_continued_and_started_again(finished):
    result = cli("finetune", "--resume", finished, "--overwrite")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--overwrite: would remove the run that --resume {finished} continues" in result.stderr
    assert len(result.stderr.splitlines()) == 1


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


def test_a_run_is_not_written_over(tune, finished, slim, images, tmp_path):
    with pytest.raises(OutputError, match=r"already holds a run.*resume="):
        tune()
    events = finished / "tensorboard" / "events.out.tfevents.1"
    events.parent.mkdir()
    mine = [finished / "notes.txt", events.with_name("notes.txt")]
    for file in (finished / "curve.png", events, *mine):
        file.write_text("of the earlier run")
    assert tune(overwrite=True).steps == 6
    assert not (finished / "curve.png").exists()
    assert not events.exists()
    assert all(file.exists() for file in mine)
    held = tmp_path / "held"
    held.mkdir()
    (held / "last.safetensors").write_bytes(slim.read_bytes())
    with pytest.raises(OutputError, match="is the input"):
        mhacut.finetune(held / "last.safetensors", output=held, overwrite=True, data_dir=images, batch_size=6)
    with pytest.raises(OutputError, match="is the input"):
        tune(teacher=tmp_path / "run" / "best.safetensors", overwrite=True)
    assert (tmp_path / "run" / "best.safetensors").exists()


@pytest.mark.slow
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
    with pytest.raises(CheckpointError, match=r"images per step .12, now 6.*as many processes as before"):
        resume(result.folder, batch_size=6)
    with pytest.raises(UsageError, match=r"lr=0.5: the run in .* was started with 0.001"):
        resume(result.folder, lr=0.5)
    with pytest.raises(UsageError, match=r"resume=.*no run to continue"):
        resume(tmp_path / "nothing")
    # Shared out otherwise, the step is the same.
    assert resume(result.folder, batch_size=6, grad_accum_steps=2).steps == 6


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not really", b"\x80\x04K."])
def test_a_damaged_or_missing_state_is_refused(finished, content):
    (finished / "state.pt").unlink()
    if content is not None:
        (finished / "state.pt").write_bytes(content)
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    how = "is gone" if content is None else r"cannot be read \("
    with pytest.raises(CheckpointError, match=rf"state.pt: {how}.*last.safetensors holds .* overwrite=True"):
        resume(finished)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_without_the_best_weights_a_run_goes_on(tune, kill, finished, slim, monkeypatch, tmp_path):
    """As if no epoch until then had been better than the start."""
    (finished / "best.safetensors").unlink()
    result = resume(finished)
    assert (result.improved, result.after.loss) == (False, result.before.loss)
    assert same(weights(finished, "best.safetensors"), weights(slim.parent, slim.name))
    kill(Trainer, "step", 5)
    with pytest.raises(Killed):
        tune("cut")
    monkeypatch.undo()
    whole = weights(tmp_path / "cut", "last.safetensors")
    (tmp_path / "cut" / "best.safetensors").unlink()
    reporter = Recorder()
    result = resume(tmp_path / "cut", reporter=reporter)
    assert result.improved == (result.epochs[1].eval_top1 > result.before.top1)
    assert result.after.top1 == max(result.epochs[1].eval_top1, result.before.top1)
    assert not same(weights(tmp_path / "cut", "last.safetensors"), whole)
    assert any("best.safetensors is gone" in message for message in reporter.messages)


@pytest.mark.parametrize("damage", ["cut", "random", "directory", "other"])
def test_best_weights_that_are_not_this_run_s_are_refused_before_the_work(finished, slim, damage):
    best = finished / "best.safetensors"
    content = best.read_bytes()
    best.unlink()
    if damage == "directory":
        best.mkdir()
    else:
        other = slim.read_bytes()  # nobody trained it
        best.write_bytes({"cut": content[:-9], "random": b"x" * 99, "other": other}[damage])
    says = "not a regular file" if damage == "directory" else "move it away, and resume="
    with pytest.raises(MhacutError, match=says):
        resume(finished)
    if damage != "directory":
        best.unlink()
        assert resume(finished).steps == 6


def test_a_run_with_other_options_than_it_began_with_is_refused(finished):
    arguments = finished / "args.yaml"
    lines = arguments.read_text().splitlines(keepends=True)
    arguments.write_text("".join(line for line in lines if not line.startswith("lr:")))
    with pytest.raises(CheckpointError, match=r"differ from its start: lr of args.yaml \(0.001, now "):
        resume(finished)


def test_runs_of_before_options_were_saved_go_on(finished):
    state = torch.load(finished / "state.pt", weights_only=True)
    del state["began_with"]["options"]
    torch.save(state, finished / "state.pt")
    assert resume(finished).steps == 6


def removed(folder: Path) -> None:
    shutil.rmtree(folder)


def replaced(folder: Path) -> None:
    removed(folder)
    folder.mkdir()


def moved_away(folder: Path) -> None:
    folder.rename(folder.with_name("old"))
    folder.mkdir()


def another_run(folder: Path) -> None:
    moved_away(folder)
    (folder / "args.yaml").write_text("lr: 1")


@pytest.mark.parametrize("happens", [removed, replaced, moved_away, another_run])
def test_a_run_whose_directory_goes_away_ends(tune, tmp_path, monkeypatch, happens):
    step, folder, once = Trainer.step, tmp_path / "run", iter([happens])

    def late(*args, **options):
        if (folder / "args.yaml").exists():
            next(once, lambda _: None)(folder)
        return step(*args, **options)

    monkeypatch.setattr(Trainer, "step", late)
    how = r"removed meanwhile.*\w+.safetensors there" if happens is removed else "replaced meanwhile"
    with pytest.raises(OutputError, match=f"was {how}"):
        tune()
    assert len(list(folder.iterdir())) == (happens in (removed, another_run))


def test_a_directory_that_has_another_inode_is_the_locked_one(finished, monkeypatch):
    monkeypatch.setattr("os.path.samestat", lambda *found: False)
    lock = RunFolder(finished).claim()
    assert RunFolder(finished).still_there(lock)
    unlock(lock)


def test_a_lock_whose_directory_is_stale_is_of_one_that_was_replaced(finished, monkeypatch):
    def stale(descriptor):
        raise OSError(errno.ESTALE, "Stale file handle")

    lock = RunFolder(finished).claim()
    with monkeypatch.context() as patch:
        patch.setattr("os.fstat", stale)
        with pytest.raises(OutputError, match="was replaced meanwhile"):
            RunFolder(finished).still_there(lock)
    unlock(lock)


def test_a_state_runs_nothing(finished, tmp_path):
    state = {"version": 1, "step": Hostile(os.system, f"touch {tmp_path}/ran")}
    torch.save(state, finished / "state.pt")
    with pytest.raises(CheckpointError, match=r"state.pt"):
        resume(finished)
    assert not (tmp_path / "ran").exists()


def test_a_directory_where_a_run_is_written_is_refused(tune, finished):
    lock = RunFolder(finished).claim()
    for start in (lambda: resume(finished), lambda: tune(overwrite=True), tune):
        with pytest.raises(OutputError, match="run: another process is writing a run there"):
            start()
    unlock(lock)
    assert resume(finished).steps == 6


def test_processes_that_look_at_a_run_together_find_the_same(finished):
    other = RunFolder(finished).claim(shared=True)  # as torchrun's processes do
    with pytest.raises(OutputError, match="already holds a run"):
        RunFolder(finished).check_new([], overwrite=False)
    with pytest.raises(OutputError, match="another process is writing a run there"):
        RunFolder(finished).claim()
    unlock(other)
    lock = RunFolder(finished).claim()
    with pytest.raises(OutputError, match="another process is writing a run there"):
        RunFolder(finished).check_new([], overwrite=False)
    unlock(lock)


def test_a_directory_that_is_refused_is_free_again(finished):
    with pytest.raises(OutputError, match="already holds a run"):
        RunFolder(finished).open_new(overwrite=False)
    unlock(RunFolder(finished).claim())


def test_a_directory_that_is_gone_when_it_is_claimed_is_refused(finished, monkeypatch):
    original = RunFolder.claim

    def late(folder):
        shutil.rmtree(folder.path)
        return original(folder)

    monkeypatch.setattr(RunFolder, "claim", late)
    with pytest.raises(OutputError, match=r"run: cannot be written: No such file or directory"):
        resume(finished)
    assert not finished.exists()


FORKED = """
import os, signal, sys
from mhacut.runtime.files import lock_directory

lock = lock_directory(sys.argv[1])
runs, running = os.pipe()
child = os.fork()
if not child:
    os.write(running, b"!")
    signal.pause()
os.read(runs, 1)
os.close(lock)  # as the end of the process does
try:
    lock_directory(sys.argv[1])
finally:
    os.kill(child, signal.SIGKILL)
"""


def test_a_lock_ends_with_its_process_whatever_that_forked(programs, tmp_path):
    """Processes that load images may outlive their parent by a moment."""
    done = programs.run(FORKED, tmp_path)
    assert done.returncode == 0, done.stderr
