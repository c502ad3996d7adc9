"""Curves over depth by group of sequences, and the differences between groups."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from rsdyn.analysis.results import ByGroup, GroupCurve
from rsdyn.figures.colours import WITHOUT, Look
from rsdyn.figures.over_depth import depth_axis, sublayer_names, transition_names
from rsdyn.figures.panel import Axis, Caption, Mark, Panel, Rule, array, brief, in_words
from rsdyn.figures.streams import depth_lines

COLOURS = ("cross", "c1", "within", "c2", "c3", "c6", "c5", "c4")
DASHES = ("solid", "dash", "dot", "dashdot")
SECTION = "groups"  # of these panels, and what their keys begin with
LABELS = {
    "density": "share of units",
    "participation": "units",
    "correlation": "mean correlation over units",
    "cosine": "cosine",
    "speed": "speed (activation units)",
    "relative_speed": "step / norm of the state",
    "norm": "norm (activation units)",
    "explained": "explained variance",
    "curvature": "angle (radians)",
    "information": "mean information (nats)",
    "dimensions": "participation ratio of the variances",
    "components_90": "components",
}


def groups(found: ByGroup | None, *, n_sublayers: int, sites: int) -> list[Panel]:
    """Two panels for each curve: of each group, and of the differences; none where sequences have no labels."""
    if found is None:
        return []
    panels: list[Panel] = []
    for key, curve in found.curves.items():
        if curve.value.shape[1] > 1 and not curve.without_massive:
            panels += _panels(key, curve, found, n_sublayers, sites)
    return panels


def looks_of_groups(names: Sequence[str]) -> list[Look]:
    """The look of each group: of its name, whatever groups stand beside it, unless one before has taken that look."""
    every = [Look(colour, dash) for dash in DASHES for colour in COLOURS]
    looks: list[Look] = []
    for name in names:
        first = zlib.crc32(name.encode()) % len(COLOURS)
        own = [every[(first + k) % len(COLOURS)] for k in range(len(COLOURS))] + every[len(COLOURS) :]
        looks.append(next((look for look in own if look not in looks), own[0]))
    return looks


def _panels(key: str, curve: GroupCurve, found: ByGroup, n_sublayers: int, sites: int) -> list[Panel]:
    y = LABELS[key]
    few = next((c for c in found.curves.values() if c.path == curve.path and c.without_massive), None)
    looks = looks_of_groups(found.names)
    axis = depth_axis(n_sublayers, sites)
    between = curve.value.shape[1] == n_sublayers - 1
    kinds = " Circles are steps within a layer, squares those from layer to layer." if between and sites == 2 else ""
    equal = "; every group at equal N, of larger ones a random part" if curve.equal_n else ""
    sizes = ", ".join(f"{name} {n:,}" for name, n in zip(found.names, curve.n.tolist(), strict=True))
    names = [shown(name) for name in found.names]
    lines = _lines(names, array(curve.value), array(curve.interval), n_sublayers, sites, looks)
    if few is not None:
        apart = [f"{name}, {WITHOUT}" for name in names]
        lines += _lines(apart, array(few.value), array(few.interval), n_sublayers, sites, looks, waits=True)
    values = array(curve.value)
    where = _where(values.shape[1], n_sublayers, sites)
    told = "; ".join(in_words(n, v, where) for n, v in zip(names, values, strict=True) if np.isfinite(v).any())
    made = [
        Panel(
            key=f"{SECTION}_{key}", section=SECTION, title=f"By group: {curve.words}", marks=tuple(lines),
            x=axis, y=Axis(y),
            bands=f"95 % interval over {found.over}",
            caption=Caption(
                f"The {curve.words} of each group of sequences (trajectories: {sizes}){equal}.{kinds}",
                "whether groups part, and where",
                "whether they differ: two intervals may overlap while their difference is clear, which the next panel "
                "shows",
            ),
            alt=f"Lines over depth. {told}.",
        )
    ]  # fmt: skip
    if not found.first:
        return made
    several = len(found.names) > 2
    contrasts = [shown(name) for name in (found.first if several else found.contrasts)]
    looks = [looks[found.names.index(name)] for name in found.first]
    lines = _lines(contrasts, array(curve.difference), array(curve.difference_interval), n_sublayers, sites, looks)
    if few is not None:
        apart = [f"{name}, {WITHOUT}" for name in contrasts]
        lines += _lines(
            apart, array(few.difference), array(few.difference_interval), n_sublayers, sites, looks, waits=True
        )
    ps = ", ".join(f"{name} {brief(float(p))}" for name, p in zip(contrasts, curve.p, strict=True))
    rest = "Each group less all other labelled sequences" if several else f"The difference {contrasts[0]}"
    told = "; ".join(in_words(n, array(v), where) for n, v in zip(contrasts, curve.difference, strict=True))
    made.append(
        Panel(
            key=f"{SECTION}_{key}_difference",
            section=SECTION,
            title=f"Difference between groups: {curve.words}",
            marks=(Rule(name="zero", y=0.0, legend=False), *lines),
            x=axis, y=Axis(f"difference, {y}"),
            bands=f"95 % interval over {found.over}",
            caption=Caption(
                f"{rest}, with an interval that leaves out {found.over} of both{equal}.{kinds} p of a difference this "
                f"large anywhere over depth, over permutations of labels: {ps}.",
                "where over depth groups differ, and by how much",
                "a test at one sublayer: bands are for each place by itself, and p is for the whole curve",
            ),
            alt=f"Lines over depth. {told}.",
        )
    )  # fmt: skip
    return made


def shown(name: str) -> str:
    """A group's name as a figure has it: short, and nothing that a back end takes for markup."""
    text = name.replace("$", "＄").replace("<", "‹").replace(">", "›").strip("_") or "_"
    return text if len(text) <= 40 else text[:39] + "…"


def _where(n: int, n_sublayers: int, sites: int) -> tuple[str, ...]:
    return (transition_names if n == n_sublayers - 1 else sublayer_names)(n_sublayers, sites)[:n]


def _lines(
    names: Sequence[str],
    values: np.ndarray,
    ends: np.ndarray,
    n_sublayers: int,
    sites: int,
    looks: Sequence[Look],
    *,
    waits: bool = False,
) -> list[Mark]:
    marks: list[Mark] = []
    n = values.shape[1]
    between = n == n_sublayers - 1
    at = np.arange(n) + (0.5 if between else 1.0 if n == n_sublayers - 2 else 0.0)
    where = _where(n, n_sublayers, sites)
    for i, (name, look) in enumerate(zip(names, looks, strict=True)):
        look = Look(look.colour, "longdash") if waits else look
        if not np.isfinite(values[i]).any():
            continue  # too few sequences for it
        low, high = ends[:, i]
        known = bool(np.isfinite(low).any()) and not waits
        text = [
            f"{w}<br>{brief(v, 4)}" + (f"  [{brief(a, 4)}, {brief(b, 4)}]" if np.isfinite([a, b]).all() else "")
            for w, v, a, b in zip(where, values[i], low, high, strict=True)
        ]
        marks += depth_lines(
            name, at, values[i], low=low if known else None, high=high if known else None, text=text,
            sites=sites, between=between, look=look, width=0.8 if waits else 1.0,
            waits=waits,
        )  # fmt: skip
    return marks
