"""``prune --max-latency``: targets of time, met by a clock that counts parameters.

``benchmarks/test_latency_targets.py`` goes by the machine's own.
"""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mhacut
from helpers.jobs import Recorder
from helpers.models import slow_except
from helpers.pruning import QUICK, last_step, prune_quickly
from mhacut.budget import Budget, Targets
from mhacut.checkpoint.load import read_model
from mhacut.commands import prune_cut, prune_files, prune_inputs
from mhacut.commands.prune_latency import TimedCut, TimeTarget
from mhacut.errors import BudgetError, MhacutError, OutputError, UsageError
from mhacut.options.prune import PruneOptions
from mhacut.pruning.planner import Planner

prune = partial(prune_quickly, latency=True)


# --- times as people write them ---


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [("12ms", 12_000_000), ("0.012s", 12_000_000), ("800us", 800_000), ("50%", 10_000_000), ("7ns", 7)],
)
def test_times_are_understood(text, nanoseconds):
    assert Budget.parse(text, "max_latency").amount(dense=20_000_000) == nanoseconds


@pytest.mark.parametrize("text", ["12", "12m", "12 ms", "0ms", "-1ms", "12MB", "2.0G", "ms", "12msms"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match=r"is not a budget; write 12ms, 0\.012s, 800us or 50%"):
        Budget.parse(text, "max_latency")


@pytest.mark.parametrize("resource", ["flops", "params", "size"])
def test_other_budgets_are_no_times(resource):
    with pytest.raises(UsageError, match="is not a budget"):
        Budget.parse("12ms", resource)


def test_files_are_named_by_their_time():
    assert Targets.parse("50%", max_latency="12ms").label == "50pct-latency12ms"
    assert Targets.parse(max_latency="40%").label == "latency40pct"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"max_latency": "50%", "max_kl": 0.1},
            "max_kl=0.1 searches for the smallest model, but max_latency=",
        ),
        ({"max_latency": "50%", "max_drop": 1.0}, "max_drop=1.0 searches for the smallest model"),
        ({"max_latency": "50%", "allocation": "indicator"}, "allocation='indicator': expected curves or"),
        ({"max_latency": "50%", "int8": True}, "int8=True: expected runtime='onnx'"),
        ({"max_latency": "50%", "runtime": "tensorrt"}, "runtime='tensorrt': expected one of eager,"),
        ({"max_latency": "50%", "threads": 0}, "threads=0: expected at least 1"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        PruneOptions.from_flat(checkpoint="a", **given)


def test_a_runtime_that_is_not_installed_is_named_before_the_work(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(MhacutError, match=r"runtime='openvino' needs onnx, .*mhacut\[openvino\]"):
        prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="50%", runtime="openvino")


# --- from file to file, by a clock that counts parameters ---


@pytest.mark.parametrize("asked", ["80%", "1.3ms", *slow_except((), ["88%", "0.00135s"])])
def test_a_target_is_met_used_and_recorded(tiny_vit, tmp_path, clock, asked):
    result = prune(tiny_vit, tmp_path / "slim.safetensors", max_latency=asked)
    (target,) = result.targets
    dense = read_model(tiny_vit.path, model=tiny_vit.architecture, model_args=tiny_vit.args).model
    slim = mhacut.load_model(result.output)
    assert target.reached == pytest.approx(clock.time(slim, dense), rel=1e-6)
    assert target.measured["dense"] == pytest.approx(clock.time(dense, dense), rel=1e-6)
    most = Budget.parse(asked, "max_latency").amount(round(1e6 * clock.time(dense, dense))) / 1e6
    assert target.most == pytest.approx(most, rel=1e-6)
    assert 0.9 * most <= target.reached <= most
    assert target.measured["predicted"] == pytest.approx(target.reached, rel=0.02)
    assert result.slim.latency_ms == target.reached
    (entry,) = last_step(result.output)["targets"]
    assert entry == target.to_json()
    assert entry["target"] == "max_latency"
    assert entry["threads"] >= 1
    assert entry["machine"]
    assert last_step(result.output)["options"]["max_latency"] == asked
    assert last_step(result.output)["options"]["round_to"] == 8  # not that it was the default
    assert "runtime" not in last_step(result.output)["options"]


@pytest.mark.parametrize(
    ("given", "widths", "device", "multiple"),
    [
        (None, (64, 1536), "cuda", 16),
        (None, (64, 1536), "cpu", 8),
        (None, (32, 1536), "cuda", 8),  # few widths would be left
        (4, (64, 1536), "cuda", 4),
    ],
)
def test_widths_suit_the_kernels_of_a_gpu_that_is_timed(given, widths, device, multiple):
    target = SimpleNamespace(stopwatch=SimpleNamespace(device=torch.device(device)))
    units = [SimpleNamespace(width=width) for width in widths]
    options, reporter = SimpleNamespace(round_to=given), Recorder()
    assert prune_inputs._multiple(options, units, target, reporter) == multiple
    told = "widths are multiples of 16, not 8, for the kernels of GPUs; round_to=8 allows more widths"
    assert reporter.messages == [told] * (multiple == 16)
    assert prune_inputs._multiple(options, units, None, reporter) == (given or 8)  # no time is asked for


def test_what_tokens_would_leave_is_of_the_flops_that_are_left(tiny_vit, tmp_path, clock, monkeypatch):
    budgets = []
    monkeypatch.setattr(prune_files, "MUCH", -1.0)
    monkeypatch.setattr(prune_files, "divergence_by_merging", lambda job, flops, _: budgets.append(flops))
    result = prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="85%")
    assert budgets == [result.slim.flops]


