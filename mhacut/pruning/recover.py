"""What is done to a slim model once it is cut: readouts refitted in order, scales and weights trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from mhacut.options.prune import SearchOptions
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.channel_scales import reweight
from mhacut.pruning.distill import Distillation
from mhacut.pruning.sequential import repair_in_order
from mhacut.pruning.tune import tune


def finish(
    slim: nn.Module,
    dense: nn.Module,
    calibration: Calibration,
    distillation: Distillation,
    options: SearchOptions,
    device: torch.device,
    *,
    start_stage: Callable[[str], None],
    progress: Callable[[int, int, str], None],
    note: Callable[[str], None],
) -> nn.Module:
    """``slim`` after what ``options`` ask for, as far as it helps on images held out.

    Those chose the ridges of its repair, which was then fitted to them too: they lean to what was there.

    Args:
        slim: cut, eval mode, float32.
        dense: what it was cut from.
        calibration: of ``dense``.
        distillation: all images, with the answers of ``dense``.
        options: see :class:`SearchOptions`.
        device: to work on; both models are on the CPU afterwards.
        start_stage: called with the name of each stage as it begins.
        progress: called with (done, in all, detail) during a stage.
        note: called with what users should know.
    """
    if calibration.held == 0:
        if options.trained_gain_steps or options.tuned_steps:
            note("nothing was trained: of a single image, none is left to judge by")
        return slim

    def trained(done: int, total: int, loss: float) -> None:
        progress(done, total, f"loss {loss:.4f}")

    def tell(what: str, kept: bool, before: float, after: float) -> None:
        left_out = "" if kept else " was left out"
        note(f"{what}{left_out}: divergence on held-back images {before:.2g} without, {after:.2g} with")

    learning, judge = distillation.part(calibration.held, None), distillation.part(0, calibration.held)
    slim, dense = slim.to(device), dense.to(device)
    if options.repairs_in_order:
        start_stage("repairing in order")
        repaired = repair_in_order(
            slim,
            dense,
            distillation.images,
            calibration.held,
            calibration.fisher,
            judge,
            progress=lambda done, total: progress(done, total, ""),
        )
        if repaired.model is slim:
            tell("repair in order", False, repaired.before, repaired.after)
        slim = repaired.model
    if options.trained_gain_steps > 0:
        start_stage("reweighting")
        steps, lr = options.trained_gain_steps, options.gain_lr
        reweighted = reweight(slim, learning, judge, steps=steps, lr=lr, progress=trained)
        tell("training gains", reweighted.model is not slim, reweighted.before, reweighted.after)
        slim = reweighted.model
    if options.tuned_steps > 0:
        start_stage("tuning")
        steps, lr = options.tuned_steps, options.tuning_lr
        tuned = tune(slim, dense, learning, judge, steps=steps, lr=lr, seed=options.seed, progress=trained)
        tell("tuning", tuned.model is not slim, tuned.before, tuned.after)
        slim = tuned.model
    dense.cpu()
    return slim.cpu()
