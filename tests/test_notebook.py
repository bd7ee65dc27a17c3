"""The notebook in examples/ runs as it stands, shows tables and one bar, and is kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "in_memory.ipynb"


def test_it_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_it_runs():
    reason = "needs pip install 'mhacut[dev]'"
    nbformat = pytest.importorskip("nbformat", reason=reason)
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    updates = []

    class Client(nbclient.NotebookClient):
        def process_message(self, message, cell, cell_index):
            if message["msg_type"] == "update_display_data":
                updates.append(message["content"]["data"]["text/html"])
            return super().process_message(message, cell, cell_index)

    Client(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    tables = [
        output["data"]["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "<table>" in output.get("data", {}).get("text/html", "")
    ]
    pruned, evaluated = tables
    assert all(text in pruned for text in ("top-1", "FLOPs", "latency", "KL to dense", "dry run"))
    assert "on 300 images in memory" in evaluated
    assert any("<progress value=" in update and "calibrating" in update for update in updates)
    assert updates[-1] == ""
    assert notebook.cells[-1].outputs[0].text.endswith("% after\n")
