"""Imports point one way: a package imports from the layers below its own only."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mhacut

PACKAGE = Path(mhacut.__file__).parent
LAYERS = """
    __main__
    cli
    commands
    report finetuning exporting
    inspection
    checkpoint pruning
    surgery
    adapters
    flatten data measuring linalg plan
    options runtime
    budget
    errors limits text _version _timm_hook
""".strip().splitlines()
"""From top to bottom. Packages of one layer do not know each other."""
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.removeprefix("mhacut.") for name in names if name.startswith("mhacut.")}


def imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_imports_point_down():
    upward = [
        f"{path.relative_to(PACKAGE)} imports mhacut.{other}"
        for path in modules()
        for other in imported_packages(path) - {package_of(path)}
        if LAYER_OF[other] <= LAYER_OF[package_of(path)]
    ]
    assert not upward


def test_no_modules_import_each_other():
    dotted = (".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in modules())
    names = dict(zip((name.removesuffix(".__init__") for name in dotted), modules(), strict=True))
    TopologicalSorter({name: imported(path) - {name} for name, path in names.items()}).prepare()


def test_the_mathematics_needs_torch_only():
    for path in (PACKAGE / "linalg").glob("*.py"):
        assert imported_packages(path) <= {"linalg"}
        assert "timm" not in path.read_text()


def test_only_the_command_line_prints_or_exits():
    for path in modules():
        if package_of(path) in {"cli", "__main__"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "exit", "quit"}, f"{path.name}:{node.lineno}"