def test_budgets_of_all_kinds_are_met(tiny_vit, tmp_path, clock):
    result = prune(
        tiny_vit, tmp_path / "s.safetensors", max_latency="85%", flops="70%", params="70%", size="220KB"
    )
    assert [target.name for target in result.targets] == ["flops", "params", "size", "max_latency"]
    assert all(target.reached <= target.most for target in result.targets)
    assert max(target.reached / target.most for target in result.targets) > 0.9
    assert result.output.stat().st_size <= 220_000


def test_a_time_that_does_not_bind_beside_another_budget_is_stated(tiny_vit, tmp_path, clock):
    result = prune(tiny_vit, tmp_path / "slim.safetensors", flops="60%", max_latency="9ms")
    (flops, time) = result.targets
    assert flops.reached <= flops.most
    assert time.reached < time.measured["dense"] < time.most == 9
    assert time.measured["predicted"] == pytest.approx(time.reached, rel=0.02)


def test_a_time_that_decides_nothing_leads_to_no_second_plan(tiny_vit, tmp_path, clock, monkeypatch):
    """Also if it is shorter than predicted: the next plan would be the same."""
    clock.unforeseen = lambda share: 0.9 if 0.55 < share < 0.9 else 1.0
    made, reporter = [], Recorder()
    of = prune_cut._Cut.of
    monkeypatch.setattr(prune_cut._Cut, "of", lambda planned, job: made.append(planned) or of(planned, job))
    options = {"flops": "55%", "max_latency": "99%", "dry_run": True, "reporter": reporter}
    target = prune(tiny_vit, tmp_path / "slim.safetensors", **options).targets[1]
    assert target.reached < 0.95 * target.measured["predicted"] < target.most
    assert len(made) == 1
    assert target.measured["corrections"] == 0
    assert not [line for line in reporter.messages if "another is made" in line]


def test_what_layers_do_not_foresee_is_corrected(tiny_vit, tmp_path, clock):
    clock.unforeseen = lambda share: 1.08 if 0.55 < share < 0.9 else 1.0  # not at half nor at least widths
    result = prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="85%")
    (target,) = result.targets
    assert target.reached <= target.most
    assert target.measured["corrections"] > 0


def at_shares_of_the_budget(clock, monkeypatch, shares):
    """Let cut models take these shares of the budget, one after the other, and the last one ever after."""
    left, took = iter(shares), []

    def time(target, model, record):
        dense = target.times.dense
        most = target.budget.amount(dense)
        if not hasattr(model, "took"):
            model.took = next(left, took[-1] if took else None)
            took.append(model.took)
        target._last = TimedCut(model.took * most / dense, dense, most, model.took * most / 1e6)
        return target._last

    monkeypatch.setattr(TimeTarget, "time", time)


