"""From file to file: a model of every kind is pruned, written, read back, written again and exported."""

from __future__ import annotations

import pytest
import torch

import mhacut
from helpers.files import save_dense
from helpers.models import ModelCase, build, image, relative, slow_except
from mhacut.surgery.flops import measure_flops
from properties.cases import CASES

QUICK = {"attention.Attention"}
MODELS = {name: case for name, case in CASES.items() if isinstance(case, ModelCase)}


@pytest.mark.parametrize("name", slow_except(QUICK, MODELS))
@torch.no_grad()
def test_from_file_to_file(name, tmp_path):
    case = MODELS[name]
    dense = build(case)
    # Classes that have a case of one layer too are tried without weights for tokens.
    effort = "fast" if name.endswith("model") else "balanced"
    result = mhacut.prune(
        save_dense(dense, tmp_path / "dense.safetensors"),
        flops=case.flops,
        model=case.architecture,
        model_args={"num_classes": 5, **case.args},
        img_size=case.side,
        effort=effort,
        calibration_images=6,
        round_to=1,
        latency=False,
        output=tmp_path / "slim.safetensors",
    )
    assert 0.98 * result.budget < result.slim.flops <= result.budget < result.dense.flops
    if effort == "fast":
        assert all(repair.error <= 1 + 1e-6 for repair in result.repairs.values())
    slim = mhacut.load_model(result.output)
    assert measure_flops(slim, case.size) == result.slim.flops
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in dense.parameters())
    x, more = image(case), image(case, batch=3)
    logits = slim(x)
    assert logits.isfinite().all()
    mhacut.save_model(slim, tmp_path / "again.safetensors", like=result.output)
    for path in (result.output, tmp_path / "again.safetensors"):
        assert torch.equal(mhacut.load_model(path)(x), logits)
    program = torch.export.export(slim, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    assert relative(program.module()(more), slim(more)) < 1e-5
