"""One model of each class is pruned on a second device, where no tensor may stay behind on the CPU."""

from __future__ import annotations

import pytest

import mhacut
from helpers.files import save_dense
from helpers.models import build, image
from helpers.second_device import second_device
from properties.cases import FIRST_MODEL, MODELS

FIRST = [name for name in MODELS if any(MODELS[name] is case for case in FIRST_MODEL.values())]
LEFT_OUT = {
    "nextvit.EfficientAttention, model": "gradients overflow with the weights of tests, and widths are wide",
    "csatv2.SpatialTransformerBlock, model": "indexes with a list, for which torch needs a real device",
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in FIRST if name not in LEFT_OUT])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
def test_no_tensor_stays_behind(name, tmp_path):
    case = MODELS[name]
    dense = save_dense(build(case), tmp_path / "dense.safetensors")
    with second_device() as device:
        result = mhacut.prune(
            dense,
            flops=case.flops,
            model=case.architecture,
            model_args={"num_classes": 5, **case.args},
            img_size=case.side,
            heal_steps=2,
            calibration_images=6,
            round_to=1,
            latency=False,
            device=device,
            output=tmp_path / "slim.safetensors",
        )
    assert mhacut.load_model(result.output)(image(case)).isfinite().all()
