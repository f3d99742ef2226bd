"""The notebooks of docs/ run from the first cell to the last, in a kernel of their own."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from tests.docs.pages import DOCS

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def run(cells: list[str], folder: Path) -> list[str]:
    """What the cells print, each by itself."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(
        book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Jupyter's packages say of each other
        client.execute()
    return ["".join(o.get("text", "") for o in cell.outputs) for cell in book.cells]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    shown = run([cell.source for cell in book.cells if cell.cell_type == "code"], tmp_path)
    assert any("of its MACs" in text for text in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_what_it_prints_is_not_stored(path: Path) -> None:
    """The site runs it at each build, so what is stored could only grow old."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert cells
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_a_cell_that_fails_fails(tmp_path: Path) -> None:
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="left over"):
        run(["x = 1", "assert x == 2, 'left over'"], tmp_path)
