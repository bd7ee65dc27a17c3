"""Models that merge tokens: what cutting, copying, resuming and exporting them must not change."""

from __future__ import annotations

import copy
import math
import pickle

import onnx
import onnxruntime
import pytest
import torch
from timm.layers import RelPosMlp
from torch import nn

from helpers.models import ModelCase, build, double, image, relative, slow_but, slow_except
from helpers.plans import random_plan
from mhacut.checkpoint.build import allocate
from mhacut.errors import PlanError, UnsupportedModelError
from mhacut.exporting import runtimes
from mhacut.exporting.quantize import quantize
from mhacut.plan import Plan, TokenPlan
from mhacut.pruning.resumable import ResumableModel
from mhacut.surgery.channels import rotate
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.mask import kept_channels, masked_tensors, run_with
from mhacut.surgery.slice import cut
from mhacut.surgery.token_merging import weigh
from mhacut.surgery.tokens import apply_tokens, set_merged, tokens_of


def merging(architecture: str = "vit_tiny_patch16_224", **args: object) -> ModelCase:
    small = {"depth": 3, "img_size": 64, "embed_dim": 24, "num_heads": 3}
    return ModelCase(architecture, {**small, **args})


WITH_HEAD = {"num_classes": 10, "init_values": 0.5}
MERGING = {
    "read": (merging(), TokenPlan(1, (4, 3, 0))),
    "all tokens": (merging(), TokenPlan(None, (0, 8, 4))),
    "registers": (merging(reg_tokens=2, no_embed_class=True), TokenPlan(1, (8, 0, 0))),
    "distilled": (merging("deit_tiny_distilled_patch16_224"), TokenPlan(2, (3, 0, 0))),
    "averaging": (merging("vit_base_patch16_gap_224"), TokenPlan(None, (2, 5, 1))),
    "averaging behind a norm": (merging(global_pool="avg", fc_norm=False), TokenPlan(None, (2, 5, 0))),
    "copied back": (merging(), TokenPlan(None, (0, 8, 4), unmerge=True)),
    "copied back, registers": (
        merging(reg_tokens=2, global_pool="", num_classes=0),
        TokenPlan(None, (4, 0, 6), unmerge=True),
    ),
    "copied back, of before": (merging(), TokenPlan(None, (0, 8, 4), unmerge="rows")),
    "rotary": (
        merging("eva02_tiny_patch14_224", patch_size=16, global_pool="token"),
        TokenPlan(1, (4, 3, 0)),
    ),
    "rotary by halves, averaging": (
        merging("vit_small_patch16_dinov3", **WITH_HEAD),
        TokenPlan(None, (2, 5, 1)),
    ),
    "rotary, all tokens": (
        merging("vit_small_patch16_rope_224", init_values=0.5, no_embed_class=True),
        TokenPlan(None, (0, 8, 4)),
    ),
    "rotary, copied back": (
        merging("vit_small_patch16_dinov3", patch_size=8, img_size=32),
        TokenPlan(None, (0, 8, 4), unmerge=True),
    ),
    "attention pooling": (merging(global_pool="map"), TokenPlan(None, (2, 5, 1))),
    "rotary, attention pooling": (
        merging("vit_pe_core_tiny_patch16_384", num_classes=10),
        TokenPlan(None, (0, 8, 2)),
    ),
    "position biases": (merging("beit_base_patch16_224", **WITH_HEAD), TokenPlan(None, (2, 5, 1))),
    "position biases, read": (
        merging("beitv2_base_patch16_224", **WITH_HEAD, global_pool="token"),
        TokenPlan(1, (4, 3, 0)),
    ),
    "position biases of all blocks, copied back": (
        merging(
            "beit_base_patch16_224",
            **WITH_HEAD,
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
        ),
        TokenPlan(None, (0, 8, 4), unmerge=True),
    ),
    "positions by MLP": (
        merging("vit_relpos_base_patch16_clsgap_224", **WITH_HEAD),
        TokenPlan(None, (2, 5, 1)),
    ),
    "positions by MLP, all tokens": (
        merging("vit_relpos_base_patch16_cls_224", **WITH_HEAD, qk_norm=True),
        TokenPlan(None, (0, 8, 4)),
    ),
    "positions by MLP of all blocks, copied back": (
        merging("vit_srelpos_small_patch16_224", **WITH_HEAD),
        TokenPlan(None, (4, 0, 2), unmerge=True),
    ),
    "position biases, norms behind": (
        merging("vit_relpos_base_patch16_rpn_224", num_classes=10),
        TokenPlan(None, (2, 5, 1)),
    ),
    "norms behind": (merging("vit_base_patch16_rpn_224", num_classes=10), TokenPlan(None, (2, 5, 1))),
    "norms behind, read": (
        merging("vit_base_patch16_rpn_224", num_classes=10, class_token=True, global_pool="token"),
        TokenPlan(1, (2, 5, 0)),
    ),
    "class attention": (merging("cait_xxs24_224", **WITH_HEAD), TokenPlan(None, (2, 5, 1))),
    "class attention, averaging": (
        merging("cait_xxs24_224", **WITH_HEAD, global_pool="avg"),
        TokenPlan(None, (2, 5, 1)),
    ),
    "class attention, copied back": (
        merging("cait_xxs24_224", **WITH_HEAD),
        TokenPlan(None, (4, 0, 2), unmerge=True),
    ),
    "layer scale, normalised": (merging("deit3_small_patch16_224", qk_norm=True), TokenPlan(1, (1, 1, 0))),
}
"""Models and what they merge."""
BIASES = [name for name in MERGING if name.startswith(("position", "class attention"))]


