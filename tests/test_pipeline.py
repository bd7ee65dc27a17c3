"""From file to file through the public API."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mhacut
from helpers.data import write_image
from helpers.jobs import Recorder
from helpers.models import build, image, relative
from helpers.programs import BY_TWO, free_port
from mhacut.adapters.registry import adapter_for
from mhacut.checkpoint.load import read_model
from mhacut.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    MhacutError,
    OutputError,
    UnsupportedModelError,
    UsageError,
)
from mhacut.pruning.candidates import find_candidates
from mhacut.pruning.indicators import search
from mhacut.pruning.recover import Recovery
from mhacut.pruning.repair import shrink
from properties.cases import UNLIKE, VITS

QUICK = {"gain_steps": 2, "calibration_images": 8, "batch_size": 4, "latency": False}
DIGITS = Path(__file__).parent.parent / "examples" / "digits"


def prune(tiny_vit, output, **more):
    options = {"model": tiny_vit.architecture, "model_args": tiny_vit.args, "flops": "60%", **QUICK, **more}
    return mhacut.prune(
        more.pop("checkpoint", tiny_vit.path),
        output=output,
        **{k: v for k, v in options.items() if k != "checkpoint"},
    )


@pytest.fixture(scope="module")
def pruned(tiny_vit, tmp_path_factory):
    """What pruning as above gives; its file is only read."""
    return prune(tiny_vit, tmp_path_factory.mktemp("pruned") / "slim.safetensors")


def test_prune_writes_what_load_model_opens(pruned):
    result = pruned
    assert result.output.name == "slim.safetensors"
    assert 0.99 * result.budget <= result.slim.flops <= result.budget < result.dense.flops
    model = mhacut.load_model(result.output)
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == result.slim.parameters < result.dense.parameters
    with safe_open(result.output, "pt") as file:
        record = json.loads(file.metadata()["mhacut"])
    step = record["history"][0]
    assert step["command"] == "prune"
    assert (step["flops_before"], step["flops_after"]) == (result.dense.flops, result.slim.flops)
    assert step["options"]["flops"] == "60%"
    assert str(result.output.parent) not in json.dumps(record)
    assert record["preprocessing"]["input_size"] == [3, 32, 32]


@pytest.mark.slow
def test_another_process_reads_the_same_model(programs, pruned, tmp_path):
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    save_file({"x": x}, tmp_path / "x.safetensors")
    code = (
        "import sys, mhacut; from safetensors.torch import load_file, save_file;"
        "model = mhacut.load_model(sys.argv[1]);"
        "y = model(load_file(sys.argv[2])['x']);"
        "save_file({**model.state_dict(), 'y': y.detach()}, sys.argv[3])"
    )
    paths = pruned.output, tmp_path / "x.safetensors", tmp_path / "found.safetensors"
    assert programs.run(code, *paths).returncode == 0
    found = load_file(tmp_path / "found.safetensors")
    model = mhacut.load_model(pruned.output)
    # Weights to the bit. Logits to rounding: BLAS sums in another order when a buffer is aligned otherwise.
    torch.testing.assert_close(found.pop("y"), model(x), rtol=0, atol=1e-6)
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_head_with_one_output_is_judged_by_its_output(tiny_vit, tmp_path):
    # A softmax over one output is 1: by its divergence, every cut would be perfect.
    tensors = load_file(tiny_vit.path)
    tensors |= {name: tensors[name][:1].clone() for name in ("head.weight", "head.bias")}
    save_file(tensors, tmp_path / "one.safetensors")
    reporter, checkpoint = Recorder(), tmp_path / "one.safetensors"
    result = prune(
        tiny_vit, tmp_path / "slim.safetensors", checkpoint=checkpoint, tuning_steps=1, reporter=reporter
    )
    (tuning,) = (note for note in reporter.messages if note.startswith("tuning"))
    assert float(re.search(r"images (\S+) without", tuning)[1]) > 0
    assert result.divergence_of == "features"
    assert result.divergence > 0
    # Nor have labels a meaning for it, whatever classes a folder has.
    folder = tmp_path / "images"
    for number in range(24):
        write_image(folder / f"{number % 2}" / f"{number}.png", 10 * number)
    result = prune(tiny_vit, tmp_path / "of_images.safetensors", checkpoint=checkpoint, data_dir=folder)
    assert result.slim.evaluation is None
    with pytest.raises(MhacutError, match="the model has one output, so it has no accuracy"):
        mhacut.evaluate(result.output, data_dir=folder)


@pytest.mark.parametrize("lr", [1e-6, 1e3])
def test_what_training_was_left_out_is_logged(tiny_vit, tmp_path, lr, monkeypatch):
    outcomes = []  # of scales, healing and tuning, in this order

    def recorded(*arguments):
        outcomes.append(judged(*arguments))
        return outcomes[-1]

    judged = Recovery.of
    monkeypatch.setattr(Recovery, "of", recorded)
    reporter = Recorder()
    options = {"tuning_steps": 2, "tuning_lr": lr, "gain_steps": 2, "gain_lr": lr}
    result = prune(tiny_vit, tmp_path / "slim.safetensors", **options, reporter=reporter)
    for what, outcome in zip(("training channel scales", "tuning"), outcomes[::2], strict=True):
        (note,) = (note for note in reporter.messages if note.startswith(what))
        helped = outcome.after < outcome.before  # neither where it is no number, nor where both are 0
        assert note.startswith(f"{what} was left out") == (not helped)
        assert note.endswith(f"images {outcome.before:.2g} without, {outcome.after:.2g} with")
    assert result.divergence < 1
    assert result.judged_on == 2


def test_a_slim_file_can_be_pruned_again(pruned, tmp_path):
    first = pruned
    second = mhacut.prune(first.output, flops="70%", output=tmp_path / "second.safetensors", **QUICK)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(tiny_vit, tmp_path, dtype):
    half = tmp_path / "half.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(tiny_vit.path).items()}, half)
    result = prune(tiny_vit, tmp_path / "slim.safetensors", checkpoint=half)
    assert {tensor.dtype for tensor in load_file(result.output).values()} == {dtype}


def test_a_trained_slim_model_goes_back_into_a_file(pruned, tmp_path):
    slim = pruned.output
    model = mhacut.load_model(slim)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.train()(x).square().mean().backward()
    optimiser.step()
    mhacut.save_model(model.eval(), tmp_path / "tuned.safetensors", like=slim)
    again = mhacut.load_model(tmp_path / "tuned.safetensors")
    assert torch.equal(again(x), model(x))
    assert not torch.equal(again(x), mhacut.load_model(slim)(x))
    record = read_model(tmp_path / "tuned.safetensors").record
    assert [step["command"] for step in record.history] == ["prune", "save"]
    assert mhacut.prune(tmp_path / "tuned.safetensors", flops="80%", dry_run=True, **QUICK).slim.flops > 0


def test_a_new_classifier_is_saved_with_the_model(pruned, tmp_path):
    slim = pruned.output
    model = mhacut.load_model(slim)
    model.reset_classifier(3)
    mhacut.save_model(model, tmp_path / "other.safetensors", like=slim)
    assert mhacut.load_model(tmp_path / "other.safetensors")(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    with pytest.raises(OutputError, match="exists"):
        mhacut.save_model(model, tmp_path / "other.safetensors", like=slim)
    mhacut.save_model(model, tmp_path / "other.safetensors", like=slim, overwrite=True)


@pytest.mark.parametrize("classes", [0, 3])
def test_names_of_other_classes_are_not_kept(pruned, tmp_path, classes):
    slim, before, tensors = tmp_path / "slim.safetensors", read_model(pruned.output), load_file(pruned.output)
    cfg = {**before.identity.pretrained_cfg, "label_names": list("abcdefg"), "label_descriptions": {"a": "A"}}
    record = dataclasses.replace(
        before.record, identity=dataclasses.replace(before.identity, pretrained_cfg=cfg)
    )
    save_file(tensors, slim, {"mhacut": record.to_json()})
    model = mhacut.load_model(slim)
    mhacut.save_model(model, tmp_path / "same.safetensors", like=slim)
    assert cfg.items() <= read_model(tmp_path / "same.safetensors").record.identity.pretrained_cfg.items()
    model.reset_classifier(classes)
    mhacut.save_model(model, tmp_path / "other.safetensors", like=slim)
    other = read_model(tmp_path / "other.safetensors")
    assert not {"label_names", "label_descriptions"} & other.record.identity.pretrained_cfg.keys()
    x = torch.zeros(1, 3, 32, 32)
    assert torch.equal(other.model(x), model.eval()(x))


def test_saving_needs_the_file_the_model_came_from(tiny_vit, pruned, tmp_path):
    slim = pruned.output
    other = prune(tiny_vit, tmp_path / "other.safetensors", flops="90%").output
    model = mhacut.load_model(slim)
    with pytest.raises(CheckpointError, match="not the file that this model was opened from"):
        mhacut.save_model(model, tmp_path / "new.safetensors", like=other)
    with pytest.raises(CheckpointError, match="is no slim file"):
        mhacut.save_model(model, tmp_path / "new.safetensors", like=tiny_vit.path)
    with pytest.raises(OutputError):
        mhacut.save_model(model, slim, like=slim, overwrite=True)
    model.reset_classifier(3)
    with pytest.raises(CheckpointError, match="not the file that this model was opened from"):
        mhacut.save_model(model, tmp_path / "new.safetensors", like=other)
    assert not (tmp_path / "new.safetensors").exists()


def test_a_missing_validation_split_is_logged(tiny_vit, tmp_path):
    from PIL import Image

    for label in range(7):
        folder = tmp_path / "images" / "train" / str(label)
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (label * 30, 0, 0)).save(folder / "0.png")

    reporter = Recorder()
    result = prune(tiny_vit, tmp_path / "slim.safetensors", data_dir=tmp_path / "images", reporter=reporter)
    assert result.slim.evaluation is None
    assert any("accuracy is not measured: no labelled split 'val'" in note for note in reporter.messages)


def test_a_validation_split_without_labels_is_logged_unless_accuracy_is_asked_for(tiny_vit, tmp_path):
    root, slim = tmp_path / "images", tmp_path / "slim.safetensors"
    for split in ("train", "val"):
        for number in range(8):
            write_image(root / split / f"{number}.png", 20 * number)
    reporter = Recorder()
    result = prune(tiny_vit, slim, data_dir=root, workers=0, reporter=reporter)
    assert result.slim.evaluation is None
    assert [note for note in reporter.messages if note.startswith("accuracy is not measured")] == [
        f"accuracy is not measured: {root / 'val'}: images without class folders; accuracy needs "
        f"val/<class>/<image>. Folders in {root}: train, val"
    ]
    for asked in ({"eval_images": 5}, {"max_drop": 1.0, "flops": None}):
        with pytest.raises(DataError, match="accuracy needs val/<class>/<image>"):
            prune(tiny_vit, slim, data_dir=root, workers=0, overwrite=True, **asked)


def test_budgets_may_be_numbers(tiny_vit, tmp_path):
    flops = 900_000
    assert prune(tiny_vit, tmp_path / "slim.safetensors", flops=flops, dry_run=True).budget == flops
    with pytest.raises(BudgetError, match=r"did you mean 50%\?"):
        prune(tiny_vit, tmp_path / "other.safetensors", flops=50)
    with pytest.raises(BudgetError, match=r"did you mean 50%\?"):
        prune(tiny_vit, tmp_path / "other.safetensors", flops=0.5)
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        prune(tiny_vit, tmp_path / "slim.pth")


def test_same_seed_same_file(tiny_vit, pruned, tmp_path):
    # Often enough that an order left to chance would show.
    files = {prune(tiny_vit, tmp_path / f"{name}.safetensors").output.read_bytes() for name in "ab"}
    assert files == {pruned.output.read_bytes()}


def test_dry_run_finds_the_same_plan_and_writes_nothing(tiny_vit, pruned, tmp_path):
    dry = prune(tiny_vit, tmp_path / "slim.safetensors", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert dry.output is None
    assert dry.plan == pruned.plan


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"flops": "100%"}, BudgetError, "nothing to prune: .* already within 100%"),
        ({"flops": "1G"}, BudgetError, "nothing to prune"),
        ({"flops": "1%"}, BudgetError, r"out of reach: the lowest is .*round_to=8"),
        ({"flops": "50%", "scope": "attention"}, BudgetError, "out of reach.*scope='attention' "),
        ({"flops": "2,0G"}, UsageError, "2,0G"),
        ({"init": "magic"}, UsageError, "attention-difference, uniform"),
        ({"steps": 0}, UsageError, "steps=0"),
        ({"stepz": 1}, UsageError, "did you mean 'steps'"),
        ({"device": "tpu9"}, UsageError, "not a device"),
        ({"model": "swin_tiny_patch4_window7_224", "model_args": {}}, Exception, "swin_tiny"),
    ],
)
def test_refusals_leave_nothing_behind(tiny_vit, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        prune(tiny_vit, tmp_path / "slim.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


def test_unsupported_attention_is_refused_by_class(tmp_path):
    import timm

    path = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("bat_resnext26ts", num_classes=5).state_dict(), path)
    with pytest.raises(UnsupportedModelError, match="BilinearAttnTransform"):
        mhacut.prune(
            path, flops="50%", model="bat_resnext26ts", output=tmp_path / "slim.safetensors", **QUICK
        )
    assert not (tmp_path / "slim.safetensors").exists()


def test_the_lowest_budget_that_is_named_works(tiny_vit, tmp_path):
    with pytest.raises(BudgetError) as refusal:
        prune(tiny_vit, tmp_path / "slim.safetensors", flops="1%")
    flops, share = re.search(r"the lowest is (\S+) \((\S+%) of", str(refusal.value)).groups()
    for budget in (flops, share):
        result = prune(tiny_vit, tmp_path / "slim.safetensors", flops=budget, effort="fast", dry_run=True)
        assert result.slim.flops <= result.budget


def test_bad_validation_images_are_found_before_anything_is_written(tiny_vit, tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        for label in range(7):
            folder = tmp_path / "images" / split / str(label)
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (label * 30, 0, 0)).save(folder / "0.png")
    (tmp_path / "images" / "val" / "3" / "0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"0\.png"):
        prune(tiny_vit, tmp_path / "slim.safetensors", data_dir=tmp_path / "images")
    assert not (tmp_path / "slim.safetensors").exists()


@pytest.mark.parametrize("repair", [True, False])
def test_temperature_reaches_the_weights(tiny_vit, tmp_path, repair):
    options = {"repair": repair, "reweight": False, "effort": "fast"}
    found = [
        prune(tiny_vit, tmp_path / f"{choice}.safetensors", temperature=choice, **options)
        for choice in ("kept", "dense")
    ]
    assert load_file(found[0].output).keys() == load_file(found[1].output).keys()
    assert found[0].output.read_bytes() != found[1].output.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(UNLIKE))
def test_every_class_survives_the_file_and_repeats(name, tmp_path):
    case = VITS[name]
    dense = build(case)
    path = tmp_path / "dense.safetensors"
    save_file(dense.state_dict(), path)
    options = {"flops": "95%", "model": case.architecture, "model_args": case.args, **QUICK}
    first, second = (mhacut.prune(path, output=tmp_path / f"{name}.safetensors", **options) for name in "ab")
    assert first.plan == second.plan
    assert first.output.read_bytes() == second.output.read_bytes()
    stored = load_file(first.output)
    models = [mhacut.load_model(first.output) for _ in range(2)]
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(tensor, stored[name])
    with torch.no_grad():
        x = image(case)
        assert torch.equal(models[0].forward_features(x), models[1].forward_features(x))
        assert relative(models[0](x), models[1](x)) < 1e-6


def test_the_output_is_checked_before_any_work(tiny_vit, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match="overwrite=True"):
        prune(tiny_vit, tmp_path / "there.safetensors", checkpoint=tmp_path / "no-such-file")
    assert (tmp_path / "there.safetensors").read_bytes() == b"precious"


def test_what_is_left_whole_is_logged(tmp_path):
    import timm

    args = {
        "depth": 1,
        "embed_dim": 48,
        "num_heads": 3,
        "img_size": 32,
        "patch_size": 8,
        "global_pool": "prr",
    }
    path = tmp_path / "prr.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=5, **args).state_dict(), path)
    result = mhacut.prune(
        path,
        flops="80%",
        output=tmp_path / "slim.safetensors",
        model="vit_tiny_patch16_224",
        model_args=args,
        **QUICK,
    )
    assert result.not_prunable == ("attn_pool (AttentionPoolPrr): this pooling head is not pruned",)


@pytest.mark.slow
def test_the_example_loses_little(tmp_path):
    result = mhacut.prune(
        DIGITS / "model",
        flops="50%",
        data_dir=DIGITS / "images",
        calibration_images=100,
        output=tmp_path / "slim.safetensors",
        latency=False,
    )
    assert result.dense.evaluation.top1 > 96
    assert result.slim.evaluation.top1 > result.dense.evaluation.top1 - 3
    # The accuracy is that of the file.
    from mhacut.data import Preprocessing, evaluation_loader
    from mhacut.measuring.accuracy import evaluate
    from mhacut.options.base import LabelledImages

    loaded = read_model(result.output)
    loader = evaluation_loader(
        Preprocessing(**loaded.record.preprocessing),
        LabelledImages(data_dir=DIGITS / "images", workers=0),
        num_classes=10,
        batch_size=50,
    )
    assert evaluate(loaded.model, loader, device=torch.device("cpu")).top1 == result.slim.evaluation.top1


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tiny_vit, tmp_path, programs):
    """Each calibrates on half of the images; the first one searches, writes and prints."""
    alone = prune(tiny_vit, tmp_path / "alone.safetensors", calibration_images=24)
    flags = [
        "--flops",
        "60%",
        "--calibration-images",
        "24",
        "--batch-size",
        "4",
        "--gain-steps",
        "2",
        "--json",
        "--no-latency",
    ]
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
    assert "did not foresee" not in again.stderr


@pytest.mark.slow
def test_a_single_image_does_not_break_the_model(few_digits):
    # There is nothing to judge refits by, and fewer tokens than channels to fit them to.
    result = mhacut.prune(
        DIGITS / "model",
        flops="50%",
        data_dir=few_digits,
        calibration_images=1,
        latency=False,
        dry_run=True,
    )
    assert result.slim.evaluation.top1 > 90


@pytest.mark.parametrize("repair", [True, False])
def test_channels_and_widths_are_chosen_for_the_repair_that_follows_or_not(
    tiny_vit, tmp_path, monkeypatch, repair
):
    seen = {}

    def finding(module, unit, moments, smallest, options, fisher):
        seen["find_candidates"] = options.repair
        return find_candidates(module, unit, moments, smallest, options, fisher)

    def shrinking(*args, refit):
        seen["shrink"] = refit
        return shrink(*args, refit=refit)

    monkeypatch.setattr("mhacut.pruning.planner.find_candidates", finding)
    monkeypatch.setattr("mhacut.pruning.curves.shrink", shrinking)
    prune(tiny_vit, tmp_path / "slim.safetensors", dry_run=True, repair=repair)
    assert seen == {"find_candidates": repair, "shrink": repair}


def test_the_search_knows_which_channels_are_principal(tiny_vit, tmp_path, monkeypatch):
    rotated = []

    def searching(job, calibration, distillation, start):
        rotated.append({key for key, begun in start.items() if begun.basis == "principal"})
        return search(job, calibration, distillation, start)

    monkeypatch.setattr("mhacut.pruning.planner.search", searching)
    options = {"allocation": "refined", "steps": 1, "dry_run": True}
    prune(tiny_vit, tmp_path / "slim.safetensors", basis="principal", **options)
    prune(tiny_vit, tmp_path / "slim.safetensors", basis="channel", **options)
    assert {kind for _, kind in rotated[0]} == {"qk", "v"}
    assert rotated[1] == set()


@pytest.mark.slow
def test_a_repair_in_order_that_is_left_out_is_logged(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.setattr("mhacut.pruning.recover.GUARD", 0.0)
    reporter = Recorder()
    vetoed = prune(tiny_vit, tmp_path / "vetoed.safetensors", heal_steps=0, reporter=reporter)
    assert any(note.startswith("repair in order was left out: divergence") for note in reporter.messages)
    without = prune(tiny_vit, tmp_path / "without.safetensors", heal_steps=0, repair_in_order=False)
    fast = prune(tiny_vit, tmp_path / "fast.safetensors", effort="fast", repair_in_order=True)
    tensors = [load_file(result.output) for result in (vetoed, without)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert "repairing in order" in vetoed.seconds
    assert "repairing in order" in fast.seconds
    assert "repairing in order" not in without.seconds


def test_prunable_layers_are_found_once_per_model(tiny_vit, tmp_path, monkeypatch):
    roots = []

    def asked(module):
        if hasattr(module, "forward_features"):
            roots.append(module)
        return adapter_for(module)

    monkeypatch.setattr("mhacut.surgery.find.adapter_for", asked)
    prune(tiny_vit, tmp_path / "slim.safetensors", report=tmp_path / "page.html", tuning_steps=1)
    assert len(roots) <= 3  # of the dense model, of the slim one, of the one in the file


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        (
            {"steps": 100, "similarity": False},
            [
                "similarity=False has no effect: allocation='curves' trains no indicators",
                "steps has no effect: allocation='curves' trains no indicators",
            ],
        ),
        ({"allocation": "indicator", "steps": 1, "similarity": False}, []),
        (
            {"allocation": "refined", "steps": 1, "init": "uniform"},
            ["init has no effect: allocation='refined' starts from the plan of the curves"],
        ),
        (
            {"repair": False, "swap_moves": True},
            ["swap_moves=True has no effect: repair=False refits nothing"],
        ),
        (
            {
                "allocation": "indicator",
                "steps": 1,
                "selection": "indicator",
                "basis": "channel",
                "swap_moves": True,
            },
            ["swap_moves=True has no effect: selection='indicator' keeps the indicators' choice"],
        ),
        ({"allocation": "refined", "steps": 1, "swap_moves": True}, []),
        (
            {"allocation": "refined", "steps": 1, "selection": "indicator", "basis": "channel"},
            ["selection has no effect: allocation='refined' keeps what serves best once repaired"],
        ),
        ({"amp": True, "heal_steps": 0}, ["amp=True has no effect: nothing is trained"]),
        ({"amp": True, "gain_steps": 1}, []),
        (
            {"labels": False, "val_split": "held"},
            [
                "val_split has no effect: there are no images without data_dir or dataset",
                "labels=False has no effect: there are no images without data_dir or dataset",
            ],
        ),
        (
            {"labels": False, "data_dir": "nowhere", "eval_images": 5},
            ["eval_images has no effect: labels=False measures no accuracy"],
        ),
        ({"labels": False, "data_dir": "nowhere", "eval_images": 0}, []),
        ({"repair": False, "gain_steps": None, "gain_lr": 0.01}, []),
        (
            {"repair": False, "repair_in_order": True},
            ["repair_in_order=True has no effect: repair=False refits nothing"],
        ),
        ({"gain_lr": 0.01}, ["gain_lr has no effect: no channel scales are trained; see gain_steps"]),
        ({"tuning_lr": 0.01}, ["tuning_lr has no effect: nothing is tuned; see tuning_steps"]),
    ],
    ids=str,
)
def test_options_without_effect_are_named_before_any_work(tiny_vit, tmp_path, options, expected):
    class Stopped(Exception):
        pass

    class Stopping(Recorder):
        def start(self, stage):
            if stage == "loading images":
                raise Stopped

    reporter = Stopping()
    with pytest.raises(Stopped):
        prune(tiny_vit, tmp_path / "slim.safetensors", reporter=reporter, **{"gain_steps": None, **options})
    assert [note for note in reporter.messages if "no effect" in note] == expected


def test_training_on_a_single_image_is_left_out(tiny_vit, tmp_path):
    reporter, options = Recorder(), {"calibration_images": 1, "tuning_steps": 1, "gain_steps": None}
    prune(tiny_vit, tmp_path / "slim.safetensors", reporter=reporter, **options)
    assert (
        "nothing was trained: with a single image, none is left to check the result on" in reporter.messages
    )
    assert not any("no effect" in note for note in reporter.messages)
