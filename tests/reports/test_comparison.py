"""Two models laid beside each other, against a slow reference."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file

from helpers.cli import document_of, run
from helpers.models import ModelCase, build, image
from mhacut.commands.inspect import inspect
from mhacut.errors import CheckpointError, MhacutError, UsageError
from mhacut.inspection.compare import compare
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut
from mhacut.surgery.tokens import set_merged

CASE = ModelCase("vit_tiny_patch16_224", {"depth": 2, "img_size": 32, "num_classes": 7, "embed_dim": 48})


def halved(model):
    slim, units = copy.deepcopy(model), find_prunable_layers(model).units()
    cut(slim, Plan(tuple(unit.keep_first(unit.width // 2) for unit in units)))
    return slim


def outputs(model, images, name):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda m, args, out: seen.append((args[0], out[0] if type(out) is tuple else out))
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    return seen[0]


def test_layers_are_compared_as_a_slow_reference_does():
    dense = build(CASE, dtype=torch.float64)
    slim = halved(dense)
    images = image(CASE, batch=5, dtype=torch.float64)
    found = compare(dense, slim, images, source="dense", data="noise", batch_size=2)
    for layer in found.layers:
        x, expected = outputs(dense, images, layer.name)
        _, other = outputs(slim, images, layer.name)
        with torch.no_grad():
            alone = slim.get_submodule(layer.name)(x)
        assert layer.own_error == pytest.approx(float((alone - expected).norm() / expected.norm()), rel=1e-9)
        assert layer.error == pytest.approx(float((other - expected).norm() / expected.norm()), rel=1e-9)
        assert layer.flops[1] < layer.flops[0]
    with torch.no_grad():
        p, q = dense(images).log_softmax(-1), slim(images).log_softmax(-1)
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum() / 5), rel=1e-5)
    assert found.agreement == sum(int(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)) / 5


@pytest.mark.parametrize("dense_merges", [False, True])
def test_tokens_that_are_merged_are_compared_with_the_same_patches(dense_merges):
    """Each layer against one of the dense model whose tokens are merged as the slim model merges them."""
    merges = (4, 3, 0)
    dense = build(ModelCase(CASE.architecture, {**CASE.args, "depth": 3, "patch_size": 8}))
    slim = halved(dense)
    with torch.no_grad():  # so that it matches other tokens
        slim.pos_embed += 2 * torch.randn(slim.pos_embed.shape, generator=torch.Generator().manual_seed(0))
    set_merged(slim, merges)
    if dense_merges:
        set_merged(dense, merges)
    images = image(CASE, batch=5)
    found = compare(dense, slim, images, source="dense", data="noise", batch_size=2)

    same = copy.deepcopy(dense)
    set_merged(same, merges)
    chosen = []
    for block in (0, 1):
        _, own = outputs(same, images, f"blocks.{block}.matcher")
        _, taken = outputs(slim, images, f"blocks.{block}.matcher")
        chosen.append(taken)
        assert own.merged.tolist() != taken.merged.tolist()
    for block, taken in enumerate(chosen):
        same.blocks[block].matcher.register_forward_hook(lambda m, args, out, taken=taken: taken)
    for layer in found.layers:
        _, expected = outputs(same, images, layer.name)
        _, other = outputs(slim, images, layer.name)
        assert layer.error == pytest.approx(float((other - expected).norm() / expected.norm()), rel=1e-5)
    with torch.no_grad():  # outputs are those of the dense model as it is
        p, q = dense(images).log_softmax(-1), slim(images).log_softmax(-1)
    assert found.divergence == pytest.approx(float((p.exp() * (p - q)).sum() / 5), rel=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"depth": 1}, "compare='other': the layer blocks.1.attn"),
        ({"num_heads": 6}, "compare='other': the layer blocks.0.attn or its heads differ"),
        ({"num_classes": 3}, "expected 7 outputs per image, found 3"),
    ],
)
def test_another_model_is_refused(args, message):
    other = build(ModelCase(CASE.architecture, {**CASE.args, **args}))
    with pytest.raises(MhacutError, match=message):
        compare(other, build(CASE), image(CASE), source="other", data="b", batch_size=2)


@pytest.mark.slow
def test_a_slim_file_beside_its_dense_one(slim_of):
    slim = slim_of("flatten")
    dense = slim.parent / "dense.safetensors"  # says nothing of itself: the slim file does
    asked = ["inspect", str(slim), "--compare", str(dense), "--calibration-images", "8"]
    comparison = document_of(*asked)["comparison"]
    assert comparison["data"] == "8 synthetic images of shapes (64x64)"
    dense_flops, slim_flops = comparison["flops"]
    assert slim_flops < 0.7 * dense_flops
    assert all(layer["error"] >= 0 for layer in comparison["layers"])
    widths = [pair for layer in comparison["layers"] for pair in layer["widths"].values()]
    assert any(after < before for before, after in widths)
    shown = run(*asked).stdout
    assert "own error" in shown
    assert f"{100 * comparison['agreement']:.1f}% have the same top-1 class" in shown


def test_a_part_is_the_dense_models(slim_of, tmp_path):
    dense = load_file(slim_of("vit").parent / "dense.safetensors")
    other = {name: tensor + 0.1 for name, tensor in dense.items()}
    training = tmp_path / "training.pth"
    torch.save({"model": dense, "model_ema": other}, training)
    given = {"compare": training, "calibration_images": 2}
    model = inspect(slim_of("vit"), part="model", **given).comparison
    plain = inspect(
        slim_of("vit"), compare=slim_of("vit").parent / "dense.safetensors", calibration_images=2
    ).comparison
    assert model.layers == plain.layers
    assert inspect(slim_of("vit"), **given).comparison.layers != plain.layers  # the average comes first
    with pytest.raises(CheckpointError, match="part='pupil': no such part"):
        inspect(slim_of("vit"), part="pupil", **given)


def test_what_lies_beside_what_is_said_or_refused(slim_of, tiny_vit, tmp_path):
    dense = tiny_vit.options
    with pytest.raises(UsageError, match="expected a dense model, found a slim file"):
        inspect(tiny_vit.path, compare=slim_of("vit"), **dense)
    large = tmp_path / "large"
    timm.models.save_for_hf(
        timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=48, img_size=64),
        str(large),
        safe_serialization=True,
    )
    with pytest.raises(UsageError, match="expected image size 3x32x32, found 3x64x64"):
        inspect(slim_of("vit"), compare=large, calibration_images=2)
