"""The Jacobians of a text's stream, against matched nulls, and the claims of arXiv 2605.14258 (METHOD section 12).

One text after another: what is kept of each are curves over depth, never its matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rsdyn.analysis.finding import Value
from rsdyn.analysis.sink import PRODUCTS, SinkFinding, products, sink_finding
from rsdyn.analysis.statistics import per_layer, spearman
from rsdyn.dynamics.jacobian import NULLS as MATRIX_NULLS
from rsdyn.dynamics.jacobian import complex_share_of_chance, lyapunov, matched_null, spectrum
from rsdyn.dynamics.projection import PCA
from rsdyn.dynamics.resampling import N_DRAWS, jackknife
from rsdyn.lm.continuing.continuation import continue_all
from rsdyn.lm.continuing.reference import Reference
from rsdyn.lm.jacobians import Context, reference_run, sublayer_jacobians
from rsdyn.lm.model import LanguageModel

VERSION = 1  # raise it whenever a text would give other numbers
NULL_TEXTS = 2  # texts whose matrices are drawn again as random ones, which hardly differ from text to text
PLANE_TEXTS = 20  # texts whose states span the plane of the linear range
SIZES = tuple(10 ** (e / 2) for e in range(-6, 1))  # of a displacement, in norms of the state
DIRECTIONS = ("leading singular", "random", "plane")
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the depth, where the linear range is measured
SHARE = (0.0, 1.0)
LINEAR = (0.5, 2.0)  # what a displacement may be over what the Jacobian predicts

Curves = dict[str, np.ndarray]


class Kind(NamedTuple):
    """A series of Jacobians: whose, in which context, and what it is called."""

    model: str
    context: Context
    label: str


SERIES = {
    "full": Kind("trained", "full", "trained, full context"),
    "none": Kind("trained", "none", "trained, one token alone"),
    "untrained": Kind("untrained", "full", "untrained, full context"),
    "permuted": Kind("permuted", "full", "weights permuted"),
    "rotated": Kind("trained", "full", "G's singular values, rotated"),
    "gaussian": Kind("trained", "full", "iid Gaussian G"),
}
MODELS = ("trained", "untrained", "permuted")
# over depth, one value per sublayer; PRODUCTS are of the product from a sublayer to the end
CURVES = ("rms", "log_abs_det", "gain", "expanding", "complex_share", "antisymmetric", "henrici", "henrici_update")


# --- one text ---------------------------------------------------------------------------------------------------------


def measure_text(
    lm: LanguageModel,
    tokens: np.ndarray,
    model: str,
    *,
    nulls: int | None = None,
    plane: PCA | None = None,
    keep_eigenvalues: bool = False,
) -> dict[str, Curves]:
    """What the Jacobians of one text say, by series, for one of ``MODELS``.

    Args:
        lm: that model, in float32 or float64.
        nulls: seed of the random matrices to measure beside the trained model's; None for none.
        plane: for the linear range, of a trained model; None leaves it out.
        keep_eigenvalues: also give the eigenvalues of every sublayer.

    Returns:
        ``CURVES`` and ``PRODUCTS`` ``(S,)``, ``singular`` ``(S,)``, ``exponents`` ``(D,)`` and ``growth`` in nats per
        layer; for the trained model in full context also ``linear`` ``(depths, directions, sizes)``.
    """
    reference = reference_run(lm, tokens)
    found: dict[str, Curves] = {}
    for name, kind in SERIES.items():
        if kind.model != model or name in MATRIX_NULLS:
            continue
        js = sublayer_jacobians(lm, tokens, context=kind.context, reference=reference)
        found[name] = _curves(js, lm, reference, keep_eigenvalues)
        if name == "full":
            for null in MATRIX_NULLS if nulls is not None else ():
                generator = torch.Generator().manual_seed(2 * int(nulls or 0) + MATRIX_NULLS.index(null))
                eye = torch.eye(lm.n_units, dtype=js.dtype)
                drawn = torch.stack([eye + matched_null(j.cpu() - eye, null, generator) for j in js])  # type: ignore[arg-type]
                found[null] = _curves(drawn, lm, reference, keep_eigenvalues)
            if plane is not None:
                found[name]["linear"] = linear_range(lm, reference, js, plane)
    return found


def _curves(js: Tensor, lm: LanguageModel, reference: Reference, keep_eigenvalues: bool) -> Curves:
    spectra = [spectrum(j) for j in js]  # one at a time, as the eigenvalues are asked for anyway
    curves = {name: _stacked([getattr(s, name) for s in spectra]) for name in CURVES}
    curves["singular"] = _stacked([s.rank < lm.n_units for s in spectra])
    if keep_eigenvalues:
        curves["eigenvalues"] = torch.stack([s.eigenvalues for s in spectra]).cpu().to(torch.complex64).numpy()
    curves |= products(js)
    sites = len(lm.sites.names)
    layers = js.to(torch.float64)
    if sites == 2:  # a layer's own product is well conditioned, and halves the work
        layers = layers[1::2] @ layers[0::2]
    curves["exponents"] = lyapunov(layers).cpu().numpy()
    ends = reference.final.double().norm() / reference.stream[0].double().norm()
    curves["growth"] = np.array(float(ends.log()) / lm.n_layers)
    return curves


def _stacked(values: Sequence[Tensor]) -> np.ndarray:
    return torch.stack(list(values)).cpu().to(torch.float64).numpy()


def depths_of(n_sublayers: int) -> list[int]:
    """The sublayers at which the linear range is measured."""
    return sorted({round(f * (n_sublayers - 1)) for f in FRACTIONS})


def linear_range(lm: LanguageModel, reference: Reference, js: Tensor, plane: PCA) -> np.ndarray:
    """Displacement behind the last layer over what the Jacobian predicts: ``(depths, directions, sizes)``.

    Lengths are compared. Directions: the leading right singular vector of the derivative from there to the end, one at
    random, and the first axis of the plane; sizes in norms of the state.
    """
    generator = torch.Generator().manual_seed(0)
    depths, product, products = depths_of(lm.n_sublayers), torch.eye(lm.n_units, dtype=torch.float64), {}
    for s in range(lm.n_sublayers - 1, -1, -1):
        product = product @ js[s].cpu().double()
        if s in depths:
            products[s] = product
    injections, predicted = [], []
    for s in depths:
        leading = torch.linalg.svd(products[s])[2][0]
        drawn = torch.randn(lm.n_units, generator=generator, dtype=torch.float64)
        directions = torch.stack([leading, drawn / drawn.norm(), plane.components[:, 0].cpu().double()])
        state = reference.stream[s].cpu().double()
        moved = directions[:, None] * (torch.tensor(SIZES, dtype=torch.float64) * state.norm())[:, None]
        injections.append((s, (state + moved).flatten(0, 1)))
        predicted.append((moved @ products[s].T).norm(dim=-1))
    ratios = []
    for result, expected in zip(continue_all(lm, reference, injections), predicted, strict=True):
        away = (result.final.cpu().double() - reference.final.cpu().double()).norm(dim=-1)
        ratios.append(away.view(expected.shape) / expected)
    return torch.stack(ratios).numpy()


def range_end(ratio: np.ndarray) -> float:
    """The size, in norms of the state, at which a displacement leaves ``LINEAR``; inf where it never does.

    Between the sizes that were tried it is interpolated in logarithms; nan where the smallest is outside already, which
    is rounding or a very small range.
    """
    logs, sizes = np.log(ratio), np.log(SIZES)
    outside = np.abs(logs) > np.log(LINEAR[1])
    if not outside.any():
        return float("inf")
    first = int(outside.argmax())
    if first == 0:
        return float("nan")
    edge = np.sign(logs[first]) * np.log(LINEAR[1])
    share = (edge - logs[first - 1]) / (logs[first] - logs[first - 1])
    return float(np.exp(sizes[first - 1] + share * (sizes[first] - sizes[first - 1])))


# --- all texts --------------------------------------------------------------------------------------------------------


@dataclass
class JacobianResult:
    """What was measured on all texts.

    Attributes:
        n_layers, n_units, sites: of the model.
        curves: by series and name, ``(texts, ...)``.
        eigenvalues: of the first text, by series, ``(S, D)``.
        dtype: that of the model; what is below float32 was computed in float32.
        documents: the document of each text; None where nobody knows, and each text counts as one.
        sink: curves of the first texts with the sink held or taken away, by name, ``(texts, S)``.
        massive: the units that were held.
    """

    n_layers: int
    n_units: int
    sites: int
    curves: dict[str, Curves] = field(default_factory=dict)
    eigenvalues: Curves = field(default_factory=dict)
    dtype: str = "float32"
    documents: np.ndarray | None = None
    sink: dict[str, Curves] = field(default_factory=dict)
    massive: list[int] = field(default_factory=list)

    def groups(self, n: int) -> list[np.ndarray]:
        """The rows of each document among the first ``n`` texts: what an interval leaves out together."""
        documents = np.arange(n) if self.documents is None else np.asarray(self.documents)[:n]
        return [np.flatnonzero(documents == d) for d in dict.fromkeys(documents.tolist())]

    def add(self, found: Mapping[str, Curves]) -> None:
        """One more text, of one model."""
        for series, curves in found.items():
            if "eigenvalues" in curves:
                self.eigenvalues.setdefault(series, curves["eigenvalues"])
        _append(self.curves, {s: {k: v for k, v in c.items() if k != "eigenvalues"} for s, c in found.items()})

    def add_sink(self, found: Mapping[str, Curves]) -> None:
        """One more text of :func:`rsdyn.analysis.sink.measure_sink`."""
        _append(self.sink, found)

    def sink_finding(self) -> SinkFinding | None:
        """Whether the sink owns the gain; None where it was not measured."""
        if not self.sink:
            return None
        n = len(next(iter(self.sink.values()))["product_gain"])
        beside = {s: {name: self.curves[s][name][:n] for name in PRODUCTS} for s in ("full", "none")}
        return sink_finding(beside | self.sink, self.massive, self.groups(n))

    @property
    def series(self) -> list[str]:
        """The series that were measured, in the order of ``SERIES``."""
        return [name for name in SERIES if name in self.curves]

    def mean(self, series: str, name: str) -> np.ndarray:
        """A curve's mean over texts."""
        return self.curves[series][name].mean(0)

    def interval(self, series: str, name: str) -> np.ndarray | None:
        """Its 95 % interval ``(2, ...)`` by delete-one-document jackknife; None for one document."""
        values = self.curves[series][name]
        groups = self.groups(len(values))
        if len(groups) < 2:
            return None
        without = np.stack([np.delete(values, rows, 0).mean(0) for rows in groups])
        found = jackknife(torch.from_numpy(values.mean(0)), torch.from_numpy(without))
        return torch.stack([found.low, found.high]).numpy()

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, flat, for ``results.npz``."""
        out = {f"jacobian/{s}/{name}": v for s, curves in self.curves.items() for name, v in curves.items()}
        if self.documents is not None:
            out["jacobian/documents"] = np.asarray(self.documents)
        out |= {f"jacobian/{s}/eigenvalues": v for s, v in self.eigenvalues.items()}
        if self.sink:
            out |= {f"jacobian/sink/{s}/{name}": v for s, curves in self.sink.items() for name, v in curves.items()}
            out["jacobian/sink/massive_units"] = np.array(self.massive, dtype=np.int64)
        return out

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], *, n_layers: int, n_units: int, sites: int, dtype: str = "float32"
    ) -> JacobianResult:
        """What :meth:`arrays` gave, read back."""
        result = cls(n_layers, n_units, sites, dtype=dtype)
        for key in arrays:
            of, _, rest = key.partition("/")
            series, _, name = rest.partition("/")
            if of == "jacobian" and name == "eigenvalues":
                result.eigenvalues[series] = arrays[key]
            elif of == "jacobian" and name:
                result.curves.setdefault(series, {})[name] = arrays[key]
        if "jacobian/documents" in arrays:
            result.documents = arrays["jacobian/documents"]
        return result

    def ranges(self) -> dict[str, list[float]]:
        """The end of the linear range by direction, at each depth: the median over texts, in norms of the state."""
        linear = self.curves.get("full", {}).get("linear")
        if linear is None:
            return {}
        ends = np.array([[[range_end(r) for r in depth] for depth in text] for text in linear])
        return {d: [float(x) for x in np.median(ends[:, :, i], 0)] for i, d in enumerate(DIRECTIONS)}


def _append(kept: dict[str, Curves], found: Mapping[str, Curves]) -> None:
    """One more text's curves, below those that are there."""
    for series, curves in found.items():
        here = kept.setdefault(series, {})
        for name, value in curves.items():
            here[name] = np.concatenate([here[name], value[None]]) if name in here else value[None]


