"""Execute the notebooks, and store them with their outputs for the documentation site.

    python docs/execute_notebooks.py                  # all, six minutes on one core
    python docs/execute_notebooks.py 2_the_fixes      # one of them

`experiments/notebooks` has the notebooks without outputs. This script writes executed copies to
`docs/tutorials`, which the site shows as they are: a build of the site executes nothing. Run it
after a change of a notebook; a test compares the code of both. It needs the extras docs and
notebook.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "experiments" / "notebooks"
EXECUTED = ROOT / "docs" / "tutorials"


def execute(path: Path) -> None:
    """Execute one notebook in an empty folder, and write it to the folder of the site."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook,
            timeout=900,
            kernel_name="python3",
            coalesce_streams=True,
            resources=resources,
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ in every execution
        if cell.cell_type == "code":
            # Warnings are about the machine that executes the notebook.
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(notebook, EXECUTED / path.name)


if __name__ == "__main__":
    EXECUTED.mkdir(exist_ok=True)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if path.stem in sys.argv[1:] or not sys.argv[1:]:
            execute(path)
            print(EXECUTED / path.name)
