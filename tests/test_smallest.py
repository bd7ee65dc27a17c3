"""The smallest model within a bound on the loss, and many budgets from one calibration."""

from __future__ import annotations

import copy
import gc
import json
import math
import re
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mhacut
from helpers.cli import FAST, run
from helpers.jobs import Recorder
from helpers.models import ModelCase, build
from helpers.pruning import QUICK, last_step, prune_quickly
from mhacut.commands import prune_cut
from mhacut.errors import BudgetError, UsageError
from mhacut.measuring.accuracy import standard_error_of_drop
from mhacut.pruning import planner
from mhacut.pruning.smallest import Bracket, Trial, smallest_within
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.merging import set_merged

# --- search ---


@settings(deadline=None)
@given(data=st.data())
def test_the_search_finds_the_smallest_budget_within_a_step(data):
    low = data.draw(st.integers(1, 10**6))
    high = low + data.draw(st.integers(0, 10**7))
    step = max(1, (high - low) // data.draw(st.integers(1, 1000)))
    steepness, factor = data.draw(st.floats(0.5, 30)), data.draw(st.floats(1e-3, 1e3))
    bound = data.draw(st.floats(1e-9, 1e3))
    tried = []

    def expected(budget):
        return math.exp(-steepness * budget / high)

    def attempt(budget):
        assert low <= budget <= high
        tried.append(budget)
        return Trial(budget, factor * expected(budget) / bound, budget)

    best, least = smallest_within(Bracket(low, high, step), attempt, expected, bound)
    passing = [budget for budget in tried if factor * expected(budget) <= bound]
    if factor * expected(high) > bound:
        assert best is None
        assert least.found == high
        return
    assert best.found == min(passing)
    # A step lower the loss is out of the bound, or there is nothing lower.
    assert best.found - step < low or factor * expected(best.found - step) > bound * (1 - 1e-9)
    assert len(tried) <= 3 + 2 * math.log2(max(2, (high - low) / step + 2))


def test_the_search_takes_few_trials_where_the_expectation_is_of_the_right_shape():
    tried = []

    def attempt(budget):
        tried.append(budget)
        return Trial(budget, 40 * math.exp(-budget / 100) / 0.02, budget)

    best, _ = smallest_within(Bracket(50, 1000, 2), attempt, lambda budget: math.exp(-budget / 100), 0.02)
    assert best.found == pytest.approx(100 * math.log(40 / 0.02), abs=2)
    assert len(tried) <= 6


def test_the_standard_error_is_that_of_paired_answers():
    before = [True] * 90 + [False] * 10
    after = [True] * 80 + [False] * 18 + [True] * 2
    lost = [a - b for a, b in zip(before, after, strict=True)]
    mean = sum(lost) / 100
    expected = 100 * math.sqrt(sum((one - mean) ** 2 for one in lost) / 99 / 100)
    assert standard_error_of_drop(before, after) == pytest.approx(expected)
    assert standard_error_of_drop(before, before) == 0


# --- bounds, from file to file ---


@pytest.mark.slow
def test_a_bound_on_the_divergence_finds_what_a_sweep_finds(tiny_vit, tmp_path):
    bound = 1e-4
    found = prune_quickly(tiny_vit, tmp_path / "found.safetensors", max_kl=bound)
    (target,) = found.targets
    assert (target.name, target.asked, target.most) == ("max_kl", "0.0001", bound)
    assert target.reached == pytest.approx(found.divergence, abs=1e-7)  # what float32 resolves of logarithms
    assert found.divergence <= bound
    # The same model as that of the budget that was found; the next ones down, a step at a time, are outside.
    again = prune_quickly(tiny_vit, tmp_path / "again.safetensors", flops=found.budget)
    assert again.plan == found.plan
    assert again.divergence == pytest.approx(found.divergence)
    sweep = [
        prune_quickly(tiny_vit, tmp_path / "sweep.safetensors", flops=f"{share}%", dry_run=True)
        for share in range(30, 100, 5)
    ]
    smallest = min(one.slim.flops for one in sweep if one.divergence <= bound)
    assert found.slim.flops <= smallest
    entry = last_step(found.output)
    assert entry["options"]["max_kl"] == bound
    assert entry["options"]["flops"] is None
    assert entry["budget"] == found.budget
    assert entry["targets"][0]["target"] == "max_kl"


@pytest.mark.slow
def test_a_bound_on_accuracy_is_judged_on_labelled_images(digits_vit, tmp_path):
    images, checkpoint = digits_vit
    reporter = Recorder()
    found = mhacut.prune(
        checkpoint,
        max_drop=3.0,
        data_dir=images,
        workers=0,
        output=tmp_path / "slim.safetensors",
        reporter=reporter,
        effort="fast",
        calibration_images=40,
        latency=False,
    )
    (target,) = found.targets
    before, after = found.dense.evaluation, found.slim.evaluation
    assert target.reached == pytest.approx(before.top1 - after.top1)
    assert target.reached <= 3.0
    assert target.standard_error >= 0
    tried = [line for line in reporter.messages if "points of top-1 lost" in line]
    assert 1 < len(tried) < 20
    assert found.slim.flops < 0.6 * found.dense.flops


@pytest.fixture(scope="module")
def digits_vit():
    from pathlib import Path

    folder = Path(__file__).parents[1] / "examples" / "digits"
    return folder / "images", folder / "model"


def test_bounds_that_no_cut_keeps_are_refused_with_the_nearest(tiny_vit, tmp_path):
    # Repaired, the smallest cut of this untrained model may lose less than float32 resolves.
    options = {"max_kl": 1e-30, "keep_dead_tokens": True, "repair": False}
    with pytest.raises(
        BudgetError, match=r"max_kl=1e-30: no pruned model is within this bound; the nearest, with .*KL"
    ):
        prune_quickly(tiny_vit, tmp_path / "slim.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_that_knows_nothing_is_refused(tiny_vit, few_digits, tmp_path):
    # The head of the model has 7 classes; so have the images, and the model is not trained.
    images = tmp_path / "images"
    for split in ("train", "val"):
        for label in range(7):
            (images / split).mkdir(parents=True, exist_ok=True)
            (images / split / str(label)).symlink_to(few_digits / split / str(label))
    with pytest.raises(
        BudgetError, match=r"max_drop=1\.0: the dense model is right on .* no more than chance"
    ):
        prune_quickly(tiny_vit, tmp_path / "slim.safetensors", max_drop=1.0, data_dir=images, workers=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": False}, "expected labels, which labels=False leaves out"),
        ({"eval_images": 0}, "expected images to measure accuracy on, found eval_images=0"),
        ({"val_split": "nowhere"}, "expected labelled images to measure accuracy on, in the split 'nowhere'"),
    ],
)
def test_a_bound_on_accuracy_needs_labels(digits_vit, tmp_path, options, message):
    images, checkpoint = digits_vit
    with pytest.raises(UsageError, match=re.escape(message)):
        mhacut.prune(
            checkpoint,
            max_drop=1.0,
            data_dir=images,
            output=tmp_path / "slim.safetensors",
            **QUICK,
            **options,
        )


@pytest.fixture
def averaging():
    """A ViT that pools all tokens, so that none is dead, and arguments to prune it as a module."""
    args = {"depth": 2, "embed_dim": 64, "num_heads": 2, "patch_size": 8}
    args |= {"global_pool": "avg", "class_token": False, "fc_norm": False}
    return build(ModelCase("vit_tiny_patch16_224", {**args, "img_size": 32})), args


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "attention", "round_to": 32}, "scope='attention' and round_to=32: the model's .* FLOPs"),
        ({"exclude": ("*",)}, r"scope='attention\+mlp', round_to=8 and exclude='\*': the model's .* FLOPs"),
    ],
)
def test_a_bound_is_refused_before_the_work_where_no_width_can_change(
    averaging, tmp_path, monkeypatch, options, message
):
    model, args = averaging
    monkeypatch.setattr("mhacut.pruning.job.calibrate", lambda *args, **options: pytest.fail("calibrated"))
    with pytest.raises(BudgetError, match=f"nothing to prune with {message} are the lowest"):
        mhacut.prune(
            model, model_args=args, max_kl=0.1, output=tmp_path / "slim.safetensors", **QUICK, **options
        )


