"""``mhacut.prune_``: prune a vision transformer inside any model, in place."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from mhacut.adapters.huggingface import is_old
from mhacut.budget import Budget, format_flops
from mhacut.checkpoint.part_file import check_dense, cut_part
from mhacut.commands.prune_attempt import Attempt, cut_model, recover_model
from mhacut.commands.prune_targets import check_reachable
from mhacut.errors import BudgetError, UnsupportedModelError, UsageError, option_name
from mhacut.measuring.accuracy import Fidelity
from mhacut.options.option import lists_options
from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan
from mhacut.pruning.build_job import submodule_job
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Limit, lowest_flops
from mhacut.pruning.planner import Planned, Planner
from mhacut.pruning.preserve import OutputMetric
from mhacut.runtime.device import default_torch
from mhacut.runtime.progress import Reporter, reporting
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.submodule import Batches, SubmoduleFn, record_submodule, shown, vision_transformers
from mhacut.surgery.tokens import tokens_of


@dataclass(frozen=True)
class InPlaceResult:
    """Result of :func:`prune_`."""

    part: str
    """Name of the pruned submodule; empty if the complete model was pruned."""
    plan: Plan
    """Channels that each layer keeps, and merged tokens. Layer names are relative to the submodule."""
    flops_before: int
    """FLOPs of the dense submodule in 1 call, per image."""
    flops_after: int
    preserved: tuple[str, ...]
    """Names of the submodule's outputs that were preserved, or ``loss``."""
    fidelity: Fidelity
    """Similarity of the preserved outputs to the dense model's outputs, on held-out images."""
    metric: OutputMetric
    """Metric of :attr:`divergence`: KL divergence in nats (``answers``), relative squared error
    (``features``), or divergence of patch features in nats per token (``dense``)."""

    @property
    def divergence(self) -> float:
        """Divergence of the preserved outputs from the dense outputs, in the unit of :attr:`metric`.

        With ``loss``: estimated squared error of the values of ``loss``, divided by their variance.
        """
        return self.fidelity.divergence

    def __repr__(self) -> str:
        before, after = format_flops(self.flops_before), format_flops(self.flops_after)
        merged, copied = sum(self.plan.tokens.merged), " and copied back" if self.plan.tokens.unmerge else ""
        return (
            f"{shown(self.part)}: {before} -> {after} FLOPs ({self.flops_after / self.flops_before:.1%}), "
            f"{f'{merged} tokens merged{copied}, ' if merged else ''}"
            f"divergence of {', '.join(self.preserved)} {self.divergence:.2g}"
            f"{' nats per token' if self.metric == 'dense' and self.preserved != ('loss',) else ''}"
        )


