"""Recovery after the cut: steps that bring a slim model nearer to the dense one, if held-out images agree."""

from __future__ import annotations

from torch import nn

from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.channel_scales import with_trained_scales
from mhacut.pruning.heal import healed
from mhacut.pruning.job import Job
from mhacut.pruning.merge_law import Schedule
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.tokens import set_merged


def recover(
    slim: nn.Module, prunable: PrunableLayers, job: Job, calibration: Calibration, merged: Schedule = ()
) -> nn.Module:
    """Return ``slim`` after the steps that the job's options ask for, as far as they help on held-out images.

    Args:
        slim: cut from the job's model, eval mode, float32, on the CPU; so is the result.
        prunable: its prunable layers.
        job: what is pruned.
        calibration: calibration of the job's model.
        merged: number of tokens that each block is to merge; empty to leave the model as it is. Channel
            scales are trained without merges, healing with them.
    """
    options, reporter = job.options, job.reporter
    scale_steps, heal_steps = options.trained_gain_steps, options.healed_steps
    if calibration.held == 0 and (scale_steps or heal_steps):
        reporter.log("nothing was trained: with a single image, none is left to check the result on")
        scale_steps = heal_steps = 0
    slim = slim.to(job.device)
    if scale_steps:
        reporter.start("reweighting")
        learning, lr = job.learning(calibration), options.gain_lr
        scaled = with_trained_scales(slim, prunable, learning, steps=scale_steps, lr=lr, reporter=reporter)
        slim = _better(slim, scaled, job, calibration, "training channel scales")
    if merged:
        set_merged(slim, merged)
    if heal_steps:
        reporter.start("healing")
        slim = _better(slim, healed(slim, prunable, job, calibration), job, calibration, "healing")
    return slim.cpu()


def _better(slim: nn.Module, changed: nn.Module, job: Job, calibration: Calibration, name: str) -> nn.Module:
    """Return ``changed`` if it diverges less from the dense model on held-out images, else ``slim``.

    These images also chose the ridges of the repair, which favours ``slim``.
    """
    judge = job.judge(calibration)
    before, after = judge.divergence_of(slim), judge.divergence_of(changed)
    helps = after < before  # not where training diverged, to no number
    job.reporter.log(
        f"{name}{'' if helps else ' was left out'}: divergence on held-out images "
        f"{before:.2g} without, {after:.2g} with"
    )
    return changed if helps else slim