@pytest.fixture(
    params=slow_except(
        {
            "read",
            "averaging",
            "copied back",
            "copied back, registers",
            "rotary",
            "rotary by halves, averaging",
            "position biases, read",
            "positions by MLP",
            "class attention",
        },
        MERGING,
    )
)
def case(request):
    return MERGING[request.param]


@pytest.fixture(params=slow_except({"read", "averaging", "copied back", "rotary, all tokens"}, MERGING))
def case_of_few(request):
    """For what takes longer."""
    return MERGING[request.param]


def merged(case: tuple[ModelCase, TokenPlan]) -> tuple[nn.Module, torch.Tensor]:
    model, x = double(case[0])
    apply_tokens(model, case[1])
    assert tokens_of(model) == case[1]
    return model, x


@torch.no_grad()
def test_a_model_whose_equal_tokens_merge_computes_the_same():
    """Averages of equal tokens are these tokens, which then weigh as much as all of them together."""
    rotary = merging("eva02_tiny_patch14_224", patch_size=16)
    for case in (*(merging(global_pool=name) for name in ("token", "avg", "map")), rotary):
        model, x = double(case)
        model.pos_embed.zero_()
        if case is rotary:  # all patches at the same position
            model.rope.pos_embed.copy_(model.rope.pos_embed[5].clone())
        x = x[:, :, :16, :16].repeat(1, 1, 4, 4)  # 16 patches alike
        expected = model(x)
        set_merged(model, (8, 4, 2))
        assert relative(model(x), expected) < 1e-12


@torch.no_grad()
def test_where_equal_tokens_merge_every_patch_has_its_features():
    """At the end and after any block; of a model that pools neither class token nor mean, too."""
    model, x = double(merging(reg_tokens=1, global_pool="map"))
    model.pos_embed.zero_()
    kinds = x[:, :, :16, :16], x[:, :, 16:32, :16]
    chosen = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1])
    x = torch.cat([kinds[kind] for kind in chosen], -1).unflatten(-1, (4, 64)).movedim(-2, 2).flatten(2, 3)
    expected = model(x), model.forward_features(x), *model.forward_intermediates(x)[1]
    before = set(dict(model.named_modules()))
    set_merged(model, (5, 2, 1), unmerge=True)
    found = model(x), model.forward_features(x), *model.forward_intermediates(x)[1]
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-12
    assert set(dict(model.named_modules())) == before | {f"blocks.{block}.matcher" for block in range(3)}
    assert len(model.get_intermediate_layers(x, n=2)) == 2


@torch.no_grad()
def test_files_of_before_the_checkerboard_merge_as_they_did():
    """Their sets are columns, so that rows of equal patches merge without an error, columns do not."""
    model, x = double(merging(num_classes=0, global_pool=""))
    model.pos_embed.zero_()
    rows = torch.randn_like(x)[:, :, :, :1].expand_as(x)
    rows = rows[:, :, ::16].repeat_interleave(16, 2)
    for images, exact in ((rows, True), (rows.mT, False)):
        dense = model(images)
        set_merged(model, (8, 0, 0), unmerge="rows")
        assert torch.allclose(model(images), dense) == exact
        set_merged(model, ())


