"""The scripts in examples/ can be imported, and what they compute is what their first lines say."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from helpers.benchmarks import script, small_vit

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1]
SCRIPTS = [
    path
    for folder in ("benchmarks", "coverage", "flatten_cifar")
    for path in EXAMPLES.glob(f"{folder}/*.py")
    if not path.name.startswith(("test_", "conftest"))
]
IMPORTED = """
import pathlib, runpy, sys
for script in map(pathlib.Path, sys.argv[1:]):
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="imported")
"""


def test_every_script_can_be_imported():
    subprocess.run([sys.executable, "-c", IMPORTED, *map(str, SCRIPTS)], check=True)


def test_errors_of_blocks_are_those_of_a_slow_reference():
    module, dense = script("block_errors"), small_vit().eval()
    slim, images = copy.deepcopy(dense), torch.randn(40, 3, 16, 16)
    with torch.no_grad():
        slim.blocks[1].mlp.fc2.weight.mul_(1.5)
    first, second = module.block_errors(dense, slim, images)
    assert first.relative == 0
    streams = []
    for model in (dense, slim):
        model.blocks[1].register_forward_hook(lambda block, args, output: streams.append(output.double()))
        with torch.inference_mode():
            model(images)
    rows, other = (stream.reshape(-1, stream.shape[-1]) for stream in streams)
    variance = rows.var(0, correction=0)
    error = (rows - other).square().mean(0)
    assert second.relative == pytest.approx(float(error.sum() / variance.sum()), rel=1e-5)
    assert second.scaled == pytest.approx(float((error / variance).mean()), rel=1e-5)


def test_between_two_budgets_the_logarithm_is_read_linearly():
    at_time = script("time_or_flops").at_time
    points = [(0.5, 4.0), (0.9, 0.1), (0.7, 1.0)]
    for share in (0.0, 0.25, 1.0):
        expected = math.exp((1 - share) * math.log(4.0) + share * math.log(1.0))
        assert at_time(points, 0.5 + 0.2 * share) == pytest.approx(expected)
    assert at_time(points, 0.49) is at_time(points, 0.91) is None


def test_the_probe_finds_what_is_linear_whatever_the_scale():
    backbone, generator = script("backbone"), torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(4, 10, generator=generator)
    labels = torch.randint(4, (600,), generator=generator)
    points = centres[labels] + torch.randn(600, 10, generator=generator)
    fit, val = slice(0, 400), slice(400, 600)
    accuracy = backbone.probed(points[fit], labels[fit], points[val], labels[val], seed=1)
    assert accuracy > 95
    scaled = 100 * points + 5
    again = backbone.probed(scaled[fit], labels[fit], scaled[val], labels[val], seed=1)
    assert again == pytest.approx(accuracy, abs=0.6)
    assert backbone.nearest(points[fit], labels[fit], points[val], labels[val]) > 95


def test_patches_of_a_mosaic_are_labelled_by_the_class_of_their_picture(tmp_path):
    tasks = script("dense_tasks")
    for label, name in enumerate("abc"):  # whose pictures have one grey each
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (40 + 9 * number, 30), 3 * (60 * label + 50,)).save(
                tmp_path / name / f"{number}.png"
            )
    images, labels = tasks.mosaics(ImageFolder(tmp_path), 3, 3, seed=0)
    shades = torch.nn.functional.avg_pool2d(images.mul(0.5).add(0.5).mul(255).mean(1, keepdim=True), 16)[:, 0]
    torch.testing.assert_close(shades, 60.0 * labels + 50)
    assert images.shape == (3, 3, 224, 224)
    assert labels.shape == (3, 14, 14)
    assert len(labels.unique()) == 3


def test_a_linear_head_learns_patches_of_tokens_as_they_are():
    tasks, generator = script("dense_tasks"), torch.Generator().manual_seed(0)
    labels = torch.randint(3, (20, 14, 14), generator=generator)
    maps = (
        50 * torch.eye(3)[labels].permute(0, 3, 1, 2) + torch.randn(20, 3, 14, 14, generator=generator) + 90
    )
    model = tasks.PatchClassifier(torch.nn.Identity(), 3, 3)
    tasks.train_head(model, maps, labels, seed=0)
    assert (model.head(maps).argmax(1) == labels).double().mean() > 0.95


def test_augmented_images_are_shifted_or_flipped_ones():
    train = script("train_cifar_vit")
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    changed = train.augment(train.normalize(images), cutout=0)
    padded = torch.nn.functional.pad(train.normalize(images), (4, 4, 4, 4))
    for before, after in zip(padded, changed, strict=True):
        views = [before[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert any(torch.equal(after, view) or torch.equal(after, view.flip(-1)) for view in views)


def test_scratch_is_the_same_architecture_without_the_weights(tmp_path):
    finetune = script("finetune")
    from methods.common import Slim, cut_to, write_slim

    from helpers.benchmarks import task_of

    dense = small_vit()
    task = task_of(dense, 0.5)
    kept = {unit.key: torch.arange(20)[None] for unit in task.prunable.units(("hidden",))}
    slim = Slim(cut_to(dense, task.prunable, kept, keep_temperature=True), ("own",), {})
    write_slim(str(tmp_path / "corp-50.safetensors"), slim.model, slim.temperatures)
    pruned, scratch = (
        finetune.slim_model(dense, tmp_path, finetune.Run("corp", 50.0, start, False, 3, 0))
        for start in ("pruned", "scratch")
    )
    for (name, one), other in zip(pruned.state_dict().items(), scratch.state_dict().values(), strict=True):
        assert one.shape == other.shape
        assert not torch.equal(one, other), name


def test_everything_for_a_gpu_is_measured_on_the_cpu_with_tiny_sizes(tmp_path, monkeypatch, capsys):
    from process import Process

    gpu = script("gpu")

    def run(command, threads, limit_s=None):
        if "run_part" in command[2]:
            gpu.run_part(command[-1])
        return Process(wall_s=1.0, cpu_s=1.0, peak_mib=1.0, stdout="2.13 None\ncpu")

    flags = ["--smoke", "--device", "cpu", "--threads", "1", "--output", str(tmp_path / "gpu.json")]
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "run", run)
        parts = [part for part in gpu.PARTS if part != "compile"]  # which would take a minute
        assert gpu.main([*flags, "--minutes", "60", "--parts", *parts]) == 0
    document = json.loads((tmp_path / "gpu.json").read_text())
    assert document["failed"] == {}
    assert {name.split()[0] for name in document["rows"]} >= {"same", "eager", "finetune", "sums", "prune"}
    for scope in ("attention+mlp", "attention+mlp+tokens"):
        assert document["rows"][f"same {scope}"]["units of other channels"] == 0
        assert document["rows"][f"same {scope}"]["logits of its plan, largest difference"] < 1e-5
    assert document["rows"]["what stays on the CPU"]["stages"]["calibrating"]["CPU operators, s"] > 0
    assert "finetune --amp, batch 4: images per s" in capsys.readouterr().out
    kept = {"machine": gpu.machine("cpu", 1) | {"sizes": "smoke"}, "rows": {"kept": {"of before": 1.0}}}
    (tmp_path / "gpu.json").write_text(json.dumps({**kept, "failed": {}}))
    assert gpu.main([*flags, "--parts", "sums"]) == 0  # goes on with what is there
    assert set(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == {"kept", "sums 64 x 16"}


def test_runs_of_fine_tuning_become_figures_of_rows():
    """Mean and spread over the seeds of the longest runs with a teacher; random weights have a row."""

    def line(start, steps, seed, top1, teacher=True):
        run = {
            "method": "corp",
            "keep": 50.0,
            "start": start,
            "teacher": teacher,
            "steps": steps,
            "seed": seed,
        }
        return {"run": run, "after": {"top1": top1}}

    row = {"method": "corp", "title": "CORP", "keep": 50.0, "ratio": 0.5, "top1": 6.0}
    lines = [{"machine": {}}, line("pruned", 100, 0, 9.0), line("pruned", 500, 0, 20.0)]
    lines += [line("pruned", 500, 1, 24.0), line("pruned", 500, 1, 99.0, False), line("scratch", 500, 0, 3.0)]
    rows = script("kept").with_runs([row], lines)
    tuned, random = script("kept").with_runs(rows, lines)  # again: nothing is added twice
    assert tuned["finetuned"] == {"top1": 22.0, "spread": math.sqrt(8), "seeds": [0, 1], "steps": 500}
    assert (random["finetuned"]["top1"], random["ratio"], "top1" in random) == (3.0, 0.5, False)


def test_the_figure_has_a_panel_of_times_where_rows_have_them():
    figure = script("figure")
    rows = [
        {"method": "dense", "ratio": 1.0, "top1": 90.0, "onnx_ms": 14.0},
        {"method": "tome", "ratio": 0.5, "top1": 80.0, "onnx_ms": 8.0},
    ]
    both = figure.figure({"rows": rows}, "light")
    assert (both.count("<polyline"), both.count("<g ")) == (2, 2)
    for row in rows:
        del row["onnx_ms"]
    assert figure.figure({"rows": rows}, "light").count("<g ") == 1
