"""Calls of the public API as users write them; mypy reads this file, nobody runs it.

Each line that must not pass names its error; should it pass, its comment is unused, which is an error too.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import mhacut


def prune_and_load() -> nn.Module:
    result = mhacut.prune("vit.safetensors", flops="50%", data_dir=Path("images"), effort="fast", round_to=16)
    assert_type(result, mhacut.PruneResult)
    assert_type(result.output, Path | None)
    return mhacut.load_model(result.output)


def to_targets() -> None:
    mhacut.prune("vit.safetensors", params="60%", size="6MB")
    mhacut.prune("vit.safetensors", max_drop=1.0, data_dir="images")
    assert_type(mhacut.prune_many("vit.safetensors", flops=("75%", 1e9)), mhacut.PruneResults)


def at_once() -> nn.Module:
    return mhacut.load_model(mhacut.prune("vit.safetensors", flops=2e9).output)


def of_a_module(model: nn.Module) -> float:
    pruned = mhacut.load_model(mhacut.prune(model, flops="50%", model_args={"depth": 2}).output)
    return mhacut.evaluate(pruned, data_dir="images").evaluation.top1


def other_verbs() -> None:
    tuned = mhacut.finetune("slim.safetensors", teacher="vit.safetensors", epochs=3, scale=(0.5, 1.0))
    assert_type(tuned, mhacut.FinetuneResult)
    assert_type(mhacut.finetune(resume="run"), mhacut.FinetuneResult)
    measured = mhacut.evaluate(tuned.output, data_dir="images", device="cpu")
    assert_type(measured, mhacut.EvaluateResult)
    assert_type(mhacut.inspect(tuned.output, sort="flops"), mhacut.InspectResult)
    assert_type(mhacut.bench("a.pth", "b.pth", runtime="onnx", batch_sizes=(1, 8)), mhacut.BenchResult)
    assert_type(mhacut.export(tuned.output, format="timm", overwrite=True), mhacut.ExportResult)
    mhacut.save_model(nn.Linear(2, 2), "x.safetensors", like="slim.safetensors")


def in_memory(model: nn.Module) -> None:
    assert_type(mhacut.prune(model, flops="50%", model_args={"depth": 2}), mhacut.PruneResult)
    assert_type(mhacut.evaluate(model, data_dir="images"), mhacut.EvaluateResult)


def images_in_memory(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    loader = DataLoader(TensorDataset(images), batch_size=8)
    mhacut.prune(model, flops="50%", images=images)
    mhacut.prune(model, flops="50%", images=loader, progress=False)
    assert_type(mhacut.evaluate(model, images=[(images, labels)]), mhacut.EvaluateResult)
    return mhacut.prune(model, flops="50%", images=(images, labels), dry_run=True).model()


def errors() -> mhacut.Plan | None:
    try:
        return mhacut.prune("vit.safetensors", flops="50%", dry_run=True).plan
    except mhacut.BudgetError as error:
        assert_type(error, mhacut.BudgetError)
    except (mhacut.UsageError, mhacut.DataError, mhacut.CheckpointError, mhacut.UnsupportedModelError):
        pass
    except mhacut.MhacutError:
        raise
    return None


def mistakes() -> None:
    mhacut.prune("vit.safetensors", flops=["50%", "25%"])  # type: ignore[arg-type]  # prune_many takes several
    mhacut.prune("vit.safetensors", flops="50%", data_dirr="images")  # type: ignore[call-arg]
    mhacut.prune("vit.safetensors", flops="50%", effort="fastt")  # type: ignore[arg-type]
    mhacut.prune("vit.safetensors", flops="50%", round_to="8")  # type: ignore[arg-type]
    mhacut.finetune("slim.safetensors", epoch=3)  # type: ignore[call-arg]
    mhacut.finetune("slim.safetensors", sched="cosinus")  # type: ignore[arg-type]
    mhacut.evaluate("vit.safetensors", train_split="train")  # type: ignore[call-arg]
    mhacut.inspect("vit.safetensors", sort="size")  # type: ignore[arg-type]
    mhacut.bench("a.pth", runtime="tensorrt")  # type: ignore[arg-type]
    mhacut.export("a.pth", format="tflite")  # type: ignore[arg-type]
    mhacut.load_model(3)  # type: ignore[arg-type]