@pytest.mark.parametrize(("classes", "found"), [(0, "no classifier"), (1, "one output")])
@pytest.mark.parametrize("bound", ["max_kl", "max_drop"])
def test_a_bound_needs_classes(averaging, classes, found, bound):
    model, args = averaging
    model = copy.deepcopy(model)
    model.reset_classifier(classes)
    with pytest.raises(UsageError, match=f"^{bound}=0.1: expected .* classes; the model has {found}$"):
        mhacut.prune(model, model_args=args, **{bound: 0.1}, dry_run=True, **QUICK)


def test_the_search_goes_down_to_the_model_that_merges_every_token(averaging, monkeypatch):
    model, args = averaging
    lowest = copy.deepcopy(model)
    set_merged(lowest, (8, 4))  # half of 16 patches, and half of what is left

    def stop(bracket, *others):
        raise BudgetError(f"from {bracket.low}")

    monkeypatch.setattr(prune_cut, "smallest_within", stop)
    options = {"scope": "attention+mlp+tokens", "exclude": ("*",), "dry_run": True, **QUICK}
    with pytest.raises(BudgetError, match=f"from {measure_flops(lowest, (3, 32, 32))}"):
        mhacut.prune(model, model_args=args, max_kl=1.0, **options)


@pytest.mark.slow
def test_the_smallest_model_merges_as_many_tokens_as_the_bound_allows(averaging):
    model, args = averaging
    options = {"scope": "attention+mlp+tokens", "exclude": ("*.mlp",), "dry_run": True, **QUICK}
    found = mhacut.prune(model, model_args=args, max_kl=1e6, **options)
    assert found.plan.tokens.merged == (8, 4)
    lowest = math.ceil(1000 * found.slim.flops / found.dense.flops) / 10
    with pytest.raises(BudgetError, match=rf"the lowest is .*\({lowest}% of"):
        mhacut.prune(model, model_args=args, flops="5%", **options)


