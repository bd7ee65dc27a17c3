"""Hooks of mkdocs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=<code>)")
_EXAMPLES = Path(__file__).parents[1] / "examples"


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of docstrings, :func:`name`, which mkdocstrings shows as text."""
    return _ROLE.sub("", html)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to notebooks in examples/, which the repository shows, to the pages made of them."""
    return re.sub(r"\]\(((?:\.\./)*)\.\./examples/(\w+)\.ipynb\)", r"](\1notebooks/\2.md)", markdown)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add a page for each notebook of examples/, with the outputs that are kept in it.

    mkdocs-jupyter would do it too, with 100 MB more to install and 600 KB more in each page.
    """
    for path in sorted(_EXAMPLES.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join(block for cell in cells for block in _blocks(cell))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def _blocks(cell: dict[str, Any]) -> Iterator[str]:
    """Yield a cell of a notebook, and what it gave, as Markdown."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
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


def _output(html: str) -> str:
    return f'<div class="notebook-output">{html.strip()}</div>'
