"""Figure 2 of the page: units in the plane of activation and gradient, and their turns beside null models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rsdyn.analysis.settings import NULLS
from rsdyn.figures.colours import look_of
from rsdyn.labels import KEEPS
from rsdyn.report import plots
from rsdyn.report.plots import Control, Plot, counted, number, packed
from rsdyn.report.streams import NAMES, Stream, pick, sequences_in_words

MOST_UNITS = 1024  # whose portraits the page holds, of each stream
MOST_HISTOGRAMS = 256  # units whose surrogates are drawn again
BINS = 40
# nulls whose surrogates are drawn again, of the steps and the paper's; of others the spread is kept
DRAWN_AGAIN = ("increment_shuffle_scaled", "layer_shuffle")


def figure2(streams: Sequence[Stream]) -> tuple[list[Plot], dict[str, Any]]:
    """The panels, and the shared data of the units that they pick from."""
    some = [s for s in streams if s.measured("rotation")]
    if not some:
        return [], {}
    data = {"streams": {s.key: _units(s) for s in some}}
    return [*_explorer(some, data), distribution(some)], {"units": data}


def _nulls(stream: Stream) -> list[str]:
    """The null models of a stream, those first that keep most."""
    return [null for null in NULLS if f"null_{null}_mean" in stream.arrays]


def chosen_units(turns: np.ndarray) -> np.ndarray:
    """The units that the page holds: all, or those that turn most each way and an even sample of the rest."""
    if len(turns) <= MOST_UNITS:
        return np.arange(len(turns))
    order = np.argsort(np.nan_to_num(turns, nan=0.0), kind="stable")
    ends = MOST_UNITS // 8
    middle = order[ends:-ends]
    some = middle[np.linspace(0, len(middle) - 1, MOST_UNITS - 2 * ends).round().astype(int)]
    return np.sort(np.concatenate([order[:ends], some, order[-ends:]]))


def _units(stream: Stream) -> dict[str, Any]:
    """What the page needs of a stream's units; rotations are clockwise turns, -R, as the paper shows them."""
    r = stream.arrays["rotation"]
    kept = chosen_units(r)
    nulls = {}
    for null in _nulls(stream):
        found: dict[str, Any] = {"label": NAMES.get(null, null)}
        for name, sign in (("mean", -1), ("std", 1), ("p", 1), ("q_normal", 1)):
            found[name] = packed(sign * stream.arrays[f"null_{null}_{name}"][kept])
        p = stream.arrays[f"null_{null}_p"]
        found |= {"beyond": float(100 * (p[np.isfinite(p)] < 0.05).mean()), "tested": int(np.isfinite(p).sum())}
        nulls[null] = found
    for null in DRAWN_AGAIN:
        if null in nulls and stream.sites and stream.condition == stream.run.summary["conditions"][0]:
            nulls[null] |= surrogate_histograms(stream, null, kept)
    return {
        "label": stream.label,
        "sites": stream.sites or 1,
        "sublayers": plots.sublayer_names(stream.n_sublayers, stream.sites),
        "n_units": len(r),
        "units": packed(kept, "i4"),
        "paths": packed(stream.arrays["rotation_mean_trajectory"].T[kept]),
        "turns": packed(-r[kept]),
        "nulls": nulls,
    }


