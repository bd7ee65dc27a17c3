"""Options stated once: bounds, names, and how messages name them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch

import mhacut
from mhacut.cli.app import COMMANDS
from mhacut.cli.flags import PANELS, flag_writer
from mhacut.errors import UsageError, option_name, options_written_by
from mhacut.options.base import LabelledImages
from mhacut.options.export import ExportOptions
from mhacut.options.finetune import FinetuneOptions
from mhacut.options.measure import BenchOptions, InspectOptions
from mhacut.options.option import Option
from mhacut.options.prune import PruneOptions, SearchOptions

EVERY: list[Option] = [one for command in COMMANDS.values() for one in command.options().values()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"round_to": 0}, "round_to=0: expected at least 1"),
        ({"round_to": 8.0}, "round_to=8.0: expected a whole number, at least 1"),
        ({"round_to": "8x"}, "round_to='8x': expected a whole number, at least 1"),
        ({"round_to": True}, "round_to=True: expected a whole number"),
        ({"batch_size": None}, "batch_size=None: expected a whole number"),
        ({"batch_size": 10**12}, "batch_size=1000000000000: expected at most 2147483647"),
        ({"lr": float("nan")}, "lr=nan: expected a number, above 0"),
        ({"lr": 10**400}, "expected a number"),
        ({"device": None}, "device=None: expected text"),
        ({"workers": -1}, "workers=-1: expected at least 0"),
        ({"effort": "fastt"}, "effort='fastt': expected one of fast, balanced, best"),
        ({"output": "x.pth"}, "output='x.pth': expected a name that ends in .safetensors"),
        ({"exclude": (None,)}, "exclude=None: expected text"),
        ({"preserve": ["blocks.1"]}, "preserve=['blocks.1']: expected text"),
        ({"mean": ("a",)}, "mean='a': expected a number"),
        ({"model_args": "depth"}, "model_args 'depth': expected KEY=VALUE"),
        ({"model_args": 3}, "model_args=3: expected a mapping"),
        ({"data_dir": 3}, "data_dir=3: expected a path"),
        ({"repair": "yes"}, "repair='yes': expected True or False"),
        ({"checkpoint": [0] * 100}, "checkpoint=[0, 0, 0, 0, 0, 0, ...]: expected a path"),
        ({"data_dirr": "x"}, "no option 'data_dirr'; did you mean 'data_dir'?"),
        ({"flops": None}, "flops is missing. Budget for the FLOPs"),
    ],
)
def test_errors_name_the_argument(values, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        PruneOptions.of(**{"checkpoint": "a", "flops": "50%", **values})


def test_text_is_read_as_a_flag_s():
    given = {"lr": "1e-2", "mean": "0.5,0.4", "exclude": "a,b", "model_args": ["depth=2"], "steps": "7"}
    made = PruneOptions.of(checkpoint="a", flops=2_000_000_000, **given)
    assert (made.lr, made.mean, made.exclude, made.steps) == (0.01, (0.5, 0.4), ("a", "b"), 7)
    assert (made.model_args, made.flops) == ({"depth": 2}, "2000000000")


def test_seeds_are_what_torch_takes():
    for seed in (-(2**63), -1, 2**64 - 1):
        torch.Generator().manual_seed(SearchOptions(seed=seed).seed)
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(UsageError, match="expected at least -9223372036854775808, at most 184467"):
            SearchOptions(seed=seed)


def test_numbers_of_numpy_become_python_s_and_none_is_a_value():
    made = PruneOptions.of(
        checkpoint="a",
        flops="50%",
        round_to=np.int64(4),
        seed=np.int64(3),
        lr=np.float32(0.5),
        label_weight=1,
        repair=np.bool_(False),
        mean=np.full(3, 0.5, np.float32),
        std=[np.float64(0.5)],
        gain_steps=None,
        device=torch.device("cpu"),
    ).values()
    assert json.loads(json.dumps(made)) == {
        **made,
        "mean": [0.5] * 3,
        "std": [0.5],
        "exclude": [],
        "min_width": [],
    }
    assert (made["round_to"], made["seed"], made["lr"], made["repair"]) == (4, 3, 0.5, False)
    assert (made["mean"], made["std"], made["device"]) == ((0.5,) * 3, (0.5,), "cpu")


def test_each_of_several_values_is_checked():
    assert BenchOptions(checkpoints=Path("a")).checkpoints == (Path("a"),)
    with pytest.raises(UsageError, match="batch_sizes=0: expected at least 1"):
        BenchOptions(checkpoints=("a",), batch_sizes=(8, 0))
    with pytest.raises(UsageError, match="checkpoints: expected at least 1"):
        BenchOptions(checkpoints=())


@pytest.mark.parametrize("command", COMMANDS.values())
def test_values_make_the_same_options(command):
    given = {"checkpoint": "a", "checkpoints": ("a", "b"), "flops": "50%"}
    made = command.of(**{name: value for name, value in given.items() if name in command.options()})
    assert command.of(**made.values()) == made
    assert list(made.values()) == list(command.options())
    assert not {name for name in made.changed() if name not in given}


def test_every_option_says_what_it_is():
    for one in EVERY:
        assert one.panel in PANELS
        assert one.help.endswith("."), one.name
        assert "--" not in one.help, f"{one.name}: flags are not spoken of in Python"
        assert bool(one.placeholder) == (one.kind is not bool), one.name
        assert set(one.needs) <= {other.name for other in EVERY}


def test_options_that_were_changed():
    made = PruneOptions.of(checkpoint="a", flops="1G", model_args={"depth": 2}, steps=3)
    assert set(made.changed()) == {"checkpoint", "flops", "model_args", "steps"}
    assert made.only(LabelledImages).changed() == []


NO_EMA = "model_ema_warmup=False has no effect without model_ema=True"


@pytest.mark.parametrize(
    ("kind", "given", "idle"),
    [
        (PruneOptions, {"lr": 0.1}, {"lr": "lr has no effect without allocation='indicator'"}),
        (PruneOptions, {"lr": 0.1, "allocation": "indicator", "class_map": "m", "data_dir": "d"}, {}),
        (PruneOptions, {"workers": 1}, {"workers": "workers has no effect without data_dir or dataset"}),
        (PruneOptions, {"latency": False, "threads": 1}, {"threads": ANY}),
        (PruneOptions, {"max_latency": "50%", "latency": False, "threads": 1}, {}),
        (FinetuneOptions, {"model_ema_warmup": False}, {"model_ema_warmup": NO_EMA}),
        (FinetuneOptions, {"label_weight": 0.5, "recount": 2}, {"label_weight": ANY, "recount": ANY}),
        (FinetuneOptions, {"teacher": "b", "label_weight": 0.5, "mixup": 1.0, "mixup_prob": 0.5}, {}),
        (InspectOptions, {"batch_size": 4, "train_split": "x"}, {"batch_size": ANY, "train_split": ANY}),
        (InspectOptions, {"compare": "b", "batch_size": 4}, {}),
        (ExportOptions, {"format": "pt2", "opset": 23}, {"opset": ANY}),
    ],
)
def test_options_without_effect_are_found(kind, given, idle):
    flops = {"flops": "1G"} if kind is PruneOptions else {}
    assert kind(checkpoint="a", **flops, **given).unmet_needs() == idle


# --- messages ---


@pytest.mark.parametrize(
    ("arguments", "argument", "flag"),
    [
        (("data_dir",), "data_dir", "--data-dir"),
        (("round_to", 0), "round_to=0", "--round-to 0"),
        (("labels", False), "labels=False", "--no-labels"),
        (("dry_run", True), "dry_run=True", "--dry-run"),
        (("basis", "channel"), "basis='channel'", "--set basis=channel"),
        (("repair", False), "repair=False", "--set repair=false"),
        (("effort", "fast"), "effort='fast'", "--effort fast"),
        (("mean", (0.5, 0.4)), "mean=(0.5, 0.4)", "--mean 0.5,0.4"),
        (("output", Path("my run.html")), "output='my run.html'", "--output 'my run.html'"),
        (("model_args",), "model_args", "--model-arg"),
        (("model_args", {"depth": 2}), "model_args={'depth': 2}", "--model-arg depth=2"),
        (("grad_accum_steps", 2), "grad_accum_steps=2", "--grad-accum-steps 2"),
        (("checkpoint",), "checkpoint", "CHECKPOINT"),
    ],
)
def test_options_are_arguments_in_python_and_flags_on_the_command_line(arguments, argument, flag):
    assert option_name(*arguments) == argument
    with options_written_by(flag_writer(PruneOptions.options())):
        assert option_name(*arguments) == flag
    assert option_name(*arguments) == argument


def sources() -> list[tuple[Path, ast.Module]]:
    """Modules whose messages both Python and the command line show."""
    package = Path(mhacut.__file__).parent
    of_flags = {package / "options" / "option.py", *(package / "cli").iterdir()}
    return [(path, ast.parse(path.read_text())) for path in package.rglob("*.py") if path not in of_flags]


def test_no_message_writes_flags():
    """But for whole commands, which are the same wherever they are read."""
    flag = re.compile(r"(?<![\w-])--([a-z]|$)")
    command = re.compile(r"mhacut (prune|finetune|export) |torchrun | --flops 50%|--colour: ")
    for path, module in sources():
        docstrings = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
        for node in ast.walk(module):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                plain = command.search(node.value) or not flag.search(node.value)
                assert plain, f"{path.name}:{node.lineno}: write flags by option_name()"


def test_messages_name_options_that_exist():
    known = {one.name for one in EVERY}
    named = set()
    for path, module in sources():
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "option_name":
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    assert first.value in known, f"{path.name}:{node.lineno}: no option {first.value!r}"
                    named.add(first.value)
    assert len(named) > 30
