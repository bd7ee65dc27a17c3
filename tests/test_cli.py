"""The command line: what it prints where, what it refuses, how it exits."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from importlib.metadata import version

import pytest
import typer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mhacut
from helpers.cli import run
from mhacut.cli.app import app
from mhacut.cli.console import Console, safe, table
from mhacut.errors import MhacutError, UsageError
from mhacut.options.bench import BenchOptions
from mhacut.options.config import convert, read_config
from mhacut.options.evaluate import EvaluateOptions
from mhacut.options.export import ExportOptions
from mhacut.options.finetune import FinetuneOptions
from mhacut.options.inspect import InspectOptions
from mhacut.options.models import ModelsOptions
from mhacut.options.prune import PruneOptions

FAST = ["--gain-steps", "2", "--calibration-images", "8", "--batch-size", "4", "--no-latency"]
COMMANDS = {
    "prune": PruneOptions,
    "finetune": FinetuneOptions,
    "evaluate": EvaluateOptions,
    "inspect": InspectOptions,
    "bench": BenchOptions,
    "export": ExportOptions,
    "models": ModelsOptions,
}
# Flags of every command that are no options of its function.
COMMON = {"config", "json", "quiet", "verbose", "help"}


@pytest.fixture
def captured(monkeypatch):
    """The options objects that ``prune`` would have run with."""
    seen = []

    def run_prune(options, reporter):
        seen.append(options)
        raise MhacutError("far enough")

    monkeypatch.setattr("mhacut.commands.prune.run_prune", run_prune)
    return seen


@pytest.fixture(scope="module")
def slim(tiny_vit, tmp_path_factory):
    path = tmp_path_factory.mktemp("slim") / "slim.safetensors"
    result = run("prune", *tiny_vit.flags, "--flops", "60%", "-o", path, *FAST)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ImageFolder with a val split of 7 classes, two images each."""
    root = tmp_path_factory.mktemp("images")
    for label in range(7):
        folder = root / "val" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (32, 32), (30 * label, 100 * number, 50)).save(folder / f"{number}.png")
    return root


# --- flags, YAML keys and options are one thing ---


def test_flags_are_the_options():
    commands = typer.main.get_command(app).commands
    assert set(commands) == set(COMMANDS)
    for name, options in COMMANDS.items():
        flags = {parameter.name for parameter in commands[name].params}
        assert flags - COMMON == set(options.options())


def test_defaults_are_the_options(captured):
    assert run("prune", "a.safetensors", "--flops", "50%").exit_code == 1
    assert captured == [PruneOptions(checkpoint="a.safetensors", flops="50%")]


FULL = PruneOptions.from_flat(
    checkpoint="a.safetensors",
    flops="2.0G",
    output="b.safetensors",
    overwrite=True,
    dry_run=True,
    report="r.html",
    model="vit",
    model_args={"img_size": 32, "qk_norm": True, "global_pool": "avg"},
    num_classes=10,
    scope="attention",
    round_to=4,
    calibration_images=7,
    labels=False,
    eval_images=0,
    latency=False,
    latency_batch_size=3,
    device="cpu",
    amp=True,
    data_dir="d",
    dataset="hfds/x",
    class_map="m.txt",
    train_split="t",
    val_split="v",
    workers=0,
    mean=(0.5, 0.4, 0.3),
    std=(0.2,),
    crop_pct=0.9,
    interpolation="bilinear",
    img_size=64,
    similarity=False,
    score_adjustment=False,
    init="uniform",
    reweight=False,
    repair=False,
    swap_moves=True,
    repair_in_order=True,
    token_weights=False,
    effort="fast",
    allocation="indicator",
    basis="channel",
    gain_steps=9,
    tuning_steps=8,
    positions="own",
    selection="indicator",
    temperature="dense",
    steps=3,
    batch_size=2,
    lr=0.1,
    gain_lr=0.2,
    tuning_lr=0.6,
    budget_weight=0.3,
    label_weight=0.4,
    seed=5,
)


def as_flags(options):
    flags = []
    for name, value in options.flat().items():
        flag = "--" + name.replace("_", "-")
        if name == "checkpoint":
            flags.append(value)
        elif name == "model_args":
            for key, item in value.items():
                flags += ["--model-arg", f"{key}={item}"]
        elif isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return flags


def test_every_flag_reaches_its_option(captured):
    differs = {name for name, value in FULL.flat().items() if PruneOptions.defaults().get(name) != value}
    assert differs == set(PruneOptions.options()), "give every option of FULL a value that is no default"
    run("prune", *as_flags(FULL))
    assert captured == [FULL]


