"""The panels of principal components: paths, variance explained, components needed, and loadings (Fig. 4A-C)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rsdyn.analysis.results import Plane, PrincipalComponents
from rsdyn.figures.colours import LOOKS, WITHOUT, Look
from rsdyn.figures.over_depth import sublayer_names
from rsdyn.figures.panel import Axis, Bars, Caption, Line, Mark, Panel, Path, Paths, array, brief, counted, percent
from rsdyn.figures.streams import Stream, curve_panel, pick, sequences_in_words, when

N_BARS = 10  # components
N_NAMED = 3  # units of each


def components(streams: Sequence[Stream]) -> list[Panel]:
    """Fig. 4A to C, and what the components are made of."""
    some = [s for s in streams if s.found.pca is not None]
    if not some:
        return []
    n = ", ".join(dict.fromkeys(str(len(_found(s).ratio.value)) for s in some))
    jackknife = ""
    return [
        *_plane(some),
        _control(some),
        _cumulative(some),
        *curve_panel(
            "fig4c_variance_by_sublayer", "4C", "Explained variance by sublayer", some,
            lambda r: r.pca.over_depth.explained if r.pca and r.pca.over_depth else None,
            Axis("explained variance", limits=(-0.02, 1.02)),
            Caption(
                f"How much of each sublayer's variance over {{sequences}} the first {n} components of all sublayers "
                f"together hold.{jackknife} Values below 0, of sublayers that vary outside all of the components, are "
                "off the panel.",
                "which sublayers vary within the directions that are shared.",
                "that later layers need fewer components because it rises: the components are fitted to where the "
                "variance is, which is late. The two panels below do not depend on that.",
            ),
        ),
        *curve_panel(
            "fig4c_components_needed", "4C", "Components for 90 % of a sublayer's variance", some,
            lambda r: r.pca.over_depth.components_90 if r.pca and r.pca.over_depth else None,
            Axis("components", from_zero=True),
            Caption(
                "How many of each sublayer's own components hold 90 % of its variance over {sequences}.",
                "the number of directions that matter at a depth, whatever its norm. The paper's claim is that it "
                "falls.",
                "a number of dimensions beyond the number of sequences, which limits it from above.",
            ),
        ),
        *curve_panel(
            "fig4c_dimensions", "4C", "Dimensions filled at each sublayer", some,
            lambda r: r.pca.over_depth.dimensions if r.pca and r.pca.over_depth else None,
            Axis("participation ratio of the variances", from_zero=True),
            Caption(
                "The participation ratio of each sublayer's own variances, (Σλ)² / Σλ², over {sequences}.",
                "how many directions the sequences spread over evenly at a depth. Here the claim \u201clater layers "
                "need fewer components\u201d can be seen to hold or not.",
                "much about small directions: the ratio is ruled by the largest variances, and one massive unit holds "
                "it near 1.",
            ),
        ),
        _loadings(some[0]),
        _units_of(some),
    ]  # fmt: skip


def _found(stream: Stream) -> PrincipalComponents:
    assert stream.found.pca is not None
    return stream.found.pca


def _axes(plane: Plane) -> tuple[Axis, Axis]:
    ratio = array(plane.ratio)
    x, y = (Axis(f"component {k + 1}" + (f" ({percent(ratio[k])})" if k < len(ratio) else "")) for k in (0, 1))
    return x, y


def plane_marks(
    name: str, mean: np.ndarray, samples: np.ndarray | None, sites: int, labels: Sequence[str] = (), **more: object
) -> list[Mark]:
    """A mean path ``(S, 2+)`` through a plane with single ones ``(n, S, 2+)`` behind it."""
    text = sublayer_names(len(mean), sites)
    marks: list[Mark] = []
    if samples is not None and len(samples):
        called = tuple(labels) or tuple(f"sequence {i}" for i in range(len(samples)))
        marks.append(Paths(name="sequences", x=samples[..., 0], y=samples[..., 1], labels=called, text=text, **more))  # type: ignore[arg-type]
    marks.append(Path(name=name, x=mean[:, 0], y=mean[:, 1], sites=sites, text=text, **more))  # type: ignore[arg-type]
    return marks


def _planes(streams: list[Stream], of: Callable[[PrincipalComponents], Plane], labels: str = "") -> tuple[Mark, ...]:
    marks: list[Mark] = []
    for stream in streams:
        plane = of(_found(stream))
        samples = array(plane.samples)
        called = [f"{labels} {i}" for i in range(len(samples))] if labels else []
        marks += plane_marks("mean", array(plane.mean), samples, stream.sites, called, when=when(stream, streams))
    return tuple(marks)


def _plane(streams: list[Stream]) -> list[Panel]:
    some = [s for s in streams if (plane := _found(s).latents) is not None and plane.mean.shape[1] > 1]
    if not some:
        return []

    def of(found: PrincipalComponents) -> Plane:
        assert found.latents is not None
        return found.latents

    first = _found(some[0])
    mean = array(of(first).mean)
    angles = first.half_angles
    sure = (
        f" The planes of two halves of the sequences lie {float(angles[0]):.1f} and {float(angles[1]):.1f} degrees "
        "apart."
        if angles is not None
        else ""
    )
    n = len(of(first).samples)
    axes = {s.key: _axes(of(_found(s))) for s in some}
    return [
        Panel(
            key="fig4a_trajectory",
            figure="4A",
            title="The stream in the plane of its first two components",
            marks=_planes(some, of),
            x=axes[some[0].key][0],
            y=axes[some[0].key][1],
            axes=axes,
            own_axes=True,
            controls=pick(some),
            tall=1.3,
            caption=Caption(
                f"The mean over {sequences_in_words(some)} at every sublayer, coloured by depth (circles resid_pre, "
                f"squares resid_mid), and single sequences behind it; on the page, point at one to follow it. "
                f"Components are of all states of all sequences together.{sure}",
                "the direction in which all sequences move together, and how far they spread about it.",
                "that the curve is the system's: the first two components of any smooth random walk trace one, as the "
                "panel beside it shows. The plane holds the share of the variance that its axes say; the rest is not "
                "seen.",
            ),
            alt=f"Path of the mean over {len(mean)} sublayers in a plane of components, from ({brief(mean[0, 0])}, "
            f"{brief(mean[0, 1])}) to ({brief(mean[-1, 0])}, {brief(mean[-1, 1])}), and {n} single sequences.",
        )
    ]


def _control(streams: list[Stream]) -> Panel:
    axes = {s.key: _axes(_found(s).control) for s in streams}
    control = _found(streams[0]).control
    held = percent(array(control.ratio)[:2].sum())
    return Panel(
        key="fig4a_control", figure="4A", title="A random walk in the plane of its own components",
        marks=_planes(streams, lambda found: found.control, "walk"), x=axes[streams[0].key][0],
        y=axes[streams[0].key][1], axes=axes, own_axes=True, controls=pick(streams), tall=1.3,
        caption=Caption(
            f"{len(control.samples)} smoothed random walks with the stream's own step lengths, common to all and their "
            "own, in the plane of their own components, drawn as Fig. 4A is.",
            "how much curve, and how much variance in a plane, comes from nothing but steps added up.",
            "a test: it is one draw of one kind of walk.",
        ),
        alt=f"Path of the mean of random walks in the plane of their own first two components, which hold {held} of "
        "their variance; it is a curve although the walks have no dynamics.",
    )  # fmt: skip


def _cumulative(streams: list[Stream]) -> Panel:
    marks: list[Mark] = []
    told = []
    for stream in streams:
        ratio = _found(stream).ratio
        for without, measured in ((False, ratio), (True, ratio.without_massive)):
            if measured is None:
                continue
            total = np.cumsum(array(measured.value))
            count = np.arange(1, len(total) + 1)
            label = (WITHOUT if stream.main else f"{stream.label}, {WITHOUT}") if without else stream.label
            look, other = stream.looks, LOOKS["without_massive"]
            if without:
                look = other if stream.main else Look(look.colour, other.dash)
            reached = np.flatnonzero(total >= 0.9 - 1e-12)  # a sum of shares may end an ulp short
            needs = f"{reached[0] + 1} for 90 %" if len(reached) else "90 % is not reached"
            marks.append(
                Line(name=label, x=count, y=total, look=look, waits=without and not stream.main,
                     text=tuple(f"{counted(int(k), 'component')}<br>{percent(v)}" for k, v in
                                zip(count, total, strict=True)))
            )  # fmt: skip
            told.append(
                f"{label}: {percent(total[0])} with one component, {percent(total[-1])} with {len(total)}, {needs}"
            )
    most = max(len(_found(s).ratio.value) for s in streams)
    return Panel(
        key="fig4b_cumulative_variance", figure="4B", title="Cumulative explained variance", marks=tuple(marks),
        x=Axis("number of components", "log" if most > 20 else "linear"),
        y=Axis("cumulative explained variance", limits=(0, 1.03), percent=True),
        caption=Caption(
            f"The share of the variance of all states, over all sublayers of {sequences_in_words(streams)}, that the "
            f"first components hold together. {'; '.join(told)}.",
            "how many directions hold most of what varies, depth included.",
            "the dimension of the computation: large units and late layers own the variance, and movement that is "
            "common to all sequences is counted like differences between them.",
        ),
        alt="Rising lines. " + "; ".join(told) + ".",
    )  # fmt: skip


def _loadings(stream: Stream) -> Panel:
    """Squared loadings of the largest units of each of the first components, by name."""
    found = _found(stream)
    squared = array(found.components)[:N_BARS] ** 2
    massive = set(stream.found.flags.massive_units.tolist())
    parts: dict[str, list[tuple[int, float, float, str]]] = {"largest units": [], "massive units": []}
    ticks = []
    for k, row in enumerate(squared):
        left = 0.0
        named = []
        for u in np.argsort(-row, kind="stable")[:N_NAMED]:
            is_massive = int(u) in massive
            parts["massive units" if is_massive else "largest units"].append((k, left, row[u], f"unit {u}"))
            named.append(f"{u}{'*' * is_massive}")
            left += row[u]
        ticks.append((float(k), f"PC {k + 1}: {', '.join(named)}"))
    marks = [
        Bars(name=name, x=[p[0] for p in of], start=[p[1] for p in of], height=[p[2] for p in of], width=0.7,  # type: ignore[arg-type]
             text=tuple(f"{p[3]}: {percent(p[2])} of PC {p[0] + 1}" for p in of))
        for name, of in parts.items()
        if of
    ]  # fmt: skip
    held = (
        f", of which {counted(len(massive), 'massive unit')} hold {percent(squared[0, sorted(massive)].sum())}"
        if massive
        else ""
    )
    told = f"the largest unit holds {percent(squared[0].max())} of component 1{held}"
    return Panel(
        key="fig4_loadings", figure="4A", title=f"The {N_NAMED} largest units of each component", marks=tuple(marks),
        x=Axis("squared loading (share of the component)", percent=True), y=Axis("", ticks=tuple(ticks)),
        caption=Caption(
            f"The squared loadings of the {N_NAMED} largest units of each of the first components of {stream.label}, "
            f"by their numbers, largest first; a star marks a massive unit. Here {told}.",
            "whether a component is a direction of many units or, at bottom, one or two.",
            "that a few large loadings are a finding: massive units have most of the variance and become components "
            "of themselves.",
        ),
        alt=f"Bars of squared loadings: {told}.",
    )  # fmt: skip


def _units_of(streams: list[Stream]) -> Panel:
    marks: list[Mark] = []
    told = []
    for stream in streams:
        power = array(_found(stream).components)[:2] ** 2
        largest = np.sort(power, axis=1)[:, ::-1].cumsum(1)
        count = np.arange(1, largest.shape[1] + 1)
        for k, row in enumerate(largest):
            look = Look(stream.looks.colour, ("solid", "dash")[k])
            marks.append(Line(name=f"{stream.label}, component {k + 1}", x=count, y=row, look=look,
                              waits=not stream.first))  # fmt: skip
        told.append(f"{stream.label}: the largest unit holds {percent(largest[0, 0])} of component 1")
    return Panel(
        key="fig4_units_of_components", figure="4A", title="How many units a component is made of",
        marks=tuple(marks), x=Axis("units, largest loading first", "log"),
        y=Axis("share of the component", limits=(0, 1.03), percent=True),
        caption=Caption(
            f"The squared loadings of the first two components, added up from the largest. {'; '.join(told)}.",
            "whether a component is a direction of many units or, at bottom, one or two.",
            "the units themselves: the panel beside it names them.",
        ),
        alt="Rising lines. " + "; ".join(told) + ".",
    )  # fmt: skip
