"""``mhacut.prune_``: prune a vision transformer inside any model, in place."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mhacut.adapters.huggingface import is_old
from mhacut.budget import Budget, format_flops
from mhacut.checkpoint.part_file import check_dense, cut_part
from mhacut.commands.prune_attempt import Attempt, cut_model, recover_model
from mhacut.commands.prune_targets import check_reachable
from mhacut.errors import BudgetError, UnsupportedModelError, UsageError, option_name
from mhacut.measuring.accuracy import Fidelity
from mhacut.options.option import lists_options
from mhacut.options.prune import Scope, SearchOptions
from mhacut.plan import Plan
from mhacut.pruning.build_job import build_job, why_no_merging
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Constraints, Limit, lowest_flops
from mhacut.pruning.planner import Planned, Planner
from mhacut.pruning.preserve import ANSWERS, OutputMetric, Preserved
from mhacut.runtime.device import default_torch
from mhacut.runtime.progress import Reporter, reporting
from mhacut.surgery.channels import output_weights
from mhacut.surgery.features import Features
from mhacut.surgery.find import find_prunable_layers, gives_probabilities
from mhacut.surgery.flops import measure_flops_by_module
from mhacut.surgery.submodule import Loss, Recorded, SubmoduleFn, record, shown, vision_transformers
from mhacut.surgery.tokens import tokens_of

Batches = Tensor | Mapping[str, Any] | Iterable[Any] | Callable[[], Any]
"""Batches for the model, or a function that runs 1 batch."""


@dataclass(frozen=True)
class InPlaceResult:
    """Result of :func:`prune_`."""

    part: str
    """Name of the pruned submodule; empty if the complete model was pruned."""
    plan: Plan
    """The plan. Layer names are relative to the submodule."""
    flops_before: int
    """FLOPs of 1 call of the submodule, per image."""
    flops_after: int
    preserved: tuple[str, ...]
    """Names of the preserved outputs."""
    fidelity: Fidelity
    """Similarity of the preserved outputs to the dense outputs, on held-out images."""
    metric: OutputMetric
    """Metric of ``fidelity``, see :class:`mhacut.pruning.preserve.Preserved`."""

    @property
    def divergence(self) -> float:
        """Divergence from the dense outputs. For a loss: its estimated squared error over its variance."""
        return self.fidelity.divergence

    def __repr__(self) -> str:
        before, after = format_flops(self.flops_before), format_flops(self.flops_after)
        merged = sum(self.plan.tokens.merged)
        return (
            f"{shown(self.part)}: {before} -> {after} FLOPs ({self.flops_after / self.flops_before:.1%}), "
            f"{f'{merged} tokens merged and copied back, ' if merged else ''}"
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
    Class, forward pass and tensor names stay. Layers become narrower. Blocks of a plain ViT merge tokens, and
    outputs have a copy of the merged token for each of its patches. Create optimizers after this call.

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
            raise BudgetError(f"nothing to prune: {shown(name)} takes {format_flops(job.table.dense)} FLOPs")
        planner = Planner(job, job.calibrate())
        attempt = cut_model(planner.plan((limit,)), (limit,), 1, planner)
        recover_model(attempt, {}, planner)
        held_out = job.held_out(planner.calibration)
        slim = attempt.model.to(job.device)
        fidelity = Fidelity(*held_out.divergence_and_agreement(slim), len(held_out.images), "held-out images")
    planned = cut_submodule(module, name, attempt, job)
    before, after, metric = job.table.dense, attempt.planned.flops, held_out.preserved.metric
    return InPlaceResult(name, planned.plan, before, after, outputs, fidelity, metric)


def record_submodule(
    model: nn.Module, name: str, images: Batches, count: int, loss: Callable[[Any], Tensor] | None = None
) -> tuple[Recorded, nn.Module]:
    """Run ``model`` until the submodule has received ``count`` images. Return the calls and a copy."""
    with _in_eval_mode(model):
        stops = not callable(images)  # a function may go on after its forward pass
        sensitivity = None if loss is None else Loss(loss)
        recorded = record(model, name, _runs(model, images), count, sensitivity, stops=stops)
        dense = copy.deepcopy(model.get_submodule(name)).float().requires_grad_(False)
        for layer in find_prunable_layers(dense).layers:
            layer.adapter.prepare(dense.get_submodule(layer.name))
        return recorded, dense


def cut_submodule(module: nn.Module, name: str, attempt: Attempt, job: Job) -> Planned:
    """Cut the submodule ``module`` in place; return the plan in the names of its layers.

    Costs need the job's names: FLOPs are those of ``attempt.planned``.
    """

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
    """Return the name of the submodule to prune, a dense one with layers that can be cut."""
    name = _named_part(model, part)
    check_dense(model, name)
    _check_kind(model.get_submodule(name), name)
    return name


def _named_part(model: nn.Module, part: str | None) -> str:
    if part is None:
        found = vision_transformers(model)
        if len(found) > 1:
            names = ", ".join(map(shown, found))
            raise UsageError(f"{len(found)} vision transformers inside: {names}; name one")
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
    """Raise an :class:`UnsupportedModelError` if the submodule has no prunable layer."""
    try:
        layers = find_prunable_layers(module).layers
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{shown(name)}: {error}{_of_transformers_4()}") from None
    if not layers[0].name:
        raise UnsupportedModelError(f"{shown(name)} is a single layer; name the block or the model around it")


def _of_transformers_4() -> str:
    return "; of transformers 4, DINOv2, DINOv3, CLIP and SigLIP alone are cut" if is_old() else ""


def submodule_job(
    dense: nn.Module, name: str, recorded: Recorded, options: SearchOptions, scope: str, reporter: Reporter
) -> tuple[Job, tuple[str, ...]]:
    """Return the pruning job of a submodule and the names of the preserved outputs."""
    images, cls = recorded.images, type(dense).__name__
    image = images[:1].to(next(dense.parameters()).device)
    with torch.no_grad():
        maps = dict(
            zip(recorded.outputs, SubmoduleFn(dense, recorded, recorded.outputs).maps(image), strict=True)
        )
    # Nobody knows what is read of the model's own outputs: the logits, else the features of all tokens.
    outputs = [output for output in maps if name or output == "logits"]
    outputs = outputs or [output for output, value in maps.items() if value.ndim > 2] or list(maps)
    model = SubmoduleFn(dense, recorded, outputs).eval()
    skipped = f" ({recorded.left_out} of other shapes left out)" if recorded.left_out else ""
    reporter.log(
        f"pruning {shown(name)} ({cls}) on {len(images)} inputs {list(images.shape[1:])}{skipped}; "
        f"preserving {', '.join(outputs)}"
    )
    preserved = _preserved(dense, {output: maps[output] for output in outputs}, model, recorded.loss)
    if scope != "auto":
        reason = option_name("scope", scope)
    elif options.allocation != "curves":
        reason = option_name("allocation", options.allocation)
    else:
        reason = why_no_merging(model, preserved, tuple(images.shape[1:]))
    merged = "channels and token merging (merged tokens are copied back to their patches)"
    reporter.log(f"scope: {f'channels only: {reason}' if reason else merged}")
    parts: Scope = "attention+mlp" if reason else "attention+mlp+tokens"
    job = build_job(model, images, preserved, parts, options)
    one_width = [layer.name for layer in job.prunable.layers if layer.adapter.one_width]
    if one_width:
        classes = {type(model.get_submodule(layer)).__name__ for layer in one_width}
        reporter.log(f"{', '.join(sorted(classes))} has one width of q, k and v: they are kept equal")
    job = replace(job, reporter=reporter, constraints=Constraints(equal_qkv=bool(one_width)))
    _report_unknown(job)
    return job, tuple(outputs) if recorded.loss is None else ("loss",)


def _report_unknown(job: Job) -> None:
    """Report the attention classes that stay, their share of the FLOPs, and the lowest budget."""
    if not job.prunable.unknown:
        return
    counted = measure_flops_by_module(job.model, job.input_size)
    for cls, names in job.prunable.unknown.items():
        share = sum(counted.get(name, 0) for name in names) / counted[""]
        job.reporter.log(f"{len(names)} layers of class {cls} stay, with {share:.0%} of the FLOPs")
    lowest = lowest_flops(job.allowed, job.table.flops) / job.table.dense
    job.reporter.log(f"the lowest budget by channels is {lowest:.0%} of the FLOPs")


def _preserved(
    dense: nn.Module, maps: Mapping[str, Tensor], model: nn.Module, loss: Loss | None
) -> Preserved:
    """Return the outputs to preserve: class probabilities, 1 vector, or the features of all tokens."""
    if loss is None and [each.ndim for each in maps.values()] == [2]:
        answers = "logits" in maps or gives_probabilities(dense)
        return ANSWERS if answers else Preserved("pooled", "features", Features("output"))
    units = find_prunable_layers(model).units(("v", "hidden"))
    widths = {len(output_weights(model.get_submodule(unit.layer), unit)) for unit in units}
    last = (each.ndim != 4 or each.shape[-1] in widths - {each.shape[1]} for each in maps.values())
    dims = tuple(-1 if channels_last else 1 for channels_last in last)
    # Errors of maps add up, of which the mean is taken.
    metrics = () if loss is None else tuple(len(maps) * one for one in map(loss.metric, maps, dims))
    return Preserved("outputs", "dense", Features("maps", channel_dims=dims), metrics=metrics)


def _runs(model: nn.Module, images: Batches) -> Iterator[Callable[[], Any]]:
    """Return functions that each run 1 batch of ``images``."""
    if callable(images):
        while True:
            yield images
    device = next(model.parameters()).device
    for batch in [images] if isinstance(images, Tensor | Mapping) else images:

        def run(batch: Any = batch) -> Any:
            given = batch[0] if isinstance(batch, tuple | list) else batch
            given = dict(given) if isinstance(given, Mapping) else given
            given = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, given)
            return model(**given) if isinstance(given, dict) else model(given)

        yield run


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