@default_torch()
@lists_options(SearchOptions)
def prune_(
    model: nn.Module,
    part: str | None = None,
    *,
    images: Batches,
    flops: str | float,
    scope: Literal["auto", "attention+mlp"] = "auto",
    loss: Callable[[Any], Tensor] | None = None,
    progress: bool | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> InPlaceResult:
    """Prune a vision transformer inside ``model``, in place, and preserve the outputs that ``model`` reads.

        mhacut.prune_(detector, "backbone", images=loader, flops="70%")

    The images run through the complete model. One run shows which outputs of the submodule the model reads.
    Class, forward pass and tensor names stay. Layers become narrower. Blocks of a plain ViT merge tokens.
    Output features have a copy of the merged token for each of its patches. A model with logits that depend
    on the class token only returns no patch features. Create optimizers after this call.

    Args:
        model: any model, on any device, in any mode.
        part: name of the submodule, or ``""`` for the complete model. Default: the only vision transformer.
        images: batches for ``model``: tensors, dicts (``model(**batch)``), or tuples (the first element is
            used). Or a function that runs 1 batch, returns the output, and finally raises
            ``StopIteration``.
        flops: budget for 1 image in the submodule: ``70%`` or ``2.0G`` (multiply-accumulates).
        scope: ``attention+mlp`` cuts channels only. ``auto`` also merges tokens if the model allows it.
        loss: function from the output of ``model`` (or of the function ``images``) to the values to
            preserve, a tensor [images, ...], such as ``lambda out: out.logits``. Outputs of the submodule are
            preserved as far as these values depend on them, to first order.
        progress: show a progress bar. Default: in notebooks and terminals.
        reporter: receives progress and messages instead of a bar.
        options: options of the search; ``help()`` lists them below.

    Raises:
        MhacutError: see :mod:`mhacut.errors` for its subclasses. The model is unchanged.
    """
    search = SearchOptions.of(**options)
    name = find_part(model, part)
    module = model.get_submodule(name)
    with reporting(reporter, progress) as display:
        display.start("reading")
        recorded, dense = record_submodule(model, name, images, search.work.calibration_images, loss)
        job, outputs = submodule_job(dense, name, recorded, search, scope, display)
        budget, cost = Budget.parse(flops), job.table.flops
        lowest = lowest_flops(job.allowed, (job.all_merged_costs or job.table).flops)
        check_reachable(budget, job.table.dense, lowest, job)
        limit = Limit(cost, budget.amount(job.table.dense))
        if limit.most >= job.table.dense:
            raise BudgetError(
                f"nothing to prune: {shown(name)} takes {format_flops(job.table.dense)} FLOPs, within the "
                "budget. Set a lower budget"
            )
        planner = Planner(job, job.calibrate())
        attempt = cut_model(planner.plan((limit,)), (limit,), 1, planner)
        recover_model(attempt, {}, planner)
        held_out = job.held_out(planner.calibration)
        slim = attempt.model.to(job.device)
        fidelity = Fidelity(*held_out.divergence_and_agreement(slim), len(held_out.images), "held-out images")
    planned = cut_submodule(module, name, attempt, job)
    before, after, metric = job.table.dense, attempt.planned.flops, held_out.preserved.metric
    return InPlaceResult(name, planned.plan, before, after, outputs, fidelity, metric)


def cut_submodule(module: nn.Module, name: str, attempt: Attempt, job: Job) -> Planned:
    """Cut the submodule ``module`` in place. Return the plan with layer names of the submodule."""

    def inside(layer: str) -> str:  # the job's names are "module.blocks.0.attn"
        return layer.partition(".")[2]

    planned, slim = attempt.planned, attempt.model
    assert isinstance(slim, SubmoduleFn)
    units = tuple(replace(unit, layer=inside(unit.layer)) for unit in planned.ready.plan)
    ready = replace(
        planned.ready,
        plan=Plan(units, planned.ready.plan.tokens),
        repairs={(inside(layer), kind): repair for (layer, kind), repair in planned.ready.repairs.items()},
    )
    curves = {(inside(layer), kind): curve for (layer, kind), curve in planned.curves.items()}
    flops = {"flops_before": job.table.dense, "flops_after": planned.flops}
    renamed = replace(planned, ready=ready, curves=curves)
    # The copy knows which tokens never merge.
    cut_part(module, name, Plan(units, tokens_of(slim.module)), slim.module.state_dict(), **flops)
    return renamed


def find_part(model: nn.Module, part: str | None) -> str:
    """Return the name of the submodule to prune: ``part``, or the only vision transformer in ``model``."""
    name = _named_part(model, part)
    check_dense(model, name)
    _check_kind(model.get_submodule(name), name)
    return name


def _named_part(model: nn.Module, part: str | None) -> str:
    if part is None:
        found = vision_transformers(model)
        if len(found) > 1:
            names = ", ".join(map(shown, found))
            raise UsageError(f"{len(found)} vision transformers found: {names}; choose 1 as `part`")
        if not found:
            _check_kind(model, "")  # names attention that is not known
        return found[0] if found else ""
    known = [name for name, _ in model.named_modules()]
    if part not in known:
        near = difflib.get_close_matches(part, known, n=3, cutoff=0.5) or vision_transformers(model)
        hint = f"; the nearest: {', '.join(map(shown, near))}" if near else ""
        raise UsageError(f"{option_name('part', part)}: {type(model).__name__} has no such submodule{hint}")
    return part


def _check_kind(module: nn.Module, name: str) -> None:
    try:
        layers = find_prunable_layers(module).layers
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{shown(name)}: {error}{_of_transformers_4()}") from None
    if not layers[0].name:
        raise UnsupportedModelError(
            f"{shown(name)} is a single layer. Choose a `part` that contains the layer, such as a block"
        )


def _of_transformers_4() -> str:
    return "; of transformers 4, DINOv2, DINOv3, CLIP and SigLIP alone are cut" if is_old() else ""
