"""The smallest model within a bound on the loss."""

from __future__ import annotations

import copy
import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import mhacut
from helpers.jobs import Recorder
from helpers.models import ModelCase, build
from helpers.pruning import QUICK, last_step, prune_quickly
from mhacut.errors import BudgetError, UsageError
from mhacut.measuring.accuracy import standard_error_of_drop
from mhacut.pruning.smallest import Trial, smallest_within

# --- search ---


def smallest(budgets, attempt, expected, goal):
    """The trial of least cost within the bound; None if there is none."""
    search, best = smallest_within(budgets, expected, goal), None
    try:
        budget = next(search)
        while True:
            trial = attempt(budget)
            if trial.ratio <= 1 and (best is None or trial.cost <= best.cost):
                best = trial
            budget = search.send(trial)
    except StopIteration:
        return best


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
        return Trial(budget, factor * expected(budget) / bound)

    best = smallest(range(low, high + 1, step), attempt, expected, bound)
    passing = [budget for budget in tried if factor * expected(budget) <= bound]
    if factor * expected(high) > bound:
        assert best is None
        assert high in tried
        return
    assert best.cost == min(passing)
    # A step lower the loss is out of the bound, or there is nothing lower.
    assert best.cost - step < low or factor * expected(best.cost - step) > bound * (1 - 1e-9)
    assert len(tried) <= 6 + 2 * math.log2(max(2, (high - low) / step + 2))


@example(noise=[0.0] * 101, bound=1.96875, plateau=1)
@given(
    noise=st.lists(st.floats(-1, 1), min_size=101, max_size=101),
    bound=st.floats(-2, 2),
    plateau=st.sampled_from([1, 7, 40]),
)
def test_three_models_below_the_smallest_miss(noise, bound, plateau):
    """Losses fall by 4 from the lowest budget to the highest, but not steadily; models may be far apart."""
    tried = []

    def attempt(budget):
        assert 0 <= budget <= 1000
        cost = budget // plateau * plateau
        tried.append(Trial(cost, math.exp(2 - 4 * cost / 1000 + noise[cost // 10] - bound)))
        return tried[-1]

    best = smallest(
        range(0, 1001, 10), attempt, lambda budget: math.exp(2 - 4 * budget / 1000), math.exp(bound)
    )
    within = [trial.cost for trial in tried if trial.ratio <= 1]
    if best is None:
        assert not within
        return
    assert best.cost == min(within)
    missing = sorted({trial.cost for trial in tried if trial.cost < best.cost}, reverse=True)
    lowest, count = min(missing, default=best.cost), len(missing)
    assert count >= 3 or lowest <= 5  # half a step: such a model stands for that of the lowest budget
    # Of each of three: a stride, half of one to a trial that stands for it, and a plateau.
    assert best.cost - (missing[2] if count > 2 else lowest) <= 3 * (10 + 5 + plateau - 1)


def test_the_walk_takes_strides_of_a_quarter_of_a_percent():
    """However small a step is."""
    tried = []

    def attempt(budget):
        tried.append(budget)
        return Trial(budget, 0.9 if budget >= 9500 else 1.1)

    best = smallest(range(8000, 10001, 1), attempt, lambda budget: 1 - budget / 1e4, 0.1)
    assert best.cost == 9500
    assert all(any(abs(budget - below) <= 13 for budget in tried) for below in (9475, 9450, 9425))
    assert len(tried) <= 20


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
    alone = {"scope": "attention+mlp"}
    found = prune_quickly(tiny_vit, tmp_path / "found.safetensors", max_kl=bound, **alone)
    (target,) = found.targets
    assert (target.name, target.spec, target.limit) == ("max_kl", "0.0001", bound)
    assert target.reached == pytest.approx(found.divergence, abs=1e-7)  # what float32 resolves of logarithms
    assert found.divergence <= bound
    # The same model as that of the budget that was found; the next ones down, a step at a time, are outside.
    again = prune_quickly(tiny_vit, tmp_path / "again.safetensors", flops=found.budget, **alone)
    assert again.plan == found.plan
    assert again.divergence == pytest.approx(found.divergence)
    sweep = [
        prune_quickly(tiny_vit, tmp_path / "sweep.safetensors", flops=f"{share}%", dry_run=True, **alone)
        for share in range(30, 100, 10)
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
    words = {True: "within the bound", False: "above the bound"}
    assert all(line.endswith(words[float(line.split("): ")[1].split()[0]) <= 3.0]) for line in tried), tried
    assert found.slim.flops < 0.6 * found.dense.flops


@pytest.mark.slow
def test_bounds_that_no_cut_keeps_are_refused_with_the_nearest(tiny_vit, tmp_path):
    # Repaired, the smallest cut of this untrained model may lose less than float32 resolves.
    options = {"max_kl": 1e-30, "keep_dead_tokens": True, "repair": False}
    with pytest.raises(BudgetError, match=r"max_kl=1e-30: no model .*; the nearest, with .*KL"):
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
        BudgetError, match=r"max_drop=1\.0: the dense model is right on .* no better than chance"
    ):
        prune_quickly(tiny_vit, tmp_path / "slim.safetensors", max_drop=1.0, data_dir=images, workers=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": False}, "expected labelled images to measure accuracy on; labels=False"),
        ({"eval_images": 0}, "expected labelled images to measure accuracy on; eval_images=0"),
        ({"val_split": "nowhere"}, "images to measure accuracy on; no labelled split 'nowhere' in"),
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
        ({"scope": "attention", "round_to": 32}, "scope='attention' and round_to=32"),
        (
            {"scope": "attention+mlp", "exclude": ("*",)},
            r"scope='attention\+mlp', round_to=8 and exclude='\*'",
        ),
    ],
)
def test_a_bound_is_refused_before_the_work_where_no_width_can_change(
    averaging, tmp_path, monkeypatch, options, message
):
    model, args = averaging
    monkeypatch.setattr("mhacut.pruning.job.calibrate", lambda *args, **options: pytest.fail("calibrated"))
    with pytest.raises(
        BudgetError, match=f"nothing to prune with {message}: the model already has the lowest FLOPs"
    ):
        mhacut.prune(
            model, model_args=args, max_kl=0.1, output=tmp_path / "slim.safetensors", **QUICK, **options
        )


@pytest.mark.parametrize(("classes", "found"), [(0, "no classifier"), (1, "one output")])
@pytest.mark.parametrize("bound", ["max_kl", "max_drop"])
def test_a_bound_needs_classes(averaging, classes, found, bound):
    model, args = averaging
    model = copy.deepcopy(model)
    model.reset_classifier(classes)
    with pytest.raises(UsageError, match=f"^{bound}=0.1: expected .* classes, found {found}$"):
        mhacut.prune(model, model_args=args, **{bound: 0.1}, dry_run=True, **QUICK)


@pytest.mark.slow
def test_the_smallest_model_merges_as_many_tokens_as_the_bound_allows(averaging):
    model, args = averaging
    options = {"scope": "attention+mlp+tokens", "exclude": ("*.mlp",), "dry_run": True, **QUICK}
    found = mhacut.prune(model, model_args=args, max_kl=1e6, **options)
    assert found.plan.tokens.merged == (8, 4)
    lowest = math.ceil(1000 * found.slim.flops / found.dense.flops) / 10
    with pytest.raises(BudgetError, match=rf"the lowest is .*\({lowest}% of"):
        mhacut.prune(model, model_args=args, flops="5%", **options)