# --- the claims -------------------------------------------------------------------------------------------------------

Statistic = Callable[[Mapping[str, np.ndarray]], float]  # of the mean curves of a series


@dataclass(frozen=True)
class Claim:
    """A claim of arXiv 2605.14258 as a number, and when it is taken to hold.

    Attributes:
        key, claim, paper, statistic: as in :class:`rsdyn.analysis.finding.Finding`.
        of: the number, of a series' curves averaged over texts.
        low, high: it holds when the whole 95 % interval lies between these.
        span: what the number can be at all; intervals end there.
        in_steps: a rank correlation, which moves in steps, so that a jackknife takes its spread for none or for much.
        values: by series.
        verdict: ``holds``, ``holds untrained too``, ``only without context`` or ``not``; a claim whose interval reaches
            over its bound is ``not`` shown. Empty where there is nothing to hold.
        also: the nulls in which it holds as well.
    """

    key: str
    claim: str
    paper: str
    statistic: str
    of: Statistic
    low: float = -np.inf
    high: float = np.inf
    span: tuple[float, float] = (-np.inf, np.inf)
    in_steps: bool = False
    values: dict[str, Value] = field(default_factory=dict)
    verdict: str = ""
    also: tuple[str, ...] = ()

    @property
    def bound(self) -> str:
        """When it holds, in words."""
        return f"> {self.low:g}" if np.isfinite(self.low) else f"< {self.high:g}" if np.isfinite(self.high) else ""

    def holds(self, value: Value) -> bool:
        """Whether the interval (the number itself, where there is none) lies within the bounds."""
        low, high = (value.value if end is None else end for end in (value.low, value.high))
        return bool(low > self.low and high < self.high)


