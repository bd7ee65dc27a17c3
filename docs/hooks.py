"""Hooks of mkdocs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

_LONGEST = 80
"""Columns of a command on the site."""
_SHELL = re.compile(r"(```bash\n)(.*?)(?=```)", re.DOTALL)
_VERSION = re.compile(r'__version__ = "(.+)"')
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=<code>)")
_BADGE = re.compile(r"\[!\[(.+?)\]\(\S+\)\](\(\S+\))\n\n")
_EXAMPLES = Path(__file__).parents[1] / "examples"


def on_config(config: Any) -> Any:
    """Show the version in the header, and link to the repository that ``MHACUT_REPOSITORY`` names."""
    version = _VERSION.search((_EXAMPLES.parent / "mhacut" / "_version.py").read_text())
    assert version is not None
    config.site_name = f"mhacut {version[1]}"
    if repository := os.environ.get("MHACUT_REPOSITORY", "").rstrip("/"):
        config.repo_url, config.repo_name = f"{repository}/", repository.partition("://")[2]
        config.nav.append({"Issues": f"{repository}/issues"})
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Remove docstring roles such as :func:`name`, which mkdocstrings shows as text."""
    return _ROLE.sub("", html)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links to notebooks at their pages, and break long commands at options."""
    markdown = re.sub(r"\]\(((?:\.\./)*)\.\./examples/(\w+)\.ipynb\)", r"](\1notebooks/\2.md)", markdown)
    return _SHELL.sub(lambda found: found[1] + "\n".join(map(_broken, found[2].split("\n"))), markdown)


def _broken(command: str) -> str:
    """Break a long line of a shell script before options."""
    if len(command) <= _LONGEST or "#" in command:
        return command
    text = command.removesuffix("\\").strip()
    indent = command[: command.index(text)]
    first, *options = re.split(r" (?=--?[a-z])", text)
    lines = [indent + first]
    for option in options:
        if len(lines[-1]) + len(option) + 3 > _LONGEST:
            lines.append(f"{indent or '    '}{option}")
        else:
            lines[-1] += f" {option}"
    return " \\\n".join(lines) + (" \\" if command.endswith("\\") else "")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page for each notebook of examples/, with its stored outputs."""
    # mkdocs-jupyter needs 100 MB more to install and makes each page 600 KB larger.
    from mkdocs.structure.files import File

    for path in sorted(_EXAMPLES.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        shown = (cell for cell in cells if "colab" not in cell["metadata"].get("tags", ()))
        text = "\n\n".join(block for cell in shown for block in _blocks(cell))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def _blocks(cell: dict[str, Any]) -> Iterator[str]:
    """Yield a notebook cell and its outputs as Markdown."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        source = _BADGE.sub(_link_of_badge, source)
        # Links lead from examples/ to docs/ there, and from docs/notebooks/ here.
        yield re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source.replace("](../docs/", "](../"))
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            yield _output(f"<pre>{escape(''.join(output['text']))}</pre>")
        elif "text/html" in output["data"]:
            yield _output("".join(output["data"]["text/html"]))
        else:
            yield _output(f"<pre>{escape(''.join(output['data']['text/plain']))}</pre>")


def _link_of_badge(badge: re.Match[str]) -> str:
    # The site loads no pictures from other servers. While the owner is unknown there is no link.
    return "" if "/OWNER/" in badge[2] else f"[{badge[1]}]{badge[2]}\n\n"


def _output(html: str) -> str:
    return f'<div class="notebook-output">{html.strip()}</div>'
