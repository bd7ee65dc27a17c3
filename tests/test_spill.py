"""Moments of large models lie in a file: the same numbers, in less memory."""

from __future__ import annotations

import mmap
import os
from unittest.mock import patch

import pytest
import torch

from helpers.jobs import job_of
from helpers.models import ModelCase, build, image
from mhacut.pruning import fisher, unit_sums
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.planner import Planner
from mhacut.pruning.unit_sums import SpilledMoments
from mhacut.runtime import spill as spill_module
from mhacut.runtime.spill import LEAST_BYTES, Spill

CASE = ModelCase(
    "vit_tiny_patch16_224",
    {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 5},
)


def test_what_is_kept_stays_after_its_pages_were_dropped():
    spill = Spill()
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((400, 401), (2**17,), (2, 300, 300))]
    kept = [spill.keep(tensor) for tensor in tensors]
    spill.drop()
    for tensor, copy in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.data_ptr() != copy.data_ptr()
        copy += 1
    spill.drop()
    assert all(torch.equal(tensor + 1, copy) for tensor, copy in zip(tensors, kept, strict=True))
    del spill  # the tensors keep the file
    assert torch.equal(kept[2], tensors[2] + 1)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")
def test_dropped_pages_leave_the_process():
    def resident() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssFile"))  # KiB

    spill, before = Spill(), resident()
    kept = spill.keep(torch.ones(32 << 20, dtype=torch.uint8))
    held = resident() - before
    spill.drop()
    assert held > 30 << 10
    assert resident() - before < 4 << 10
    assert int(kept.sum()) == 32 << 20


def test_a_full_disk_leaves_tensors_in_memory():
    tensor, spill = torch.ones(LEAST_BYTES), Spill()
    with patch("mhacut.runtime.spill._reserve", side_effect=OSError(28, "No space left on device")):
        assert spill.keep(tensor) is tensor
    with patch.object(mmap, "mmap", side_effect=OSError(12, "Cannot allocate memory")):
        assert spill.keep(tensor) is tensor
    small = torch.ones(3)
    assert spill.keep(small) is small


def test_plans_are_the_same_from_a_file():
    model = build(CASE)
    job = job_of(model, image(CASE, batch=12), share=0.6, round_to=2)
    plan = Planner(job, job.calibrate()).plan()
    with patch.object(unit_sums, "MOST_BYTES", 0), patch.object(spill_module, "LEAST_BYTES", 0):
        calibration = job.calibrate()
        assert isinstance(calibration.moments, SpilledMoments)
        spilled = Planner(job, calibration).plan()
    assert spilled.plan == plan.plan
    assert all(
        torch.equal(a, b)
        for a, b in zip(spilled.ready.model.parameters(), plan.ready.model.parameters(), strict=True)
    )


def test_large_models_are_differentiated_in_smaller_batches():
    job = job_of(build(CASE), image(CASE, batch=12), share=0.6, round_to=2)
    batches: list[int] = []

    def gather():
        def count(module, args):
            if torch.is_grad_enabled():
                batches.append(len(args[0]))

        handle = job.model.register_forward_pre_hook(count)
        try:
            return calibrate(
                job.model, job.prunable, job.images, batch_size=4, fisher=job.fisher_options
            ).fisher.matrices
        finally:
            handle.remove()

    whole = gather()
    (one, *sizes), batches[:] = list(batches), []
    assert one == 1  # whose size is measured
    assert max(sizes) == 4
    with patch.object(fisher, "MOST_BYTES", 1):
        single = gather()
    assert set(batches) == {1}
    for name, matrix in whole.items():  # other random projections of the same images
        assert 0.2 < float(single[name].trace() / matrix.trace()) < 5