def surrogate_histograms(stream: Stream, null: str, kept: np.ndarray) -> dict[str, Any]:
    """Turns of each unit's surrogates, counted in bins of its own.

    They are the very surrogates of the run's test, since they depend on the seed, the null and the unit alone; with
    very many units only the first of those kept that turn most are drawn again. ``counted`` are their places in
    ``kept``; ``low`` and ``high`` the ends of the bins.
    """
    import torch

    from rsdyn.dynamics.rotation import turns
    from rsdyn.dynamics.rotation_test import surrogates

    config = stream.run.config
    rotation = config["analysis"]["rotation"]
    trajectory = torch.from_numpy(stream.arrays["rotation_mean_trajectory"])
    options: dict[str, Any] = {
        "seed": config["seed"], "window": rotation["window"], "sites_per_layer": stream.sites,
        "shared": rotation["shared"], "of_all": trajectory,
    }  # fmt: skip
    n = int(rotation["surrogates"])
    places = np.arange(len(kept))
    if len(kept) > MOST_HISTOGRAMS:
        turned = np.abs(np.nan_to_num(stream.arrays["rotation"][kept], nan=0.0))
        places = np.sort(np.argsort(-turned, kind="stable")[:MOST_HISTOGRAMS])
    blocks = [(0, trajectory.shape[1])] if len(places) == trajectory.shape[1] else [(int(kept[p]), 1) for p in places]
    counts, ends = np.zeros((len(places), BINS), dtype=np.uint16), np.zeros((2, len(places)))
    at = 0
    for first, width in blocks:
        found = []
        for portrait in surrogates(trajectory[:, first : first + width], null, n, first_unit=first, **options):
            x, y = (v.to(torch.float64).movedim(1, 0).diff(dim=0) for v in portrait)
            length = torch.maximum(x.abs().amax(0), y.abs().amax(0)).clamp(min=1e-300)
            found.append(-turns((x / length).contiguous(), (y / length).contiguous()))
        values = torch.cat(found).numpy()
        for u in range(width):
            edges = np.histogram_bin_edges(values[:, u], BINS)
            counts[at], _ = np.histogram(values[:, u], edges)
            ends[:, at] = edges[0], edges[-1]
            at += 1
    return {
        "n": n,
        "counted": packed(places, "i4"),
        "counts": packed(counts, "u2"),
        "low": packed(ends[0]),
        "high": packed(ends[1]),
    }


def _explorer(streams: list[Stream], data: dict[str, Any]) -> list[Plot]:
    first = streams[0]
    found = data["streams"][first.key]
    n_kept = len(chosen_units(first.arrays["rotation"]))
    thinned = (
        f" Thinned: {n_kept:,} of {found['n_units']:,} units, those that turn most each way and an even sample."
        if n_kept < found["n_units"]
        else ""
    )
    turns = -first.arrays["rotation"]
    most = int(np.nanargmax(turns)) if np.isfinite(turns).any() else 0
    nulls = list(dict.fromkeys(null for s in streams for null in _nulls(s)))
    controls = [
        *pick("stream", "stream", streams),
        Control("unit", "unit", [(str(most), str(most))], str(most), kind="unit"),
    ]
    null_control = Control("null", "null model", [(null, NAMES.get(null, null)) for null in nulls], nulls[0])
    sequences = sequences_in_words(streams)
    walk = first.scalar("rotation_random_walk")
    beyond = {null: first.scalar(f"walks_beyond_{null}") for null in nulls}
    rejected = ", ".join(f"{NAMES.get(k, k)} {100 * v:.0f} %" for k, v in beyond.items() if v is not None)
    kept = "What each keeps: " + "; ".join(f"{NAMES.get(null, null)}: {KEEPS[null]}" for null in nulls)
    surrogates = first.run.config["analysis"]["rotation"]["surrogates"]
    portrait = Plot(
        "fig2a",
        "Fig. 2A  Portrait of a unit",
        f"A unit's path over {first.n_sublayers} sublayers in the plane of its activation and the gradient of that; "
        f"at first unit {most}, which makes {number(turns[most])} clockwise turns in {first.label}.",
        (
            f"The mean trajectory of one unit over {sequences}: its activation against that activation's gradient over "
            "sublayers (central differences), each from its start; open ring start, full ring end. Choose a "
            f"unit by its number, step through them by their turns, or touch one in Fig. 2C.{thinned}",
            "the shape behind a number of turns: a few wide loops, or many small zigzags.",
            "rotation. A path in the plane of a value and its own slope can only turn clockwise, and every reversal of "
            "the slope adds to the count: |R| counts how jagged the path is.",
        ),
        controls=controls,
        widget="portrait",
        source="units",
    )
    place = Plot(
        "fig2a-null",
        "Fig. 2A  Its place in the null",
        f"Histogram of the turns of {surrogates:,} surrogates of the chosen unit, with the unit's own turns as a line.",
        (
            f"The turns of the unit's own surrogates under the chosen null model ({surrogates:,} of them), and the "
            "unit's. Where the surrogates are not drawn again on this page (nulls that need the model or take long, "
            f"an analysis' other streams, beyond {MOST_HISTOGRAMS} units), their mean and 1.96 SD stand for them. p is "
            "two-sided, for this unit alone; q is the false discovery rate over all units.",
            "whether the order that this null destroys matters for this unit's turns.",
            "dynamics, from a null that keeps little: random walks of equal length, which have none, go beyond their "
            f"null at p < .05 this often: {rejected}. Go by the nulls that keep most, which stand first. {kept}. A "
            "unit picked because its p is small is not evidence: go by q.",
        ),
        controls=[*pick("stream", "stream", streams), null_control],
        widget="place",
        source="units",
    )
    by_unit = Plot(
        "fig2c",
        "Fig. 2C  Turns of all units",
        f"Turns of {counted(n_kept, 'unit')}, sorted, with each one's null mean and band. In {first.label} they go "
        f"from {number(np.nanmin(turns))} to {number(np.nanmax(turns))} clockwise, mean size "
        f"{number(np.nanmean(np.abs(turns)))}.",
        (
            f"Clockwise turns of each unit's mean trajectory over {sequences}, sorted, beside the mean and the band of "
            "± 1.96 SD of its own surrogates under the chosen null. Touch a unit to see its portrait."
            f"{thinned} A random walk of equal length makes {number(walk)} turns.",
            "how many units have p < .05: 5 % would if the null held for every unit.",
            "that units outside rotate: they differ from what this null keeps, no more. The bands are of single units; "
            "the findings table has the test of all units together, whose surrogates keep their correlation.",
        ),
        controls=[*pick("stream", "stream", streams), null_control],
        widget="by_unit",
        source="units",
        wide=True,
    )
    return [portrait, place, by_unit]


