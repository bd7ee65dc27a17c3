"""The documentation: links and flags are alive, pages that follow from the code are current, commands run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import timm
import yaml
from typer.main import get_command

import mhacut
from helpers.cli import run
from helpers.docs import (
    CONTRIBUTING,
    DOCS,
    NOT_RUN,
    NOTEBOOKS,
    PAGES,
    README,
    ROOT,
    Block,
    anchors,
    blocks,
    commands,
    links,
    mhacut_arguments,
)
from mhacut.cli.app import app
from mhacut.commands.models import catalogue
from test_layering import LAYERS

LONGEST_README = 600
LONGEST_BENCHMARKS = 1500
GENERATED = {DOCS / "reference" / "commands" / f"{name}.md" for name in get_command(app).commands}
RUN_BY_CI = {"main-job", "tests"}
"""Marks of the README's blocks that .ci/run runs."""
FLAGS_OF_OTHERS = {
    "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",  # torchrun
    "--model-kwargs",  # timm
    "--strict",  # mkdocs
    "--check",  # ruff format
    "--hypothesis-profile",  # pytest
    "--data-binary", "--local-dir",  # curl, hf
    "--write",  # tests/golden/test_golden.py
    "--sdist", "--python",  # .ci/wheels.py, which an sdist lacks
}  # fmt: skip
QUICK = {
    "prune": {
        "--effort": "fast",
        "--calibration-images": "8",
        "--batch-size": "8",
        "--eval-images": "10",
        "--no-latency": None,
        "--overwrite": None,
    },
    "finetune": {"--steps": "2", "--batch-size": "8", "--workers": "0", "--overwrite": None},
    "evaluate": {"--workers": "0"},
    "bench": {"--seconds": "0.1", "--threads": "1", "--batch-sizes": "1"},
    "inspect": {},
    "export": {"--overwrite": None},
    "models": {},
}
"""Flags that are added to a command, where it has not got them, to save time."""


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, found)
    spec.loader.exec_module(found)
    return found


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_links_and_anchors_lead_somewhere():
    dead = []
    for page in PAGES:
        for target in links(page):
            path, _, anchor = target.partition("#")
            place = (page.parent / path).resolve() if path else page
            if not place.exists() or (anchor and anchor not in anchors(place)):
                dead.append(f"{named(page)}: {target}")
    assert not dead


def test_the_navigation_has_every_page_once():
    def paths(entry):
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [path for part in parts for path in paths(part)]

    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    found = paths(config["nav"])
    pages = [str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)]
    assert sorted(found) == sorted([*pages, *(f"notebooks/{path.stem}.md" for path in NOTEBOOKS)])


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= LONGEST_README


def test_pages_that_follow_from_the_code_are_current():
    generate = module(DOCS / "generate.py")
    pages = generate.pages()
    assert {DOCS / "reference" / path for path in pages} == {*GENERATED, DOCS / "reference" / "python.md"}
    for path, text in generate.written().items():
        assert path.read_text() == text, "run python docs/generate.py"


def test_the_benchmarks_page_is_short_and_its_tables_are_made_of_rows(tmp_path):
    generate, page = module(DOCS / "generate.py"), DOCS / "explanation" / "benchmarks.md"
    assert len(page.read_text().replace("|", " ").split()) <= LONGEST_BENCHMARKS
    assert generate.unknown_tables(page) == []
    (written := tmp_path / "page.md").write_text(page.read_text() + "\n| by hand | 90.0 |\n|---|---|\n")
    assert generate.unknown_tables(written) == ["| by hand | 90.0 |"]
    wrong = page.read_text().replace("| mhacut |", "| mhacut, better |", 1)
    assert generate.with_tables(wrong) == page.read_text()


def test_long_commands_of_the_site_break_at_options():
    """Shells read the same words."""
    hooks = module(DOCS / "hooks.py")
    for page in PAGES:
        shown = hooks.on_page_markdown(page.read_text())
        for before, after in zip(
            hooks._SHELL.findall(page.read_text()), hooks._SHELL.findall(shown), strict=True
        ):
            assert [*commands(before[1])] == [*commands(after[1])]
            assert all(len(line) <= 110 or "#" in line for line in after[1].splitlines())


def test_the_page_of_the_python_api_has_every_public_name():
    names = [name for names in module(DOCS / "generate.py").NAMES.values() for name in names]
    assert sorted([*names, "__version__"]) == sorted(mhacut.__all__)


def test_the_page_of_architectures_is_current():
    generate = module(DOCS / "generate.py")
    text = (DOCS / "reference" / "architectures.md").read_text()
    if f"Of timm\n{timm.__version__} " not in text:
        pytest.skip(f"written for another timm than {timm.__version__}")
    for name in ("deit_tiny_patch16_224", "mvitv2_tiny", "bat_resnext26ts", "flatten_deit_tiny"):
        (entry,) = catalogue(name)
        assert generate._architecture_row(asdict(entry)) in text.splitlines()


def test_the_figure_shows_the_rows():
    figure = module(ROOT / "examples" / "benchmarks" / "figure.py")
    document = json.loads(figure.ROWS.read_text())
    for paper in ("light", "dark"):
        committed = (figure.IMAGES / f"accuracy-{paper}.svg").read_text()
        assert committed == figure.figure(document, paper), "run python examples/benchmarks/figure.py"


def test_the_drawing_of_the_architecture_is_the_table_of_layers():
    (drawn,) = (block.text for block in blocks(CONTRIBUTING) if "__main__" in block.text)
    assert [line.strip() for line in drawn.splitlines()] == [line.strip() for line in LAYERS]


