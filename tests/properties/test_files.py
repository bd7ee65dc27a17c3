"""From file to file: models of every kind are pruned, written, read back and written again."""

from __future__ import annotations

import pytest
import torch

import mhacut
from helpers.files import save_dense
from helpers.models import build, image
from mhacut.surgery.flops import measure_flops
from properties.cases import FIRST_MODEL, MODELS, UNLIKE_ATTENTION

QUICK = {"attention.Attention"}
UNLIKE = {
    "attention.Attention, distilled",
    "attention.Attention, gated mlp",
    "eva.EvaAttention, separate",
    "attention.SeparateFocusedAttention, pvt v2",
}
"""Models of other classes around them, or with another MLP."""
WIDE = {"nextvit.EfficientAttention, model": 8}
"""Multiples that widths are rounded to, the same share everywhere, of models that have no narrow ones."""
assert QUICK | UNLIKE | set(WIDE) <= set(MODELS)


def marks(name: str) -> list[pytest.MarkDecorator]:
    if name in QUICK:
        return []
    slow = name in UNLIKE or any(MODELS[name] is FIRST_MODEL.get(cls) for cls in UNLIKE_ATTENTION)
    return [pytest.mark.slow if slow else pytest.mark.exhaustive]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in MODELS])
@torch.no_grad()
def test_from_file_to_file(name, tmp_path):
    case = MODELS[name]
    dense = build(case)
    # Classes that have a case of one layer too, and variants, are tried without weights for tokens.
    effort = "balanced" if case in FIRST_MODEL.values() and not name.endswith("model") else "fast"
    result = mhacut.prune(
        save_dense(dense, tmp_path / "dense.safetensors"),
        flops=case.flops,
        model=case.architecture,
        model_args={"num_classes": 5, **case.args},
        img_size=case.side,
        effort=effort,
        heal_steps=2 if effort == "balanced" else None,
        keep_dead_tokens=name != "attention.Attention",
        calibration_images=6,
        round_to=WIDE.get(name, 1),
        allocation="uniform" if name in WIDE else "curves",
        latency=False,
        output=tmp_path / "slim.safetensors",
    )
    assert 0.98 * result.budget < result.slim.flops <= result.budget < result.dense.flops
    if effort == "fast":
        assert all(repair.error <= 1 + 1e-6 for repair in result.repairs.values())
    slim = mhacut.load_model(result.output)
    assert measure_flops(slim, case.size) == result.slim.flops
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in dense.parameters())
    x = image(case)
    logits = slim(x)
    assert logits.isfinite().all()
    mhacut.save_model(slim, tmp_path / "again.safetensors", like=result.output)
    for path in (result.output, tmp_path / "again.safetensors"):
        assert torch.equal(mhacut.load_model(path)(x), logits)
