"""The notebooks in examples/ run as they stand, and give the outputs that are kept in them."""

from __future__ import annotations

import importlib.util
import re

import pytest

from helpers.docs import NOTEBOOKS, ROOT, notebook_cells

LARGEST = 300_000
"""Bytes of a notebook with its outputs, which the repository holds."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_small(path):
    first, *cells = notebook_cells(path)
    assert f"/examples/{path.name})" in "".join(first["source"])  # the badge of Colab
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert any(cell["outputs"] for cell in cells)
    assert path.stat().st_size < LARGEST


def comparable(cell) -> list[str]:
    """The outputs of a cell, less what depends on the machine: numbers, pictures and curves."""
    if "measured" in cell["metadata"].get("tags", ()):
        return [output["output_type"] for output in cell.get("outputs", ())]
    texts = []
    for output in cell.get("outputs", ()):
        found = output.get("text") or output["data"].get("text/html") or output["data"]["text/plain"]
        text = re.sub(r'src="data:[^"]*"|(?s:<svg.*?</svg>)', "", "".join(found))
        texts.append(re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", text))
    return texts


BRIEF_TIMES = "import mhacut.commands.prune as pruning; pruning.TIMING_SECONDS = 0.1"
"""What the kernel runs first: notebooks show times, and nothing here depends on how steady they are."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    for needed in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(needed, reason="needs pip install 'mhacut[dev]'")
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "brief_times.py").write_text(BRIEF_TIMES)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    found = runner.executed(path).cells
    for cell, kept in zip(found, notebook_cells(path), strict=True):
        assert comparable(cell) == comparable(kept), "run python docs/notebooks.py"
    outputs = " ".join(str(cell.get("outputs")) for cell in found)
    SHOWN[path.stem](outputs)


def shows_a_cut_in_memory(outputs: str) -> None:
    assert all(text in outputs for text in ("top-1", "FLOPs", "latency", "KL to dense", "dry run"))
    assert "on 300 images in memory" in outputs


def shows_pictures_of_both_models(outputs: str) -> None:
    assert outputs.count("data:image/png") == 3 * 11
    assert int(re.search(r"same prediction for (\d+) of 300", outputs)[1]) >= 290
    assert float(re.search(r"similarity of the maps: ([\d.]+)", outputs)[1]) > 0.9


def shows_budgets_within_a_loss(outputs: str) -> None:
    assert outputs.count("<svg") == 2
    by_drop, by_kl = (float(found) for found in re.findall(r"with ([\d.]+)% of the FLOPs", outputs))
    assert 5 < by_drop <= by_kl < 25


SHOWN = {
    "in_memory": shows_a_cut_in_memory,
    "before_and_after": shows_pictures_of_both_models,
    "choose_a_budget": shows_budgets_within_a_loss,
}
