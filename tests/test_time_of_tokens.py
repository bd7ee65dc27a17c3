"""``prune --max-latency`` where tokens may be merged, by a clock that counts FLOPs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mhacut
from helpers.models import ModelCase, build
from helpers.pruning import last_step
from mhacut.checkpoint.load import read_model
from mhacut.commands.stopwatch import Stopwatch
from mhacut.errors import BudgetError
from mhacut.measuring.latency import Beside
from mhacut.measuring.time_curve import TimeCurve
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.merging import merged_of

SIDE = 64
ARGS = {"depth": 2, "embed_dim": 48, "num_heads": 3}
VIT = ModelCase("vit_tiny_patch16_224", {**ARGS, "img_size": SIDE, "num_classes": 10})
SMALL = {"patch_size": 8, **ARGS}


class Clock:
    """A model takes 0.1 ms and 0.1 ns per FLOP; one that merges tokens takes longer by ``matching``."""

    def __init__(self, monkeypatch):
        self.matching = 1.1
        self.timed: list[float] = []
        """Time of each cut model, in turn."""
        clock = self  # functions become methods of the stopwatch, bound methods do not

        def beside(stopwatch, models, parts=(), *, seconds, expected=None):
            times = tuple(map(clock.time, (stopwatch.dense, *models)))
            clock.timed += times[1:]
            return Beside(times, times, tuple(time / times[0] for time in times), 0.0)

        monkeypatch.setattr(Stopwatch, "beside", beside)

    def time(self, model):
        longer = self.matching if any(merged_of(model)) else 1.0
        return (0.1 + 1e-7 * measure_flops(model, (3, SIDE, SIDE))) * longer


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build(ModelCase(VIT.architecture, {**VIT.args, "patch_size": 8}))


def prune(model, output, **options):
    return mhacut.prune(
        model,
        output=output,
        model_args=SMALL,
        scope="attention+mlp+tokens",
        calibration_images=12,
        effort="fast",
        round_to=1,
        **options,
    )


def test_a_time_is_met_by_merging_used_and_recorded(model, tmp_path, clock):
    result = prune(model, tmp_path / "slim.safetensors", max_latency="60%")
    (target,) = result.targets
    assert sum(result.plan.tokens.merged) > 0
    assert target.most == pytest.approx(0.6 * clock.time(model), rel=1e-5)
    assert 0.9 * target.most <= target.reached <= target.most
    assert target.reached == pytest.approx(clock.time(mhacut.load_model(result.output)), rel=1e-5)
    (entry,) = last_step(result.output)["targets"]
    assert entry == target.to_json()


def test_what_merging_takes_beyond_its_flops_is_corrected(model, tmp_path, clock):
    result = prune(model, tmp_path / "slim.safetensors", max_latency="75%")
    (target,) = result.targets
    assert target.measured["corrections"] > 0  # the curve ends at a model that merges, and starts at none
    assert 0.9 * target.most <= target.reached <= target.most


def test_flops_and_time_are_both_met(model, tmp_path, clock):
    clock.matching = 1.0
    both = prune(model, tmp_path / "both.safetensors", max_latency="80%", flops="45%")
    flops, time = both.targets
    assert flops.reached <= flops.most
    assert time.reached < 0.95 * time.most  # the FLOPs decide
    late = prune(model, tmp_path / "late.safetensors", max_latency="60%", flops="95%")
    flops, time = late.targets
    assert flops.reached < 0.9 * flops.most
    assert 0.9 * time.most <= time.reached <= time.most


def test_times_out_of_reach_name_the_lowest_which_works(model, tmp_path, clock):
    with pytest.raises(
        BudgetError, match=r"max_latency='5%' is out of reach: the lowest is (\S+)ms"
    ) as error:
        prune(model, tmp_path / "slim.safetensors", max_latency="5%")
    assert "tokens" in str(error.value)
    lowest = str(error.value).partition("the lowest is ")[2].split()[0]
    result = prune(model, tmp_path / "slim.safetensors", max_latency=lowest)
    assert all(target.reached <= target.most for target in result.targets)


def test_a_file_of_the_command_line_is_opened_with_its_merges(model, tmp_path, clock):
    result = prune(model, tmp_path / "slim.safetensors", max_latency="60%")
    slim = read_model(result.output).model
    assert tuple(merged_of(slim)) == result.plan.tokens.merged


shares = st.lists(st.floats(0.05, 1.2), min_size=2, max_size=5)


@given(shares, st.integers(1, 10**9))
def test_a_curve_is_its_own_inverse_and_never_falls(times, dense):
    curve = TimeCurve.through([(1000 * (1 + place), time) for place, time in enumerate(times)], dense)
    found = [curve.at(flops) for flops in range(0, 8000, 250)]
    assert found == sorted(found)
    least, most = curve.points[0][0], curve.points[-1][0]
    for nanoseconds in (0, dense // 3, dense // 2, dense, 2 * dense):
        flops = curve.flops(nanoseconds)
        assert least <= flops <= most
        assert curve.at(flops) <= nanoseconds + 1 or flops == least