def test_there_are_three_corrections_whatever_misses(tiny_vit, tmp_path, clock, monkeypatch):
    """The first plan misses in memory, the second once it is read from a file, and both once more."""
    at_shares_of_the_budget(clock, monkeypatch, 4 * [1.1, 0.9, 1.2])
    planned = []

    def plan(planner, limits, plan=Planner.plan):
        planned.append(limits[1].most)
        return plan(planner, limits)

    monkeypatch.setattr(Planner, "plan", plan)
    with pytest.raises(BudgetError, match="not met: after 3 corrections"):
        prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="85%")
    assert len(planned) == 4
    assert planned[1] < planned[0]
    assert planned[2] < planned[1]


@pytest.mark.parametrize(
    ("shares", "kept", "plans"),
    [
        ([0.975], 0.975, 1),
        ([0.99, 0.975], 0.975, 2),
        ([0.99, 1.1], 0.99, 3),
        ([0.997, 0.985, 0.99], 0.985, 3),  # the fastest
    ],
)
def test_a_model_that_is_just_within_the_budget_is_kept_if_no_other_is_safer(
    shares, kept, plans, tiny_vit, tmp_path, clock, monkeypatch
):
    at_shares_of_the_budget(clock, monkeypatch, shares)
    planned, reporter = [], Recorder()
    monkeypatch.setattr(Planner, "plan", lambda *given, plan=Planner.plan: planned.append(0) or plan(*given))
    options = {"max_latency": "85%", "dry_run": True, "reporter": reporter}
    (target,) = prune(tiny_vit, tmp_path / "slim.safetensors", **options).targets
    assert target.reached == pytest.approx(kept * target.most)
    assert len(planned) == plans
    assert target.measured["corrections"] == shares.index(kept)
    reasons = [line.split(", ")[1] for line in reporter.messages if line.startswith("this plan takes")]
    expected = ["too much" if share > 1 else "too near to be sure" for share in shares]
    assert reasons == [f"{reason}: another is made" for reason in expected[: plans - 1]]


def test_a_plan_is_left_for_a_file_that_is_slower_than_the_model_in_memory(
    tiny_vit, tmp_path, clock, monkeypatch
):
    """Where others were tried before it, to be sure."""
    in_memory, first_file = [0.985, 1.1, 1.1], 1.003
    at_shares_of_the_budget(clock, monkeypatch, [*in_memory, first_file, 0.95, 0.96])
    (target,) = prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="85%").targets
    assert target.reached == pytest.approx(0.96 * target.most)
    assert target.measured["corrections"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["85%", "9ms"])
def test_a_size_that_never_fits_is_not_blamed_on_the_time(asked, tiny_vit, tmp_path, clock, monkeypatch):
    """Be it of a time that the dense model meets, which is not measured between plans."""
    at_shares_of_the_budget(clock, monkeypatch, [0.9])
    monkeypatch.setattr(prune_cut, "file_size", lambda *given: 10**6)
    with pytest.raises(
        MhacutError, match=r"no plan was found that stores at most 220000 parameters or bytes"
    ):
        prune(tiny_vit, tmp_path / "slim.safetensors", max_latency=asked, size="220KB")


def test_of_models_within_the_budget_the_larger_is_kept(tiny_vit, tmp_path, clock, monkeypatch):
    """The first uses too little of it, and the one in its place is yet smaller."""
    at_shares_of_the_budget(clock, monkeypatch, [0.80])
    first = prune(tiny_vit, tmp_path / "first.safetensors", max_latency="80%", dry_run=True)
    planned = []

    def plan(planner, limits, plan=Planner.plan):
        planned.append(limits)
        return plan(planner, limits if len(planned) == 1 else smaller(limits))

    def smaller(limits):
        return (limits[0], replace(limits[1], most=int(0.9 * planned[0][1].most)))

    monkeypatch.setattr(Planner, "plan", plan)
    at_shares_of_the_budget(clock, monkeypatch, [0.80, 0.75])
    second = prune(tiny_vit, tmp_path / "second.safetensors", max_latency="80%", dry_run=True)
    assert len(planned) == 2
    assert second.slim.flops <= first.slim.flops
    assert second.targets[0].reached == pytest.approx(0.8 * second.targets[0].most)


def test_a_target_that_is_always_missed_fails_and_leaves_nothing(tiny_vit, tmp_path, clock):
    clock.unforeseen = lambda share: 1.0 if share in (1.0,) or clock.layers == 0 else 1.5
    out = tmp_path / "slim.safetensors"
    message = (
        r"max_latency='85%': not met: after 3 corrections the pruned model takes \S+ms, "
        r"expected at most \S+ms"
    )
    with pytest.raises(BudgetError, match=message):
        prune(tiny_vit, out, max_latency="85%")
    assert not out.exists()


