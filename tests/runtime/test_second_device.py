"""Commands on a second device: no tensor stays behind on the CPU."""

from __future__ import annotations

import pytest
import torch

import mhacut
from helpers.checkpoints import ARGS, IMAGES, save, tiny
from helpers.checkpoints import NAME as ARCHITECTURE
from helpers.second_device import NAME, second_device

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own
QUICK = {"calibration_images": 16, "latency": False, "overwrite": True, "heal_steps": 2}


@pytest.fixture(autouse=True)
def device():
    with second_device():
        yield torch.device(NAME, 0)


def test_tensors_of_two_devices_do_not_mix(device):
    here, there = torch.randn(3, 4), torch.randn(3, 4, device=device)
    assert there.device == device
    assert torch.equal(there.cpu(), there.to("cpu"))
    assert torch.equal(there[torch.tensor([2, 0])].cpu(), there.cpu()[[2, 0]])
    assert torch.equal((there * torch.tensor(2.0)).cpu(), 2 * there.cpu())
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: torch.stack([there.sum(), here.sum()]),
        lambda: here[there > 0],
        lambda: there.numpy(),
        lambda: torch.rand(3, device=device, generator=torch.Generator()),
        lambda: torch.nn.Linear(4, 2)(there),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            mixed()
    layer = torch.nn.Linear(4, 2).to(device)
    layer(there).sum().backward()
    assert layer.weight.grad.device == device


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"scope": "attention+mlp+tokens", "labels": False}, marks=pytest.mark.slow),
        pytest.param({"effort": "best", "amp": True, "batch_size": 4}, marks=pytest.mark.exhaustive),
        pytest.param({"preserve": "tokens", "basis": "channel"}, marks=pytest.mark.exhaustive),
        pytest.param({"allocation": "indicator", "steps": 3}, marks=pytest.mark.exhaustive),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_model_is_pruned_there(options, few_digits, tmp_path):
    given = {"model_args": ARGS, "data_dir": few_digits, "output": tmp_path / "slim.safetensors"}
    result = mhacut.prune(tiny().to(NAME), flops="60%", device=NAME, **given, **QUICK, **options)
    assert result.device.startswith(NAME)
    assert mhacut.load_model(result.output)(IMAGES).isfinite().all()


@pytest.mark.exhaustive
def test_several_budgets_and_a_bound_work_there(few_digits, tmp_path):
    kept = {"data_dir": few_digits, "device": NAME}
    output = tmp_path / "slim-{}.safetensors"
    results = mhacut.prune_many(tiny(), flops=["80%", "60%"], output=output, model_args=ARGS, **kept, **QUICK)
    assert [result.output.exists() for result in results] == [True, True]
    output = tmp_path / "slim.safetensors"
    assert mhacut.prune(tiny(), max_kl=0.5, output=output, model_args=ARGS, **kept, **QUICK).output.exists()


@pytest.mark.slow
def test_a_model_is_fine_tuned_there(few_digits, tmp_path):
    dense, slim = save(tiny(), tmp_path / "dense.safetensors"), tmp_path / "slim.safetensors"
    mhacut.prune(dense, flops="60%", effort="fast", output=slim, model_args=ARGS, model=ARCHITECTURE, **QUICK)
    mixing = {"mixup": 0.2, "cutmix": 0.2, "reprob": 0.5, "clip_grad": 1.0}
    training = {"steps": 1, "batch_size": 4, "workers": 0, "teacher": dense}
    data = {"data_dir": few_digits, "device": NAME, "teacher_model": ARCHITECTURE, "teacher_model_args": ARGS}
    run = mhacut.finetune(slim, output=tmp_path / "run", **training, **mixing, **data)
    assert run.output.exists()


@pytest.mark.exhaustive
def test_all_other_commands_work_there(few_digits, tmp_path, digits_vit):
    data = {"data_dir": few_digits, "device": NAME}
    assert mhacut.evaluate(digits_vit[1], **data).evaluation.images == 30
    assert mhacut.inspect(digits_vit[1], **data).inspection.layers
    assert mhacut.bench(digits_vit[1], device=NAME, seconds=0.1, batch_sizes=[1]).models
