"""The notebooks run from top to bottom with tiny sizes, and are stored without outputs."""

import re
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from sizes import SHORT_RUN

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))
#: Replaces the parameters of a notebook.
_SMALL = f"""
SEEDS = 2
STEPS = 200
SETTINGS |= {SHORT_RUN | {"eval.every": 50, "eval.episodes": 1}}
"""
SIZES = {
    "1_quickstart": _SMALL,
    "2_the_fixes": _SMALL,
    "3_your_own_task": _SMALL
    + "TRANSITIONS, ROUNDS, CANDIDATES = 600, 1, ['none', 'scale,target']",
}
#: Texts that the outputs contain.
SHOWN = {
    "1_quickstart": ["image/png", "<iframe", "video/mp4", "the evaluation during training gave"],
    "2_the_fixes": ["image/png", "scale,target  missed"],
    "3_your_own_task": ["image/png", "<iframe", "the function agrees"],
}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_tested():
    assert [path.stem for path in NOTEBOOKS] == list(SIZES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    notebook = read(path)
    (index,) = (
        k for k, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ())
    )
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(SIZES[path.stem]))
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = str([cell.outputs for cell in code_cells(notebook)])
    for words in SHOWN[path.stem]:
        assert words in outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_stored_without_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    # Cells are short enough to read at a glance; the file that the third notebook writes is longest.
    assert max(len(cell.source.splitlines()) for cell in notebook.cells) <= 45
    assert cells[0].source == code_cells(read(NOTEBOOKS[0]))[0].source
    # The address of the project in the first cell.
    (repository,) = re.findall('REPOSITORY = "https://github.com/(.*?)"', cells[0].source)
    address = (
        f"colab.research.google.com/github/{repository}/blob/main/experiments/notebooks/{path.name}"
    )
    assert f"(https://{address})" in notebook.cells[0].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_tutorial_is_the_notebook_with_outputs(path):
    """Check that `docs/execute_notebooks.py` was run after the last change of the notebook."""
    notebook, executed = read(path), read(ROOT / "docs" / "tutorials" / path.name)
    nbformat.validate(executed)
    sources = [[(c.cell_type, c.source) for c in n.cells] for n in (notebook, executed)]
    assert sources[0] == sources[1]
    assert all(cell.execution_count for cell in code_cells(executed))
    outputs = [output for cell in code_cells(executed) for output in cell.outputs]
    for words in SHOWN[path.stem]:
        assert words in str(outputs)
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in outputs)


@pytest.mark.parametrize(
    ("devices", "smi", "package"),
    [
        ([], "sh: nvidia-smi: not found", "jax"),
        ([], "| Driver Version: 550.54  CUDA Version: 12.4 |", "jax[cuda12]"),
        ([], "| Driver Version: 580.65  CUDA Version: 13.0 |", "jax[cuda13]"),
        (["/dev/accel0"], "sh: nvidia-smi: not found", "jax[tpu]"),
    ],
)
def test_first_cell_installs_for_the_runtime(monkeypatch, devices, smi, package):
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr(subprocess, "getoutput", lambda command: smi)
    monkeypatch.setattr("glob.glob", lambda pattern: devices)
    source = code_cells(read(NOTEBOOKS[0]))[0].source
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    exec(source, {})
    assert not ran
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    exec(source, {})
    ((*_, project, jax, _),) = ran
    assert project.startswith("dynajax @ git+https://") and jax == package