# --- many budgets ---


@pytest.mark.slow
def test_many_budgets_give_the_files_that_single_runs_give(tiny_vit, tmp_path):
    budgets = ("80%", "60%", "900K")
    results = mhacut.prune_many(
        tiny_vit.path,
        flops=budgets,
        model=tiny_vit.architecture,
        model_args=tiny_vit.args,
        output=tmp_path / "many-{}.safetensors",
        **QUICK,
    )
    assert [result.output.name for result in results] == [
        "many-80pct.safetensors",
        "many-60pct.safetensors",
        "many-900K.safetensors",
    ]
    for budget, result in zip(budgets, results, strict=True):
        alone = prune_quickly(tiny_vit, tmp_path / "alone.safetensors", flops=budget, overwrite=True)
        assert result.output.read_bytes() == alone.output.read_bytes()
        assert result.divergence == alone.divergence
    assert "calibrating" in results[0].seconds
    assert not {"calibrating", "measuring error curves", "reading"} & results[1].seconds.keys()


@pytest.mark.slow
def test_a_budget_holds_no_weights_but_those_of_its_slim_model(tiny_vit, tmp_path, monkeypatch):
    made = []

    def remembering(job, *others):
        ready = reconstruct(job, *others)
        made.append(weakref.ref(ready.model))
        return ready

    def count(slim, *args, **kwargs):
        gc.collect()
        alive = [model() for model in made if model() is not None]
        assert alive[-1] is slim  # cut in place; those before it are the results
        counts.append(len(alive))
        return healed(slim, *args, **kwargs)

    counts, reconstruct, healed = [], planner.reconstruct, prune_cut.recover
    monkeypatch.setattr(planner, "reconstruct", remembering)
    monkeypatch.setattr(prune_cut, "recover", count)
    mhacut.prune_many(
        tiny_vit.path,
        flops=("80%", "60%", "900K"),
        model=tiny_vit.architecture,
        model_args=tiny_vit.args,
        output=tmp_path / "many-{}.safetensors",
        **QUICK,
    )
    assert len(made) == 3
    assert counts == [1, 2, 3]


