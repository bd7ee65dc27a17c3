"""Options that were changed to no effect, named before the work."""

from __future__ import annotations

from collections.abc import Mapping

from mhacut.errors import option_name
from mhacut.options.option import Options
from mhacut.runtime.progress import Reporter


def log_idle_options(options: Options, idle: Mapping[str, str], reporter: Reporter) -> None:
    """Log each option that ``idle`` names, and the reason that it gives."""
    given = options.flat()
    for name, reason in idle.items():
        shown = option_name(name, given[name]) if isinstance(given[name], bool) else option_name(name)
        reporter.log(f"{shown} has no effect: {reason}")
