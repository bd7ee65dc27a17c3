"""List the pruned models on the Hugging Face hub whose cards carry the tag ``mhacut``, as a Markdown table.

    python docs/hub.py > models.md

``HF_ENDPOINT`` names another hub than huggingface_hub's own.
"""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

from huggingface_hub.constants import ENDPOINT

COLUMNS = {
    "FLOPs": r"^- \*\*FLOPs.*?:\*\* (\d[\w.]*)",
    "dense": r"^- \*\*FLOPs.*, dense (\d[\w.]*)",
    "top-1, %": r"^- \*\*Top-1 accuracy:\*\* .*this model (\d[\d.]*) %",
    "dense, %": r"^- \*\*Top-1 accuracy:\*\* dense (\d[\d.]*) %",
}
"""Columns that are read from the text of a card, as ``mhacut export --format timm`` writes it.

Cards are anybody's: what they say stands in a table only where it is a number or a name.
"""
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def rows() -> list[list[str]]:
    """Return a row for each model, those that were downloaded most first."""
    models = json.loads(fetch("api/models?filter=mhacut&sort=downloads&cardData=true&limit=1000"))
    return [row(model) for model in models if NAME.fullmatch(str(model.get("id")))]


def row(model: dict[str, Any]) -> list[str]:
    """Return the cells of one model: its name, that of the dense one, and what its card says."""
    base = (model.get("cardData") or {}).get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    card = fetch(f"{model['id']}/raw/main/README.md")
    found = [re.search(pattern, card, re.MULTILINE) for pattern in COLUMNS.values()]
    return [
        *(linked(name) if NAME.fullmatch(str(name or "")) else "" for name in (model["id"], base)),
        *("" if one is None else one[1] for one in found),
    ]


def linked(name: str) -> str:
    """Return a link to a model."""
    return f"[{name}]({ENDPOINT}/{name})"


def fetch(path: str) -> str:
    """Return what the hub has at a path; nothing if there is no such thing, such as a card."""
    try:
        with urllib.request.urlopen(f"{ENDPOINT}/{path}", timeout=30) as answer:
            return str(answer.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):  # gated models show their cards to few
            return ""
        raise


def main() -> None:
    """Print the table."""
    for cells in (["model", "base model", *COLUMNS], ["---"] * (2 + len(COLUMNS)), *rows()):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
