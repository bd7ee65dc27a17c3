"""The wheel and the sdist hold what they should, and nothing else."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mhacut

ROOT = Path(__file__).parents[2]
VERSION = mhacut.__version__


def test_the_versions_of_python_are_stated_alike():
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"Programming Language :: Python :: 3\.(\d+)", project)
    assert list(map(int, named)) == list(range(int(named[0]), int(named[-1]) + 1))
    assert f'requires-python = ">=3.{named[0]}"' in project
    assert f'target-version = "py3{named[0]}"' in project
    assert f'python_version = "3.{named[0]}"' in project
    assert f"(Python 3.{named[0]}+" in (ROOT / "README.md").read_text()


def imported_packages() -> set[str]:
    names: set[str] = set()
    for path in (ROOT / "mhacut").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for_types = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CH" in ast.dump(node.test)
        ]
        skipped = {id(child) for node in for_types for child in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and id(node) not in skipped:
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and id(node) not in skipped:
                names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"mhacut"}


def test_imported_packages_are_declared():
    project = (ROOT / "pyproject.toml").read_text()
    declared = {name.lower() for name in re.findall(r'"([A-Za-z_][\w-]*)[><=~]', project)}
    distributions = {"PIL": "pillow", "yaml": "pyyaml"}
    assert {distributions.get(name, name) for name in imported_packages()} <= declared


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    pytest.importorskip("build", reason="needs pip install 'mhacut[dev]'")
    if not (ROOT / ".git").exists():
        pytest.skip("no clone: the files that git knows are not known")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in git_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def git_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.slow
def test_the_wheel_holds_the_package(built):
    with zipfile.ZipFile(built / f"mhacut-{VERSION}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        info = f"mhacut-{VERSION}.dist-info"
        metadata = wheel.read(f"{info}/METADATA").decode()
        entry_points = wheel.read(f"{info}/entry_points.txt").decode()
    packaged = {name for name in names if not name.startswith(info)}
    assert packaged == {name for name in git_files() if name.startswith("mhacut/")}
    assert "mhacut/py.typed" in packaged
    assert f"{info}/licenses/LICENSE" in names
    assert f"Version: {VERSION}" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: timm>=1.0.31" in metadata
    assert "mhacut = mhacut.cli:main" in entry_points


@pytest.mark.slow
def test_the_sdist_holds_sources_tests_and_documentation(built):
    with tarfile.open(built / f"mhacut-{VERSION}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    left_out = {name for name in git_files() if not name.startswith(".")} - names
    assert not left_out
    assert names - set(git_files()) == {"PKG-INFO"}