def test_a_file_that_is_slower_than_the_model_in_memory_is_written_anew(
    tiny_vit, tmp_path, clock, monkeypatch
):
    seen = []

    def unforeseen(share):
        seen.append(share)
        # Measured whole: dense, dense, half, least; then dense and the cut one; then the first file, twice.
        return 1.05 if len(seen) in (8, 10) else 1.0

    clock.unforeseen = unforeseen
    result = prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="85%")
    (target,) = result.targets
    assert target.reached <= target.most
    assert target.measured["corrections"] == 1


def slow_once_it_is_read(clock, monkeypatch, factor=1.5):
    """Let what is read from a file be slower than what is in memory; list what was read, and from where."""
    read, load, time = [], prune_files.load_model, clock.time

    def slow(path):
        model = load(path)
        read.append((model, Path(path)))
        return model

    def timed(model, dense):
        return time(model, dense) * (factor if any(model is own for own, _ in read) else 1.0)

    monkeypatch.setattr(prune_files, "load_model", slow)
    clock.time = timed
    return read


def test_a_file_that_misses_the_time_is_never_published(tiny_vit, tmp_path, clock, monkeypatch):
    read = slow_once_it_is_read(clock, monkeypatch)
    with pytest.raises(BudgetError, match="not met"):
        prune(tiny_vit, tmp_path / "new" / "slim.safetensors", max_latency="85%")
    assert read
    assert not list((tmp_path / "new").rglob("*"))


def test_a_folder_that_cannot_be_written_when_the_file_is_timed_is_named(
    tiny_vit, tmp_path, clock, monkeypatch
):
    def full(target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mhacut.commands.prune_timing.temporary_folder", full)
    with pytest.raises(OutputError, match=r"slim\.safetensors: cannot be written: No space left on device"):
        prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="85%")


def test_a_file_that_misses_the_time_replaces_none(tiny_vit, tmp_path, clock, monkeypatch):
    """Even where the plan after it is the one that fails, in memory."""
    read = slow_once_it_is_read(clock, monkeypatch)
    clock.unforeseen = lambda share: 1.5 if read and share != 1.0 else 1.0
    out = tmp_path / "slim.safetensors"
    out.write_bytes(b"of before")
    with pytest.raises(BudgetError, match="not met"):
        prune(tiny_vit, out, max_latency="85%", overwrite=True)
    assert len(read) == 1
    assert out.read_bytes() == b"of before"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("1%", r"max_latency='1%' is out of reach: the lowest is \S+ms \(\d+\.\d% of \S+ms\) with scope="),
        ("0.1ms", r"max_latency='0\.1ms' is out of reach: the lowest is \S+ms"),
        ("9ms", r"nothing to prune: the model's \S+ms are already within 9ms"),
        ("100%", r"nothing to prune: the model's \S+ms are already within 100%"),
    ],
)
def test_infeasible_times_are_refused_before_the_work(tiny_vit, tmp_path, clock, asked, message):
    with pytest.raises(BudgetError, match=message):
        prune(tiny_vit, tmp_path / "slim.safetensors", max_latency=asked)
    assert not (tmp_path / "slim.safetensors").exists()


@pytest.mark.slow
def test_the_lowest_time_that_is_named_works(tiny_vit, tmp_path, clock):
    with pytest.raises(BudgetError) as refusal:
        prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="1%")
    for budget in re.search(r"the lowest is (\S+) \((\S+%) of", str(refusal.value)).groups():
        result = prune(tiny_vit, tmp_path / "slim.safetensors", max_latency=budget, dry_run=True)
        assert result.targets[0].reached <= result.targets[0].most


@pytest.mark.slow
def test_several_files_meet_one_time(tiny_vit, tmp_path, clock):
    results = mhacut.prune_many(
        tiny_vit.path,
        model=tiny_vit.architecture,
        model_args=tiny_vit.args,
        flops=["90%", "60%"],
        max_latency="88%",
        output=tmp_path / "slim-{}.safetensors",
        **{**QUICK, "latency": True},
    )
    names = [result.output.name for result in results]
    assert names == ["slim-90pct-latency88pct.safetensors", "slim-60pct-latency88pct.safetensors"]
    for result in results:
        assert all(target.reached <= target.most for target in result.targets)