@pytest.mark.parametrize("separator", ["-", "_"])
def test_every_yaml_key_reaches_its_option(captured, tmp_path, separator):
    file = tmp_path / "run.yaml"
    document = {name.replace("_", separator): value for name, value in FULL.flat().items()}
    # JSON is YAML
    file.write_text(json.dumps(document))
    run("prune", "--config", file)
    assert captured == [FULL]


def test_evaluate_has_no_flag_without_an_effect():
    assert "train_split" not in EvaluateOptions.options()
    assert {"data_dir", "val_split", "mean", "img_size"} <= set(EvaluateOptions.options())


def test_flags_win_over_the_file(captured, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("flops: 50%\nsteps: 7\nlr: 1e-2\nlabels: false\nmodel-args: {img_size: 32, depth: 6}\n")
    run("prune", "a", "-c", file, "--steps", "8", "--labels", "--model-arg", "depth=2")
    (options,) = captured
    assert (options.flops, options.search.steps, options.search.lr, options.labels) == ("50%", 8, 0.01, True)
    assert options.model_args == {"img_size": 32, "depth": 2}


def test_yaml_takes_the_spelling_of_the_flags(captured, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("no-latency: true\nno_similarity: false\nmodel-arg: {depth: 2}\n")
    run("prune", "x.safetensors", "--flops", "50%", "--config", str(config))
    (options,) = captured
    assert (options.latency, options.search.similarity, options.model_args) == (False, True, {"depth": 2})


def test_what_only_the_command_line_takes_is_said(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("json: true\n")
    result = run("prune", "x.safetensors", "--flops", "50%", "--config", str(config))
    assert result.exit_code == 2
    assert "command line only, --json" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "no option 'stepz'; did you mean 'steps'?"),
        ("data-dirr: x", "did you mean 'data-dir'?"),
        ("steps: many", "steps: expected a whole number, found 'many'"),
        ("steps: true", "expected a whole number, found True"),
        ("amp: 1", "expected true or false, found 1"),
        ("lr: .nan", "expected a number, found nan"),
        ("mean: [0.5, x]", "expected a number, found 'x'"),
        ("output: [a]", "expected text, found ['a']"),
        ("model-args: 3", "expected NAME: VALUE pairs, found 3"),
        ("data-dir: a\ndata_dir: b", "'data_dir' appears twice"),
        ("- 1", "expected lines of NAME: VALUE, found list"),
        ("a: [", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_config_errors_name_file_and_key(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    result = run("prune", "a", "--flops", "50%", "-c", file)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "run.yaml" in result.stderr
    assert result.stdout == ""


def test_config_that_is_not_there():
    result = run("prune", "a", "--flops", "1G", "-c", "nowhere.yaml")
    assert result.exit_code == 2
    assert "error: --config nowhere.yaml: No such file" in result.stderr


def test_empty_config_says_nothing(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("# nothing\n")
    assert read_config(file, PruneOptions.options(), "run.yaml") == {}


def test_budget_without_a_unit_may_be_a_number():
    assert convert(2_000_000_000, str, "flops") == "2000000000"
    with pytest.raises(UsageError, match="flops: expected text, found None"):
        convert(None, str, "flops")


# --- prune ---


def test_prune_prints_a_table(tiny_vit, tmp_path):
    out = tmp_path / "new" / "out [1].safetensors"
    arguments = [argument for argument in FAST if argument != "--no-latency"]
    result = run("prune", *tiny_vit.flags, "--flops", "60%", "-o", out, *arguments)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["vit_tiny_patch16_224", "dense", "slim", "ratio"]
    assert [line.split("  ")[0] for line in lines[1:4]] == [
        "FLOPs",
        "parameters",
        "latency, ms (batch 8, cpu)",
    ]
    assert f"saved {out}" in lines
    assert f"loads with: mhacut.load_model({str(out)!r})" in lines
    assert any(line.startswith("searched on 8 synthetic") for line in lines)
    assert lines[4].startswith("KL to dense (2 images)  ")
    assert max(map(len, lines[:6])) <= 80
    assert "num_classes 7" in result.stderr
    assert mhacut.load_model(out).num_classes == 7


def test_prune_measures_accuracy_where_it_can(tiny_vit, images, tmp_path):
    arguments = ["--data-dir", images, "--train-split", "val", "--workers", "0", *FAST]
    result = run("prune", *tiny_vit.flags, "--flops", "60%", "--dry-run", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "top-1, % of 14 images" in result.stdout
    assert "dry run: no model was written" in result.stdout


def test_prune_json(tiny_vit, tmp_path):
    out = tmp_path / "out.safetensors"
    by_indicators = ["--allocation", "indicator", "--steps", "2"]
    result = run("prune", *tiny_vit.flags, "--flops", "60%", "-o", out, "--json", *by_indicators, *FAST)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert document["output"] == str(out)
    assert document["slim"]["flops"] <= document["budget"] < document["dense"]["flops"]
    assert document["dense"]["latency_ms"] is None
    assert len(document["log"]) == 2
    assert (document["divergence_of"], document["judged_on"]) == ("answers", 2)
    assert 0 < document["divergence"] < 1
    assert {"reading", "searching", "cutting", "writing"} <= set(document["seconds"])
    slim = load_file(out)
    hidden = next(layer for layer in document["layers"] if layer["kind"] == "hidden")
    assert slim[f"{hidden['layer']}.fc1.weight"].shape[0] == hidden["width"] < hidden["dense_width"]
    with safe_open(out, "pt") as file:
        stated = json.loads(file.metadata()["mhacut"])
    assert stated["plan"] == document["plan"]


def test_dry_run_writes_nothing(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("prune", *tiny_vit.flags, "--flops", "60%", "--dry-run", "--json", *FAST)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["output"] is None
    assert list(tmp_path.iterdir()) == []


def test_default_name_is_stem_and_budget(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("prune", *tiny_vit.flags, "--flops", "700K", *FAST).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-700K.safetensors"]


@pytest.mark.parametrize(
    ("budget", "code", "message"),
    [
        ("5G", 1, "nothing to prune: the model's 1.16M FLOPs are already within 5G"),
        ("100%", 1, "nothing to prune"),
        ("10K", 1, "--flops 10K is out of reach: the lowest is "),
        ("2,0G", 2, "--flops 2,0G is not a budget; write 2.0G, 600M, 2e9 or 50%"),
        *((text, 2, "is not a budget") for text in ("nan", "inf", "0", "-1G", "", "2GB", "2.0 G", "1e999")),
        ("101%", 2, "a share is at most 100%"),
    ],
)
def test_budgets_that_are_refused(tiny_vit, tmp_path, monkeypatch, budget, code, message):
    monkeypatch.chdir(tmp_path)
    result = run("prune", *tiny_vit.flags, f"--flops={budget}", *FAST)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(tiny_vit, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    result = run("prune", *tiny_vit.flags, "--flops", "60%", "-o", out, *FAST)
    assert result.exit_code == 1
    assert "--overwrite" in result.stderr
    assert "searching" not in result.stderr
    assert out.read_bytes() == b"precious"
    assert run("prune", *tiny_vit.flags, "--flops", "60%", "-o", out, "--overwrite", *FAST).exit_code == 0
    assert mhacut.load_model(out).num_classes == 7


@pytest.mark.parametrize("link", [False, True])
def test_input_is_never_overwritten(slim, tmp_path, link):
    before = slim.read_bytes()
    out = slim
    if link:
        out = tmp_path / "link.safetensors"
        out.symlink_to(slim)
    result = run("prune", slim, "--flops", "90%", "-o", out, "--overwrite", *FAST)
    assert result.exit_code == 1
    assert "is the input" in result.stderr
    assert slim.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CHECKPOINT is missing"),
        (["a"], "--flops is missing. Budget: 2.0G"),
        (["a", "--flops", "1G", "--scope", "mlp"], "--scope mlp: expected one of attention, attention+mlp"),
        (["a", "--flops", "1G", "--steps", "0"], "--steps 0: expected at least 1"),
        (["a", "--flops", "1G", "--lr", "nan"], "--lr: expected a number, found nan"),
        (["a", "--flops", "1G", "--mean", "0.5,a"], "--mean: expected a number, found 'a'"),
        (["a", "--flops", "1G", "--model-arg", "img_size"], "expected KEY=VALUE, like img_size=32"),
        (["a", "--flops", "1G", "--device", "gpu"], "--device gpu is not a device"),
        (["a", "--flops", "1G", "--steps", "x"], "--steps"),
        (["a", "--flops", "1G", "--bogus"], "--bogus"),
    ],
)
def test_usage_errors_exit_2(arguments, message):
    result = run("prune", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


# --- evaluate and inspect ---


def test_evaluate(slim, images):
    result = run("evaluate", slim, "--data-dir", images, "--workers", "0", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["images"] == 14
    assert 0 <= document["top1"] <= document["top5"] <= 100
    assert document["preprocessing"]["input_size"] == [3, 32, 32]
    told = run("evaluate", slim, "--data-dir", images, "--workers", "0", "--mean", "0.5")
    assert told.stdout.splitlines()[0] == f"top-1  {document['top1']:>10.2f}%"
    assert "mean 0.5,0.5,0.5" in told.stdout
    told = run("evaluate", slim, "--data-dir", images, "--workers", "0", "--mean", "0.1,0.2,0.3")
    assert "mean 0.1,0.2,0.3" in told.stdout


def test_small_models_see_whole_images(tiny_vit, slim, images):
    """The crop of the architecture's 224-pixel weights says nothing about a model of 32 pixels."""
    for checkpoint in (tiny_vit.flags, [slim]):
        result = run("evaluate", *checkpoint, "--data-dir", images, "--workers", "0", "--json")
        assert json.loads(result.stdout)["preprocessing"]["crop_pct"] == 1.0


def test_evaluate_needs_images(slim):
    result = run("evaluate", slim)
    assert result.exit_code == 2
    assert "nothing to evaluate on: give --data-dir or --dataset\n" in result.stderr


def test_image_size_the_model_does_not_take(slim, images):
    result = run("evaluate", slim, "--data-dir", images, "--img-size", "64")
    assert result.exit_code == 2
    assert "--img-size 64: the model takes images of 32x32 only" in result.stderr
    assert "prune the dense model again, built for that size" in result.stderr


def test_inspect_dense(tiny_vit):
    result = run("inspect", *tiny_vit.flags)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    blank = lines.index("")
    document = json.loads(run("inspect", *tiny_vit.flags, "--json").stdout)
    assert " ".join(lines[:blank]) == document["verdict"]
    spent = sum(layer["share"] for layer in document["layers"] if layer["heads"])
    assert document["verdict"].startswith(f"attention {100 * spent:.0f} % of 1.16M; ")
    assert document["verdict"].endswith("(by weights alone)")
    cells = [line.split() for line in lines[blank + 1 :]]
    assert cells[0] == ["attention", "heads", "qk", "sim", "r99", "v", "sim", "r99", "FLOPs", "params"]
    assert [*cells[1][:3], cells[1][5]] == ["blocks.0.attn", "3", "16", "16"]
    assert cells[5][:2] == ["blocks.0.mlp", "192"]
    assert "7 classes: 1.16M FLOPs, 67.1K" in result.stdout
    assert max(map(len, lines)) <= 80


def test_inspect_slim_shows_before_and_after(slim):
    text = run("inspect", slim).stdout
    assert " 8/16 " in text
    assert "step 1: prune 1.16M -> " in text
    document = json.loads(run("inspect", slim, "--json").stdout)
    layers = {layer["layer"]: layer for layer in document["layers"]}
    assert layers["blocks.0.attn"]["widths"]["qk"] == {"now": 8, "dense": 16}
    assert document["history"][0]["flops_after"] == document["flops"]
    assert sum(layer["share"] for layer in document["layers"]) < 1


def test_inspect_tells_what_goes_with_what(slim_of):
    told = run("inspect", slim_of("coat"), "--shapes").stdout
    (line,) = [line for line in told.splitlines() if line.startswith("serial_blocks1.0.factoratt_crpe ")]
    assert " as v " in line
    document = json.loads(run("inspect", slim_of("coat"), "--shapes", "--json").stdout)
    assert document["layers"][0]["goes_with"] == {"qk": "v"}


def test_inspect_counts_what_is_left_whole(tiny_vit, tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, qk_norm=True, **tiny_vit.args)
    save_file(model.state_dict(), tmp_path / "norm.safetensors")
    flags = [tmp_path / "norm.safetensors", *tiny_vit.flags[1:], "--model-arg", "qk_norm=True"]
    document = json.loads(run("inspect", *flags, "--json").stdout)
    plain = json.loads(run("inspect", *tiny_vit.flags, "--json").stdout)
    assert "qk" in document["layers"][0]["left_whole"]
    assert document["layers"][0]["flops"] >= plain["layers"][0]["flops"]
    shown = run("inspect", *flags).stdout.splitlines()
    assert "whole" in next(line for line in shown if line.startswith("blocks.0.attn"))


# --- hostile text ---

HOSTILE = "x\x1b[2J\x1b]0;title\x07[red]\u202e\x9b\r"


def test_safe_shows_what_terminals_obey():
    assert safe(HOSTILE) == r"x\x1b[2J\x1b]0;title\x07[red]\u202e\x9b\r"
    assert safe("h\u00e9 \u6f22 [b]") == "h\u00e9 \u6f22 [b]"
    assert safe(os.fsdecode(b"\xff.pth")) == r"\udcff.pth"


def assert_harmless(text):
    assert all(char == "\n" or char.isprintable() for char in text), repr(text)


@pytest.mark.parametrize("command", ["inspect", "evaluate", "prune"])
def test_hostile_tensor_names(tiny_vit, tmp_path, command, images):
    tensors = load_file(tiny_vit.path)
    tensors[HOSTILE] = tensors["norm.weight"].clone()
    path = tmp_path / "[red]\x1b[2J.safetensors"
    save_file(tensors, path)
    extra = {"prune": ["--flops", "50%"], "evaluate": ["--data-dir", images], "inspect": []}[command]
    result = run(command, path, *tiny_vit.flags[1:], *extra)
    assert result.exit_code == 1
    assert_harmless(result.stdout + result.stderr)
    assert "[red]" in result.stderr
    assert r"\x1b[2J" in result.stderr


def test_hostile_history(slim, tmp_path):
    with safe_open(slim, "pt") as file:
        document = json.loads(file.metadata()["mhacut"])
    document["history"] = [
        {"command": HOSTILE, "budget": HOSTILE, "flops_before": True, "versions": 3, "data": [HOSTILE]}
    ]
    path = tmp_path / "slim.safetensors"
    save_file(load_file(slim), path, {"format": "pt", "mhacut": json.dumps(document)})
    result = run("inspect", path)
    assert result.exit_code == 0, result.stderr
    assert_harmless(result.stdout + result.stderr)
    assert r"step 1: x\x1b[2J" in result.stdout
    assert "? -> ? FLOPs (budget ?)" in result.stdout


def test_hostile_architecture(slim, tmp_path):
    with safe_open(slim, "pt") as file:
        document = json.loads(file.metadata()["mhacut"])
    document["architecture"] = HOSTILE
    path = tmp_path / "slim.safetensors"
    save_file(load_file(slim), path, {"format": "pt", "mhacut": json.dumps(document)})
    result = run("inspect", path)
    assert result.exit_code == 1
    assert_harmless(result.stderr)
    assert "expected the name of a timm model" in result.stderr


# --- the printer ---


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@contextmanager
def terminal(monkeypatch):
    """Stderr as a terminal; not a fixture, since pytest puts its own stderr back before the test runs."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        yield sys.stderr


def test_progress_on_a_terminal(monkeypatch):
    with terminal(monkeypatch) as stream:
        console = Console()
        console.start("searching")
        console.advance(3, 10, "loss [bold] 1\x1b[2J")
        console.log("a note with [brackets] and \x1b[2J")
        console.finish()
    text = stream.getvalue()
    assert "searching" in text
    assert r"a note with [brackets] and \x1b[2J" in text
    assert "\x1b[2J" not in text


@pytest.mark.parametrize("settings", [{"quiet": True}, {"as_json": True}])
def test_no_progress_when_not_wanted(monkeypatch, settings):
    with terminal(monkeypatch) as stream:
        console = Console(**settings)
        console.start("searching")
        console.advance(3, 10)
        console.finish()
    assert stream.getvalue() == ""


def test_stages_are_lines_without_a_terminal(capsys):
    for verbose in (0, 1):
        console = Console(verbose=verbose)
        console.start("searching")
        console.advance(1, 2, "detail")
        console.finish()
        assert capsys.readouterr().err == "searching\n" * verbose


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_and_verbose_stand_on_either_side(slim, place):
    def stderr(flag):
        return run(*([flag, "inspect", slim] if place == "before" else ["inspect", slim, flag])).stderr

    assert stderr("-q") == ""
    assert "reading\n" in stderr("-v")
    assert "reading\n" not in run("inspect", slim).stderr


def test_table_is_never_cut():
    name = "blocks." * 40
    assert table([["layer", "FLOPs"], [name, "1"]]).splitlines()[1] == f"{name}      1"
    assert table([["\u6f22", "1"], ["ab", "22"]]).splitlines() == ["\u6f22   1", "ab  22"]


# --- what nobody foresaw ---


def test_unforeseen_errors_ask_for_a_report(monkeypatch):
    def fail(options, reporter):
        raise ZeroDivisionError("[red] \x1b[2J")

    monkeypatch.setattr("mhacut.commands.prune.run_prune", fail)
    result = run("prune", "a", "--flops", "1G")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "please report it" in result.stderr
    assert_harmless(result.stderr)


def test_own_errors_show_a_traceback_on_demand(captured):
    assert "Traceback" not in run("prune", "a", "--flops", "1G").stderr
    result = run("prune", "a", "--flops", "1G", env={"MHACUT_DEBUG": "1"})
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: far enough\n")
    assert result.exit_code == 1


def test_out_of_memory_says_what_to_do(monkeypatch):
    import torch

    def fail(options, reporter):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mhacut.commands.prune.run_prune", fail)
    result = run("prune", "a", "--flops", "1G")
    assert result.exit_code == 1
    assert result.stderr == "error: out of memory; use a smaller --batch-size, or --device cpu\n"


def test_libraries_are_heard_with_v_only(monkeypatch):
    def fail(options, reporter):
        import logging
        import warnings

        warnings.warn("loud warning", stacklevel=1)
        logging.getLogger("timm.data").warning("loud log")
        raise MhacutError("far enough")

    monkeypatch.setattr("mhacut.commands.prune.run_prune", fail)
    assert run("prune", "a", "--flops", "1G").stderr == "error: far enough\n"
    with pytest.warns(UserWarning, match="loud warning"):
        assert "timm.data: loud log" in run("prune", "a", "--flops", "1G", "-v").stderr


# --- as a process ---


MAIN = "from runpy import run_module; run_module('mhacut', run_name='__main__', alter_sys=True)"


def _children_cpu_s() -> float:
    """CPU seconds of all processes that ended: wall time would be that of whatever else runs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_is_fast_and_needs_no_torch():
    code = (
        "import sys; from mhacut.cli.app import app; app(['prune', '--help'], standalone_mode=False); "
        "heavy = {'torch', 'timm', 'rich', 'yaml', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        began = _children_cpu_s()
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(_children_cpu_s() - began)
        assert result.returncode == 0, result.stderr
    assert "One FLOP is" in result.stdout
    assert min(seconds) < 0.7


def test_help_groups_flags():
    text = run("prune", "--help").stdout
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        "Arguments:",
        "Result:",
        "Data:",
        "Model:",
        "Preprocessing:",
        "Measuring:",
        "Computing:",
        "Output:",
        "Research switches:",
    ]
    assert "(default: 60)" in " ".join(text.split())


def test_version():
    assert run("--version").stdout == f"mhacut {mhacut.__version__}\n"


def test_version_with_what_it_stands_on():
    for order in (["--version", "-v"], ["-v", "--version"]):
        lines = run(*order).stdout.splitlines()
        assert lines[0] == f"mhacut {mhacut.__version__}"
        assert [line.split()[0] for line in lines[1:]] == ["python", "torch", "timm", "safetensors", "device"]
        assert lines[2] == f"torch {version('torch')}"


def test_no_command_is_a_usage_error():
    result = run("-q")
    assert result.exit_code == 2
    assert "Missing command" in result.stderr


def test_broken_pipe_ends_quietly(programs, slim):
    program = programs.start(MAIN, "inspect", slim, "-q")
    program.stdout.close()
    with program.stderr:
        assert program.stderr.read() == ""
        assert program.end() == 0


def test_ascii_terminal(slim, tmp_path):
    path = tmp_path / "mod\u00e8le \u6f22.safetensors"
    path.write_bytes(slim.read_bytes())
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "mhacut", "evaluate", path, "--data-dir", "no \u6f22"]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True)
    assert done.returncode == 1
    assert rb"error: no \u6f22: no such directory" in done.stderr
    assert b"Traceback" not in done.stderr


def test_interrupt(programs, tiny_vit, tmp_path):
    out = tmp_path / "out.safetensors"
    endless = ["--allocation", "indicator", "--steps", "1000000"]
    flags = ["--flops", "50%", "-o", out, *endless, "--calibration-images", "8", "-v"]
    program = programs.start(MAIN, "prune", *tiny_vit.flags, *flags)
    with program.stdout, program.stderr:
        for line in program.stderr:
            if line == "searching\n":
                break
        os.kill(program.pid, signal.SIGINT)
        assert program.end() == 130
        stderr = program.stderr.read()
        assert program.stdout.read() == ""
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
