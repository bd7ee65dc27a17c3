"""``prune --max-latency`` where tokens may be merged, by a clock that counts FLOPs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mhacut
from helpers.clocks import Counting
from helpers.models import ModelCase, build
from helpers.pruning import last_step
from mhacut.errors import BudgetError
from mhacut.measuring.predicted_time import TimeCurve
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.tokens import merged_of

SIDE = 64
ARGS = {"depth": 2, "embed_dim": 48, "num_heads": 3}
VIT = ModelCase("vit_tiny_patch16_224", {**ARGS, "img_size": SIDE, "num_classes": 10})
MEASURED = 5
"""Models that are measured before there are plans, the dense one included."""


class Clock(Counting):
    """A model takes 0.1 ms and 0.1 ns per FLOP; one that merges tokens takes longer by ``matching``."""

    def __init__(self, monkeypatch, tmp_path):
        super().__init__(monkeypatch, tmp_path)
        self.matching, self.most = 1.1, 0
        self.faster, self.timed = 1.0, 0
        """Factor on the times of cut models that are not measured for the curve."""

    def time(self, model, dense=None):
        flops = measure_flops(model, (3, SIDE, SIDE))
        self.most = max(self.most, flops)  # the dense model is timed first
        self.timed += 1
        longer = self.matching if any(merged_of(model)) else 1.0
        longer *= self.faster if self.timed > MEASURED and flops < self.most else 1.0
        return (0.1 + 1e-7 * flops) * longer * self.unforeseen(flops / self.most)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    return Clock(monkeypatch, tmp_path)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(ModelCase(VIT.architecture, {**VIT.args, "patch_size": 8}))


OPTIONS = {"model_args": {"patch_size": 8, **ARGS}, "scope": "attention+mlp+tokens"}
OPTIONS |= {"calibration_images": 12, "effort": "fast", "round_to": 1}


def prune(model, output, **options):
    return mhacut.prune(model, output=output, **OPTIONS, **options)


@pytest.mark.slow
def test_a_time_is_met_by_merging_used_and_recorded(model, tmp_path, clock):
    clock.matching = 1.02
    result = prune(model, tmp_path / "slim.safetensors", max_latency="40%")
    (target,) = result.targets
    assert sum(result.plan.tokens.merged) > 0
    assert target.limit == pytest.approx(0.4 * clock.time(model), rel=1e-5)
    assert 0.9 * target.limit <= target.reached <= target.limit
    assert target.reached == pytest.approx(clock.time(mhacut.load_model(result.output)), rel=1e-5)
    assert target.measured["predicted"] == pytest.approx(target.reached, rel=0.1)
    (entry,) = last_step(result.output)["targets"]
    assert entry == target.to_json()


@pytest.mark.slow
def test_what_is_not_foreseen_is_corrected(model, tmp_path, clock):
    clock.unforeseen = lambda share: 1 + share * (1 - share)  # of the dense model's FLOPs
    result = prune(model, tmp_path / "slim.safetensors", max_latency="65%")
    (target,) = result.targets
    assert target.measured["corrections"] > 0
    assert 0.9 * target.limit <= target.reached <= target.limit


@pytest.mark.slow
def test_a_time_that_is_used_too_little_is_corrected_again(model, tmp_path, clock):
    clock.faster = 0.7
    result = prune(model, tmp_path / "slim.safetensors", max_latency="50%")
    (target,) = result.targets
    assert target.measured["corrections"] == 1
    assert 0.9 * target.limit <= target.reached <= target.limit


@pytest.mark.slow
@pytest.mark.parametrize(("matching", "asked"), [(1.5, "40%"), (3.0, "95%")])
def test_where_merging_takes_longer_than_it_saves_channels_go(model, tmp_path, clock, matching, asked):
    clock.matching = matching
    result = prune(model, tmp_path / "slim.safetensors", max_latency=asked)
    (target,) = result.targets
    assert not any(result.plan.tokens.merged)
    assert target.reached <= target.limit
    uncut = 0.68 * clock.time(model)  # its last block computes the class token alone
    assert target.reached > 0.9 * min(target.limit, uncut)


@pytest.mark.slow
def test_times_out_of_reach_name_the_lowest_which_works(model, tmp_path, clock):
    with pytest.raises(
        BudgetError, match=r"max_latency='5%' is out of reach: the lowest is (\S+)ms"
    ) as error:
        prune(model, tmp_path / "slim.safetensors", max_latency="5%")
    lowest = str(error.value).partition("the lowest is ")[2].split()[0]
    result = prune(model, tmp_path / "slim.safetensors", max_latency=lowest)
    assert all(target.reached <= target.limit for target in result.targets)


@pytest.mark.slow
def test_a_time_goes_with_several_budgets_a_size_and_a_dry_run(model, tmp_path, clock):
    clock.matching = 1.02
    given = {"flops": ["60%", "40%"], "max_latency": "50%", "size": "150KB"}
    results = mhacut.prune_many(model, output=tmp_path / "slim-{}.safetensors", **given, **OPTIONS)
    for result in results:
        assert [target.name for target in result.targets] == ["flops", "size", "max_latency"]
        assert all(target.reached <= target.limit for target in result.targets)
    tried = prune(model, tmp_path / "no.safetensors", max_latency="50%", dry_run=True)
    assert tried.targets[0].reached <= tried.targets[0].limit
    assert not (tmp_path / "no.safetensors").exists()


shares = st.lists(st.floats(0.05, 1.2), min_size=1, max_size=5)


@given(shares, shares, st.booleans(), st.integers(1000, 10**9))
def test_the_most_flops_within_a_time_are_found(cut, merged, merges, dense):
    lines = ([(1000 * (1 + place), time) for place, time in enumerate(times)] for times in (cut, merged))
    curve = TimeCurve.through(*lines, dense)
    found = [curve.at(flops, merges=merges) for flops in range(0, 8000, 250)]
    assert found == sorted(found)
    line = curve.merged if merges else curve.cut
    for nanoseconds in (0, dense // 3, dense // 2, dense):
        flops, rounding = curve.flops(nanoseconds, merges=merges), 1e-9 * dense + 1
        if len(line) == 1:
            assert flops == (line[0][0] if line[0][1] * dense <= nanoseconds else -1)
        elif flops >= 0:
            assert curve.at(flops, merges=merges) <= nanoseconds + rounding
            assert curve.at(flops + 2, merges=merges) >= nanoseconds - rounding
        else:
            assert curve.at(0, merges=merges) >= nanoseconds - rounding


def test_a_line_is_scaled_to_a_measured_model_and_the_other_stays():
    curve = TimeCurve.through([(40, 0.5), (100, 1.0)], [(30, 0.6), (50, 0.8)], 10**6)
    found = curve.with_measured(40, 350_000, merges=True).with_measured(60, 525_000, merges=True)
    assert found.at(40, merges=True) == round(700_000 * 525 / 900)
    assert found.at(60, merges=True) == 525_000
    assert found.flops(525_001, merges=True) == 60
    assert found.at(70, merges=False) == curve.at(70, merges=False) == 750_000