@torch.no_grad()
def test_cut_models_compute_what_masked_ones_do(case):
    model, x = merged(case)
    prunable = find_prunable_layers(model)
    plan, scales = random_plan(prunable, 1)
    masks = {unit.key: kept_channels(unit).double() * scales.get(unit.key, 1) for unit in plan}
    expected = run_with(model, masked_tensors(model, prunable, masks), x)
    assert relative(expected, model(x)) > 1e-3
    cut(model, plan, scales, prunable)
    assert relative(model(x), expected) < 1e-10


@torch.no_grad()
def test_a_change_of_basis_changes_no_match(case):
    model, x = merged(case)
    expected = model(x)
    for unit in find_prunable_layers(model).units():
        if unit.mixing == "rotate":
            basis = torch.randn(unit.heads, unit.width, unit.width, dtype=torch.float64)
            rotate(model.get_submodule(unit.layer), unit, basis)
    assert relative(model(x), expected) < 1e-8


def test_costs_are_those_of_the_tokens_left(case_of_few):
    case = case_of_few
    model = build(case[0])
    dense = measure_flops(model, case[0].size)
    apply_tokens(model, case[1])
    prunable = find_prunable_layers(model)
    table = build_cost_table(model, prunable, case[0].size)
    assert table.dense == measure_flops(model, case[0].size) < dense
    plan, _ = random_plan(prunable, 3)
    cut(model, plan)
    assert measure_flops(model, case[0].size) == table.flops(plan.widths())


@torch.no_grad()
def test_passes_do_not_mix(case_of_few):
    """Of several batches, block by block and layer by layer; of copies; of images alone and together."""
    model, x = merged(case_of_few)
    expected, heads = model(x), []
    handle = model.head.register_forward_hook(lambda module, args, output: heads.append(output))
    model(x)
    handle.remove()
    layers = ("", ".attn.proj", ".mlp.fc1", ".mlp.fc2")
    for inside in (layers[:1], layers[1:]):
        with ResumableModel(model, x.split(1)) as resumed:
            for name in [f"blocks.{number}{layer}" for number in range(3) for layer in inside]:
                resumed.run_through(name)
            outputs = resumed.run_through("head")
        assert relative(torch.cat(outputs), heads[0]) < 1e-12
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    assert relative(torch.cat([model(one[None]) for one in x]), expected) < 1e-12


def test_gradients_are_those_without_checkpoints(case):
    model, x = merged(case)
    model.requires_grad_(True)
    found = []
    for checkpoints in (False, True):
        model.set_grad_checkpointing(checkpoints)
        found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("images", [2, 2000])
@torch.no_grad()
def test_a_merging_layer_gives_what_the_class_token_looks_at(images):
    """A cut one, whose q and k are narrower than v, with sizes; of few images and of many."""
    model, _ = merged(MERGING["read"])
    cut(model, random_plan(find_prunable_layers(model), 2)[0])
    m, width = model.blocks[0].attn, model.embed_dim
    tokens = torch.randn(images, 10, width, dtype=torch.float64)
    sizes = torch.randint(1, 4, (images, 10, 1)).double()
    rows = (m.qkv.out_features - m.proj.in_features) // 2
    parts = m.qkv(tokens).split((rows, rows, m.proj.in_features), dim=-1)
    q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in parts)
    weights = (q @ k.mT * m.scale + sizes.log().mT[:, None]).softmax(-1)
    output, looks = m(tokens, attn_mask=sizes.log().mT[:, None])
    torch.testing.assert_close(looks, weights[:, :, 0])
    torch.testing.assert_close(output, m.proj((weights @ v).transpose(1, 2).flatten(2)))


def test_a_class_token_that_looks_at_itself_alone_leaves_weights_by_size():
    sizes, looks = torch.tensor([1, 2, 1, 3]).half()[None, :, None], torch.tensor([1, 0, 0, 0]).half()
    weights = weigh(sizes, looks.expand(1, 3, 4), 1)
    torch.testing.assert_close(weights[:, 1:] / weights[:, 1:2], sizes[:, 1:].float() / 2)


