"""Models and images at the edge of numerics: a sound result, or a clear refusal, in both bases."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import mhacut
from helpers.models import ModelCase, build
from helpers.pruning import QUICK
from mhacut.errors import CheckpointError, DataError, MhacutError
from mhacut.linalg.moments import Moments
from mhacut.linalg.reconstruction import refit_logits
from mhacut.linalg.selection import RIDGE, damped_inverse, rank_channels
from mhacut.pruning.calibrate import calibrate
from mhacut.surgery.find import find_prunable_layers

ARGS = {"depth": 2, "embed_dim": 24, "num_heads": 3, "patch_size": 8}


def made(**more: object) -> nn.Module:
    case = ModelCase("vit_tiny_patch16_224", {"img_size": 16, **ARGS, **more})
    return build(case).requires_grad_(False)


def with_attention(change: Callable[[Tensor, Tensor], None]) -> nn.Module:
    model = made()
    for block in model.blocks:
        change(block.attn.qkv.weight.view(3, 3, 8, 24), block.attn.qkv.bias.view(3, 3, 8))
    return model


def rank_deficient(weight: Tensor, bias: Tensor) -> None:
    mix = torch.randn(3, 3, 4, 4)
    weight[:, :, 4:] = mix @ weight[:, :, :4]
    bias[:, :, 4:] = (mix @ bias[:, :, :4, None])[..., 0]


def constant(weight: Tensor, bias: Tensor) -> None:
    weight.zero_()


def nothing(weight: Tensor, bias: Tensor) -> None:
    weight.zero_(), bias.zero_()


def no_head(weight: Tensor, bias: Tensor) -> None:
    weight[:, 1], bias[:, 1] = 0, 0


def equal_channels(weight: Tensor, bias: Tensor) -> None:
    weight[:], bias[:] = weight[:, :, :1].clone(), bias[:, :, :1].clone()


def values_times(factor: float) -> nn.Module:
    model = made()
    for block in model.blocks:
        block.attn.qkv.weight[48:] *= factor
        block.attn.qkv.bias[48:] *= factor
        block.attn.proj.weight /= factor
    return model


def logits_times(factor: float) -> nn.Module:
    model = made()
    for block in model.blocks:
        block.attn.qkv.weight[:48] *= factor
    return model


def outlying_channels() -> nn.Module:
    """As in a trained ViT-Ti, some channels of the tokens are a hundred times the others."""
    model = made()
    for block in model.blocks:
        block.norm1.weight[:2] *= 100
        block.norm2.weight[:2] *= 100
    return model


def images(model: nn.Module, count: int = 8) -> Tensor:
    side = model.patch_embed.img_size[0]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def of_zeros() -> nn.Module:
    model = made()
    for parameter in model.parameters():
        parameter.zero_()
    return model


LOSSLESS: dict[str, Callable[[], nn.Module]] = {
    "constant activations": lambda: with_attention(constant),
    "no attention": lambda: with_attention(nothing),
    "weights of zero": of_zeros,
    "equal channels": lambda: with_attention(equal_channels),
}
"""Models of which a part says nothing: what is cut of it costs nothing."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "rank-deficient": lambda: with_attention(rank_deficient),
    "one head of zeros": lambda: with_attention(no_head),
    "values of 1e22": lambda: values_times(1e22),
    "values of 1e-30": lambda: values_times(1e-30),
    "logits of 1e12": lambda: logits_times(1e6),
    "logits of 1e-12": lambda: logits_times(1e-6),
    "outlying channels": outlying_channels,
    "one class": lambda: made(num_classes=1),
    "no classes": lambda: made(num_classes=0),
    "one token": lambda: made(img_size=8, class_token=False, global_pool="avg"),
}
IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "one image": lambda x: x[:1],
    "the same image": lambda x: x[:1].repeat(8, 1, 1, 1),
    "black images": torch.zeros_like,
    "huge images": lambda x: 1e15 * x,
    "tiny images": lambda x: 1e-20 * x,
}


def pruned(model: nn.Module, given: Tensor, flops: str = "70%", **options) -> tuple[nn.Module, float]:
    side = model.patch_embed.img_size[0]
    args = {**ARGS, "img_size": side, "class_token": model.cls_token is not None}
    args["global_pool"] = model.global_pool
    options |= {"model_args": args, "dry_run": True, "round_to": 1, **QUICK}
    result = mhacut.prune(model, flops=flops, images=given, **options)
    return result.model(), result.divergence


def outputs_in_float64(model: nn.Module, given: Tensor) -> Tensor:
    return model.double()(given.double())


@torch.no_grad()
def assert_sound(model: nn.Module, given: Tensor, basis: str) -> tuple[Tensor, Tensor]:
    slim, divergence = pruned(model, given, basis=basis)
    single = slim(given)
    found, expected = outputs_in_float64(slim, given), outputs_in_float64(model, given)
    assert found.isfinite().all()
    assert (single - found).abs().max() <= 2e-3 * found.abs().max()
    if model.num_classes > 1:
        logs, wanted = found.log_softmax(-1), expected.log_softmax(-1)
        kl = (wanted.exp() * (wanted - logs)).sum(-1)  # of each image; some of them are held out
        assert 0.99 * float(kl.min()) - 1e-5 <= divergence <= 1.01 * float(kl.max()) + 1e-5
    else:
        assert 0 <= divergence < 10
    return found, expected


