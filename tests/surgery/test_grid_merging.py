"""Merges that leave a smaller grid: tokens of SAM's windows, in lines, beside padding, and in exports."""

from __future__ import annotations

import copy

import onnx
import onnxruntime
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.models import relative, slow_but
from helpers.plans import random_plan
from mhacut.errors import PlanError, UnsupportedModelError
from mhacut.exporting import runtimes
from mhacut.plan import Plan, TokenPlan
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.grid_merging import (
    LineMatcher,
    least_side,
    length_left,
    merge_neighbours,
    sides_of,
    steps_of,
)
from mhacut.surgery.mask import kept_channels, masked_tensors, run_with
from mhacut.surgery.slice import cut
from mhacut.surgery.token_merging import SizedTokens
from mhacut.surgery.tokens import apply_tokens, merged_of, set_merged, tokens_of

MODELS = {
    "whole windows": {"img_size": 64},
    "padding": {"img_size": 56, "neck_chans": 0},
    "padding, oblong": {"img_size": (36, 64), "init_values": 0.5, "qk_norm": True},
    "a window larger than the grid": {"img_size": 32, "window_size": 11},
    "no relative positions": {"img_size": 56, "use_rel_pos": False},
}
"""Models of 4 blocks; windows of 8 x 8 tokens if not stated, and block 2 is global."""


def build(name: str = "padding", **changes: object) -> nn.Module:
    torch.manual_seed(0)
    small = {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "neck_chans": 16, "num_classes": 5}
    arguments = {**small, "window_size": 8, "global_attn_indexes": (2,), **MODELS[name], **changes}
    model = timm.create_model("samvit_base_patch16", **arguments).eval().requires_grad_(False)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(std=part.in_features**-0.5)
            if part.bias is not None:
                part.bias.normal_(std=0.3)
        if getattr(part, "use_rel_pos", False):
            part.rel_pos_h.normal_(std=0.3)
            part.rel_pos_w.normal_(std=0.3)
    model.pos_embed.normal_()
    return model


def size_of(model: nn.Module) -> tuple[int, int, int]:
    return 3, *(4 * side for side in model.patch_embed.grid_size)


def schedule(model: nn.Module) -> tuple[int, ...]:
    """Return numbers of merges for sides 8, 6, 4, 4 (or the like) behind the blocks."""
    grid, window = model.patch_embed.grid_size, model.blocks[0].window_size
    counts = [side[0] for side in steps_of(grid, window)]
    first, second = counts[min(2, len(counts) - 1)], counts[min(4, len(counts) - 1)]
    return 0, counts[0] - first, first - second, 0


