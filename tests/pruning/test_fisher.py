"""Fisher information from a batch in parts."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from helpers.jobs import job_of
from helpers.models import ModelCase, build, image, relative
from mhacut.pruning import fisher
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.preserve import Preserved
from mhacut.surgery.features import Features, find_token_map
from mhacut.surgery.find import find_prunable_layers

CASE = ModelCase(
    "vit_tiny_patch16_224",
    {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 5},
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
            options = {"batch_size": 4, "fisher_images": len(images), "preserved": preserved}
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