def distribution(streams: list[Stream]) -> Plot:
    """Turns over units, of every stream and beside the nulls (Fig. 2B)."""
    main = streams[0]
    rows: list[tuple[str, np.ndarray, str]] = []
    for stream in streams:
        rows.append((stream.label, -stream.arrays["rotation"], stream.colour))
    rows.insert(
        1, (f"{main.label}, per sequence", -main.arrays["rotation_per_sequence"], look_of("per_sequence").token)
    )
    for null in _nulls(main):
        if f"null_{null}_example" in main.arrays:
            rows.append((NAMES.get(null, null), -main.arrays[f"null_{null}_example"], "@muted"))
    traces = []
    for name, values, colour in rows:
        finite = values[np.isfinite(values)]
        traces.append(
            {
                "type": "violin",
                "x": packed(finite),
                "y0": plots.flat(name),
                "name": plots.flat(name),
                "orientation": "h",
                "side": "negative",
                "width": 1.7,
                "points": False,
                "meanline": {"visible": True},
                "line": {"color": colour, "width": 1.2},
                "fillcolor": f"{colour}/35",
                "spanmode": "hard",
                "hoveron": "violins",
                "hoverinfo": "x+name",
                "showlegend": False,
            }
        )
    words = "; ".join(
        f"{name}: {number(np.nanmean(v))} ± {number(np.nanstd(v))}" for name, v, _ in rows if np.isfinite(v).any()
    )
    return Plot(
        "fig2b",
        "Fig. 2B  Turns over units, beside the nulls",
        f"Distributions over units of clockwise turns, mean and standard deviation: {words}.",
        (
            f"How clockwise turns are spread over units, over {sequences_in_words(streams)}: of the mean trajectory, "
            "of single sequences (mean of each unit's), of the other streams, and of one surrogate a unit of each "
            "null "
            "(grey). Mean ± SD: " + words + ".",
            "which null has turns like the stream's: those keep what makes the turns.",
            "that a null with a mean near 0 proves rotation. The layer shuffle takes points out of their order, "
            "which no trajectory is like; it is far from a random walk too.",
        ),
        traces,
        {
            "xaxis": plots.axis("clockwise turns", zeroline=True),
            "yaxis": {"autorange": "reversed", "type": "category", "ticks": ""},
            "height": 90 + 42 * len(rows),
            "violingap": 0,
        },
        wide=True,
    )
