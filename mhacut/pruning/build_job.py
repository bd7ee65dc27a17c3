"""Build the pruning job of a model, whether it comes from a file, a folder, or from inside another model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.errors import UnsupportedModelError, option_name
from mhacut.options.prune import Scope, SearchOptions
from mhacut.plan import TokenPlan, UnitKind
from mhacut.pruning.choose_merges import find_outside_tokens, with_all_merged
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Constraints, lowest_flops
from mhacut.pruning.preserve import ANSWERS, Preserved
from mhacut.runtime.progress import Reporter
from mhacut.surgery.channels import output_weights
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.features import Features
from mhacut.surgery.find import find_prunable_layers, gives_probabilities
from mhacut.surgery.flops import measure_flops, measure_flops_by_module
from mhacut.surgery.hooks import captured_outputs, registered
from mhacut.surgery.submodule import Loss, Recorded, SubmoduleFn, shown
from mhacut.surgery.tokens import stack_of, tokens_of, why_not_merged, with_tokens


def build_job(
    model: nn.Module,
    images: Tensor,
    preserved: Preserved,
    scope: Scope,
    options: SearchOptions,
    tokens: TokenPlan | None = None,
) -> Job:
    """Return the job of pruning ``model`` with calibration images [n, C, H, W]; n may be 0.

    ``tokens`` is the token plan of the slim model if nothing is merged: by default all tokens are computed.
    """
    size, tokens = tuple(images.shape[1:]), tokens or TokenPlan()
    merges = scope.endswith("+tokens")
    # Channels are cut in a model that merges nothing; its merges, old or new, come back at the end.
    unmerged = with_tokens(model, replace(tokens, merged=()))
    if merges and (reason := why_no_merging(unmerged, preserved, size)):
        raise UnsupportedModelError(f"{option_name('scope', scope)}: tokens cannot be merged: {reason}")
    unmerge = _unmerges(unmerged, preserved, size) if merges else tokens.unmerge
    merged, prunable = () if merges else tokens.merged, find_prunable_layers(unmerged)
    # The pooling head of SigLIP does not run for the features of all tokens, nor does the class attention of
    # CaiT for the levels of its pyramid; nothing says what cuts of them would cost.
    names = [layer.name for layer in prunable.layers]
    with torch.no_grad(), captured_outputs(unmerged, names, lambda args, output: None) as called:
        preserved.features.of(unmerged, _image(model, size))
    # The trace of a model has no layers whose outputs nothing reads, such as the last layer of a vision tower
    # whose projector reads the layer before.
    flops = measure_flops_by_module(unmerged, size)
    if unused := [name for name in names if name not in called or not flops.get(name)]:
        prunable = prunable.without(unused, f"does not run for {preserved}")
    counted = with_tokens(unmerged, replace(tokens, merged=merged, unmerge=unmerge))
    table, all_merged_costs = build_cost_table(counted, prunable, size), None
    if counted is not model:
        table = replace(table, dense=measure_flops(model, size))
    if merges:
        costs = build_cost_table(with_all_merged(unmerged, size, unmerge), prunable, size)
        all_merged_costs = replace(costs, dense=table.dense)
    kinds: tuple[UnitKind, ...] = ("qk", "v") if scope == "attention" else ("qk", "v", "hidden")
    return Job(
        model=unmerged,
        prunable=prunable,
        units=prunable.units(kinds),
        table=table,
        images=images,
        options=options,
        all_merged_costs=all_merged_costs,
        preserved=preserved,
        merged=merged,
        unmerge=unmerge,
        class_token=reads_class_token(unmerged, preserved, size),
    )


def submodule_job(
    dense: nn.Module, name: str, recorded: Recorded, options: SearchOptions, scope: Scope, reporter: Reporter
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
    if preserved.what == "pooled":
        reporter.log(f"{outputs[0]} is preserved as features. For logits, set num_classes of the model")
    scope = resolve_scope(scope, options, model, preserved, tuple(images.shape[1:]), reporter)
    job = build_job(model, images, preserved, scope, options)
    one_width = [layer.name for layer in job.prunable.layers if layer.adapter.one_width]
    if one_width:
        classes = {type(model.get_submodule(layer)).__name__ for layer in one_width}
        reporter.log(f"{', '.join(sorted(classes))}: q, k and v get equal widths")
    job = replace(job, reporter=reporter, constraints=Constraints(equal_qkv=bool(one_width)))
    _report_unknown(job)
    return job, tuple(outputs) if recorded.loss is None else ("loss",)


def _report_unknown(job: Job) -> None:
    """Log the attention classes that cannot be pruned, their share of the FLOPs, and the lowest budget."""
    if not job.prunable.unknown:
        return
    counted = measure_flops_by_module(job.model, job.input_size)
    for cls, names in job.prunable.unknown.items():
        share = sum(counted.get(name, 0) for name in names) / counted[""]
        job.reporter.log(f"{len(names)} layers of class {cls} cannot be pruned ({share:.0%} of the FLOPs)")
    lowest = lowest_flops(job.allowed, job.table.flops) / job.table.dense
    job.reporter.log(f"the lowest budget that channel pruning reaches is {lowest:.0%} of the FLOPs")


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


def resolve_scope(
    scope: Scope,
    options: SearchOptions,
    model: nn.Module,
    preserved: Preserved,
    size: tuple[int, ...],
    reporter: Reporter,
    reason: str = "",
) -> Scope:
    """Resolve ``--scope auto``: merge tokens if the model allows merging and ``reason`` is empty."""
    if scope != "auto":
        return scope
    if options.allocation != "curves":
        reason = option_name("allocation", options.allocation)
    reason = reason or why_no_merging(model, preserved, size)
    if reason:
        reporter.log(f"scope: channels only: {reason}")
        return "attention+mlp"
    alone = option_name("scope", "attention+mlp")
    copied = _unmerges(model, preserved, size)
    features = "merged tokens are copied back to their patches" if copied else "no patch features"
    reporter.log(
        f"scope: channels and token merging ({features}). {alone} cuts channels only. ONNX, OpenVINO and pt2 "
        "exports run anywhere; eager PyTorch needs mhacut"
    )
    return "attention+mlp+tokens"


def why_no_merging(model: nn.Module, preserved: Preserved, size: tuple[int, ...]) -> str:
    """Return the reason why merged tokens would not give the ``preserved`` outputs; empty if they do."""
    if preserved.metric == "features":
        return "merged tokens have no separate features"
    # Old merges keep the number of patches that they were planned for.
    model = with_tokens(model, replace(tokens_of(model), merged=()))
    unmerge = _unmerges(model, preserved, size)
    if (reason := why_not_merged(model, unmerge) or find_outside_tokens(model, size)) or not unmerge:
        return reason
    image = _image(model, size)
    try:
        merging = with_all_merged(model, size, unmerge=True)
        with torch.no_grad():
            shapes = [[each.shape for each in preserved.features.of(m, image)] for m in (model, merging)]
    except UnsupportedModelError as error:  # for example, the model runs its blocks with a mask
        return str(error)
    except Exception as error:  # code of other libraries may do anything with the tokens
        stack = stack_of(model)
        if stack is None or stack.vit is not None:
            raise
        return f"code between its blocks takes no merged tokens ({type(error).__name__})"
    return "" if shapes[0] == shapes[1] else "tokens are read inside blocks, where they are not copied back"


def _unmerges(model: nn.Module, preserved: Preserved, size: tuple[int, ...]) -> bool:
    stack = stack_of(model)
    other = stack is not None and stack.vit is None
    windows = stack is not None and stack.window > 0  # the neck reads a token for every patch
    return preserved.dense or windows or (other and not reads_class_token(model, preserved, size))


def reads_class_token(model: nn.Module, preserved: Preserved, size: tuple[int, ...]) -> bool:
    """Whether the preserved outputs depend on the first token of the last block, and on no other token."""
    stack = stack_of(model)
    if stack is None or preserved.dense:
        return False
    if stack.vit is not None:
        return bool(stack.prefix and stack.vit.global_pool == "token")
    if find_outside_tokens(model, size):
        return False
    last: list[Tensor] = []

    def replace_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        last.append(output.detach().requires_grad_())
        return last[-1]

    with torch.enable_grad(), registered([stack.blocks[-1].register_forward_hook(replace_output)]):
        outputs = preserved.outputs(model, _image(model, size))
        if not last or not outputs.requires_grad:  # nothing reads the last block
            return False
        (gradient,) = torch.autograd.grad(outputs.square().sum(), last)
    tokens = gradient.transpose(0, 1) if stack.tokens_first else gradient
    if tokens[0].any(-1).nonzero().flatten().tolist() != [0]:
        return False
    try:  # code of other libraries may need a token for every patch, for outputs besides the logits
        with torch.no_grad():
            preserved.outputs(with_all_merged(model, size), _image(model, size))
    except Exception:
        return False
    return True


def _image(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    return torch.zeros(1, *size, device=next(model.parameters()).device)
