"""Pages of the documentation, taken apart: blocks, commands, links, headings."""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = (README, CONTRIBUTING, ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md")))
NOTEBOOKS = tuple(sorted((ROOT / "examples").glob("*.ipynb")))
_BLOCK = re.compile(
    r"^(?:[ \t]*<!-- (?P<mark>[^\n]*) -->\n)?"
    r"(?P<indent>[ \t]*)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
NOT_RUN = "not run: "
"""Start of the comment before a block that is only parsed; a reason follows."""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    mark: str
    """Comment before the block, or nothing."""

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "sh", "python") and not self.mark.startswith(NOT_RUN)


def blocks(page: Path) -> list[Block]:
    return [
        Block(found["language"], textwrap.dedent(found["text"]), found["mark"] or "")
        for found in _BLOCK.finditer(page.read_text())
    ]


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command of a shell script of plain commands, which ``&&`` may join."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in shlex.split(line.partition(" > ")[0], comments=True):
            if word == "&&":
                yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words


def mhacut_arguments(words: list[str]) -> list[str] | None:
    """Arguments of mhacut in a command, under torchrun too; None for other programs."""
    if Path(words[0]).name == "mhacut":
        return words[1:]
    if words[0] == "torchrun" and "mhacut" in words:
        return words[words.index("mhacut") + 1 :]
    return None


def without_blocks(text: str) -> str:
    return re.sub(r"^[ \t]*```.*?^[ \t]*```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", without_blocks(page.read_text()))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    return [target for target in found if not target.startswith(("http:", "https:", "mailto:"))]


def notebook_cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as the toc extension of Markdown makes them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(page.read_text()), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