def one_basis_each(cases: Iterable[str]) -> list:
    """Cases in both bases, in turn; the other basis of each is exhaustive."""
    bases = ("channel", "principal")
    return [
        pytest.param(case, basis, marks=pytest.mark.slow if number % 2 == turn else pytest.mark.exhaustive)
        for number, case in enumerate(cases)
        for turn, basis in enumerate(bases)
    ]


@pytest.mark.parametrize(("case", "basis"), one_basis_each(LOSSLESS))
def test_what_says_nothing_is_cut_at_no_cost(case, basis):
    model = LOSSLESS[case]()
    found, expected = assert_sound(model, images(model), basis)
    assert (found - expected).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.parametrize(("case", "basis"), one_basis_each(MODELS))
def test_models_at_the_edge(case, basis):
    model = MODELS[case]()
    assert_sound(model, images(model), basis)


@pytest.mark.parametrize(("case", "basis"), one_basis_each(IMAGES))
def test_images_at_the_edge(case, basis):
    model = made()
    assert_sound(model, IMAGES[case](images(model)), basis)


@pytest.mark.slow
def test_scale_costs_nothing():
    """Values that are 1e22, or 1e-30, times as large, and read as much less."""
    model, x = made(), images(made(), 24)
    _, usual = pruned(model, x, basis="channel")
    for factor in (1e22, 1e-30):
        assert pruned(values_times(factor), x, basis="channel")[1] <= 2 * usual + 1e-5


def test_numbers_that_are_none_are_refused(tmp_path):
    model, x = made(), images(made())
    one = x.clone()
    one[3, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="an image holds NaN or infinite values"):
        pruned(model, one)
    model.blocks[1].attn.qkv.bias[50] = float("inf")
    with pytest.raises(
        CheckpointError, match=r"1 tensors hold NaN or infinite values: 'blocks.1.attn.qkv.bias'"
    ):
        pruned(model, x)
    model = made()
    model.blocks[0].attn.proj.bias += 3e38  # finite, and its square is not
    torch.save(model.state_dict(), tmp_path / "model.pth")
    given = {"model": "vit_tiny_patch16_224", "model_args": {**ARGS, "img_size": 16}, "images": x}
    with pytest.raises(MhacutError, match="the model's outputs are not finite on the calibration images"):
        mhacut.prune(tmp_path / "model.pth", flops="70%", dry_run=True, **given)


def test_gradients_whose_squares_are_not_finite_are_refused():
    model, x = made(), images(made())

    def steeper(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: 1e30 * gradient)

    model.blocks[1].register_forward_hook(steeper)
    prunable = find_prunable_layers(model.requires_grad_(False))
    with pytest.raises(MhacutError, match="the model's gradients are not finite on the calibration images"):
        calibrate(model, prunable, x, batch_size=len(x), fisher_images=len(x))


# --- the mathematics ---


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("weighted", [False, True])
def test_moments_of_any_scale_are_those_in_float64(scale, weighted):
    x = (scale * (torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0)) + 3)).float()
    weights = torch.linspace(0.5, 1.5, 40) if weighted else None
    found, counts = Moments.of(x, weights), torch.ones(40) if weights is None else weights
    exact = x.double()
    expected = exact.mT @ (counts.double()[:, None] * exact)
    assert torch.allclose(found.second, expected, rtol=1e-5, atol=0)
    assert torch.allclose(found.total, (counts.double()[:, None] * exact).sum(-2), rtol=1e-5, atol=0)


def test_the_inverse_of_an_indefinite_matrix_is_positive():
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double()).Q
    values = torch.tensor([-1e-3, 1e-3, 1.0, 2.0, 3.0]).double()  # mean 1.2
    second = basis * values @ basis.T
    found = damped_inverse(torch.stack([second, torch.eye(5).double()]))
    expected = (
        basis / (values + 1.2e4 * RIDGE) @ basis.T
    )  # at 1.2e3 the ridge is less than twice the negative one
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], torch.eye(5).double() / (1 + RIDGE))  # the other head's is its own


def test_a_matrix_that_is_not_finite_has_no_inverse():
    with pytest.raises(torch.linalg.LinAlgError):
        damped_inverse(torch.full((3, 3), torch.nan).double())


def test_a_head_of_zeros_beside_others_is_refitted_to_zeros():
    x = (
        torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 0.0])[:, None, None]
    )
    moments, kept = (Moments.of(x), Moments.of(x.flip(-1))), torch.tensor([[0, 2], [0, 2]])
    found = refit_logits(moments, moments, kept, 1.0)
    assert found.ridge < float("inf")
    assert found.matrix.isfinite().all()
    alone = tuple(Moments(side.rows, side.total[:1], side.second[:1]) for side in moments)
    assert torch.allclose(found.matrix[:1], refit_logits(alone, alone, kept[:1], 1.0).matrix)
    assert torch.equal(found.matrix[1], torch.eye(2).double())


def test_of_many_equal_channels_the_first_go():
    """torch sorts up to 16 numbers stably even if it is not asked to."""
    second, columns = torch.eye(40).double(), torch.ones(3, 40).double()
    assert rank_channels(second, columns, heads=1, smallest=1).order[0].tolist() == list(range(40))[::-1]
