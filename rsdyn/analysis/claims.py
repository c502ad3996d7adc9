"""What other papers claim of streams over depth, measured here beside null models, each with a computed verdict.

Their models and prompts are not ours, so a number that differs says little; that a claim holds for the untrained model
too, or only for the raw number and not beside its null model, says more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import t as student
from torch import Tensor

from rsdyn.analysis.finding import Value
from rsdyn.dynamics import geometry
from rsdyn.dynamics.ensembles import convergence, convergence_null, growth, separation, transport
from rsdyn.dynamics.moments import massive_ratios
from rsdyn.dynamics.phases import LEAST_PLACES, phases
from rsdyn.dynamics.resampling import group_of, jackknife
from rsdyn.dynamics.step_nulls import step_products
from rsdyn.lm.continuing.layer_order import run_in_order, run_whole
from rsdyn.lm.model import LanguageModel

KINDS = ("lexical", "paraphrase", "reasoning", "analogy", "ambiguity")
GEOMETRY = "arXiv 2606.09287"
LINES = "arXiv 2410.01545"
ROBUST = "arXiv 2406.19384"
STRAIGHT = "Hosseini & Fedorenko 2023"
SERIES = {
    "trained": "trained",
    "untrained": "untrained",
    "without_massive": "without massive units",
    "shuffled_steps": "steps shuffled",
}
N_WHOLE = 40  # texts of which every token is recorded
N_CHANGED = 10  # texts that layers are skipped and exchanged on
MOST_LAYERS = 16  # whose ensembles are held against each other
N_ORDERS = 50  # in which steps are shuffled
MASSIVE = 100.0


@dataclass(frozen=True)
class Claim:
    """A claim, what was measured of it by series, and whether it holds.

    Attributes:
        key: snake case, the same in every run.
        source: the paper.
        claim, published: in its words and numbers.
        statistic: what is measured here.
        values: by series of ``SERIES``.
        low, high: it holds where the whole interval lies between; None for no bound.
        reason: why nothing could be measured; empty where it was.
    """

    key: str
    source: str
    claim: str
    published: str
    statistic: str
    values: dict[str, Value] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def holds(self, value: Value) -> bool:
        """Whether the whole interval (the number itself, where there is none) lies within the bounds."""
        if not value.defined:
            return False
        low, high = (value.value if end is None else end for end in (value.low, value.high))
        return (self.low is None or low > self.low) and (self.high is None or high < self.high)

    @property
    def bound(self) -> str:
        """The bounds in words; empty where there are none."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return "" if self.low is None and self.high is None else (
            f"above {self.low:g}" if self.high is None else f"below {self.high:g}"
        )  # fmt: skip

    @property
    def verdict(self) -> str:
        """``holds``, ``holds untrained too``, ``not``, ``cannot tell``; empty for a number without a bound."""
        if self.reason or "trained" not in self.values or not self.values["trained"].defined:
            return "cannot tell"
        if not self.bound:
            return ""
        if not self.holds(self.values["trained"]):
            return "not"
        untrained = self.values.get("untrained")
        return "holds untrained too" if untrained is not None and self.holds(untrained) else "holds"


class Prompts(NamedTuple):
    """The prompts of one kind: their texts, the set of each, and which are about an unambiguous word."""

    texts: list[str]
    sets: Tensor
    control: Tensor


def prompts() -> dict[str, Prompts]:
    """Twenty short prompts of each of the five kinds of arXiv 2606.09287; ours, since its own are unknown."""
    content: Any = json.loads(files("rsdyn.analysis").joinpath("claim_prompts.json").read_text(encoding="utf-8"))
    found = {}
    for kind in KINDS:
        rows = content[kind]
        sets = torch.tensor([row.get("set", i) for i, row in enumerate(rows)])
        control = torch.tensor([bool(row.get("control")) for row in rows])
        found[kind] = Prompts([row["text"] for row in rows], sets, control)
    return found


