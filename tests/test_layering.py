"""Imports point one way: a module may import from rooms below its own, never from above or beside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mhacut

PACKAGE = Path(mhacut.__file__).parent
FLOORS = (
    {
        "errors",
        "_version",
        "_timm_hook",
        "quantity",
        "options",
        "limits",
        "spans",
        "extras",
        "untrusted",
        "plan",
        "progress",
        "device",
        "processes",
        "tensor",
    },
    {"flatten"},
    {"adapters"},
    {"surgery", "taps", "lockstep"},
    {"cost", "modelinfo", "widths"},
    {"sensitivity"},
    {"calibration", "distillation"},
    {"reduction", "reweight", "tuning"},
    {"repair", "repair_in_order", "search", "weight_moments", "findings"},
    {"compensation", "curves"},
    {"allocation"},
    {"planning", "finishing"},
    {"checkpoint", "data", "evaluate", "latency"},
    {"checkpoint_preprocessing"},
    {"inspection", "comparison", "timm_slim"},
    {"verdict"},
    {"report"},
    {"pipeline", "accuracy", "finetuning", "exporting", "benching", "inspecting", "catalogue"},
    {"cli"},
    {"__main__"},
)
# Within a floor these may use each other, in this direction only.
BESIDE = {
    ("options", "errors"),
    ("plan", "errors"),
    ("extras", "errors"),
    ("quantity", "errors"),
    ("device", "errors"),
    ("processes", "errors"),
    ("processes", "device"),
    ("evaluate", "data"),
    ("checkpoint", "data"),
    ("benching", "exporting"),
}
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = (
                [node.module] if node.module != "mhacut" else [f"mhacut.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("mhacut.")}
    return rooms


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    assert room in FLOOR_OF, f"{room} has no floor: give it one in FLOORS"
    for other in imported_rooms(path) - {room}:
        allowed = FLOOR_OF[other] < FLOOR_OF[room] or (room, other) in BESIDE
        assert allowed, f"{path.name} ({room}) imports {other}, which is not below it"


def test_tensor_maths_needs_torch_only():
    for path in (PACKAGE / "tensor").glob("*.py"):
        assert imported_rooms(path) <= {"tensor"}
        assert "timm" not in path.read_text()


def test_only_the_command_line_prints_or_exits():
    for path in modules():
        if room_of(path) in {"cli", "__main__"}:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"print", "exit", "quit"}, f"{path.name}:{node.lineno}"
