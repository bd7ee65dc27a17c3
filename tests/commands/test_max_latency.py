"""``prune --max-latency`` by a clock that counts parameters, and latency as it is printed and stated.

``benchmarks/test_latency_targets.py`` goes by the machine's own clock.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

import mhacut
from helpers.cli import document_of, succeed
from helpers.jobs import Recorder
from helpers.pruning import last_step, prune_quickly
from mhacut.budget import Budget
from mhacut.checkpoint.load import read_model
from mhacut.errors import BudgetError
from mhacut.exporting import stopwatch
from mhacut.exporting.stopwatch import Stopwatch
from mhacut.options.base import TimingOptions
from mhacut.plan import Plan

# Times of models that merge tokens are estimated otherwise: test_time_of_tokens.py.
prune = partial(prune_quickly, scope="attention+mlp", latency=True)


# --- from file to file, by a clock that counts parameters ---


@pytest.mark.parametrize("asked", ["80%", "1.3ms"])
def test_a_target_is_met_used_and_recorded(tiny_vit, tmp_path, clock, asked):
    result = prune(tiny_vit, tmp_path / "slim.safetensors", max_latency=asked)
    (target,) = result.targets
    dense = read_model(tiny_vit.path, **tiny_vit.options).model
    slim = mhacut.load_model(result.output)
    assert target.reached == pytest.approx(clock.time(slim, dense), rel=1e-6)
    assert target.measured["dense"] == pytest.approx(clock.time(dense, dense), rel=1e-6)
    most = Budget.parse(asked, "max_latency").amount(round(1e6 * clock.time(dense, dense))) / 1e6
    assert target.limit == pytest.approx(most, rel=1e-6)
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


@pytest.mark.slow
def test_what_layers_do_not_foresee_is_corrected(tiny_vit, tmp_path, clock):
    clock.unforeseen = lambda share: 1.08 if 0.55 < share < 0.9 else 1.0  # not at half nor at least widths
    result = prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="85%")
    (target,) = result.targets
    assert target.reached <= target.limit
    assert target.measured["corrections"] > 0


@pytest.mark.slow
def test_a_time_that_decides_nothing_leads_to_no_second_plan(tiny_vit, tmp_path, clock):
    """Also if it is shorter than predicted: the next plan would be the same."""
    clock.shares, reporter = [0.6], Recorder()
    options = {"flops": "55%", "max_latency": "99%", "dry_run": True, "reporter": reporter}
    target = prune(tiny_vit, tmp_path / "slim.safetensors", **options).targets[1]
    assert target.reached == pytest.approx(0.6 * target.measured["dense"])
    assert reporter.stages.count("cutting") == 1
    assert target.measured["corrections"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shares", "kept", "plans"),
    [
        ([0.975], 0.975, 1),
        ([0.997, 0.985, 0.99, 0.99], 0.985, 4),  # the fastest
    ],
)
def test_a_model_just_within_the_budget_is_taken_if_no_other_is_safer(
    shares, kept, plans, tiny_vit, tmp_path, clock
):
    clock.shares, reporter = [0.85 * share for share in shares], Recorder()
    options = {"max_latency": "85%", "dry_run": True, "reporter": reporter}
    (target,) = prune(tiny_vit, tmp_path / "slim.safetensors", **options).targets
    assert target.reached == pytest.approx(kept * target.limit)
    assert reporter.stages.count("cutting") == plans
    assert target.measured["corrections"] == shares.index(kept)
    assert len([line for line in reporter.messages if line.endswith("planning again")]) == plans - 1


@pytest.mark.slow
def test_a_correction_that_leaves_much_of_a_time_unused_is_corrected(tiny_vit, tmp_path, clock):
    clock.shares = [0.85 * share for share in (1.1, 0.85)]
    (target,) = prune(tiny_vit, tmp_path / "slim.safetensors", max_latency="85%", dry_run=True).targets
    assert 0.9 * target.limit <= target.reached <= target.limit
    assert target.measured["corrections"] == 2


@pytest.mark.slow
def test_a_target_that_is_always_missed_fails_and_leaves_nothing(tiny_vit, tmp_path, clock):
    clock.shares = 4 * [0.9]
    out = tmp_path / "new" / "slim.safetensors"
    message = r"'85%': no model .* has \S+ms, limit \S+ms\. Times vary on a busy machine"
    with pytest.raises(BudgetError, match=message):
        prune(tiny_vit, out, max_latency="85%")
    assert len(clock.shares) < 3
    assert not list(tmp_path.glob("new/*"))


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


# --- as it is printed ---


@pytest.mark.slow
def test_the_time_is_printed(tiny_vit, tmp_path, clock):
    out, page = tmp_path / "slim.safetensors", tmp_path / "page.html"
    flags = ["--calibration-images", "8", "--batch-size", "4", "--effort", "fast", "--max-latency", "85%"]
    arguments = ["prune", *tiny_vit.flags, *flags, "-o", out, "--report", page, "--overwrite"]
    result = succeed(*arguments)
    line = (
        r"^--max-latency 85%: (wall|processor) time \S+ms per batch, limit \S+ms; "
        r"dense model \S+ms \(ratio \d\d\.\d%\); predicted \S+ms"
    )
    clock_name = re.search(line, result.stdout, re.MULTILINE)[1]
    line = re.search(r"^timed in eager, batch 8, (\d+) thread\(s\), cpu: \S.*", result.stdout, re.MULTILINE)
    assert (clock_name == "processor") == ("; wall time " in line[0]) == (line[1] == "1")
    assert "--max-latency 85%: " in page.read_text()
    (target,) = document_of(*arguments)["targets"]
    assert target["reached"] <= target["most"] < target["dense"]
    assert {"predicted", "machine", "threads", "runtime", "batch_size", "corrections"} <= target.keys()


@pytest.mark.slow
def test_a_latency_states_what_it_is_of(tiny_vit, tmp_path, clock):
    """Without a budget of time, too, and whatever the device that the rest ran on."""
    page, label = tmp_path / "page.html", "latency, ms (batch 2, CPU)"
    options = {"threads": 3, "latency_batch_size": 2}
    result = prune(tiny_vit, tmp_path / "slim.safetensors", flops="60%", report=page, **options)
    assert label in [row[0] for row in replace(result, device="cuda").rows()]
    assert label in page.read_text()
    asked = {"runtime": "eager", "int8": False, "batch_size": result.latency_batch_size, "device": "cpu"}
    stated = asked | {name: value for name, value in options.items() if name in result.timing}
    assert stated.items() <= result.timing.items()
    assert result.timing["machine"]


# --- in a new process ---


@pytest.mark.slow
def test_a_cut_model_is_timed_in_a_new_process_or_if_none_can_in_this_one(pruned, tiny_vit, monkeypatch):
    slim = read_model(pruned.output)
    dense = read_model(tiny_vit.path, **tiny_vit.options).model
    timing = TimingOptions(latency_batch_size=2, threads=1)
    watch, here = Stopwatch(timing, dense, (3, 32, 32), torch.device("cpu")), []
    monkeypatch.setattr(watch, "compare", lambda *given, **options: here.append(given))
    records = {"dense": replace(slim.record, plan=Plan(())), "slim": slim.record}
    found = watch.compare_in_new_process(slim.model, records, seconds=0.1, precision=1.0)
    assert here == []
    assert found.ratios[0] == 1.0
    assert 0.05 < found.ratios[1] < 20
    assert all(time > 0 for time in (*found.milliseconds, *found.wall))
    monkeypatch.setattr(stopwatch, "in_new_process", lambda *given: None)
    watch.compare_in_new_process(slim.model, records, seconds=0.1, precision=1.0)
    assert len(here) == 1