class Measurements(NamedTuple):
    """What is recorded of one model.

    Attributes:
        prompts: trajectories ``(20, L, D)`` of the last token over layers, as published, by kind.
        texts: trajectories ``(N, S, D)`` of the last token of the text's sequences.
        over_tokens, over_tokens_apart: ``(M, S)`` mean angle over the tokens of each of some texts; and without massive
            units and position 0.
        skip, swap: ``(T, L)`` and ``(T, L - 1)`` tokens predicted right by each text with a layer changed, and
            ``plain`` ``(T,)`` by the model itself; None for the untrained model.
        sites: recorded per layer.
    """

    prompts: dict[str, Tensor]
    texts: Tensor
    over_tokens: Tensor
    over_tokens_apart: Tensor
    plain: Tensor | None
    skip: Tensor | None
    swap: Tensor | None
    sites: int


@torch.no_grad()
def measure(
    lm: LanguageModel,
    of_prompts: Mapping[str, Sequence[np.ndarray]],
    texts: Sequence[np.ndarray],
    last: Tensor,
    *,
    change: bool,
    done: Callable[[int], object] = lambda n: None,
) -> Measurements:
    """Record prompts, and every token of some texts, in one model; with ``change`` also leave layers out and exchange.

    ``last`` are the trajectories ``(N, S, D)`` of the texts' last tokens.
    """
    sites = len(lm.sites.names)
    kinds = {kind: lm.record(tokens, dtype=torch.float32)[:, ::sites] for kind, tokens in of_prompts.items()}
    done(sum(map(len, of_prompts.values())))
    ratios = massive_ratios(last.mean(0, dtype=torch.float64))
    few = ratios <= MASSIVE
    whole, apart = [], []
    for tokens in texts[:N_WHOLE]:
        if len(tokens) < 5:
            continue
        x = lm.record([tokens], positions=[np.arange(len(tokens))], dtype=torch.float32).transpose(0, 1)
        whole.append(geometry.curvature(x).nanmean(1))
        apart.append(geometry.curvature(x[:, 1:], None if few.all() else few).nanmean(1))
    changed: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if change:
        rows = [_accuracy(lm, tokens) for tokens in texts[:N_CHANGED]]
        changed = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))  # type: ignore[assignment]
    done(len(texts[:N_WHOLE]))
    return Measurements(kinds, last, torch.stack(whole), torch.stack(apart), *changed, sites=sites)


