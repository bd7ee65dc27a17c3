"""Models of mhacut in timm's registry as soon as both are imported, without importing timm for that.

timm and torch take seconds, and ``mhacut --help`` needs neither: whoever imports timm, before or after
mhacut, finds our models there; whoever does not, does not pay for it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODELS = ("mhacut.flatten", "mhacut.exporting.timm_model")


def register_with_timm() -> None:
    """Register our models now if timm is imported already, else right after it is."""
    if "timm" in sys.modules:
        _import_models()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


def _import_models() -> None:
    for name in _MODELS:
        import_module(name)


class _TimmFinder:
    """Lets the finders after it find timm, and has our models imported once it has run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        # Found by the others and executed as always: only the end of its execution is watched.
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        """Patch this one loader, which stays what it is to everyone who asks it for source or data.

        Being found is not being imported: others look whether timm is installed. So this finder goes only
        when timm has run.
        """
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            del loader.exec_module  # the class's own again
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _import_models()

        loader.exec_module = execute_and_register
