"""The report as one HTML page, which needs no network and no other file."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from mhacut._version import __version__
from mhacut.options.base import PathLike
from mhacut.report.charts import COLOURS
from mhacut.report.contents import Contents
from mhacut.report.heads_table import HEADINGS, head_rows
from mhacut.report.history import step
from mhacut.report.sections import sections
from mhacut.report.svg import draw
from mhacut.runtime.files import write_whole
from mhacut.text import safe


def write_page(
    path: PathLike, contents: Contents, overwrite: bool, input_path: str | os.PathLike[str] | None
) -> Path:
    """Write :func:`page` to ``path``, whole or not at all.

    Args:
        path: the file; its directory is created.
        contents: what to show.
        overwrite: replace an existing file.
        input_path: the checkpoint, never replaced.

    Raises:
        OutputError: the file must not or cannot be written.
    """
    write_whole(path, page(contents).encode(), overwrite=overwrite, input_path=input_path)
    return Path(path)


def page(contents: Contents) -> str:
    """Return the whole document.

    Its content security policy allows the page's own style sheet and script, by their hashes, and nothing
    from anywhere else, so that text from files could not run even if it got past the escaping.
    """
    from markupsafe import Markup

    style, script = _colour_classes() + _resource("page.css"), _resource("page.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:"
    return str(
        _template().render(
            policy=policy,
            style=Markup(style),  # trusted: it must not be escaped
            script=Markup(script),
            inspection=contents.inspection,
            summary=contents.summary,
            version=__version__,
            sections=sections(contents),
            draw=draw,
            headings=HEADINGS,
            head_rows=head_rows(contents.layers),
            steps=[step(entry) for entry in contents.inspection.history],
        )
    )


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mhacut", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")


def _shown(value: Any) -> Any:
    """Make invisible characters of text visible and format coordinates; the template escapes the rest."""
    if hasattr(value, "__html__"):
        return value
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return safe(value) if isinstance(value, str) else value


def _colour_classes() -> str:
    """Style sheet with one class per colour, which sets ``--colour`` for light and dark backgrounds."""
    light, dark = (
        "\n".join(f".{name} {{ --colour: {values[side]}; }}" for name, values in COLOURS.items())
        for side in (0, 1)
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def _resource(name: str) -> str:
    """Text of a file of this package."""
    return files("mhacut.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
