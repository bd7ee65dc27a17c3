"""A dense model, one that was cut to half of its widths, and a job, to test healing on."""

from __future__ import annotations

import copy

import torch

from helpers.flatten import FLATTEN
from helpers.jobs import Recorder, job_of
from helpers.models import ModelCase, build, image
from helpers.plans import distillation_of
from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.recover import healed
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut

VIT = ModelCase(
    "vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8}
)
SWIN = ModelCase(
    "swin_tiny_patch4_window7_224",
    {"depths": (1, 2), "embed_dim": 12, "num_heads": (2, 2), "img_size": 32, "window_size": 4},
)
ROPE = ModelCase(
    "vit_small_patch16_rope_224",
    {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 16, "patch_size": 8, "qkv_fused": False},
)
MERGING = ModelCase(
    "vit_tiny_patch16_224", {"depth": 3, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8}
)
CASES = {
    "class token": VIT,
    "windows": SWIN,
    "rotary positions": ROPE,
    "sizes": FLATTEN["flatten_pvt_tiny"],
    "channels first": ModelCase(
        "levit_conv_128s",
        {"embed_dim": (16, 32), "key_dim": 8, "num_heads": (2, 4), "depth": (1, 1), "img_size": 32},
    ),
}
HELD = 4


class Bench:
    def __init__(self, case, images=16, dtype=torch.float64):
        self.dense = build(case, dtype=dtype).requires_grad_(False)
        self.images = image(case, batch=images, dtype=dtype)
        self.prunable = find_prunable_layers(self.dense)
        self.calibration = calibrate(
            self.dense, self.prunable, self.images, batch_size=images, fisher_images=images
        )
        assert self.calibration.held == HELD
        self.slim = copy.deepcopy(self.dense)
        plans = (unit.keep_first(max(unit.width // 2, 1)) for unit in self.prunable.units())
        cut(self.slim, Plan(tuple(plans)))
        self.reporter = Recorder()

    def healed(self, slim=None, steps=4, seed=1, **more):
        slim = self.slim if slim is None else slim
        options = SearchOptions(heal_steps=steps, seed=seed, batch_size=5)
        job = job_of(self.dense, self.images, prunable=self.prunable, options=options, reporter=self.reporter)
        return healed(slim, find_prunable_layers(slim), job, self.calibration, **more)

    def divergence(self, model):
        return distillation_of(self.dense, self.images).divergence_of(model)
