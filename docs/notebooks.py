"""Execute the notebooks of examples/ and keep their outputs in them; the site shows these.

    python docs/notebooks.py    # needs pip install 'mhacut[dev]'

A test executes them too, and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def notebooks() -> list[Path]:
    """Return the paths of all notebooks."""
    return sorted(EXAMPLES.glob("*.ipynb"))


def executed(path: Path) -> Any:
    """Return the notebook at ``path`` as it is after all of its cells ran, in its own folder.

    Outputs that are of no use to readers are left out: times of execution, warnings, bars that are empty
    at the end, and the text that stands for a table where tables cannot be shown.

    Args:
        path: the notebook, which is not changed.

    Raises:
        CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": path.parent}}
    limits = {"startup_timeout": 300, "timeout": 300}  # seconds; on a busy machine it starts late
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
