"""The report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib.resources import files
from pathlib import Path

from mhacut._version import __version__
from mhacut.options.base import PathLike
from mhacut.report import sections
from mhacut.report.contents import Contents
from mhacut.report.markup import Markup, join, tag
from mhacut.report.table import heads_table
from mhacut.runtime.files import write_whole


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
    """The whole document.

    Its content security policy allows the page's own style sheet and script, by their hashes, and nothing
    from anywhere else, so that text from files could not run even if it got past the escaping.

    Args:
        contents: what to show.
    """
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:"
    inspection = contents.inspection
    title = f"{inspection.architecture}: {inspection.source}"
    parts = [
        sections.figures(contents),
        sections.heat_maps(contents),
        sections.flops(contents),
        sections.errors(contents),
        sections.curves(contents),
        sections.search(contents),
        heads_table(contents),
        sections.history(inspection),
    ]
    judged = inspection.judged_by
    channels, height, width = inspection.input_size
    about = [
        f"{inspection.architecture}, {channels}x{height}x{width}, "
        + (f"{inspection.classes} classes. " if inspection.classes else "no classifier. "),
        "Only shapes were looked at. " if judged is None else f"Heads judged by: {judged}. ",
        "One FLOP is one multiply-accumulate. ",
        f"mhacut {__version__}.",
    ]
    whole = [tag("li", line) for line in inspection.not_prunable]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", style),
    )
    body = tag(
        "body",
        tag("a", "To the table", href="#part-all-heads", class_="skip"),
        tag(
            "header",
            tag("h1", inspection.source),
            tag("p", contents.verdict, class_="verdict"),
            tag("p", *about),
            tag("ul", *whole) if whole else join(),
        ),
        tag("main", *(part for part in parts if part is not None)),
        tag("script", script),
    )
    return join(Markup("<!doctype html>\n"), tag("html", head, body, lang="en")) + "\n"


def _resource(name: str) -> Markup:
    """A file that is part of this package; ours, so that it is markup already."""
    return Markup(files("mhacut.report").joinpath(name).read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
