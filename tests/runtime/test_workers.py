"""Processes that read images outlive a signal to their group, whenever it comes; nobody waits for them."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
import time
import warnings
from contextlib import suppress

import pytest
import torch
from torch.utils.data._utils import signal_handling

from helpers.data import PLAIN, evaluated, write_split
from mhacut.data import EvaluationLoader
from mhacut.finetuning.images import StepBatches, TrainingImages, training_loader
from mhacut.runtime import workers
from mhacut.runtime.signals import STOP_SIGNALS, outlive_signals

either_signal = pytest.mark.parametrize("number", STOP_SIGNALS)


class Images(list):
    """Read in another process, which signals reach."""

    def __getitem__(self, index):
        assert multiprocessing.parent_process() is not None
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return super().__getitem__(index)


IMAGES = Images((torch.zeros(3, 2, 2), label) for label in range(12))


def validation_labels():
    loader = EvaluationLoader(
        IMAGES, total=12, batch_size=2, workers=1, num_classes=12, description="", fingerprint=""
    )
    for _, labels in loader:
        yield from labels.tolist()


def training_labels():
    images = TrainingImages(IMAGES, count=12, labelled=True, description="", fingerprint="")
    batches = StepBatches(12, batch_size=2, parts=1, seed=0)
    for batch in training_loader(images, batches, start=0, stop=6, mine=[0], workers=1, pin_memory=False):
        yield from batch.labels.tolist()


either_loader = pytest.mark.parametrize("labels", [validation_labels, training_labels])


@either_signal
def test_a_process_that_reads_outlives_signals_until_it_is_killed(number):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def read():
        outlive_signals(0)
        ready.set()
        time.sleep(100)

    process = context.Process(target=read, daemon=True)
    process.start()
    assert ready.wait(60)
    for _ in range(2):  # a scheduler that repeats itself ends the process that it reads for, not this one
        os.kill(process.pid, number)
        process.join(0.2)
        assert process.is_alive()
    process.kill()
    process.join(60)
    assert not process.is_alive()


@either_loader
@either_signal
def test_a_signal_while_images_are_read_costs_none(labels, number):
    before = set(multiprocessing.active_children())
    read = labels()
    first = next(read)
    (reader,) = set(multiprocessing.active_children()) - before
    os.kill(reader.pid, number)
    assert sorted([first, *read]) == list(range(12))


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="patches what is forked")
@either_loader
@either_signal
def test_a_signal_at_the_start_of_reading_costs_no_image(labels, number, monkeypatch):
    # torch lets SIGTERM end a process that has started and is not yet ready to read.
    set_by_torch = signal_handling._set_worker_signal_handlers

    def signalled():
        set_by_torch()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", signalled)
    assert sorted(labels()) == list(range(12))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_signal_to_the_caller_as_reading_starts_leaves_it_open_to_the_next(monkeypatch):
    """Python may raise once the mask has changed, before the call that changed it returns."""
    change = signal.pthread_sigmask

    def interrupted(how, numbers):
        before = change(how, numbers)
        if how == signal.SIG_BLOCK and numbers:
            raise KeyboardInterrupt
        return before

    monkeypatch.setattr(signal, "pthread_sigmask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(validation_labels())
    assert not change(signal.SIG_BLOCK, [])


READING = """
from helpers.data import PLAIN, evaluated, write_split
from mhacut.data import EvaluationLoader

class Images(list):
    def __getitem__(self, index):
        {then}
        return super().__getitem__(index)

images = Images((__import__("torch").zeros(3, 2, 2), 0) for _ in range(100))
loader = EvaluationLoader(
    images, total=100, batch_size=2, workers=1, num_classes=1, description="", fingerprint=""
)
batches = iter(loader)
next(batches)
"""


@pytest.mark.slow
def test_a_program_that_stops_reading_half_way_ends(programs):
    ended = programs.run(READING.format(then=""))
    assert (ended.returncode, ended.stderr) == (0, "")


PATIENT = """
from torch.utils.data._utils import worker
worker.MP_STATUS_CHECK_INTERVAL = 1000  # seconds between torch's own looks whether the parent is there
"""


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="patches what is forked")
@pytest.mark.slow
def test_processes_end_with_a_program_that_a_signal_to_all_of_them_ends(programs):
    waiting = "print(flush=True)\n__import__('time').sleep(1000)\n"
    running = programs.start(PATIENT + READING.format(then="") + waiting)
    with running.stdout, running.stderr:
        try:
            assert running.stdout.readline()
            os.killpg(running.pid, signal.SIGTERM)
            assert running.end() == -signal.SIGTERM
            reads_on, _, _ = select.select([running.stdout], [], [], 60)
            assert reads_on  # the pipe's end, which processes that read hold too
            assert running.stdout.read() == ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_a_child_that_exits_leaves_the_processes_to_its_parent(programs):
    forking = """
import os, sys
if os.fork() == 0:
    sys.exit()
os.wait()
print(1 + sum(1 for _ in batches))
"""
    assert programs.run(READING.format(then="") + forking).stdout == "50\n"


def test_a_program_that_fails_where_images_are_read_ends(programs):
    failed = programs.run(READING.format(then="raise RuntimeError('no such image')"))
    assert failed.returncode == 1
    assert "no such image" in failed.stderr


STARTING = """
import multiprocessing
from torch.utils.data import DataLoader
from helpers.spawned import print_held_signals
from mhacut.runtime.signals import start_reading

multiprocessing.set_start_method("{method}")
list(start_reading(DataLoader([1, 2], num_workers=1, worker_init_fn=print_held_signals)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no signal masks")
# A fork server would pass on what it is started with to all processes of the program, for ever.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "held"), [("spawn", ["SIGINT", "SIGTERM"]), ("forkserver", [])])
def test_signals_wait_for_spawned_processes_too(programs, method, held):
    assert programs.run(STARTING.format(method=method)).stdout.split() == held


@pytest.fixture
def one_cpu(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def show_warnings():
    warnings.simplefilter("always")
    # Of Python 3.12 and later, where the tests themselves run in threads.
    warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)


def test_on_one_cpu_torch_has_nothing_to_warn_of(one_cpu, tmp_path, recwarn):
    write_split(tmp_path / "val")
    show_warnings()
    for _ in range(2):
        list(evaluated(PLAIN, data_dir=tmp_path, batch_size=5, num_classes=3))
    assert not recwarn.list


def test_more_processes_than_cpus_are_kept_and_warned_of_once(one_cpu, tmp_path, recwarn, monkeypatch):
    write_split(tmp_path / "val")
    monkeypatch.setattr(workers, "_warned", set())
    show_warnings()
    loader = evaluated(PLAIN, data_dir=tmp_path, batch_size=5, num_classes=3, workers=3)
    assert loader._loader.num_workers == 3
    images = TrainingImages(IMAGES, count=12, labelled=True, description="", fingerprint="")
    batches = StepBatches(12, batch_size=2, parts=1, seed=0)
    list(training_loader(images, batches, start=0, stop=6, mine=[0], workers=3, pin_memory=False))
    list(loader)
    (warning,) = recwarn.list
    assert "will create 3 worker processes" in str(warning.message)


def test_the_usual_number_of_processes_is_two_where_there_are_as_many_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert workers.worker_count(None) == 2
    assert [workers.worker_count(asked) for asked in (0, 1, 20)] == [0, 1, 20]
