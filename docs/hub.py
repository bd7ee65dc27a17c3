"""List models on the Hugging Face hub with the tag ``mhacut``, as a Markdown table.

    python docs/hub.py > models.md

``HF_ENDPOINT`` names another hub.
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
"""Columns, read from the text of a model card.

Anybody can write a card, so the patterns accept only numbers and names.
"""
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def rows() -> list[list[str]]:
    """One row per model, most downloads first."""
    models = json.loads(fetch("api/models?filter=mhacut&sort=downloads&cardData=true&limit=1000"))
    return [row(model) for model in models if NAME.fullmatch(str(model.get("id")))]


def row(model: dict[str, Any]) -> list[str]:
    """Cells of one model: its name, its base model, and the columns of its card."""
    base = (model.get("cardData") or {}).get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    card = fetch(f"{model['id']}/raw/main/README.md")
    found = [re.search(pattern, card, re.MULTILINE) for pattern in COLUMNS.values()]
    return [
        *(linked(name) if NAME.fullmatch(str(name or "")) else "" for name in (model["id"], base)),
        *("" if one is None else one[1] for one in found),
    ]


def linked(name: str) -> str:
    """Link to a model."""
    return f"[{name}]({ENDPOINT}/{name})"


def fetch(path: str) -> str:
    """Return a file of the hub; empty if it is missing or gated."""
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
