"""The rules of the house: short functions and modules, few parameters, docstrings in plain words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import mhacut

PACKAGE = Path(mhacut.__file__).parent
LONGEST_FUNCTION, LONGEST_MODULE, MOST_PARAMETERS, MOST_LOOSE_MODULES = 60, 400, 7, 10
FEW_PARAMETERS = ("mhacut.pruning", "mhacut.surgery", "mhacut.adapters", "mhacut.linalg")
"""Where whole objects are passed on, not their parts."""
NO_NOUN = re.compile(r"(Of|What|As|How)\b")
"""No first word of a docstring: it is an imperative or a noun phrase."""
PEOPLE_ONLY = re.compile(r"\b(told|tells?|heard|hears?|listen\w*|said)\b", re.IGNORECASE)
"""What people do, and models, files and functions do not."""
GENERATED = {"mhacut.options.keywords"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package, by its name."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): ast.parse(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def functions(tree: ast.AST, within: str) -> Iterator[tuple[str, Function]]:
    """Every function, method and function within a function, by its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield f"{within}.{node.name}", node
        name = f"{within}.{node.name}" if isinstance(node, Function | ast.ClassDef) else within
        yield from functions(node, name)


def long_functions() -> Iterator[str]:
    for module, tree in modules().items():
        for name, node in functions(tree, module):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if node.end_lineno - start + 1 > LONGEST_FUNCTION:
                yield name


def long_modules() -> Iterator[str]:
    for module, tree in modules().items():
        longest = max((node.end_lineno for node in tree.body), default=0)
        if longest > LONGEST_MODULE and module not in GENERATED:
            yield module


def long_signatures() -> Iterator[str]:
    for module, tree in modules().items():
        if module.startswith(FEW_PARAMETERS):
            for name, node in functions(tree, module):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if len([arg for arg in given if arg.arg not in ("self", "cls")]) > MOST_PARAMETERS:
                    yield name


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


RULES = [
    long_functions,
    long_modules,
    long_signatures,
    docstrings_without_a_noun,
    docstrings_in_which_code_speaks,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_is_kept(rule):
    assert set(rule()) == set()


def test_few_modules_are_loose():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_LOOSE_MODULES