def flags_of_mhacut() -> set[str]:
    group = get_command(app)
    parameters = [
        *group.params,
        *(option for command in group.commands.values() for option in command.params),
    ]
    return {flag for option in parameters for flag in (*option.opts, *option.secondary_opts)} | {"--help"}


def flags_of_scripts() -> set[str]:
    scripts = [*ROOT.glob("examples/**/*.py"), *ROOT.glob("examples/**/*.sh"), *ROOT.glob(".ci/*.py")]
    return {flag for path in scripts for flag in re.findall(r"--[a-z][a-z0-9-]+", path.read_text())}


def test_flags_exist():
    known = flags_of_mhacut() | flags_of_scripts() | FLAGS_OF_OTHERS
    unknown = []
    for page in (*PAGES, *NOTEBOOKS):
        text = re.sub(r"<!--.*?-->", "", page.read_text())
        flags = set(re.findall(r"(?<![\w`-])--[a-z][a-z0-9-]*|(?<=`)--[a-z][a-z0-9-]*", text))
        unknown += [f"{named(page)}: {flag}" for flag in sorted(flags - known)]
    assert not unknown


def test_commands_parse():
    scripts, parsed = flags_of_scripts(), 0
    for page, block in [(path, block) for path in PAGES for block in blocks(path)]:
        if block.language not in ("bash", "sh"):
            continue
        for words in commands(block.text):
            arguments = mhacut_arguments(words)
            if arguments is not None:
                name, *rest = arguments
                get_command(app).commands[name].make_context(name, rest)  # raises for an unknown flag
                parsed += 1
            elif words[0] == "python" and words[1] != "-m":
                assert (ROOT / words[1]).is_file(), f"{named(page)}: {words}"
                assert {word for word in words if word.startswith("--")} <= scripts, f"{named(page)}: {words}"
    assert parsed > 40


def test_extras_exist():
    try:
        import tomllib
    except ImportError:
        tomllib = pytest.importorskip("tomli")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in PAGES:
        groups = re.findall(r"pip install (?:-q )?(?:-e )?'(?:mhacut|\.)\[([\w,]+)\]'", page.read_text())
        assert {extra for group in groups for extra in group.split(",")} <= set(extras), named(page)


def test_measured_constants_exist():
    text = (DOCS / "explanation" / "choices.md").read_text()
    names = re.findall(r"`(\w+(?:/\w+)+)\.([A-Z_]+)`", text)
    missing = [
        f"{path}.{name}"
        for path, name in names
        if not hasattr(importlib.import_module(f"mhacut.{path.replace('/', '.')}"), name)
    ]
    assert names
    assert not missing


def test_source_files_exist():
    """Paths of Python files on pages are relative to the repository or to the package."""
    missing = [
        f"{named(page)}: {path}"
        for page in PAGES
        for path in re.findall(r"`([\w.]+(?:/[\w.]+)+\.py)`", page.read_text())
        if "NAME" not in path
        if not (ROOT / path).is_file() and not (ROOT / "mhacut" / path).is_file()
    ]
    assert not missing


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mhacut.__version__
    assert citation["license"] == "Apache-2.0"


@pytest.fixture(scope="module")
def clone(tmp_path_factory, few_digits) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    (folder / "examples" / "digits").mkdir(parents=True)
    (folder / "examples" / "digits" / "images").symlink_to(few_digits)
    for part in ("digits/model", "flatten_cifar", "recipes"):
        (folder / "examples" / part).symlink_to(ROOT / "examples" / part)
    return folder


@pytest.fixture(scope="module")
def done() -> set[str]:
    return set()


def run_command(words: list[str]) -> None:
    arguments = mhacut_arguments(words)
    assert arguments is not None, f"{words}: no command of mhacut; say why it is not run"
    given = " ".join(arguments)
    for flag, value in QUICK[arguments[0]].items():
        if flag not in given:
            arguments += [flag] if value is None else [flag, value]
    result = run(*arguments)
    assert result.exit_code == 0, f"{' '.join(words)}\n{result.stderr}"


def run_block(block: Block, names: dict[str, object], done: set[str]) -> None:
    if block.language == "python":
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block.text, "block", "exec"), names)
        return
    for words in commands(block.text):
        if block.mark == "main-job" and mhacut_arguments(words) is None:
            continue  # installs
        text = " ".join(mhacut_arguments(words) or words)
        if text not in done:
            run_command(words)
            done.add(text)


LONGEST_PAGES = {"docs/guides/targets.md", "docs/guides/export.md"}
"""Their commands search for a long time, or export to several runtimes."""


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.exhaustive if named(page) in LONGEST_PAGES else pytest.mark.slow)
        for page in PAGES
        if any(block.runs for block in blocks(page))
    ],
    ids=named,
)
def test_blocks_run(page, clone, done, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs pip install 'mhacut[dev]'")
    monkeypatch.chdir(clone)
    quick = {"effort": "fast", "calibration_images": 8, "eval_images": 10, "latency": False}
    monkeypatch.setattr(
        mhacut, "prune", lambda *given, prune=mhacut.prune, **more: prune(*given, **quick | more)
    )
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.runs and block.mark != "tests":
            run_block(block, names, done)


def test_blocks_that_are_not_run_say_why():
    marks = {block.mark for page in PAGES for block in blocks(page) if block.mark}
    assert all(mark in RUN_BY_CI or len(mark) > len(NOT_RUN) + 5 for mark in marks)
    assert {block.language for page in PAGES for block in blocks(page)} <= {"bash", "python", "text", "yaml"}