def test_several_flags_write_several_files(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--flops", "80%", "--flops", "60%", *FAST]
    result = run("prune", *tiny_vit.flags, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [one["output"] for one in document["results"]] == [
        "tiny-80pct.safetensors",
        "tiny-60pct.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tiny-60pct.safetensors",
        "tiny-80pct.safetensors",
    ]
    result = run("prune", *tiny_vit.flags, *arguments, "-o", "one.safetensors")
    assert result.exit_code == 2
    assert "--output one.safetensors: expected {} in the name" in result.stderr


@pytest.mark.parametrize(
    ("flops", "others", "line"),
    [
        (("80%", "79%"), {"size": "60%"}, "flops='80%' and flops='79%' {}: size='60%' decides"),
        (
            ("80%", "70%", "90%"),
            {"size": "55%", "params": "60%"},
            "flops='80%', flops='70%' and flops='90%' {}: size='55%' decides",
        ),
        (("60%", "60.001%"), {}, "flops='60%' and flops='60.001%' {}: no width lies between them"),
        (("80%", "50%"), {"size": "90%"}, None),
    ],
)
@pytest.mark.slow
def test_budgets_that_lead_to_one_model_are_named_with_what_decides(tiny_vit, tmp_path, flops, others, line):
    reporter = Recorder()
    results = mhacut.prune_many(
        tiny_vit.path,
        flops=flops,
        model=tiny_vit.architecture,
        model_args=tiny_vit.args,
        output=tmp_path / "many-{}.safetensors",
        reporter=reporter,
        **{**QUICK, **others},
    )
    assert len({result.plan for result in results}) == (1 if line else len(flops))
    found = [message for message in reporter.messages if "same model" in message]
    assert found == ([line.format("give the same model")] if line else [])


def test_the_place_of_a_budget_is_filled_for_one_too(tiny_vit, tmp_path):
    (result,) = results = mhacut.prune_many(
        tiny_vit.path,
        flops=["80%"],
        model=tiny_vit.architecture,
        model_args=tiny_vit.args,
        output=tmp_path / "many-{}.safetensors",
        **QUICK,
    )
    assert result.output == tmp_path / "many-80pct.safetensors"
    assert "<th>80%</th>" in results._repr_html_()
    assert [line.split()[0] for line in repr(results).splitlines()[1:]] == ["dense", "80%"]
    assert repr(result).splitlines()[-2] == f"saved {result.output}"


@pytest.mark.parametrize("flops", ["80%", 2e9, (), []])
def test_prune_many_needs_a_list_of_budgets(tiny_vit, flops):
    with pytest.raises(UsageError, match="expected one or more budgets in a list"):
        mhacut.prune_many(tiny_vit.path, flops=flops, params="60%")


def test_an_existing_file_of_many_is_found_before_the_work(tiny_vit, tmp_path):
    (tmp_path / "m-60pct.safetensors").write_bytes(b"precious")
    out = tmp_path / "m-{}.safetensors"
    result = run("prune", *tiny_vit.flags, "--flops", "80%", "--flops", "60%", "-o", out, *FAST)
    assert result.exit_code == 1
    assert "m-60pct.safetensors" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m-60pct.safetensors"]
    assert (tmp_path / "m-60pct.safetensors").read_bytes() == b"precious"


@pytest.mark.slow
def test_a_report_of_several_budgets_has_a_table_and_charts(digits_vit, tmp_path):
    images, checkpoint = digits_vit
    page = tmp_path / "all.html"
    arguments = ["--data-dir", images, "--workers", "0", "--effort", "fast", "--calibration-images", "8"]
    budgets = ["--flops", "75%", "--flops", "50%"]
    out = tmp_path / "slim-{}.safetensors"
    result = run("prune", checkpoint, *budgets, *arguments, "-o", out, "--report", page)
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[:4]]
    assert rows[0][:3] == ["budget", "FLOPs", "of"]
    assert [row[0] for row in rows[1:]] == ["dense", "75%", "50%"]
    assert f"overview {page}" in result.stdout
    assert {path.name for path in tmp_path.glob("*.html")} == {
        "all.html",
        "all-75pct.html",
        "all-50pct.html",
    }
    text = page.read_text()
    for value in ("top-1, %", "divergence"):
        for cost in ("FLOPs", "parameters", "latency"):
            assert f"{value} against {cost}" in text
    # A line and a dot per model; the dense one has no divergence.
    assert text.count("<circle") == 3 * 3 + 3 * 2
    assert "http" not in text.replace("http-equiv", "")
    assert re.findall(r'<th scope="row">(dense|\d\d%)</th>', text) == ["dense", "75%", "50%"]


def test_pareto_rows_are_in_json(tiny_vit, tmp_path):
    arguments = ["--flops", "80%", "--flops", "60%", "--dry-run", "--json", *FAST]
    result = run("prune", *tiny_vit.flags, *arguments)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [row["budget"] for row in document["pareto"]] == ["dense", "80%", "60%"]
    for row, one in zip(document["pareto"][1:], document["results"], strict=True):
        figures = {key: row[key] for key in ("flops", "parameters", "size", "latency_ms", "top1")}
        assert figures == {key: one["slim"][key] for key in figures}
        assert row["divergence"] == one["divergence"]