def merging(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a dense model, a copy that merges tokens, and 2 images."""
    model = build(name).to(dtype)
    changed = copy.deepcopy(model)
    set_merged(changed, schedule(changed))
    return model, changed, torch.randn(2, *size_of(model), dtype=dtype)


@given(
    seed=st.integers(0, 10**6),
    length=st.integers(2, 14),
    part=st.floats(0, 1),
    images=st.integers(1, 3),
)
def test_neighbours_in_lines_merge_as_in_a_slow_reference(seed, length, part, images):
    chance = torch.Generator().manual_seed(seed)
    count = max(round(part * (length // 2)), 1)
    x = torch.randn(images, length, 5, generator=chance, dtype=torch.float64)
    sizes = torch.randint(1, 5, (images, length, 1), generator=chance).double()
    place = torch.arange(length).expand(images, -1)
    (matched,) = LineMatcher()([(x, sizes, count)])
    found = merge_neighbours(SizedTokens(x, sizes, place), matched)
    for image in range(images):
        tokens, sums, index = slow_merges(x[image], sizes[image, :, 0], count)
        torch.testing.assert_close(found.x[image], tokens)
        torch.testing.assert_close(found.sizes[image, :, 0], sums)
        assert found.token_of_patch[image].tolist() == index


def slow_merges(x: Tensor, sizes: Tensor, count: int) -> tuple[Tensor, Tensor, list[int]]:
    """Merge the ``count`` cheapest odd tokens of one line [N, C] into a neighbour."""
    partner = {}
    for odd in range(1, len(x), 2):
        costs = {}
        for even in (odd - 1, odd + 1):
            if even < len(x):
                cosine = torch.dot(x[odd], x[even]) / (x[odd].norm() * x[even].norm())
                costs[even] = float((1 - cosine) / (1 / sizes[odd] + 1 / sizes[even]))
        even = min(costs, key=costs.__getitem__)
        partner[odd] = costs[even], even
    cheapest = sorted(partner, key=lambda odd: partner[odd][0])[:count]
    groups = {token: [token] for token in range(len(x)) if token not in cheapest}
    for odd in cheapest:
        groups[partner[odd][1]].append(odd)
    tokens, sums, index = [], [], [0] * len(x)
    for new, members in enumerate(groups.values()):
        total = sizes[members].sum()
        mean = (sizes[members, None] * x[members]).sum(0)
        norm = (sizes[members] * x[members].norm(dim=-1)).sum() / total
        tokens.append(mean / mean.norm() * norm)
        sums.append(total)
        for member in members:
            index[member] = new
    return torch.stack(tokens), torch.stack(sums), index


@given(length=st.integers(1, 70), window=st.integers(2, 16), data=st.data())
def test_at_most_half_of_each_line_merges_and_padding_stays(length, window, data):
    side = data.draw(st.integers(2, window))
    smaller = data.draw(st.integers(min(least_side(side), side), side))
    assert length_left(length, window, window) == length
    full, rest = divmod(length, window)
    for one in (side, smaller):
        last = length_left(length, window, one) - full * one
        assert last == 0 if not rest else 1 <= last < one or one == window
    before, after = (length_left(rest, window, one) for one in (side, smaller))
    assert before - after <= before // 2
    assert side - smaller <= side // 2


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), window=st.integers(2, 16), data=st.data())
def test_every_step_between_grids_is_a_plan(rows, columns, window, data):
    steps = dict(steps_of((rows, columns), window))
    left, merged = rows * columns, []
    for _ in range(4):
        least = steps[left]
        chosen = data.draw(st.sampled_from([count for count in steps if least <= count <= left]))
        merged.append(left - chosen)
        left = chosen
    sides = sides_of(merged, (rows, columns), window)
    for total, side in zip((sum(merged[:n]) for n in range(5)), sides, strict=True):
        product = length_left(rows, window, side) * length_left(columns, window, side)
        assert product == rows * columns - total


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_zero_merges_give_the_outputs_of_the_model(name):
    model, changed, x = merging(name, torch.float32)
    assert relative(changed(x), model(x)) > 1e-4
    for block in changed.blocks[1:]:
        block.matcher, block.side = None, block.window
    assert relative(changed(x), model(x)) < 1e-5
    apply_tokens(changed, TokenPlan())
    assert merged_of(changed) == ()
    assert relative(changed(x), model(x)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_merges_of_equal_tokens_change_nothing(name):
    """Padding has other keys than tokens, so it must weigh as much as before."""
    model, changed, _ = merging(name)
    for each in (model, changed):
        each.pos_embed.zero_()
        for part in each.modules():
            if getattr(part, "use_rel_pos", False):  # all pairs at the same distance
                part.rel_pos_h[:] = part.rel_pos_h[:1].clone()
                part.rel_pos_w[:] = part.rel_pos_w[:1].clone()
    _, height, width = size_of(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64).repeat(1, 1, height // 4, width // 4)
    assert relative(changed(x), model(x)) < 1e-10
    for one, other in zip(
        changed.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True
    ):
        assert one.shape == other.shape
        assert relative(one, other) < 1e-10


@torch.no_grad()
def test_tokens_merge_within_a_window_and_all_sizes_are_counted():
    model = build("padding")  # 14 x 14 tokens: windows of 8 and 6
    set_merged(model, schedule(model))
    tokens = []
    for block in model.blocks[1:3]:
        block.matcher.register_forward_hook(lambda module, args, output: tokens.append(output))
    model(torch.randn(2, *size_of(model)))
    for found, side in zip(tokens, sides_of(schedule(model), (14, 14), 8)[2:4], strict=True):
        left = length_left(14, 8, side)
        assert found.x.shape == (2, left, left, 48)
        assert torch.equal(found.sizes.flatten(1).sum(1), torch.tensor([196.0, 196.0]))
        for image in range(2):
            index = found.token_of_patch[image]
            assert torch.equal(index.unique(), torch.arange(left**2))
            assert torch.equal(index.flatten().bincount().float(), found.sizes[image].flatten())
            for token in range(left**2):
                rows, columns = (index == token).nonzero().T
                assert len((rows // 8).unique()) == len((columns // 8).unique()) == 1
                assert (rows[0] // 8, columns[0] // 8) == (token // left // side, token % left // side)


@torch.no_grad()
def test_smaller_and_larger_images_keep_the_sides_of_windows():
    _, changed, _ = merging("padding", torch.float32)
    sides = sides_of(schedule(changed), (14, 14), 8)
    for image in ((3, 40, 72), (3, 96, 64)):
        found = []
        for block in changed.blocks[1:3]:
            block.matcher.register_forward_hook(lambda module, args, output, to=found: to.append(output))
        assert changed(torch.randn(1, *image)).isfinite().all()
        for output, side in zip(found, sides[2:4], strict=True):
            left = tuple(length_left(length // 4, 8, side) for length in image[1:])
            assert output.x.shape[1:3] == left


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_cut_models_compute_what_masked_ones_do(name):
    _, model, x = merging(name)
    prunable = find_prunable_layers(model)
    plan, scales = random_plan(prunable, 1)
    masks = {unit.key: kept_channels(unit).double() * scales.get(unit.key, 1) for unit in plan}
    expected = run_with(model, masked_tensors(model, prunable, masks), x)
    assert relative(expected, model(x)) > 1e-3
    outline = build(name).to("meta")
    cut(model, plan, scales, prunable)
    assert relative(model(x), expected) < 1e-10
    cut(outline, Plan(plan.units, tokens_of(model)))
    outline.to_empty(device="cpu").double().load_state_dict(model.state_dict())
    assert relative(outline(x), expected) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_costs_are_those_of_the_tokens_left(name):
    model = build(name)
    dense = measure_flops(model, size_of(model))
    set_merged(model, schedule(model))
    prunable = find_prunable_layers(model)
    table = build_cost_table(model, prunable, size_of(model))
    assert table.dense == measure_flops(model, size_of(model)) < dense
    plan, _ = random_plan(prunable, 3)
    cut(model, plan)
    assert measure_flops(model, size_of(model)) == table.flops(plan.widths())


@pytest.mark.parametrize("name", slow_but({"padding"}, ["whole windows", "padding"]))
@torch.no_grad()
def test_onnx_programs_compute_the_same_without_scatter(name):
    model, changed, _ = merging(name, torch.float32)
    x = torch.randn(5, *size_of(model))
    content = runtimes.onnx_content(changed, size_of(model))
    operators = {node.op_type for node in onnx.load_from_string(content).graph.node}
    assert "TopK" in operators
    assert not [name for name in operators if "Scatter" in name]
    session = onnxruntime.InferenceSession(content)
    for count in (1, 2, 5):
        (found,) = session.run(None, {"images": x[:count].numpy()})
        assert relative(torch.from_numpy(found), changed(x[:count])) < 1e-4


def test_gradients_are_those_without_checkpoints():
    _, model, x = merging("padding")
    model.requires_grad_(True)
    found = []
    for checkpoints in (False, True):
        model.set_grad_checkpointing(checkpoints)
        found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_plans_that_leave_no_grid_are_refused():
    model = build("padding")
    with pytest.raises(PlanError, match=r"block 1 has windows of 8 x 8 tokens and merges 52 or 96 or 132, "):
        set_merged(model, (0, 50, 0, 0))
    with pytest.raises(PlanError, match="4 blocks, the plan 2"):
        set_merged(model, (0, 52))
    rotary = build("padding", use_rel_pos=False, use_rope=True)
    with pytest.raises(UnsupportedModelError, match="rotary positions"):
        set_merged(rotary, (0, 52, 0, 0))


def test_plans_state_the_grid():
    model = build("padding, oblong")
    set_merged(model, schedule(model))
    plan = tokens_of(model)
    assert plan.to_json() | {"merged": []} == {
        "merged": [],
        "rule": "grid",
        "copied": True,
        "grid": [9, 16],
    }
    read = TokenPlan.from_json(plan.to_json())
    assert (read, read.grid) == (plan, (9, 16))
    for change in ({"grid": [9]}, {"grid": [0, 16]}, {"rule": "checkerboard"}, {"copied": False}):
        with pytest.raises(PlanError):
            TokenPlan.from_json(plan.to_json() | change)
