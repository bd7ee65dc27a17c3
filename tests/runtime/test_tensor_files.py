"""Moments of large models lie in a file: the same numbers, in less memory."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from helpers.jobs import flops_limit, job_of
from helpers.models import ModelCase, build, image, relative
from mhacut.pruning import fisher, unit_moments
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.planner import Planner
from mhacut.pruning.preserve import Preserved
from mhacut.pruning.unit_moments import SpilledMoments
from mhacut.runtime import tensor_files as spill_module
from mhacut.runtime.tensor_files import MIN_BYTES, Spill
from mhacut.surgery.features import Features, find_token_map
from mhacut.surgery.find import find_prunable_layers

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


def resident(kind: str) -> int:
    """KiB of this process in memory, ``RssFile`` or ``RssAnon``."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(kind))


on_linux = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux")


@on_linux
def test_dropped_pages_leave_the_process():
    spill, before = Spill(), resident("RssFile")
    kept = spill.keep(torch.ones(32 << 20, dtype=torch.uint8))
    held = resident("RssFile") - before
    spill.drop()
    assert held > 30 << 10
    assert resident("RssFile") - before < 4 << 10
    assert int(kept.sum()) == 32 << 20


def test_a_full_disk_leaves_tensors_in_memory():
    tensor, spill = torch.ones(MIN_BYTES), Spill()
    with patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device")):
        assert spill.keep(tensor) is tensor
    with patch.object(mmap, "mmap", side_effect=OSError(12, "Cannot allocate memory")):
        assert spill.keep(tensor) is tensor
    small = torch.ones(3)
    assert spill.keep(small) is small


def test_plans_are_the_same_from_a_file():
    model = build(CASE)
    job = job_of(model, image(CASE, batch=12), counted=True, round_to=2)
    plan = Planner(job, job.calibrate()).plan(flops_limit(job, 0.6))
    with patch.object(unit_moments, "MAX_BYTES", 0), patch.object(spill_module, "MIN_BYTES", 0):
        calibration = job.calibrate()
        assert isinstance(calibration.moments, SpilledMoments)
        assert len(calibration.moments) == len(list(calibration.moments)) == len(job.units)
        spilled = Planner(job, calibration).plan(flops_limit(job, 0.6))
    assert spilled.plan == plan.plan
    assert all(
        torch.equal(a, b)
        for a, b in zip(spilled.ready.model.parameters(), plan.ready.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("what", ["answers", "pooled", "tokens"])
def test_a_batch_in_parts_gives_the_same_fisher_information(what):
    model = build(CASE, dtype=torch.float64)
    images = image(CASE, batch=10, dtype=torch.float64)
    tokens = find_token_map(model, find_prunable_layers(model), images[:1])
    preserved = {
        "answers": None,
        "pooled": Preserved("pooled", "features", Features("pooled")),
        "tokens": Preserved("tokens", "dense", tokens),
    }[what]
    job = replace(job_of(model, images, counted=True, round_to=2), preserved=preserved)
    sizes: list[int] = []

    def gather():
        def count(module, args):
            if torch.is_grad_enabled():
                sizes.append(len(args[0]))

        handle = model.patch_embed.register_forward_pre_hook(count)
        try:
            options = {"batch_size": 4, "fisher": job.fisher_options}
            return calibrate(model, job.prunable, images, **options).fisher
        finally:
            handle.remove()

    whole = gather()
    (one, *rest), sizes[:] = list(sizes), []
    assert (one, max(rest)) == (1, 4)  # the size of one is measured
    with patch.object(fisher, "MAX_BYTES", 1):
        parts = gather()
    assert set(sizes) == {1}
    assert whole.matrices.keys() == parts.matrices.keys()
    for name, matrix in whole.matrices.items():
        assert relative(parts.matrices[name], matrix) < 1e-5
        for grid, importance in whole.importance[name].items():
            assert relative(parts.importance[name][grid], importance) < 1e-5