@torch.no_grad()
def test_cut_and_merged_on_meta_is_the_same_model(case):
    model, x = merged(case)
    outline = build(case[0], dtype=torch.float64).to("meta")
    plan, _ = random_plan(find_prunable_layers(model), 4)
    cut(model, plan)
    cut(outline, Plan(plan.units, case[1]))
    allocate(outline)
    outline.load_state_dict(model.state_dict())
    assert relative(outline(x), model(x)) < 1e-12


@pytest.mark.parametrize(
    ("merges", "reason"),
    [
        ((9, 0, 0), "at most 8"),
        ((8, 5, 0), "block 1 .* merges at most 4"),
        ((1, 1), "3 blocks"),
    ],
)
def test_merges_that_a_model_has_no_tokens_for_are_refused(merges, reason):
    with pytest.raises(PlanError, match=reason):
        set_merged(build(merging()), merges)
    model = build(merging())
    apply_tokens(model, TokenPlan(1))
    with pytest.raises(PlanError, match="computes no patches"):
        set_merged(model, (0, 0, 1))


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("xcit_nano_12_p16_224", {"depth": 2}),
        ("vit_small_patch16_rope_mixed_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "max"}),
        ("vit_tiny_patch16_224", {"depth": 1}),
    ],
)
def test_models_that_cannot_merge_are_refused_by_name(architecture, args):
    model = build(merging(architecture, **args))
    with pytest.raises(
        UnsupportedModelError, match=r"tokens cannot be merged: .*(plain|frequencies|max|no block)"
    ):
        set_merged(model, (1, 0, 0))


def test_dense_features_and_masks_are_refused():
    model, x = merged(MERGING["read"])
    with pytest.raises(UnsupportedModelError, match="merges tokens"):
        model.forward_intermediates(x)
    with pytest.raises(UnsupportedModelError, match="attention masks are not supported"):
        model(x, is_causal=True)


def test_under_autocast_the_same_tokens_merge():
    model, x = build(merging()), image(merging())
    set_merged(model, (8, 0, 0))
    found = []
    matcher = model.blocks[0].matcher
    matcher.register_forward_hook(lambda module, args, output: found.append((args, output)))
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    ((given, match),) = found
    again = matcher(*given)
    assert torch.equal(match.merged, again.merged)
    assert torch.equal(match.receivers, again.receivers)


def matrices(content: bytes) -> int:
    constants = onnx.load_from_string(content).graph.initializer
    floats = [one.dims for one in constants if one.data_type == onnx.TensorProto.FLOAT]
    return sum(math.prod(dims) for dims in floats if len(dims) == 2)


@pytest.mark.parametrize(
    "name",
    slow_but(
        {"averaging", "copied back", "distilled", "rotary by halves, averaging", *BIASES},
        [
            "read",
            "averaging",
            "copied back",
            "distilled",
            "rotary",
            "rotary by halves, averaging",
            *BIASES,
        ],
    ),
)
@torch.no_grad()
def test_onnx_programs_compute_the_same_without_scatter(name):
    case = MERGING[name]
    model, x = build(case[0]), image(case[0], batch=5)
    apply_tokens(model, case[1])
    content = runtimes.onnx_content(model, case[0].size)
    operators = {node.op_type for node in onnx.load_from_string(content).graph.node}
    assert "TopK" in operators
    assert not [name for name in operators if "Scatter" in name]
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    rope = getattr(model, "rope", None)  # its table is a constant: for the first merge, and in two halves
    tables = 0 if rope is None else 3 * rope.get_embed(shape=model.patch_embed.grid_size).numel()
    for part in model.modules():
        if isinstance(part, RelPosMlp):  # the exporter computes its table
            linear -= sum(weight.numel() for weight in part.parameters() if weight.dim() == 2)
        if hasattr(part, "relative_position_index"):
            tables += 3 * 17**2 * 3  # of up to 17 x 17 tokens and 3 heads
    assert linear <= matrices(content) <= linear + tables  # of which there are no copies
    if name == "read":
        assert matrices(quantize(content)) == 0
    session = onnxruntime.InferenceSession(content)
    for count in (1, 2, 5):
        (found,) = session.run(None, {"images": x[:count].numpy()})
        assert relative(torch.from_numpy(found), model(x[:count])) < 1e-4
