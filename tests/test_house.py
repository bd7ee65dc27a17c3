"""The rules of the house: a budget of lines for each room, docstrings in plain words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mhacut

PACKAGE = Path(mhacut.__file__).parent
LINES = {
    "adapters": 3710,
    "checkpoint": 4760,
    "cli": 1174,
    "commands": 3448,
    "data": 1257,
    "exporting": 1560,
    "finetuning": 1780,
    "flatten": 1361,
    "inspection": 548,
    "linalg": 757,
    "measuring": 839,
    "options": 1400,
    "pruning": 4305,
    "report": 960,
    "runtime": 790,
    "surgery": 3596,
    "top": 814,
}
"""Most lines of each package. A commit may lower a number, or raise it with a reason in its text."""
NO_NOUN = re.compile(r"(Of|What|As|How)\b")
"""No first word of a docstring: it is an imperative or a noun phrase."""
PEOPLE_ONLY = re.compile(r"\b(told|tells?|heard|hears?|listen\w*|said)\b", re.IGNORECASE)
"""What people do, and models, files and functions do not."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def docstrings(tree: ast.AST, within: str) -> Iterator[tuple[str, str]]:
    """Docstrings of modules, of classes and functions, and those under fields and constants."""
    if isinstance(tree, ast.Module | ast.ClassDef | Function):
        text = ast.get_docstring(tree)
        if text:
            yield within, text
        above = None
        for node in tree.body:
            value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
            text = getattr(value, "value", None)
            if isinstance(text, str) and above is not None:
                yield f"{within}.{above}", text
            above = assigned(node)
            if isinstance(node, ast.ClassDef | Function):
                yield from docstrings(node, f"{within}.{node.name}")


def assigned(node: ast.AST) -> str | None:
    """Name of the field or constant that ``node`` defines."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if isinstance(targets[0], ast.Name) else None


def public(name: str) -> bool:
    return not any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def docstrings_without_a_noun() -> Iterator[str]:
    for module, tree in modules().items():
        for name, text in docstrings(tree, module):
            if public(name) and NO_NOUN.match(text):
                yield name


def docstrings_in_which_code_speaks() -> Iterator[str]:
    for module, tree in modules().items():
        for name, text in docstrings(tree, module):
            if public(name) and PEOPLE_ONLY.search(text):
                yield name


def test_docstrings_begin_with_an_imperative_or_a_noun_phrase():
    assert list(docstrings_without_a_noun()) == []


def test_only_people_speak():
    assert list(docstrings_in_which_code_speaks()) == []


@pytest.mark.parametrize("room", LINES)
def test_a_room_keeps_its_lines(room):
    files = PACKAGE.glob("*.py") if room == "top" else (PACKAGE / room).rglob("*.py")
    assert sum(len(path.read_text().splitlines()) for path in files) <= LINES[room]


def test_every_room_has_a_budget():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == LINES.keys() - {"top"}
