"""Processes that read images outlive a signal to their group, whenever it comes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data._utils import signal_handling

from mhacut.data import EvaluationLoader
from mhacut.data.workers import outlive_first_signal
from mhacut.finetuning.images import StepBatches, TrainingImages, training_loader

IMAGES = [(torch.zeros(3, 2, 2), label) for label in range(12)]

pytestmark = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def test_a_process_that_outlived_the_signal_ends_when_it_is_asked_to(number):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def read():
        outlive_first_signal(0)
        ready.set()
        time.sleep(100)

    process = context.Process(target=read, daemon=True)
    process.start()
    assert ready.wait(60)
    os.kill(process.pid, number)
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(20)
    assert not process.is_alive()


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
def test_a_signal_while_images_are_read_costs_none(labels, number):
    read = labels()
    first = next(read)
    for child in multiprocessing.active_children():
        os.kill(child.pid, number)
    assert sorted([first, *read]) == list(range(12))


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="patches what is forked")
@pytest.mark.parametrize("labels", [validation_labels, training_labels])
def test_a_signal_at_the_start_of_reading_costs_no_image(labels, number, monkeypatch):
    # torch lets SIGTERM end a process that has started and is not yet ready to read.
    set_by_torch = signal_handling._set_worker_signal_handlers

    def signalled():
        set_by_torch()
        os.kill(os.getpid(), number)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", signalled)
    assert sorted(labels()) == list(range(12))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
