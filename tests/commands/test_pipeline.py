"""From file to file through the public API."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models import levit

import mhacut
from helpers.cli import FAST
from helpers.data import write_image
from helpers.jobs import Recorder
from helpers.models import build, relative
from helpers.programs import BY_TWO, free_port
from helpers.pruning import BALANCED, QUICK, prune_quickly, stated_by
from mhacut.checkpoint.load import read_model
from mhacut.commands import prune as command
from mhacut.errors import MhacutError
from properties.cases import FIRST_MODEL

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
prune = partial(prune_quickly, flops="60%", **BALANCED)


def test_prune_writes_what_load_model_opens(pruned):
    result = pruned
    assert result.output.name == "slim.safetensors"
    assert 0.99 * result.budget <= result.slim.flops <= result.budget < result.dense.flops
    model = mhacut.load_model(result.output)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == result.slim.parameters < result.dense.parameters
    record = stated_by(result.output)
    step = record["history"][0]
    assert step["command"] == "prune"
    assert (step["flops_before"], step["flops_after"]) == (result.dense.flops, result.slim.flops)
    assert step["options"]["flops"] == "60%"
    assert str(result.output.parent) not in json.dumps(record)
    assert record["preprocessing"]["input_size"] == [3, 32, 32]


@pytest.mark.slow
def test_a_head_with_one_output_is_judged_by_its_output(tiny_vit, tmp_path):
    # A softmax over one output is 1: by its divergence, every cut would be perfect.
    tensors = load_file(tiny_vit.path)
    tensors |= {name: tensors[name][:1].clone() for name in ("head.weight", "head.bias")}
    save_file(tensors, tmp_path / "one.safetensors")
    reporter, checkpoint = Recorder(), tmp_path / "one.safetensors"
    result = prune(
        tiny_vit, tmp_path / "slim.safetensors", checkpoint=checkpoint, gain_steps=1, reporter=reporter
    )
    (scales,) = (note for note in reporter.messages if note.startswith("training channel scales"))
    assert float(re.search(r"images (\S+) before", scales)[1]) > 0
    assert result.metric == "features"
    assert result.divergence > 0
    # Nor have labels a meaning for it, whatever classes a folder has.
    folder = tmp_path / "images"
    for number in range(24):
        write_image(folder / f"{number % 2}" / f"{number}.png", 10 * number)
    result = prune(tiny_vit, tmp_path / "of_images.safetensors", checkpoint=checkpoint, data_dir=folder)
    assert result.slim.evaluation is None
    with pytest.raises(MhacutError, match="the model has one output, but accuracy needs"):
        mhacut.evaluate(result.output, data_dir=folder)


@pytest.mark.slow
def test_a_slim_file_can_be_pruned_again(pruned, tmp_path):
    first = pruned
    second = mhacut.prune(first.output, flops="70%", output=tmp_path / "second.safetensors", **BALANCED)
    assert second.dense.flops == first.slim.flops
    assert second.slim.flops <= 0.7 * first.slim.flops
    record = read_model(second.output).record
    assert [step["command"] for step in record.history] == ["prune", "prune"]
    # Kept channels are in the dense model's indices, whatever lay between.
    before = {unit.key: unit for unit in first.plan}
    for unit in record.plan:
        assert unit.dense_width == before[unit.key].dense_width
        for now, earlier in zip(unit.kept, before[unit.key].kept, strict=True):
            assert set(now) <= set(earlier)


@pytest.mark.slow
def test_running_statistics_are_rounded_as_the_file_rounds_them(tmp_path):
    """Repair changes those of batch norms, in single precision."""
    dtype, case = torch.float16, FIRST_MODEL[levit.Attention]
    output = tmp_path / "slim.safetensors"
    result = mhacut.prune(build(case).to(dtype), flops="70%", output=output, model_args=case.args, **QUICK)
    stored = {tensor.dtype for tensor in load_file(result.output).values() if tensor.is_floating_point()}
    assert stored == {dtype}


@pytest.mark.slow
def test_a_file_whose_model_gives_other_outputs_never_appears(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "same_outputs", lambda *_: False)
    with pytest.raises(MhacutError, match=r"slim.safetensors: outputs of the file differ .*"):
        prune(tiny_vit, tmp_path / "slim.safetensors")
    assert not list(tmp_path.iterdir())


def test_dry_run_writes_nothing_until_it_is_asked_to(tiny_vit, pruned, tmp_path):
    dry = prune(tiny_vit, tmp_path / "slim.safetensors", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert dry.output is None
    assert dry.plan == pruned.plan
    for result in (dry, pruned):
        result.save(tmp_path / "late.safetensors", overwrite=result is pruned)
        assert (tmp_path / "late.safetensors").read_bytes() == pruned.output.read_bytes()
    with pytest.raises(mhacut.OutputError, match="exists"):
        dry.save(tmp_path / "late.safetensors")
    with pytest.raises(mhacut.OutputError, match="input"):
        dry.save(tiny_vit.path, overwrite=True)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tiny_vit, tmp_path, programs):
    """Each calibrates on half of the images; the first one searches, writes and prints."""
    alone = prune(tiny_vit, tmp_path / "alone.safetensors", calibration_images=24)
    flags = ["--flops", "60%", *FAST, "--calibration-images", "24", "--json"]
    flags += ["-o", tmp_path / "both.safetensors"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "mhacut", "prune", *tiny_vit.flags, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(tmp_path / "both.safetensors")
    both = read_model(tmp_path / "both.safetensors")
    assert both.record.plan.widths() == alone.plan.widths()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = both.model(images), mhacut.load_model(alone.output)(images)
    assert relative(found, expected) < 1e-3
    again = programs.run(BY_TWO, free_port(), "prune", *tiny_vit.flags, *flags)
    assert again.returncode != 0
    assert again.stderr.count("exists") == 1, again.stderr
    assert "a bug in mhacut" not in again.stderr


@pytest.mark.slow
def test_a_single_image_does_not_break_the_model(few_digits):
    # There is nothing to judge refits by, and fewer tokens than channels to fit them to.
    reporter, options = Recorder(), {"calibration_images": 1, "latency": False, "dry_run": True}
    result = mhacut.prune(DIGITS / "model", flops="50%", data_dir=few_digits, reporter=reporter, **options)
    assert result.slim.evaluation.top1 > 90
    assert (
        "recovery skipped: with 1 calibration image, none is held out to check the result"
        in reporter.messages
    )
    assert not any("no effect" in note for note in reporter.messages)
