"""Register models of mhacut with timm, before or after timm is imported, without importing timm.

Importing timm and torch takes seconds, and ``mhacut --help`` needs neither.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODELS = ("mhacut.flatten", "mhacut.exporting.timm_model")


def register_with_timm() -> None:
    """Register mhacut's models with timm, now or as soon as timm is imported."""
    if "timm" in sys.modules:
        _import_models()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


def _import_models() -> None:
    for name in _MODELS:
        import_module(name)


class _TimmFinder:
    """Import finder that registers mhacut's models after timm has been imported."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        # The other finders find timm as usual. This finder only adds a step after its execution.
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Register mhacut's models after ``loader`` has executed timm."""
        # The finder stays until timm has run: a program may look for timm without importing it. The loader is
        # patched, not wrapped, because others use it to read source and data.
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module  # restores the method of the class
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _import_models()

        loader.exec_module = execute_and_register
