"""Options, the command line, logs and the scripts around them."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import mhacut
from helpers.benchmarks import script
from helpers.cli import document_of, run, succeed
from helpers.finetuning import weights
from helpers.jobs import Recorder
from helpers.models import same
from mhacut.errors import CheckpointError, MhacutError, UsageError
from mhacut.options.finetune import FinetuneOptions
from mhacut.options.option import read_config

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opt": "adamv"}, "opt='adamv': no optimiser 'adamv'; did you mean"),
        ({"opt": "adahessian"}, "opt='adahessian': requires second derivatives"),
        ({"lr": 1e38}, r"lr=1e\+38: expected above 0, at most 1e\+36"),
        ({"mixup": 1.0, "batch_size": 7}, "batch_size=7: expected an even number with mixup or cutmix"),
        ({"labels": False}, "labels=False: expected a teacher"),
        ({"scale": (0.5, 1.5)}, "scale=1.5: expected above 0, at most 1"),
        ({"scale": (0.9, 0.5)}, "2 numbers, the smaller first"),
        ({"aa": "nonsense-m9"}, "^aa='nonsense-m9': not supported by timm"),
        ({"amp": True, "amp_dtype": "float16", "device": "cpu"}, "requires CUDA"),
        ({"warmup_epochs": 3.0}, "warmup_epochs=3.0: warm-up takes 9 of only"),
    ],
)
def test_what_makes_no_sense_is_refused(tune, options, message):
    with pytest.raises(UsageError, match=message):
        tune(**options)


def test_options_without_effect_are_named_when_a_run_begins(slim, images, tmp_path):
    given = ["finetune", slim, "--data-dir", images, "-o", tmp_path / "out", "-b", "12", "-j", "0"]
    result = run(*given, "--steps", "1", "--no-model-ema-warmup")
    said = "--no-model-ema-warmup has no effect without --model-ema"
    assert (result.exit_code, said in result.stderr) == (0, True)
    assert "no effect" not in run("finetune", "--resume", tmp_path / "out").stderr


def test_a_dense_file_is_sent_to_prune(tiny_vit, images):
    with pytest.raises(CheckpointError, match="not a slim file; prune the model first: mhacut prune"):
        mhacut.finetune(tiny_vit.path, data_dir=images)


def test_the_command_and_its_files(slim, images, tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1e-3\nbatch_size: 12\nremode: rand\nworkers: 0\namp: false\n")
    out = tmp_path / "out"
    given = ["finetune", slim, "--data-dir", images, "-o", out, "--config", tmp_path / "run.yaml"]
    document = document_of(*given, "--epochs", "2", "--scale", "0.7,1")
    assert document["schema_version"] == 1
    assert document["steps"] == 6
    assert document["output"] == str(out / "best.safetensors")
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert list(rows[0]) == ["epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    kept = yaml.safe_load((out / "args.yaml").read_text())
    assert (kept["lr"], kept["remode"], kept["epochs"], kept["scale"]) == (1e-3, "rand", 2, [0.7, 1.0])
    # What was kept is itself a configuration, and gives the same again.
    again = succeed("finetune", "--config", out / "args.yaml", "-o", tmp_path / "again")
    assert same(weights(out), weights(tmp_path / "again"))
    assert re.search(r"top-1, % of 14 images \(± \d+\) \(best epoch\)", again.stdout)
    succeed("finetune", "--resume", out, "-j", "1")


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_options(recipe):
    values = read_config(recipe, FinetuneOptions.options(), recipe.name)
    options = FinetuneOptions.of(checkpoint="a", **values)
    assert {key: options.values()[key] for key in values} == values
    assert "Cost: " in recipe.read_text()
    assert FinetuneOptions.of(checkpoint="a", teacher="b", data_dir="c", **values).unmet_needs() == {}


@pytest.mark.slow
def test_logs_receive_rows_and_do_not_end_the_training(tune, monkeypatch):
    sent, reporter = [], Recorder()

    class Run:
        log, finish = staticmethod(sent.append), staticmethod(lambda: sent.append("end"))

    wandb = ModuleType("wandb")
    wandb.__spec__, wandb.init = ModuleSpec("wandb", None), lambda **options: Run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    result = tune(log="wandb")
    assert [row["train_loss"] for row in sent[:-1]] == [row.train_loss for row in result.epochs]
    assert sent[-1] == "end"
    del wandb.init  # so that it fails
    assert tune("failing", log="wandb", reporter=reporter).steps == 6
    assert any("log='wandb': logging stopped" in message for message in reporter.messages)


def test_a_log_that_is_not_known_or_installed_is_named_before_the_work(tune, tmp_path):
    with pytest.raises(UsageError, match="log='mlflow': expected one of tensorboard"):
        tune(log="mlflow")
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(MhacutError, match=r"pip install 'mhacut\[wandb\]'"):
            tune(log="wandb")
    assert not (tmp_path / "run").exists()


def test_the_table_of_fine_tuning_can_be_made_in_parts(slim, images, tiny_vit, tmp_path, monkeypatch, capsys):
    def table(*seeds):
        given = [slim, "--teacher", tiny_vit.path, "--data-dir", images, "--output", tmp_path, "--steps", "2"]
        given += ["--batch-size", "12", "--teaching", "teacher", "--seeds", *seeds]
        monkeypatch.setattr(sys, "argv", ["finetune_table", *map(str, given)])
        script("finetune_table").main()

    table("1")
    first = json.loads((tmp_path / "slim-2-teacher-1" / "finished.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1].startswith("| slim | 2 | the dense model and labels |")
    written = (tmp_path / "slim-2-teacher-1" / "state.pt").stat().st_mtime_ns
    table("1", "2")
    assert (tmp_path / "slim-2-teacher-1" / "state.pt").stat().st_mtime_ns == written
    second = json.loads((tmp_path / "slim-2-teacher-2" / "finished.json").read_text())
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[4].startswith(f"{(first['after'] + second['after']) / 2:.2f} ± ")