def claims_of(n_units: int, sites: int) -> list[Claim]:
    """The claims, without values, for a model of this width."""

    def layers(name: str) -> Callable[[Mapping[str, np.ndarray]], Tensor]:
        return lambda c: per_layer(torch.from_numpy(c[name]), sites) if sites == 1 else _pairs(c[name])

    def trend(name: str) -> Statistic:
        return lambda c: float(spearman(layers(name)(c)))

    def third(name: str, last: bool) -> Statistic:
        def of(c: Mapping[str, np.ndarray]) -> float:
            curve = layers(name)(c)
            n = max(1, len(curve) // 3)
            return float((curve[-n:] if last else curve[:n]).mean())

        return of

    depth = "rank correlation with depth"
    chance = complex_share_of_chance(n_units)
    relative: Callable[[Mapping[str, np.ndarray]], np.ndarray] = lambda c: c["exponents"] - c["growth"]  # noqa: E731
    return [
        Claim("complex_share", "nearly all eigenvalues are complex", "about 98 %", "share of complex eigenvalues",
              lambda c: float(c["complex_share"].mean()), low=0.9, span=SHARE),
        Claim("complex_excess", "", "", f"the same less that of a random {n_units} x {n_units} matrix ({chance:.3f})",
              lambda c: float(c["complex_share"].mean()) - chance, low=0.0, span=(-chance, 1 - chance)),
        Claim("antisymmetric_early", "early layers are dominated by rotation", "rotation-dominated",
              "antisymmetric share of G, first third", third("antisymmetric", last=False), low=0.5, span=SHARE),
        Claim("antisymmetric_trend", "and the later, the less", "falls", f"antisymmetric share of G, {depth}",
              trend("antisymmetric"), high=0.0, in_steps=True),
        Claim("antisymmetric_late", "late layers are near-symmetric", "near-symmetric",
              "antisymmetric share of G, last third", third("antisymmetric", last=True), high=0.25, span=SHARE),
        Claim("henrici_trend", "from non-normal to normal", "falls", f"Henrici's departure of J, {depth}",
              trend("henrici"), high=0.0, in_steps=True),
        Claim("henrici_update_trend", "", "", f"Henrici's departure of G, {depth}",
              trend("henrici_update"), high=0.0, in_steps=True),
        Claim("bottleneck", "the whole depth is a low-rank bottleneck", "low rank",
              "participation of the product's sigma^2, of D",
              lambda c: float(c["product_participation"][0]) / n_units, high=0.05, span=SHARE),
        Claim("bottleneck_trend", "which builds up with depth", "cumulative",
              f"participation of the product to the end, {depth} of its start",
              lambda c: float(spearman(torch.from_numpy(c["product_participation"]))), low=0.0, in_steps=True),
        Claim("gain", "", "not given", "ln of the product's largest gain",
              lambda c: float(np.log(c["product_gain"][0]))),
        Claim("expanding", "", "not given", "share of exponents above 0, mean of texts",
              lambda c: float(c["above_zero"]), span=SHARE),
        Claim("contracting", "states are pulled together (attractor-like)", "not given",
              "median exponent less the growth of the norm, nats per layer", lambda c: float(np.median(relative(c))),
              high=0.0),
    ]  # fmt: skip


def _pairs(curve: np.ndarray) -> Tensor:
    """The mean of a layer's two sublayers."""
    return torch.from_numpy(curve).reshape(-1, 2).mean(1)


def claims(result: JacobianResult) -> list[Claim]:
    """The claims with their values, intervals over texts and verdicts."""
    table = []
    for claim in claims_of(result.n_units, result.sites):
        values = {s: _value(result, s, claim) for s in result.series}
        verdict, also = _verdict(claim, values)
        parts: dict[str, Any] = {
            k: getattr(claim, k) for k in ("key", "claim", "paper", "statistic", "of", "low", "high")
        }
        table.append(Claim(**parts, values=values, verdict=verdict, also=also))
    return table


class _Means(dict[str, np.ndarray]):
    """The mean curves of some texts, each made when it is asked for."""

    def __init__(self, curves: Curves, rows: np.ndarray) -> None:
        super().__init__()
        self.curves, self.rows = curves, rows

    def __missing__(self, name: str) -> np.ndarray:
        found: np.ndarray = self.curves[name][self.rows].mean(0)
        self[name] = found
        return found


def _value(result: JacobianResult, series: str, claim: Claim) -> Value:
    curves = result.curves[series]
    n = len(curves["growth"])
    # of each text, and not of the mean exponents: that moves in steps
    curves = curves | {"above_zero": (curves["exponents"] > 0).mean(1)}
    every, groups = np.arange(n), result.groups(n)
    value = claim.of(_Means(curves, every))
    if len(groups) < 2:
        return Value(value, n=n)
    if claim.in_steps:
        rng = np.random.default_rng(0)
        draws = [
            np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))]) for _ in range(N_DRAWS)
        ]
        found = [claim.of(_Means(curves, rows)) for rows in draws]
        low, high = np.nanquantile(found, [0.025, 0.975])
        return Value(value, float(low), float(high), n=n)
    without = [claim.of(_Means(curves, np.setdiff1d(every, rows))) for rows in groups]
    interval = jackknife(torch.tensor(value, dtype=torch.float64), torch.tensor(without, dtype=torch.float64))
    least, most = claim.span
    return Value(value, max(float(interval.low), least), min(float(interval.high), most), n=n)


def _verdict(claim: Claim, values: Mapping[str, Value]) -> tuple[str, tuple[str, ...]]:
    if not claim.bound or "full" not in values:
        return "", ()
    held = [series for series, value in values.items() if claim.holds(value)]
    also = tuple(series for series in held if series not in ("full", "none"))
    if "full" in held:
        return ("holds untrained too" if "untrained" in held else "holds"), also
    return ("only without context" if "none" in held else "not"), also
