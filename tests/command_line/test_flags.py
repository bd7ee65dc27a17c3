"""Flags, YAML keys and options are one thing."""

from __future__ import annotations

import json

import pytest
import typer

from helpers.cli import run
from mhacut.cli.app import COMMANDS, app
from mhacut.cli.flags import RESEARCH
from mhacut.options.option import read_config
from mhacut.options.prune import PruneOptions

# Flags of every command that are no options of its function.
COMMON = {"config", "json", "quiet", "verbose", "help", "help_all", "set"}


def test_flags_are_the_options():
    commands = typer.main.get_command(app).commands
    assert set(commands) == set(COMMANDS)
    for name, options in COMMANDS.items():
        flags = {parameter.name for parameter in commands[name].params}
        known = options.options().values()
        assert flags - COMMON == {one.name for one in known if one.panel != RESEARCH}


def test_defaults_are_the_options(captured):
    assert run("prune", "a.safetensors", "--flops", "50%").exit_code == 1
    assert captured == [PruneOptions(checkpoint="a.safetensors", flops="50%")]


def other_value(one):
    if one.kind is bool:
        return not one.default
    if one.takes_pairs:
        return {"img_size": 32, "qk_norm": True, "global_pool": "avg"}
    if one.element is not None:
        return {int: (2, 3), float: (0.5, 0.75)}.get(one.element, ("x", "y"))
    if one.kind in (int, float):
        least = one.at_least if one.at_least is not None else one.above or 0
        return one.kind(least + (1 if one.kind is int else 0.125))
    return next((choice for choice in one.choices if choice != one.default), "x" + "".join(one.endings[:1]))


def as_flags(one, value):
    if one.is_argument:
        return list(value) if one.element else [value]
    if isinstance(value, bool):
        return [one.switch]
    if one.takes_pairs:
        return [word for pair in value.items() for word in (one.flag, "=".join(map(str, pair)))]
    if one.repeats:
        return [word for part in value for word in (one.flag, part)]
    return [one.flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_and_every_yaml_key_reaches_its_option(tmp_path, command):
    options = COMMANDS[command].options()
    parser = typer.main.get_command(app).commands[command]
    values = {name: other_value(one) for name, one in options.items()}
    for name, one in options.items():
        if one.panel == RESEARCH:
            continue
        parsed = parser.make_context(command, as_flags(one, values[name])).params[name]
        assert parsed is True if one.kind is bool else one.check(parsed) == values[name] != one.default, name
    document = {options[name].key: value for name, value in values.items()}
    (tmp_path / "run.yaml").write_text(json.dumps(document))  # which is YAML
    assert read_config(tmp_path / "run.yaml", options, "run.yaml") == values


@pytest.mark.parametrize(
    "value",
    [
        "{depth: 2, img_size: [224, 288], global_pool: avg}",
        "[depth=2, 'img_size=[224,288]', global_pool=avg]",
        "[{depth: 2}, {img_size: [224, 288]}, global_pool=avg]",
        "\n  - depth=2\n  - img_size: [224, 288]\n  - global_pool: avg",
    ],
)
def test_yaml_takes_pairs_as_mappings_and_lists(captured, tmp_path, value):
    file = tmp_path / "run.yaml"
    file.write_text(f"checkpoint: a.pth\nflops: 50%\nmean: [0.5, 0.4, 0.3]\nmodel_args: {value}\n")
    run("prune", "--config", file)
    made = captured.pop()
    assert made.model_args == {"depth": 2, "img_size": [224, 288], "global_pool": "avg"}
    assert made.mean == (0.5, 0.4, 0.3)


def test_flags_win_over_the_file(captured, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "flops: 50%\nround_to: 7\nlr: 1e-2\nlabels: false\nmodel_args: {img_size: 32, depth: 6}\n"
    )
    run("prune", "a", "-c", file, "--round-to", "8", "--model-arg", "depth=2")
    (options,) = captured
    assert (options.flops, options.round_to, options.lr, options.labels) == ("50%", 8, 0.01, False)
    assert options.model_args == {"img_size": 32, "depth": 2}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--feature-weight", "1"], "--feature-weight was removed: distill logits"),
        (["--calibration", "a.pt"], "--calibration was removed: repeat --flops"),
        (["--steps", "8"], "--steps is a research switch: use --set steps=VALUE"),
        (["--basis=channel"], "use --set basis=VALUE"),
        (["--no-repair"], "use --set repair=false"),
        (["--repair", "--json"], "use --set repair=true"),
        (["--labels"], "--labels is the default: leave it out"),
        (["--no-overwrite"], "--no-overwrite is the default: leave it out"),
        (["--flps", "8"], "--flops"),
    ],
)
def test_errors_of_removed_flags_name_the_replacement(flags, message):
    result = run("prune", "a", "--flops", "50%", *flags, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.stderr


LEVELS = [f"&a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(12)]
ALIASES = f"[{', '.join(LEVELS)}]"
"""A list of lists of lists, each nine times the one before."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "no option 'stepz'; did you mean 'steps'?"),
        ("json: true", "no option 'json'"),
        ("round-to: 8", "no option 'round-to'; did you mean 'round_to'?"),
        ("model-arg: depth=2", "no option 'model-arg'; did you mean 'model_args'?"),
        ("no-latency: true", "no option 'no-latency'; did you mean"),
        ("steps: many", "--set steps=many: expected a whole number"),
        ("amp: 2", "--amp 2: expected True or False"),
        ("mean: [0.5, x]", "--mean x: expected a number"),
        ("- 1", "expected lines of NAME: VALUE, found list"),
        ("a: [", "invalid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "invalid YAML"),
        ("a: !!timestamp x", "invalid YAML"),
        ("a: " + "[" * 900, "invalid YAML"),
        ("output: " + ALIASES, "expected a path"),
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
