"""The verdict on a cut: what was kept and won, a warning where much is lost, and advice that works."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
import torch

import mhacut
from helpers.cli import document_of, research, run, succeed
from helpers.data import write_split
from helpers.huggingface import dense_folder
from helpers.models import ModelCase, build
from helpers.pruning import QUICK

CHANNELS = ["--scope", "attention+mlp", "--effort", "fast", "--calibration-images", "8", "--workers", "0"]
HARSH = [*CHANNELS, "--no-latency", *research(repair=False, gain_steps=0, basis="channel")]
"""Flags that lose much at 11 % of the FLOPs."""
WARNING = re.compile(
    r"^warning: large loss: top-1 (\S+) % \(dense \S+ %\) at 11 % of the FLOPs$", re.MULTILINE
)


@pytest.fixture
def digits(digits_vit, few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [digits_vit[1], "--data-dir", few_digits]


def test_what_was_kept_and_won_comes_first(digits):
    result = succeed("prune", *digits, "--flops", "50%", *CHANNELS)
    first, second, heading, *_ = result.stdout.splitlines()
    accuracy = r"(warning: slower than dense: )?top-1 \d+\.\d % \(dense \d+\.\d %\)"
    expected = accuracy + r" at 50 % of the FLOPs, \d+\.\dx (faster|slower) \(batch 8, CPU\)"
    assert re.fullmatch(expected, first)
    assert (second, heading.split()[1:3]) == ("", ["dense", "slim"])


@pytest.mark.slow
def test_the_advice_after_a_loss_works(digits):
    result = succeed("prune", *digits, "--flops", "11%", *HARSH)
    assert WARNING.match(result.stdout)
    lines = result.stdout.split("\n\n")[0].splitlines()
    scope, budget, finetune, effort, images = (line.strip() for line in lines[1:])
    merging = HARSH[2:]  # without its scope
    assert run("prune", *digits, "--flops", "11%", *merging, *scope.split()[:2], "--dry-run").exit_code == 0
    assert re.fullmatch(r"--flops \d\d% should lose about 1 point of top-1", budget)
    assert not document_of("prune", *digits, *budget.split()[:2], *HARSH, "--dry-run")["much_lost"]
    command, _, rest = finetune.partition(" recovers")
    assert rest == " part of the loss"
    succeed(*shlex.split(command)[1:], "--steps", "1", "-b", "8", "--workers", "0")
    assert effort.startswith("--effort best ")
    assert images == "use more calibration images: found 8, the default is 128"


@pytest.mark.slow
def test_a_folder_of_transformers_is_advised_to_train(tmp_path):
    sizes = {"num_labels": 3, "hidden_size": 64, "intermediate_size": 256}
    folder = dense_folder(tmp_path / "dense", "ViTForImageClassification", **sizes)
    images, slim = write_split(tmp_path / "images" / "train", per_class=16).parent, tmp_path / "slim"
    flags = ["--as", "huggingface", "--data-dir", images, "--scope", "attention+mlp", "--effort", "fast"]
    flags += research(repair=False, gain_steps=0, tuning_steps=0, basis="channel")
    found = document_of("prune", folder, "--flops", "20%", "--no-latency", *flags, "-o", slim)
    assert found["much_lost"]
    (finetune,) = (way for way in found["advice"] if way.startswith("mhacut finetune"))
    command, _, _ = finetune.partition(" recovers")
    succeed(*shlex.split(command)[1:], "--steps", "1", "-b", "8", "-o", tmp_path / "run")


def test_without_labels_the_divergence_is_judged(digits):
    document = document_of("prune", *digits, "--flops", "11%", *HARSH, "--dry-run", "--no-labels")
    assert re.fullmatch(
        r"same top-1 class as dense for \S+ % of .* images \(KL \S+\) at 11 % of the FLOPs",
        document["verdict"],
    )
    assert document["much_lost"] == (document["divergence"] > 0.5)
    assert not any("finetune" in way for way in document["advice"])  # a dry run writes nothing to train


@pytest.mark.slow
def test_a_loss_within_a_bound_is_no_warning(digits):
    document = document_of("prune", *digits, "--max-drop", "60", *HARSH, "--dry-run")
    assert document["dense"]["top1"] - document["slim"]["top1"] > 5
    assert (document["much_lost"], document["advice"]) == (False, [])


@pytest.mark.slow
def test_python_shows_the_verdict_in_its_own_notation(digits_vit, few_digits, tmp_path):
    options = {"scope": "attention+mlp", "repair": False, "gain_steps": 0, "basis": "channel", **QUICK}
    options |= {"data_dir": few_digits, "workers": 0, "report": tmp_path / "page.html"}
    output = tmp_path / "{}.safetensors"
    harsh, mild = results = mhacut.prune_many(digits_vit[1], flops=["11%", "75%"], output=output, **options)
    assert (harsh.much_lost, mild.much_lost) == (True, False)
    assert repr(mild).startswith(f"{mild.verdict}\n\n")
    assert mild.verdict.endswith("75 % of the FLOPs")
    first, *ways = harsh.verdict_lines()
    call = f"  mhacut.finetune({str(harsh.output)!r}, teacher={str(digits_vit[1])!r}, data_dir="
    assert any(way.startswith(call) for way in ways)
    for shown in (repr(harsh), repr(results)):
        assert first in shown
        assert mild.verdict not in shown
    overview = (tmp_path / "page.html").read_text()
    assert overview.index(first) < overview.index(mild.verdict) < overview.index("<h2")
    page = harsh.report.read_text()
    assert page.index(first) < page.index("<h2")
    assert f"<div>{first}</div>" in results._repr_html_()


@pytest.mark.slow
def test_what_merged_tokens_leave_of_the_file_is_told(tmp_path):
    torch.manual_seed(0)
    sizes = {"depth": 3, "embed_dim": 48, "num_heads": 3}
    model = build(ModelCase("vit_tiny_patch16_224", {**sizes, "img_size": 96, "num_classes": 10}))

    def pruned(**budgets):
        merging = {"scope": "attention+mlp+tokens", "dry_run": True, **QUICK}
        return mhacut.prune(model, model_args=sizes, **merging, **budgets)

    merged = pruned(flops="70%")
    assert re.search(
        r" of the FLOPs, mostly by token merging, file (\d+ % smaller|size unchanged)$", merged.verdict
    )
    assert merged.advice == ("add params='60%' for a smaller file",)
    both = pruned(flops="70%", params="60%")
    assert both.slim.parameters <= 0.6 * both.dense.parameters
    assert re.search(r", file \d+ % smaller$", both.verdict)
    assert both.advice == ()


def test_a_slower_model_is_a_warning(digits_vit):
    fast = mhacut.prune(digits_vit[1], flops="70%", dry_run=True, **QUICK)
    conditions = {"runtime": "eager", "batch_size": 8, "int8": False, "device": "cpu"}
    dense, slim = replace(fast.dense, latency_ms=1.0), replace(fast.slim, latency_ms=1.2)
    slow = replace(fast, dense=dense, slim=slim, timing=conditions)
    assert slow.verdict_lines()[0] == f"warning: slower than dense: {slow.verdict}"
    assert fast.verdict_lines()[0] == fast.verdict
