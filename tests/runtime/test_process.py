"""Functions in new processes, and workers that read images and ignore signals to their group."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import util

import pytest
import torch

from mhacut.data import EvaluationLoader
from mhacut.finetuning.images import StepBatches, TrainingImages, training_loader
from mhacut.runtime.process import STOP_SIGNALS, in_new_process, stop_request


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call a function ``f`` of the given lines in a new process; the working directory has a ``json.py``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "modules")  # a search path of this process alone
    (tmp_path / "modules").mkdir()
    (tmp_path / "json.py").write_text("raise SystemExit('the working directory comes first')")

    def run(body, job=None):
        (tmp_path / "modules" / "named.py").write_text(f"def f():\n    {body}\n")
        return in_new_process("named", "f", job)

    return run


def test_the_last_line_is_the_result(run):
    body = "import json, sys; job = json.load(sys.stdin); print('noise'); print(json.dumps(job['a'] + 1))"
    assert run(body, {"a": 41}) == 42


@pytest.mark.parametrize("body", ["raise SystemExit(3)", "pass", "print('no JSON')"])
def test_no_result_is_none(run, body):
    assert run(body) is None


IMAGES = [(torch.zeros(3, 2, 2), label) for label in range(12)]


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


@pytest.mark.parametrize("labels", [validation_labels, training_labels])
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_images_are_read_costs_none(labels, number):
    before = set(multiprocessing.active_children())
    read = labels()
    first = next(read)
    (reader,) = set(multiprocessing.active_children()) - before
    os.kill(reader.pid, number)
    assert sorted([first, *read]) == list(range(12))


class ForkedWith:
    """Function that each process calls when it is forked, as long as this object exists."""

    def __init__(self, function):
        util.register_after_fork(self, lambda _: function())


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="forks nothing")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_a_worker_starts_costs_no_image_in_a_block_that_takes_requests(number):
    signalled = ForkedWith(lambda: os.kill(os.getpid(), number))
    with stop_request() as request:
        assert sorted(training_labels()) == list(range(12))
    assert signalled
    assert not request.is_set()  # the worker handled its signal


READING = """
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


def test_a_program_that_fails_where_images_are_read_ends(programs):
    failed = programs.run(READING.format(then="raise RuntimeError('no such image')"))
    assert failed.returncode == 1
    assert "no such image" in failed.stderr
