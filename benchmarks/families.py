"""What ``rsdyn check`` says of a tiny model of each family, as a table.

    python benchmarks/families.py docs/families.md

The models are those of the tests (``tests/family_zoo.py``), built from transformers' own configs with random weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from family_zoo import FAMILIES, REFUSED, make  # noqa: E402

from rsdyn.errors import UnfitModelError  # noqa: E402
from rsdyn.lm.verification import Verification, verify  # noqa: E402

COLUMNS = ("sums", "hidden states", "log-probs", "padded right", "padded left", "packed", "replay", "continuation")
HEAD = """# Families of models

What `rsdyn check` verified on a tiny model of each family: three layers of 32 units with random weights, built from
transformers' own configs, random tokens, float32. Written by `python benchmarks/families.py docs/families.md`
(transformers {transformers}, torch {torch}). A number is the largest relative error; 0 is exact.

- *sums*: what attention and the MLP add, in every layer, against the recorded states
- *hidden states*: the recorded `resid_pre` against transformers' own `hidden_states`
- *log-probs*: next-token log-probabilities from the last recorded state against the model's own
- *padded right*, *left*, *packed*: a row in a batch against the row alone. Left: with a mask and position ids where the
  model takes them; in brackets with the mask alone, which is how people pad
- *replay*, *continuation*: from every sublayer, against whole forwards of transformers
"""


def cell(found: Verification, name: str) -> str:
    """One cell of the table."""
    check = next((c for c in found.checks if c.name == name), None)
    if check is None:
        return ""
    if check.holds is False:
        return "**fails**"
    if name == "packed":
        return "yes" if check.holds else "no: padded"
    if check.holds is None:
        return "no"
    kinds = ("attention", "mlp", "parallel", "block")
    error = check.numbers.get("error", max((check.numbers[k] for k in kinds if k in check.numbers), default=None))
    alone = check.numbers.get("mask_alone")
    if error is None:
        return _told(alone)
    return _told(error) + (f" ({_told(alone)})" if alone is not None and alone > 1e-4 else "")


def _told(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}"


def table() -> str:
    """The whole page."""
    lines = [HEAD.format(transformers=transformers.__version__, torch=torch.__version__.split("+")[0])]
    lines.append("| family | sublayers per layer | " + " | ".join(COLUMNS) + " |")
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for name in FAMILIES:
        model = make(name)
        found = verify(model)
        sites = 2 if "sublayers" in found.model else 1
        cells = (cell(found, column) for column in COLUMNS)
        lines.append(f"| {name} | {sites} | " + " | ".join(cells) + " |")
        print(name, "ok" if found.failure is None else found.failure.line(), file=sys.stderr, flush=True)
    lines += ["", "Refused, since no module reads a running sum (the message is the user's):", ""]
    for name in REFUSED:
        try:
            verify(make(name))
        except UnfitModelError as error:
            lines.append(f"- {name}: {error}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the file to write")
    parser.parse_args().out.write_text(table(), encoding="utf-8")
