"""Build the pruning job of a model, whether it comes from a file, a folder, or from inside another model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mhacut.errors import UnsupportedModelError, option_name
from mhacut.options.prune import Scope, SearchOptions
from mhacut.plan import TokenPlan, UnitKind
from mhacut.pruning.choose_merges import find_outside_tokens, with_all_merged
from mhacut.pruning.job import Job
from mhacut.pruning.preserve import Preserved
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.tokens import stack_of, why_not_merged, with_tokens


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
    if merges and (reason := why_no_merging(model, preserved, size)):
        raise UnsupportedModelError(f"{option_name('scope', scope)}: tokens cannot be merged: {reason}")
    unmerge = _unmerges(model, preserved) if merges else tokens.unmerge
    # Channels are cut in a model that merges nothing; its merges, old or new, come back at the end.
    unmerged = with_tokens(model, replace(tokens, merged=()))
    merged, prunable = () if merges else tokens.merged, find_prunable_layers(unmerged)
    # The pooling head of SigLIP does not run for the features of all tokens, nor does the class attention of
    # CaiT for the levels of its pyramid; nothing says what cuts of them would cost.
    names = [layer.name for layer in prunable.layers]
    with torch.no_grad(), captured_outputs(unmerged, names, lambda args, output: None) as called:
        preserved.features.of(unmerged, _image(model, size))
    if unused := [name for name in names if name not in called]:
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
    )


def why_no_merging(model: nn.Module, preserved: Preserved, size: tuple[int, ...]) -> str:
    """Return the reason why merged tokens would not give the ``preserved`` outputs; empty if they do."""
    if preserved.metric == "features":
        return "merged tokens have no separate features"
    unmerge = _unmerges(model, preserved)
    if (reason := why_not_merged(model, unmerge) or find_outside_tokens(model, size)) or not unmerge:
        return reason
    image = _image(model, size)
    try:
        merging = with_all_merged(model, size, unmerge=True)
        with torch.no_grad():
            shapes = [[each.shape for each in preserved.features.of(m, image)] for m in (model, merging)]
    except UnsupportedModelError as error:  # for example, the model runs its blocks with a mask
        return str(error)
    return "" if shapes[0] == shapes[1] else "tokens are read inside blocks, where they are not copied back"


def _unmerges(model: nn.Module, preserved: Preserved) -> bool:
    """Whether merged tokens are copied back, as code around blocks of other libraries expects."""
    stack = stack_of(model)
    return preserved.dense or (stack is not None and stack.vit is None)


def _image(model: nn.Module, size: tuple[int, ...]) -> Tensor:
    return torch.zeros(1, *size, device=next(model.parameters()).device)
