"""Execute the notebooks of examples/ and store their outputs, which the site shows.

    python docs/notebooks.py    # needs pip install 'mhacut[dev]'

A test executes the notebooks and compares the outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def notebooks() -> list[Path]:
    """Paths of all notebooks."""
    return sorted(EXAMPLES.glob("*.ipynb"))


def executed(path: Path) -> Any:
    """Run a copy of the notebook in its folder; drop warnings, progress bars and times."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": path.parent}}
    limits = {"startup_timeout": 300, "timeout": 300}  # seconds; a kernel starts late on a busy machine
    client = NotebookClient(notebook, record_timing=False, resources=where, **limits)
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_for_readers(output)]
            for output in cell.outputs:
                if "text/html" in output.get("data", {}):
                    del output.data["text/plain"]
    notebook.metadata.pop("language_info", None)  # the version of Python
    return notebook


def _is_for_readers(output: Any) -> bool:
    if output.output_type == "stream":
        return bool(output.name == "stdout")
    return bool(output.data.get("text/html", "something"))


def main() -> None:
    """Execute all notebooks, and write them."""
    for path in notebooks():
        nbformat.write(executed(path), path)


if __name__ == "__main__":
    main()
