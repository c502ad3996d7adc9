"""The panels of Jacobians over depth (METHOD section 12): eigenvalues, curves over depth, exponents, linear range."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rsdyn.analysis.jacobians import DIRECTIONS, LINEAR, SERIES, SIZES, JacobianResult, depths_of
from rsdyn.figures.colours import Look
from rsdyn.figures.over_depth import depth_axis, sublayer_names, transition_kinds
from rsdyn.figures.panel import Axis, Band, Caption, Control, Line, Mark, Panel, Rows, Rule, brief, counted, in_words

DEPTHS = ("ink", "c1", "c2", "c3", "c4", "c5", "c6")  # of a curve per depth, in their order
CHANCE = "Beside it the nulls: the model untrained, its weights permuted, and random matrices of the same size."

# name of the curve -> title, axis, what a reader may take from it, and what not
DEPTH: dict[str, tuple[str, Axis, str, str]] = {
    "antisymmetric": (
        "Antisymmetric share of the update", Axis("antisymmetric share of G"),
        "rotation against stretching: 1 is a rotation, 0 symmetric.",
        "rotation from values about one half, which is what a random matrix has.",
    ),
    "henrici": (
        "Departure from normality of J", Axis("Henrici's departure of J", from_zero=True),
        "how far directions that grow are from being orthogonal.",
        "a property of the update: J is the identity and a small update, and nears normality as the update shrinks.",
    ),
    "henrici_update": (
        "Departure from normality of the update", Axis("Henrici's departure of G", from_zero=True),
        "the same of what a sublayer adds, whose size it does not depend on.",
        "a basis-free fact: it holds for the stream's own inner product.",
    ),
    "gain": (
        "Largest gain of each sublayer", Axis("largest singular value of J", "log"),
        "which sublayers stretch some direction, and how much.",
        "what happens over depth: the directions that two sublayers stretch need not be the same.",
    ),
    "expanding": (
        "Share of directions that grow", Axis("share of singular values above 1", percent=True),
        "whether a sublayer loses any direction.",
        "attraction, from a share below one half: the norm grows too; look at the relative exponents.",
    ),
    "complex_share": (
        "Share of complex eigenvalues", Axis("share of complex eigenvalues", percent=True),
        "whether it differs from that of a random matrix of this size.",
        "rotation: a random matrix of 576 units has 97 % complex eigenvalues.",
    ),
}  # fmt: skip


def jacobian_panels(result: JacobianResult, sublayers: Sequence[int] | None = None) -> list[Panel]:
    """All panels; a static figure shows the eigenvalues of ``sublayers``, by default the first, middle and last."""
    labels = {s: SERIES[s].label for s in result.series}
    texts = counted(len(result.curves["full"]["growth"]), "text")
    panels = []
    if "full" in result.eigenvalues and len(result.eigenvalues) > 1:
        panels.append(_eigenvalues(result, labels, sublayers))
    panels += [_over_depth(result, name, labels, texts) for name in DEPTH]
    panels += [_exponents(result, labels, texts, relative=relative) for relative in (False, True)]
    panels.append(_participation(result, labels, texts))
    if "linear" in result.curves["full"]:
        panels.append(_linear_range(result, texts))
    return panels


def _eigenvalues(result: JacobianResult, labels: dict[str, str], sublayers: Sequence[int] | None) -> Panel:
    values = {s: np.asarray(result.eigenvalues[s]) for s in labels if s in result.eigenvalues}
    n = min(map(len, values.values()))
    shown = [0, n // 2, n - 1] if sublayers is None else list(sublayers)
    if wrong := [s for s in shown if not 0 <= s < n]:
        raise ValueError(f"sublayers={list(shown)}: {wrong[0]} is not one of 0 to {n - 1}. Name others.")
    keys = tuple(str(s) for s in range(n))
    names = sublayer_names(n, result.sites)
    angle = np.linspace(0, 2 * np.pi, 200)
    drawn: list[Mark] = [Line(name="unit circle", x=np.cos(angle), y=np.sin(angle), width=0.6)]
    axes = {}
    for k, key in enumerate(keys):
        away = np.concatenate([np.abs(v[k] - 1) for v in values.values()])
        reach = float(1.1 * max(np.quantile(away, 0.99), 1e-3))
        axes[key] = Axis("Re λ", limits=(1 - reach, 1 + reach)), Axis("Im λ", limits=(-reach, reach))
    for s, v in values.items():
        drawn.append(
            Line(name=labels[s], when={} if s == "full" else {"beside": s}, rows=Rows("sublayer", keys), line=False,
                 x=v[:n].real, y=v[:n].imag, marker="circle", size=0.5 if v.shape[1] < 300 else 0.3)
        )  # fmt: skip
    others = tuple((s, labels[s]) for s in values if s != "full")
    return Panel(
        key="jacobian_eigenvalues", title="Eigenvalues of one text's Jacobians", marks=tuple(drawn),
        x=axes[keys[0]][0], y=axes[keys[0]][1], axes=axes, own_axes=True, square=True,
        controls=(
            Control("sublayer", "sublayer", tuple(zip(keys, names, strict=True)), str(shown[len(shown) // 2]), "steps",
                    tuple(str(s) for s in shown)),
            Control("beside", "beside", others, others[0][0], shown=tuple(s for s, _ in others)),
        ),
        caption=Caption(
            "Eigenvalues of the Jacobian of one sublayer in the plane, of the first text, beside those of a null. The "
            "circle is |λ| = 1, where a rotation has them all. The axes show the middle 99 % of a sublayer's values.",
            "whether the cloud differs from its nulls: in its size, its place, and its spread off the real axis.",
            "rotation, from eigenvalues off the real axis: nearly all of a random matrix's are.",
        ),
        alt=f"Eigenvalues of {n} Jacobians in the complex plane, one sublayer at a time, beside those of a null.",
    )  # fmt: skip


def _over_depth(result: JacobianResult, name: str, labels: dict[str, str], texts: str) -> Panel:
    title, y, read_for, not_for = DEPTH[name]
    n = result.n_layers * result.sites
    names = sublayer_names(n, result.sites)
    drawn: list[Mark] = []
    for s, label in labels.items():
        value, interval = result.mean(s, name), result.interval(s, name) if s == "full" else None
        for i, kind in enumerate(transition_kinds(result.sites)):
            at = np.arange(n)[kind.part]
            drawn.append(
                Line(name=label, x=at + 0.5, y=value[at], marker=kind.marker, width=1.1 if s == "full" else 0.8,
                     low=None if interval is None else interval[0, at], legend=i == 0, size=0.8,
                     high=None if interval is None else interval[1, at],
                     text=tuple(f"from {names[k]}<br>{brief(value[k], 4)}" for k in at))
            )  # fmt: skip
    return Panel(
        key=f"jacobian_{name}", title=title, marks=tuple(drawn), x=depth_axis(n + 1, result.sites), y=y,
        bands="95 % interval over texts",
        caption=Caption(f"{title} ({y.label}), mean over {texts}. {CHANCE} Circles: over attention; squares: over the "
                        "MLP.", read_for, not_for),
        alt="Lines over depth. " + in_words(labels["full"], result.mean("full", name), names) + ".",
    )  # fmt: skip


def _exponents(result: JacobianResult, labels: dict[str, str], texts: str, *, relative: bool) -> Panel:
    drawn: list[Mark] = [Rule(name="zero", y=0.0, legend=False)]
    curves = {s: result.mean(s, "exponents") - (result.mean(s, "growth") if relative else 0.0) for s in labels}
    for s, values in curves.items():
        share = (np.arange(len(values)) + 0.5) / len(values)
        drawn.append(Line(name=labels[s], x=share, y=values, width=1.1 if s == "full" else 0.8))
    finite = np.concatenate([v[np.isfinite(v)] for v in curves.values()])
    low, high = float(np.quantile(finite, 0.01)), float(finite.max())  # a few lost directions would flatten the rest
    pad = 0.05 * (high - low) or 1.0
    less = " less the growth of the norm" if relative else ""
    below = float((curves["full"] < 0).mean())
    return Panel(
        key="jacobian_exponents" + "_relative" * relative, title=f"Lyapunov exponents of the whole depth{less}",
        marks=tuple(drawn), x=Axis("rank of the exponent, as a share of the units", limits=(0, 1)),
        y=Axis(f"exponent{' less growth' if relative else ''} (nats per layer)", limits=(low - pad, high + pad)),
        caption=Caption(
            f"Logarithms of the singular values of the product of all Jacobians, per layer{less}, the largest first, "
            f"mean over {texts}. {CHANCE}",
            "whether any direction is lost" + (" against the norm: those below 0." if relative else ": those below 0."),
            "attractors, from relative exponents below 0: any network whose norm grows has them, untrained ones too.",
        ),
        alt=f"Falling lines; {100 * below:.0f} % of the exponents of the trained model are below 0.",
    )  # fmt: skip


def _participation(result: JacobianResult, labels: dict[str, str], texts: str) -> Panel:
    n = result.n_layers * result.sites
    names = sublayer_names(n, result.sites)
    drawn = tuple(
        Line(name=label, x=np.arange(n), y=result.mean(s, "product_participation"), width=1.1 if s == "full" else 0.8,
             text=tuple(f"from {where}<br>{brief(v)}" for where, v in
                        zip(names, result.mean(s, "product_participation"), strict=True)))
        for s, label in labels.items()
    )  # fmt: skip
    return Panel(
        key="jacobian_participation", title="Directions that carry the product to the end", marks=drawn,
        x=depth_axis(n, result.sites), y=Axis("participation ratio of σ²", "log"),
        caption=Caption(
            "Participation ratio of the squared singular values of the product of Jacobians from each sublayer to the "
            f"end, mean over {texts}. {CHANCE}",
            "how many directions of a sublayer's state reach the last one.",
            "a bottleneck that was learnt, where the untrained model has it as well.",
        ),
        alt="Lines over depth. " + in_words(labels["full"], result.mean("full", "product_participation"), names) + ".",
    )  # fmt: skip


def _linear_range(result: JacobianResult, texts: str) -> Panel:
    n = result.n_layers * result.sites
    linear = result.curves["full"]["linear"]
    ratios = np.exp(np.median(np.log(linear), 0))  # (depths, directions, sizes)
    sizes = np.array(SIZES)
    low, high = (np.full(2, end) for end in LINEAR)
    ends = np.array([sizes[0], sizes[-1]])
    drawn: list[Mark] = [Band(name="within a factor of two", x=ends, low=low, high=high)]
    for i, direction in enumerate(DIRECTIONS):
        for k, s in enumerate(depths_of(n)):
            drawn.append(Line(name=f"sublayer {s}", when={"direction": direction}, x=sizes, y=ratios[k, i],
                              marker="circle", look=Look(DEPTHS[k % len(DEPTHS)], "solid")))  # fmt: skip
    options = tuple((d, d) for d in DIRECTIONS)
    return Panel(
        key="jacobian_linear_range", title="Where a displacement is linear", marks=tuple(drawn),
        x=Axis("size of the displacement, in norms of the state", "log"),
        y=Axis("displacement at the end / predicted", "log"), columns=1,
        controls=(Control("direction", "direction", options, DIRECTIONS[0], shown=DIRECTIONS),),
        caption=Caption(
            "How far a displacement of the last token's state has gone at the end, over what the Jacobian predicts, "
            f"against its size; median over {texts}. Grey: within a factor of two.",
            "how small a perturbation must be for the Jacobian to say anything of it.",
            "the directions themselves: lengths are compared, and may agree where directions do not.",
        ),
        alt="Lines over the size of a displacement, one for each of some depths, by its direction.",
    )  # fmt: skip
