"""Rows of the findings, and sentences, on the shape of a stream and on what it says over depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rsdyn.analysis.finding import Finding, Value, number
from rsdyn.analysis.results import AnalysisResults, ConditionResults, Measured, PhaseResults, ReadoutResults, StepNull
from rsdyn.analysis.settings import PHASES
from rsdyn.analysis.statistics import ends_of
from rsdyn.dynamics.resampling import jackknife
from rsdyn.labels import NAMES

GEOMETRY = "arXiv 2606.09287"
DIMENSION = "arXiv 2405.15471"
CLUSTERS = "arXiv 2109.08406"
LENS = "nostalgebraist 2020"
STRAIGHT = "Hosseini & Fedorenko 2023"
STEPS = {
    "shuffled_steps": "steps shuffled over depth",
    "rotated_steps": "steps of each sublayer turned at random",
    "random_walk": "random walk with the stream's steps",
}
Of = Callable[[ConditionResults], Measured | None]


def shape_rows(found: AnalysisResults) -> list[Finding]:
    """The rows of curvature, dimension, similarity, readout and phases, for each condition that has them."""
    return [*_curvature(found), *_dimension(found), *_similarity(found), *_readout(found), *_phases(found)]


def _row(
    found: AnalysisResults,
    key: str,
    measure: str,
    statistic: str,
    of: Of,
    to: Callable[[Tensor], Tensor] = lambda curve: curve,
    *,
    claim: str = "",
    paper: str = "",
    under: str = "",
    within: tuple[float, float] = (-math.inf, math.inf),
    ends: bool = False,
    detail: bool = False,
    of_main: bool = False,
    apart: str = "without massive units",
    shown: Callable[[Tensor], Tensor] = lambda curve: curve,
) -> Iterator[Finding]:
    """A number ``to`` of a curve, in every condition; below it the same of what is left ``apart``.

    With ``ends`` the first, middle and last of its values stand beside it, as ``shown`` makes them.
    """
    values, without = {}, {}
    for condition, r in found.conditions.items():
        measured = of(r)
        if measured is None:
            continue
        values[condition] = _value(measured, to, r, ends, within, shown)
        if measured.without_massive is not None:
            without[condition] = _value(measured.without_massive, to, r, ends, within, shown)
    if values:
        yield Finding(key, measure, claim, paper, statistic, values, under=under, detail=detail, of_main=of_main)
    if without:
        under, key = under or key, f"{key}_without_massive"
        yield Finding(key, measure, "", "", apart, without, under=under, detail=detail, of_main=True)


def _value(
    measured: Measured,
    to: Callable[[Tensor], Tensor],
    r: ConditionResults,
    ends: bool,
    within: tuple[float, float],
    shown: Callable[[Tensor], Tensor],
) -> Value:
    value, low, high = to(measured.value), None, None
    if measured.groups is not None and len(measured.groups) > 1:
        interval = jackknife(value, torch.stack([to(curve) for curve in measured.groups]))
        low, high = max(float(interval.low), within[0]), min(float(interval.high), within[1])
    around = ends_of(shown(measured.value)) if ends and measured.value.ndim else None
    n = r.counts.trajectories if measured.n is None else measured.n
    reason = "" if value.isfinite() else "the curve is undefined somewhere"
    seeds = () if measured.seeds is None else tuple(float(to(curve)) for curve in measured.seeds)
    return Value(float(value), low, high, ends=around, n=n, seeds=seeds, reason=reason)


def _null_value(test: StepNull) -> Value:
    p = "below 1e-300" if test.p == 0 else number(test.p)
    return Value(test.mean, note=f" ± {number(test.std)} (z {test.z:+.1f}, p {p})")


def _nulls(found: AnalysisResults, key: str, measure: str, of: Callable[[ConditionResults], dict[str, StepNull]],
           words: str, under: str, *, detail: bool = False) -> Iterator[Finding]:  # fmt: skip
    for null, said in STEPS.items():
        values = {c: _null_value(of(r)[null]) for c, r in found.conditions.items() if null in of(r)}
        if values:
            yield Finding(
                f"{key}_{null}", measure, "", "", f"{words}, {said}", values, under=under, detail=detail, null=null
            )


# -- curvature ---------------------------------------------------------------------------------------------------------


def _curvature(found: AnalysisResults) -> Iterator[Finding]:
    yield from _row(
        found, "curvature", "curvature", "mean angle between successive steps, radians (independent steps: 1.571)",
        lambda r: r.curvature.mean_angle if r.curvature else None,
        claim="trajectories over depth curve little, and that vanishes under shuffled layers",
        paper=f"{GEOMETRY}: 0.27 to 0.83 rad, other models and prompts",
    )  # fmt: skip
    yield from _nulls(found, "curvature", "curvature", lambda r: r.curvature.nulls if r.curvature else {},
                      "the same", "curvature")  # fmt: skip
    yield from _nulls(found, "curvature_without_massive", "curvature",
                      lambda r: r.curvature.nulls_without_massive if r.curvature else {},
                      "without massive units", "curvature")  # fmt: skip
    yield from _row(found, "straightness", "curvature", "straightness, distance over length of the way",
                    lambda r: r.curvature.straightness if r.curvature else None)  # fmt: skip
    yield from _row(found, "straightness_scaled", "curvature", "steps scaled by their sublayer's RMS",
                    lambda r: r.curvature.scaled_straightness if r.curvature else None,
                    under="straightness")  # fmt: skip
    yield from _squared(found, "straightness_squared", "squared",
                        lambda r: r.curvature.straightness_nulls if r.curvature else {})  # fmt: skip
    yield from _squared(found, "straightness_scaled_squared", "steps scaled, squared",
                        lambda r: r.curvature.scaled_straightness_nulls if r.curvature else {},
                        detail=True)  # fmt: skip
    yield from _row(found, "path_length", "curvature", "length of the way, activation units",
                    lambda r: r.curvature.length if r.curvature else None, detail=True)  # fmt: skip
    yield from _row(
        found, "token_curvature_change", "curvature",
        "angle over tokens, degrees: middle of the depth less first sublayer (independent tokens: 120)",
        lambda r: r.curvature.over_tokens if r.curvature else None,
        lambda curve: torch.rad2deg(curve[len(curve) // 2] - curve[0]),
        claim="sentences grow straighter from the first to the middle layers, untrained models' do not",
        paper=f"{STRAIGHT}: falls", ends=True, shown=torch.rad2deg, apart="without massive units and position 0",
    )  # fmt: skip


def _squared(found: AnalysisResults, key: str, words: str, of: Callable[[ConditionResults], dict[str, StepNull]],
             *, detail: bool = False) -> Iterator[Finding]:  # fmt: skip
    """The squared straightness, which is what null models are of, and what they give."""
    value = {c: Value(of(r)["rotated_steps"].value) for c, r in found.conditions.items() if of(r)}
    if value:
        yield Finding(key, "curvature", "", "", f"{words}, mean over sequences", value, under="straightness",
                      detail=detail)  # fmt: skip
    yield from _nulls(found, key, "curvature", of, words, "straightness", detail=detail)


# -- dimension, similarity, readout, phases ----------------------------------------------------------------------------


def _mean(curve: Tensor) -> Tensor:
    return curve.nanmean()


def _middle_third(curve: Tensor) -> Tensor:
    """The mean over the middle third of the depth, over that of the two other thirds."""
    third = len(curve) // 3
    inner, outer = curve[third : len(curve) - third], torch.cat([curve[:third], curve[len(curve) - third :]])
    return inner.nanmean() / outer.nanmean()


def _dimension(found: AnalysisResults) -> Iterator[Finding]:
    yield from _row(
        found, "dimension_middle", "dimension", "intrinsic dimension (TwoNN), middle third of the depth over the rest",
        lambda r: r.dimension.twonn if r.dimension else None, _middle_third,
        claim="intrinsic dimension has a phase of high values in the middle of the depth",
        paper=f"{DIMENSION}: in five models",
    )  # fmt: skip
    for name, words in {
        "twonn": "intrinsic dimension (TwoNN), mean over depth",
        "mle": "intrinsic dimension (maximum likelihood), mean over depth",
        "participation": "participation ratio of each sublayer, mean over depth",
        "components_90": "components for 90 % of a sublayer's variance, mean over depth",
        "effective_rank": "effective rank of each sublayer, mean over depth",
        "matrix_entropy": "matrix entropy of each sublayer, nats, mean over depth",
    }.items():
        yield from _row(found, f"dimension_{name}", "dimension", words,
                        lambda r, name=name: getattr(r.dimension, name) if r.dimension else None, _mean, ends=True)  # type: ignore[misc]  # fmt: skip
        yield from _gaussian(found, name)


def _gaussian(found: AnalysisResults, name: str) -> Iterator[Finding]:
    """A dimension of as many states as were held against Gaussian ones, and of these."""
    tests = {c: r.dimension for c, r in found.conditions.items() if r.dimension and name in r.dimension.nulls}
    if not tests:
        return
    key, under = f"dimension_{name}_few", f"dimension_{name}"
    n = next(iter(tests.values())).n_nulls
    few = {c: Value(d.nulls[name].value, n=d.n_nulls) for c, d in tests.items()}
    yield Finding(key, "dimension", "", "", f"of the first {n} states", few, under=under, detail=True)
    yield Finding(
        f"{key}_gaussian", "dimension", "", "", f"of {n} Gaussian states of the same covariance",
        {c: _null_value(d.nulls[name]) for c, d in tests.items()}, under=under, null="gaussian",
    )  # fmt: skip


def _clusters(of: Tensor) -> Value:
    """How much more alike the sublayers of each half of the depth are than those of different halves."""
    half = len(of) // 2
    apart = torch.zeros(of.shape, dtype=torch.bool)
    apart[:half, half:] = apart[half:, :half] = True
    inside = ~apart & ~torch.eye(len(of), dtype=torch.bool)
    within, between = (of.cpu()[part].nanmean() for part in (inside, apart))
    return Value(float(within - between), note=f" ({number(float(within))} less {number(float(between))})")


def _similarity(found: AnalysisResults) -> Iterator[Finding]:
    maps = {
        "": ("", {c: r.similarity.map for c, r in found.conditions.items() if r.similarity}),
        "_without_massive": ("without massive units", {
            c: r.similarity.map_without_massive for c, r in found.conditions.items()
            if r.similarity and r.similarity.map_without_massive is not None
        }),
    }  # fmt: skip
    for more, (apart, known) in maps.items():
        if not known:
            continue
        yield Finding(
            f"similarity_clusters{more}", "similarity",
            "" if apart else "earlier and later layers are two clusters, alike within and not between",
            "" if apart else f"{CLUSTERS}: fine-tuned encoders",
            apart or "CKA of sublayers, within a half of the depth less between halves",
            {c: _clusters(of) for c, of in known.items()},
            under="similarity_clusters" if apart else "", detail=bool(apart), of_main=bool(apart),
        )  # fmt: skip
    yield from _row(found, "similarity_adjacent", "similarity", "CKA of successive sublayers, mean over depth",
                    lambda r: r.similarity.adjacent if r.similarity else None, _mean, ends=True)  # fmt: skip
    floor = {
        c: Value(float(r.similarity.floor.nanmean()), note=f" ± {number(float(_known(r.similarity.floor).std()))}")
        for c, r in found.conditions.items() if r.similarity and r.similarity.floor is not None
    }  # fmt: skip
    if floor:
        yield Finding("similarity_floor", "similarity", "", "", "sequences permuted (floor)", floor,
                      under="similarity_adjacent")  # fmt: skip
    main = NAMES.get(found.main_name, found.main_name)
    yield from _row(found, "similarity_with_main", "similarity", f"CKA with {main}, mean over depth",
                    lambda r: r.similarity.with_main if r.similarity else None, _mean, ends=True,
                    of_main=True)  # fmt: skip


def _known(values: Tensor) -> Tensor:
    return values[values.isfinite()]


def _readout(found: AnalysisResults) -> Iterator[Finding]:
    n = found.n_sublayers
    yield from _row(
        found, "readout_kl", "readout", "KL(final || sublayer), nats, at the middle of the depth",
        lambda r: r.readout.kl if r.readout else None, _middle, ends=True,
        claim="what layers say approaches the final distribution step by step, and is near it long before the end",
        paper=f"{LENS}: GPT-2",
    )  # fmt: skip
    yield from _row(found, "readout_commit", "readout",
                    f"first sublayer from which the top token stays the final one, of {n}",
                    lambda r: r.readout.commit if r.readout else None, within=(0, n))  # fmt: skip
    yield from _row(found, "readout_entropy", "readout", "entropy of a sublayer's distribution, nats, at the middle",
                    lambda r: r.readout.entropy if r.readout else None, _middle, ends=True, detail=True)  # fmt: skip
    yield from _row(
        found, "readout_agreement", "readout", "top token is the final one, at the last sublayer",
        lambda r: r.readout.agreement if r.readout else None, lambda curve: _read(curve)[-1], ends=True, within=(0, 1),
    )  # fmt: skip
    yield from _row(
        found, "readout_commonest", "readout", "of a readout that always says the commonest final token",
        lambda r: r.readout.commonest if r.readout else None, under="readout_agreement", within=(0, 1),
    )  # fmt: skip


def _commonest(found: ReadoutResults) -> str:
    """What the agreement of a readout must stand above."""
    if found.commonest is None:
        return ""
    return (
        f" The final top token is {found.commonest_token!r} in {float(found.commonest.value):.0%} of them: a readout "
        "that always said it would agree as often, and have committed from the first sublayer on."
    )


def _read(curve: Tensor) -> Tensor:
    """The values where the lens reads."""
    known = curve[curve.isfinite()]
    return known if len(known) else curve


def _middle(curve: Tensor) -> Tensor:
    known = _read(curve)
    return known[(len(known) - 1) // 2]


def _phases(found: AnalysisResults) -> Iterator[Finding]:
    values = {}
    for condition, r in found.conditions.items():
        if r.phases is not None:
            values[condition] = Value(float(r.phases.n), note=f" ({_places(r.phases)})", whole=True)
    if values:
        yield Finding(
            "phases", "phases", "layers fall into three phases, in all models",
            f"{GEOMETRY}: 2 change points", "change points beyond phase-randomised curves", values,
        )  # fmt: skip


def _places(found: PhaseResults) -> str:
    """The change points that were found, else the best two, with their p."""
    k = max(found.n, min(2, len(found.p)))
    which = "at layer" if found.n else "best two at"
    places = []
    for i in range(k):
        at, low, high = (int(t[k - 1, i]) for t in (found.places, found.low, found.high))
        places.append(f"{at}" + (f" [{low}, {high}]" if low >= 0 else ""))
    return f"{which} {', '.join(places)}; p {number(float(found.p[k - 1]))}"


WITHOUT_LARGEST: dict[str, tuple[Of, Callable[[Tensor], Tensor]]] = {
    "curvature": (lambda r: r.curvature.mean_angle if r.curvature else None, lambda angle: angle),
    "straightness": (lambda r: r.curvature.straightness if r.curvature else None, lambda share: share),
    **{
        f"dimension_{name}": (lambda r, name=name: getattr(r.dimension, name) if r.dimension else None, _mean)  # type: ignore[misc]
        for name in ("participation", "components_90", "effective_rank", "matrix_entropy")
    },
}
"""Of which rows the curves without each number of the largest units are kept, and what the row is of them."""

# -- in words ----------------------------------------------------------------------------------------------------------


def shape_in_words(found: AnalysisResults) -> list[str]:
    """What a reader must know of these measures."""
    r, words = found.main, []
    if r.curvature is not None:
        by = r.curvature.nulls
        beyond = [STEPS[null] for null, test in by.items() if test.p < 0.05]
        within = [STEPS[null] for null, test in by.items() if not test.p < 0.05]
        told = f"beyond: {'; '.join(beyond) or 'none'}. Not beyond: {'; '.join(within) or 'none'}"
        words.append(
            f"Curvature: mean angle {number(float(r.curvature.mean_angle.value))} rad; null models that it is {told}. "
            "Steps that have nothing to do with each other are at a right angle, 1.571 rad. The order of steps does "
            "not change straightness, so no shuffle can test it."
        )
    if r.dimension is not None:
        repeated = r.dimension.repeated
        at = int((repeated > 0).sum())
        said = f" At {at} sublayers up to {int(repeated.max())} states repeat others and are left out." if at else ""
        words.append(
            "Intrinsic dimensions by nearest neighbours fall short of high ones with any number of sequences at hand "
            f"(here {r.dimension.twonn.n or r.counts.trajectories}): compare them at equal N.{said}"
        )
    if r.readout is not None:
        n = r.readout.kl.n
        massive = " The final norm divides by massive units: where they are, what is read of the others is made small."
        if not r.flags.known:
            massive += " Whether this model has any was not looked for: that takes a measure of its stream."
        elif not len(r.flags.massive_units):
            massive = ""
        words.append(
            f"Readout through the {r.readout.lens}, at the last token of {n} sequence{'s' * (n != 1)}, up to the "
            f"model's own distribution.{massive}{_commonest(r.readout)}"
        )
    if r.phases is not None:
        of = ", ".join(name.replace("/", " ") for name in r.phases.curves)
        words.append(
            f"Phases: {r.phases.n} change points of {of} together are beyond curves of the same trend and spectrum "
            f"({_places(r.phases)}; intervals over documents). Any curve can be cut in three."
        )
    elif PHASES in found.measures:
        words.append("Phases were not looked for: no curve is defined at every layer and changes over them.")
    return words
