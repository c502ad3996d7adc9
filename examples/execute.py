"""Run tour.ipynb again and store it with its outputs.

python examples/execute.py        needs pip install -e '.[notebook]'

Nothing of the machine is stored: no times, no paths, no version of the kernel. Pictures have 256 colours.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

TOUR = Path(__file__).parent / "tour.ipynb"


def execute(
    folder: Path, environment: Mapping[str, str] | None = None, *, more: Sequence[str] = (), timeout: int = 600
) -> NotebookNode:
    """The tour, executed in ``folder`` in a kernel of its own, with the code of ``more`` in cells behind its last.

    ``environment`` is added to this process' own. Raises ``nbclient.exceptions.CellExecutionError`` for a cell that
    fails, and ``CellTimeoutError`` for one that takes longer than ``timeout`` seconds.
    """
    tour = nbformat.read(TOUR, as_version=4)
    tour.cells += [nbformat.v4.new_code_cell(code) for code in more]
    client = NotebookClient(tour, timeout=timeout, record_timing=False, resources={"metadata": {"path": str(folder)}})
    return client.execute(env=os.environ | dict(environment or {}))


def clean(tour: NotebookNode) -> None:
    """Take out what another machine, or another run, would write differently; make pictures small."""
    tour.metadata = NotebookNode(
        kernelspec={"display_name": "Python 3", "language": "python", "name": "python3"},
        language_info={"name": "python"},
    )
    for cell in tour.cells:
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output["data"] = NotebookNode({"image/png": smaller(output["data"]["image/png"])})
                output["metadata"] = NotebookNode()


def smaller(png: str) -> str:
    """A picture in base64, a third of its size."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    out = io.BytesIO()
    few_colours(picture).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def few_colours(picture: Image.Image) -> Image.Image:
    """A picture with 256 colours of its own, which a figure does not miss.

    Those furthest apart, then moved to the middle of what they stand for: a median cut spends all on the greys of thin
    lines, and yellow comes out brown.
    """
    return picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)


if __name__ == "__main__":
    executed = execute(TOUR.parent)
    clean(executed)
    nbformat.write(executed, TOUR)
