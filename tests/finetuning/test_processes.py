"""Runs of several processes, and runs that signals end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch

from helpers.finetuning import resume, weights
from helpers.models import same
from helpers.programs import BY_TWO, MAIN, free_port
from mhacut.finetuning.folder import RunFolder
from mhacut.finetuning.training import Trainer
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.distributed import Processes

SCRIPT = """
import os, signal, sys
import mhacut

calls = []

def replace(*paths, original=os.replace):
    calls.append(paths)
    if len(calls) == 9:  # the temporary file is complete, its name still the old one
        os.kill(os.getpid(), signal.SIGKILL)
    original(*paths)

os.replace = replace
mhacut.finetune(sys.argv[1], data_dir=sys.argv[2], output=sys.argv[3], batch_size=12, epochs=2, lr=1e-3,
                workers=0, save_every=1)
"""


@pytest.mark.slow
def test_kill_9_and_resume(programs, tune, slim, images, tmp_path):
    whole = tune("whole", save_every=1)
    killed = programs.start(SCRIPT, slim, images, tmp_path / "cut")
    with killed.stdout, killed.stderr:
        assert killed.end() == -signal.SIGKILL
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
def test_what_goes_wrong_in_one_process_ends_all_and_is_said_once(programs, tune, slim, images, tmp_path):
    """The second process waits for the first, which must not write over a run; or both find no images."""
    held = tune("held", steps=1).folder
    flags = ["-b", "6", "-j", "0", "--steps", "1"]
    for given, message in (
        (["--data-dir", images, "-o", held], "already holds a run"),
        (["--data-dir", tmp_path / "none", "-o", tmp_path / "new"], "no such directory"),
    ):
        done = programs.run(BY_TWO, free_port(), "finetune", slim, *given, *flags)  # until both have ended
        assert done.returncode == 1
        assert done.stderr.count(message) == 1, done.stderr
        assert "a bug in mhacut" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_was_interrupted_can_go_on(programs, slim, images, tmp_path, number):
    """A terminal's Ctrl-C, and many schedulers, send the signal to the workers as well."""
    folder = tmp_path / "cut"
    flags = ["--data-dir", images, "--epochs", "400", "--lr", "1e-3", "-j", 2, "-b", 12, "-o", folder]
    run = programs.start(MAIN, "finetune", slim, *flags, "--save-every", "1")
    with run.stdout, run.stderr:
        deadline = time.monotonic() + 200
        while not (folder / "summary.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(run.pid, number)
        assert run.end(200) == 130
        stderr = run.stderr.read()
    assert "Traceback" not in stderr
    assert RunFolder(folder).read_state()["progress"]["step"] < 1200
    assert f"Continue from the last save with: mhacut finetune --resume {folder}" in stderr


def test_nothing_holds_the_group_of_processes_when_they_part(tmp_path):
    # Else its destructor can wait for a thread that waits for Python's lock.
    trainer = object.__new__(Trainer)
    trainer.model, trainer.options = torch.nn.Linear(2, 2), FinetuneOptions.of(checkpoint="a")
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