def _accuracy(lm: LanguageModel, tokens: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a text predicted right by the model, without each layer, and with each exchanged with the next."""
    run = run_whole(lm, tokens)
    wanted, layers = run.tokens[1:], [*range(lm.n_layers)]

    def right(states: Tensor) -> Tensor:
        return (lm.logits(states[:-1]).argmax(-1) == wanted).sum().cpu()

    skip = [right(run_in_order(lm, run, [i for i in layers if i != layer])) for layer in layers]
    swap = []
    for layer in layers[:-1]:
        order = [*layers]
        order[layer], order[layer + 1] = layer + 1, layer
        swap.append(right(run_in_order(lm, run, order)))
    empty = torch.zeros(0, dtype=torch.int64)
    return right(run.final), torch.stack(skip), torch.stack(swap) if swap else empty


# -- the claims --------------------------------------------------------------------------------------------------------


def claims(of: Mapping[str, Measurements], documents: Tensor, *, seed: int = 0) -> list[Claim]:
    """Every claim with its values and bounds.

    Args:
        of: what was recorded of the ``trained`` and the ``untrained`` model.
        documents: ``(N,)`` the document of each text, which intervals leave out together.
        seed: of what is drawn.
    """
    return [*_curvature(of, seed), *_sets(of, seed), *_phases(of, seed), *_lines(of, documents), *_changed(of),
            *_straightening(of)]  # fmt: skip


def _curvature(of: Mapping[str, Measurements], seed: int) -> list[Claim]:
    kinds = prompts()
    bends = {s: {kind: geometry.curvature(x).mean(1) for kind, x in m.prompts.items()} for s, m in of.items()}
    few = _few(of["trained"].texts)
    if not few.all():
        bends["without_massive"] = {
            kind: geometry.curvature(x, few).mean(1) for kind, x in of["trained"].prompts.items()
        }
    bends["shuffled_steps"] = {kind: _shuffled(x, seed) for kind, x in of["trained"].prompts.items()}

    def mean_of(kind: str) -> dict[str, Value]:
        return {s: _mean(values[kind], kinds[kind].sets) for s, values in bends.items()}

    apart = {
        s: _difference((values["reasoning"], kinds["reasoning"].sets), (values["lexical"], kinds["lexical"].sets))
        for s, values in bends.items()
    }
    shuffled = apart["shuffled_steps"]
    less = {
        "trained": _difference((bends["trained"]["reasoning"] - bends["shuffled_steps"]["reasoning"],
                                kinds["reasoning"].sets))
    }  # fmt: skip
    words = "mean curvature over depth, radians"
    return [
        Claim("curvature_reasoning", GEOMETRY, "reasoning prompts curve strongly", "0.71 to 0.83",
              f"{words}, reasoning prompts (independent steps: 1.571)", mean_of("reasoning"), low=0.71, high=0.83),
        Claim("curvature_lexical", GEOMETRY, "lexical variations curve little", "0.27 to 0.31",
              f"{words}, lexical prompts", mean_of("lexical"), low=0.27, high=0.31),
        Claim("curvature_analogy", GEOMETRY, "", "as reasoning", f"{words}, analogies", mean_of("analogy")),
        Claim("curvature_difference", GEOMETRY, "reasoning curves more than lexical variation", "+0.40 to +0.56",
              f"{words}, reasoning less lexical", {k: v for k, v in apart.items() if k != "shuffled_steps"}, low=0.0),
        Claim("curvature_difference_shuffled", GEOMETRY, "the difference vanishes under shuffled layers", "0",
              "the same difference with steps shuffled over depth, as a share of the difference itself",
              {"trained": _share(shuffled, apart["trained"])}, high=0.5),
        Claim("curvature_below_shuffled", GEOMETRY, "", "not given",
              f"{words}, reasoning, less that with steps shuffled over depth", less),
    ]  # fmt: skip


def _sets(of: Mapping[str, Measurements], seed: int) -> list[Claim]:
    kinds = prompts()
    sets, n_sets = kinds["paraphrase"].sets, int(kinds["paraphrase"].sets.max()) + 1
    peaks, beyond = {}, {}
    for s, m in of.items():
        x = m.prompts["paraphrase"]
        first = x.shape[1] // 3
        curve = convergence(x, sets)[first:]
        at = int(curve.nan_to_num(-1).argmax())
        null = convergence_null(x[:, first:], sets, n=199, seed=seed).amax(1)
        without = torch.stack([convergence(x[sets != k], sets[sets != k])[first + at] for k in range(n_sets)])
        found = jackknife(curve[at], without)
        p = (1 + int((null >= curve[at]).sum())) / (1 + len(null))
        note = f" (p {p:.2g} by permuted sets; layer {first + at})"
        peaks[s] = Value(float(curve[at]), float(found.low), float(found.high), n=len(x), note=note)
        limit = float(null.quantile(0.95))
        beyond[s] = Value(float(curve[at]) - limit, float(found.low) - limit, float(found.high) - limit, n=len(x))
    ratio = {}
    pairs = kinds["ambiguity"]
    for s, m in of.items():
        x = m.prompts["ambiguity"]
        two = [x[pairs.sets == k] for k in pairs.sets.unique().tolist()]
        apart = separation(torch.stack([p[0] for p in two]), torch.stack([p[1] for p in two]))[:, -1].log()
        control = torch.tensor([bool(pairs.control[pairs.sets == k][0]) for k in pairs.sets.unique().tolist()])
        each = torch.arange(len(apart))
        ratio[s] = _exp(_difference((apart[~control], each[~control]), (apart[control], each[control])))
    return [
        Claim("convergence", GEOMETRY, "prompts of one meaning converge in middle to late layers", "0.41 to 0.58",
              "peak of 1 - distance within sets / between, last two thirds", peaks, low=0.41, high=0.58),
        Claim("convergence_beyond_chance", GEOMETRY, "more than unrelated prompts do", "p < 0.001",
              "the same less the 95 % quantile of permuted sets", beyond, low=0.0),
        Claim("bifurcation", GEOMETRY, "an ambiguous word's states part, an unambiguous one's do not", "up to 5.6",
              "distance of two contexts' states at the last layer, ambiguous over unambiguous words", ratio, low=1.0),
    ]  # fmt: skip


def _phases(of: Mapping[str, Measurements], seed: int) -> list[Claim]:
    values: dict[str, Value] = {}
    claim = Claim("three_phases", GEOMETRY, "cosine over depth has three phases", "3, in all models",
                  "change points of the cosine of successive states, beyond phase-randomised curves, plus 1", values,
                  low=2.5, high=3.5)  # fmt: skip
    for s, m in of.items():
        cosine = geometry.cosine(torch.cat([*m.prompts.values()])).mean(0, dtype=torch.float64)
        curve = cosine[:, None]
        if len(curve) < LEAST_PLACES:
            values[s] = Value(float("nan"), reason=f"{len(curve)} layers are too few for a change point to show")
            continue
        found = phases(curve, seed=seed)
        best = f"; best two at layers {', '.join(map(str, found.places[1]))}" if len(found.places) > 1 else ""
        p = float(found.p[1]) if len(found.p) > 1 else float("nan")
        values[s] = Value(found.n + 1.0, note=f" (p of two change points {p:.2g}{best})")
    return [claim]


def _lines(of: Mapping[str, Measurements], documents: Tensor) -> list[Claim]:
    found: dict[str, dict[str, Value]] = {"rate": {}, "alpha": {}, "fit": {}, "beyond": {}}
    reason = ""
    for s, m in of.items():
        x = m.texts[:, :: m.sites]
        n, n_layers, d = x.shape
        if n < 2 * d or n_layers < 4:
            reason = f"needs {2 * d} texts, twice as many as units, and four layers, and has {n} and {n_layers}"
            continue
        at = torch.linspace(0, n_layers - 1, min(n_layers, MOST_LAYERS)).round().to(torch.int64)
        group = group_of(documents, 5)
        x = x[:, at]
        whole = _transported(x, at)
        without = torch.stack([_transported(x[group != g], at) for g in group.unique()])
        for k, name in enumerate(found):
            ends = jackknife(whole[k], without[:, k])
            found[name][s] = Value(float(whole[k]), float(ends.low), float(ends.high), n=n)
    words = "variance left by linear transport"
    return [
        Claim("residual_rate", LINES, "what linear transport leaves grows exponentially over layers",
              "0.18 (GPT-2 medium), 0.27 (Llama 2 7B)", f"rate of the {words}, per layer", found["rate"], low=0.0,
              reason=reason),
        Claim("residual_fit", LINES, "", "a line", "share of its logarithm that a line explains (r squared)",
              found["fit"], low=0.9, reason=reason),
        Claim("residual_alpha", LINES, "", "0.64 (GPT-2 medium)", f"alpha of the {words}", found["alpha"],
              reason=reason),
        Claim("residual_rate_beyond", LINES, "and faster than the stream itself", "not given",
              "the rate less that of the ensemble's own variance, per layer", found["beyond"], low=0.0, reason=reason),
    ]  # fmt: skip


def _transported(x: Tensor, layers: Tensor) -> Tensor:
    """Rate, alpha, r squared of the residual variance, and the rate less the ensemble's own."""
    found = transport(x)
    ends = layers.expand(len(layers), -1)
    fitted = growth(ends.flatten(), found.residual.flatten())
    own = growth(layers[1:], found.own[1:])
    return torch.tensor([fitted.rate, fitted.alpha, fitted.r_squared, fitted.rate - own.rate], dtype=torch.float64)


def _changed(of: Mapping[str, Measurements]) -> list[Claim]:
    m = of["trained"]
    table = []
    for name, words, changed in (("skip", "without one layer", m.skip), ("swap", "with two layers exchanged", m.swap)):
        values: dict[str, Value] = {}
        ends: dict[str, Value] = {}
        reason = ""
        if changed is None or m.plain is None or changed.shape[1] < 5:
            reason = "five layers are needed, of which the middle ones are compared with the first"
        else:
            kept = [_kept_accuracy(changed, m.plain)]
            rest = [torch.arange(len(m.plain)) != i for i in range(len(m.plain))]
            kept += [_kept_accuracy(changed[rows], m.plain[rows]) for rows in rest]
            middle = [float(k[1:-1].median()) for k in kept]
            first = [float(k[0] - k[1:-1].median()) for k in kept]
            values["trained"], ends["trained"] = (_from_deleted(v, len(m.plain)) for v in (middle, first))
        table += [
            Claim(f"{name}_middle", ROBUST, f"models keep their accuracy {words}", "0.72 to 0.95",
                  f"top-1 accuracy {words} over the model's own, median over middle layers", values, low=0.72,
                  reason=reason),
            Claim(f"{name}_first", ROBUST, "but not at the first", "lowest", "the same at the first, less that median",
                  ends, high=0.0, reason=reason),
        ]  # fmt: skip
    return table


def _kept_accuracy(changed: Tensor, plain: Tensor) -> Tensor:
    return changed.sum(0).to(torch.float64) / max(1, int(plain.sum()))


def _straightening(of: Mapping[str, Measurements]) -> list[Claim]:
    curves = {s: m.over_tokens for s, m in of.items()}
    curves["without_massive"] = of["trained"].over_tokens_apart

    def values(part: Callable[[Tensor], Tensor]) -> dict[str, Value]:
        return {s: _mean(torch.rad2deg(part(c)), torch.arange(len(c))) for s, c in curves.items()}

    return [
        Claim("straightening", STRAIGHT, "sentences grow straighter from the first to the middle layers", "falls",
              "curvature over tokens, degrees: middle of the depth less first sublayer", values(
                  lambda c: c[:, c.shape[1] // 2] - c[:, 0]), high=0.0),
        Claim("curvature_over_tokens_first", STRAIGHT, "", "not given", "curvature over tokens at the first sublayer, "
              "degrees (independent states: 120)", values(lambda c: c[:, 0])),
    ]  # fmt: skip


# -- statistics --------------------------------------------------------------------------------------------------------


def _few(x: Tensor) -> Tensor:
    return massive_ratios(x.mean(0, dtype=torch.float64)) <= MASSIVE


def _shuffled(x: Tensor, seed: int) -> Tensor:
    """Mean curvature of each trajectory with its steps in other orders, the same for all, ``(N,)``."""
    of_path = step_products(x).of_path
    size = of_path.diagonal(0, 1, 2).sqrt()
    angles = (of_path / (size[:, :, None] * size[:, None, :])).clamp(-1, 1).arccos()
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(x), dtype=torch.float64)
    for _ in range(N_ORDERS):
        order = torch.randperm(angles.shape[1], generator=generator)
        total += angles[:, order[:-1], order[1:]].nanmean(1)
    return total / N_ORDERS


def _by_set(values: Tensor, sets: Tensor) -> Tensor:
    """The mean of each set: prompts of one set are nearly one prompt."""
    values = values.to(torch.float64)
    return torch.stack([values[sets == k].mean() for k in sets.unique().tolist()])


def _mean(values: Tensor, sets: Tensor) -> Value:
    return _difference((values, sets))


def _difference(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor] | None = None) -> Value:
    """Mean of ``a`` over its sets, less that of ``b``, with Student's interval (Welch)."""
    parts = [_by_set(*part) for part in (a, b) if part is not None]
    value = float(parts[0].mean()) - (float(parts[1].mean()) if b is not None else 0.0)
    n = sum(len(part[0]) for part in (a, b) if part is not None)
    if any(len(part) < 2 for part in parts):
        return Value(value, n=n)
    squares = [float(part.var()) / len(part) for part in parts]
    if sum(squares) == 0:
        return Value(value, value, value, n=n)
    freedom = sum(squares) ** 2 / sum(s**2 / (len(part) - 1) for s, part in zip(squares, parts, strict=True))
    away = float(student.ppf(0.975, freedom)) * sum(squares) ** 0.5
    return Value(value, value - away, value + away, n=n)


def _exp(value: Value) -> Value:
    ends = [None if x is None else float(np.exp(x)) for x in (value.value, value.low, value.high)]
    return Value(ends[0] if ends[0] is not None else float("nan"), ends[1], ends[2], n=value.n)


def _share(part: Value, whole: Value) -> Value:
    """A number as a share of another, whose own uncertainty is left out; its interval is the first one's."""
    if whole.low is None or whole.high is None or whole.low <= 0 <= whole.high:
        return Value(float("nan"), reason="there is no difference, within its interval, that could vanish")
    ends = sorted(x / whole.value for x in (part.low, part.high) if x is not None)
    low, high = ends or (None, None)
    return Value(part.value / whole.value, low, high, n=part.n)


def _from_deleted(values: Sequence[float], n: int) -> Value:
    whole, without = torch.tensor(values[0], dtype=torch.float64), torch.tensor(values[1:], dtype=torch.float64)
    if n < 2:
        return Value(values[0], n=n)
    found = jackknife(whole, without)
    return Value(values[0], float(found.low), float(found.high), n=n)


# -- in words ----------------------------------------------------------------------------------------------------------


def as_text(table: Sequence[Claim]) -> list[str]:
    """The table for a terminal, paper by paper."""
    lines: list[str] = []
    wide = max(len(label) for label in SERIES.values()) + 2
    for source in dict.fromkeys(claim.source for claim in table):
        lines += ["", source]
        for claim in (c for c in table if c.source == source):
            if claim.claim:
                lines.append(f"  {claim.claim[0].upper()}{claim.claim[1:]} (published: {claim.published})")
            verdict = f"   {claim.verdict}" if claim.verdict else ""
            bound = f" [holds if {claim.bound}]" if claim.bound else ""
            lines.append(f"    {claim.statistic}{bound}{verdict}")
            lines += [f"      {SERIES[s]:<{wide}}{v}" + (f" ({v.reason})" if v.reason else "")
                      for s, v in claim.values.items()]  # fmt: skip
            if claim.reason:
                lines.append(f"      {claim.reason}")
    return lines[1:]


def as_markdown(table: Sequence[Claim], title: str) -> str:
    """The same as a table of Markdown."""
    series = [s for s in SERIES if any(s in claim.values for claim in table)]
    head = ["paper", "claim", "published", "measured here", "holds if", *(SERIES[s] for s in series), "verdict"]
    lines = [f"# {title}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for claim in table:
        values = [str(claim.values[s]) if s in claim.values else "" for s in series]
        verdict = claim.verdict + (f": {claim.reason}" if claim.reason else "")
        cells = [claim.source, claim.claim, claim.published, claim.statistic, claim.bound, *values, verdict]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def as_json(table: Sequence[Claim]) -> list[dict[str, Any]]:
    """Numbers and verdicts."""
    return [
        {
            **{k: getattr(c, k) for k in ("key", "source", "claim", "published", "statistic", "bound", "verdict")},
            "reason": c.reason or None,
            "values": {
                s: {"value": v.value, "low": v.low, "high": v.high, "n": v.n, "text": str(v)}
                for s, v in c.values.items()
            },
        }
        for c in table
    ]
