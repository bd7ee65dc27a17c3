"""Recovery after the cut: a list of steps, each kept only if held-out images agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.channel_scales import with_trained_scales
from mhacut.pruning.distill import Distillation
from mhacut.pruning.heal import healed
from mhacut.pruning.job import Job
from mhacut.pruning.merge_law import Schedule
from mhacut.pruning.sequential import GUARD, sequentially_reconstructed
from mhacut.pruning.tune import tuned
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.tokens import set_merged


@dataclass(frozen=True)
class Recovery:
    """Outcome of one step that tries to bring a slim model nearer to the dense one."""

    model: nn.Module
    """The changed model where it was kept; else the model before."""
    before: float
    """Divergence (:class:`~.preserve.Preserved`) from the dense model on held-out images, before the step."""
    after: float
    """Divergence of the changed model, kept or not."""

    @classmethod
    def of(cls, slim: nn.Module, changed: nn.Module, judge: Distillation, tolerance: float = 1.0) -> Recovery:
        """Keep ``changed`` if its divergence is below ``tolerance`` times that of ``slim``.

        Args:
            slim: the model before the step.
            changed: the model after it.
            judge: held-out images.
            tolerance: 1 for an improvement.
        """
        before, after = judge.divergence_of(slim), judge.divergence_of(changed)
        return cls(changed if after < tolerance * before else slim, before, after)


@dataclass(frozen=True)
class _Step:
    name: str
    stage: str
    asked: bool
    change: Callable[[nn.Module], nn.Module]
    """Returns a changed copy of the slim model."""
    tolerance: float = 1.0
    sees_merges: bool = False
    """Whether the step works on the model that merges tokens; those before it do not."""
    by_default: bool = False
    """Whether the step is a default, which is mentioned only when it is left out."""


def recover(
    slim: nn.Module, prunable: PrunableLayers, job: Job, calibration: Calibration, merged: Schedule = ()
) -> nn.Module:
    """Return ``slim`` after the steps that the job's options ask for, as far as they help on held-out images.

    The held-out images chose the ridges of the repair, so they favour the model before the steps.

    Args:
        slim: cut from the job's model, eval mode, float32, on the CPU; so is the result.
        prunable: its prunable layers.
        job: what is pruned.
        calibration: of its model.
        merged: number of tokens that each block is to merge, from the first step on that sees merges; empty
            to leave the model as it is.
    """
    options, reporter = job.options, job.reporter
    if calibration.held == 0:
        if merged:
            set_merged(slim, merged)
        if options.trained_gain_steps or options.healed_steps or options.tuned_steps:
            reporter.log("nothing was trained: with a single image, none is left to check the result on")
        return slim
    judge = job.judge(calibration)
    slim = slim.to(job.device)
    for step in _steps(prunable, job, calibration):
        if step.sees_merges and merged:
            set_merged(slim, merged)
        if not step.asked:
            continue
        reporter.start(step.stage)
        outcome = Recovery.of(slim, step.change(slim), judge, step.tolerance)
        left_out = outcome.model is slim
        if left_out or not step.by_default:
            reporter.log(
                f"{step.name}{' was left out' if left_out else ''}: divergence on held-out images "
                f"{outcome.before:.2g} without, {outcome.after:.2g} with"
            )
        slim = outcome.model
    return slim.cpu()


def _steps(prunable: PrunableLayers, job: Job, calibration: Calibration) -> tuple[_Step, ...]:
    options, reporter, dense = job.options, job.reporter, job.model
    learning = job.learning(calibration)

    def reconstruct(slim: nn.Module) -> nn.Module:
        size = options.batch_size
        return sequentially_reconstructed(slim, prunable, dense, job.images, calibration, size, reporter)

    def heal(slim: nn.Module) -> nn.Module:
        return healed(slim, prunable, job, calibration)

    def scale(slim: nn.Module) -> nn.Module:
        steps, lr = options.trained_gain_steps, options.gain_lr
        return with_trained_scales(slim, prunable, learning, steps=steps, lr=lr, reporter=reporter)

    def tune(slim: nn.Module) -> nn.Module:
        steps, lr, seed = options.tuned_steps, options.tuning_lr, options.seed
        return tuned(slim, dense, learning, steps=steps, lr=lr, seed=seed, reporter=reporter)

    in_order = _Step(
        "repair in order", "repairing in order", options.repairs_in_order, reconstruct, GUARD, by_default=True
    )
    return (
        in_order,
        _Step("training channel scales", "reweighting", options.trained_gain_steps > 0, scale),
        _Step("healing", "healing", options.healed_steps > 0, heal, sees_merges=True),
        _Step("tuning", "tuning", options.tuned_steps > 0, tune, sees_merges=True),
    )
