"""Moments of a unit's channels from weights alone, as if the layer's input were white.

Ours; for reports on a checkpoint without images. Real inputs are far from white, so that these moments serve
for a first look, never to decide a cut.
"""

from __future__ import annotations

from torch import Tensor, nn

from mhacut.adapters.base import ChannelAxis, Unit
from mhacut.linalg.moments import Moments
from mhacut.linalg.similarity import cosine_similarity, redundancy
from mhacut.pruning.candidates import block_diagonal
from mhacut.pruning.unit_sums import UnitMoments
from mhacut.surgery.channels import channels_of


def white_moments(module: nn.Module, unit: Unit) -> tuple[UnitMoments, Tensor] | None:
    """Return the moments of the unit's channels for inputs of mean 0 and unit covariance, and a similarity.

    Every head is assumed to attend to its own tokens, so that v channels of different heads are unrelated.
    What follows the projections (ReLUs, powers, norms, convolutions) is left out.

    Args:
        module: the layer.
        unit: qk or v of that layer.

    Returns:
        The moments, and the mean similarity of each channel to the others of its head, [H, d], in [0, 1];
        None where the channels are not made by linear layers, one row each, or not from the layer's input.
    """
    grams = _grams(module, unit)
    if not grams:
        return None
    similarity = redundancy(*map(cosine_similarity, grams))
    if unit.linear:
        grams = [grams[0] * grams[1]]  # of independent features, as products of q, k and v are
    elif unit.kind == "v":
        grams = [block_diagonal(grams[0])]
    sides = tuple(Moments(1, gram.new_zeros(gram.shape[:-1]), gram) for gram in grams)
    return UnitMoments(sides, sides), similarity


def _grams(module: nn.Module, unit: Unit) -> list[Tensor]:
    """Second moments [H, d, d], float64: of q and (centred) k, or of v. Empty without linear layers."""
    weights = [axis for axis in unit.axes if _projects(module, axis)]
    sides = 2 if unit.kind == "qk" else 1
    grams: list[Tensor] = []
    if not unit.white_inputs or len(weights) < sides or any(axis.shared or axis.heads for axis in weights):
        return grams
    for axis in weights[:sides]:
        rows = channels_of(module, unit, axis).flatten(2).double()  # (H, d, in)
        grams.append(rows @ rows.mT)
    if unit.kind == "qk":
        bias = _bias_beside(module, unit, weights[0])
        if bias is not None:  # keys are centred, so that their bias has no effect
            grams[0] = grams[0] + bias @ bias.mT
    return grams


def _projects(module: nn.Module, axis: ChannelAxis) -> bool:
    """Whether the axis runs along the output rows of a linear layer, or of a 1x1 convolution."""
    owner_name, _, name = axis.tensor.rpartition(".")
    owner = module.get_submodule(owner_name)
    pixelwise = isinstance(owner, nn.Conv2d) and owner.kernel_size == (1, 1) and owner.groups == 1
    return axis.dim == 0 and name == "weight" and (isinstance(owner, nn.Linear) or pixelwise)


def _bias_beside(module: nn.Module, unit: Unit, weight: ChannelAxis) -> Tensor | None:
    """Bias of the layer whose weight this is, [H, d, copies], float64; None without one."""
    name = weight.tensor.removesuffix("weight") + "bias"
    for axis in unit.axes:
        if axis.tensor == name and axis.offset == weight.offset:
            return channels_of(module, unit, axis).double()
    return None
