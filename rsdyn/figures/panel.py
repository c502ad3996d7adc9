"""What a panel shows, described once: the static figure, the page and W&B's charts are all made of this description.

A :class:`Panel` is a list of marks over two axes, with the controls by which some of them are chosen. It says what is
drawn, never how: :mod:`rsdyn.figures.static` and :mod:`rsdyn.figures.interactive` do that, and since a mark's colour
belongs to its *name*, its band and its controls are part of it, they cannot disagree. A control is a menu, a slider or
a number on a page; a static figure draws the options that are ``shown`` beside each other, one of two controls down,
the other across.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np

from rsdyn.figures.colours import Look, look_of

Scale = Literal["linear", "log", "fisher", "symlog"]
Choice = Mapping[str, str]
"""What every control is set to: the value of an option by the control's name."""


def array(value: Any) -> np.ndarray:
    """A float64 array of an array, a tensor (any device, bf16 too) or a nested list."""
    if hasattr(value, "detach"):
        value = value.detach().double().cpu().numpy()
    return np.asarray(value, dtype=float)


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it measures, with its unit.
        scale: ``fisher`` spaces correlations and cosines by artanh; ``symlog`` is linear up to ``linear_to`` and
            logarithmic beyond it on both sides.
        from_zero: whether it begins at 0 where that costs at most half of it.
        limits: its ends; None where the values decide.
        percent: whether its values are shares, to be labelled in per cent.
        whole: whether only whole numbers are labelled.
        ticks: position and label of each tick; empty where the back end chooses.
        names: whether positions are the names of rows, which are not labelled (a heat map's units).
    """

    label: str = ""
    scale: Scale = "linear"
    from_zero: bool = False
    limits: tuple[float, float] | None = None
    percent: bool = False
    whole: bool = False
    ticks: tuple[tuple[float, str], ...] = ()
    linear_to: float = 1.0
    names: bool = False


class Rows(NamedTuple):
    """That a mark's arrays have a row for each of ``keys``, options of ``control``, along a first axis more.

    With ``last`` the last row stands for every option without one, as for a stream that has ended by then.
    """

    control: str
    keys: tuple[str, ...]
    last: bool = False


@dataclass(frozen=True)
class Control:
    """Something to choose by: controls of one name move together on a page.

    Attributes:
        name: what marks say ``when`` by.
        label: what a person reads.
        options: value and label of each.
        value: the one that is chosen at first.
        kind: ``menu``, ``steps`` (a slider: options in an order), or ``unit`` (a number, with steps along the order).
        shown: the options that a static figure draws, beside each other; by default the chosen one.
    """

    name: str
    label: str
    options: tuple[tuple[str, str], ...]
    value: str
    kind: Literal["menu", "steps", "unit"] = "menu"
    shown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = [value for value, _ in self.options]
        object.__setattr__(self, "shown", self.shown or (self.value,))
        if strange := [v for v in (self.value, *self.shown) if v not in known]:
            raise ValueError(f"control {self.name!r} has no option {strange[0]!r}: it has {', '.join(known)}.")

    def label_of(self, value: str) -> str:
        return dict(self.options)[value]


# -- marks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What all marks have.

    Attributes:
        name: what it is called in the legend, and what its colour and its dash go by.
        when: at which options of which controls it is drawn; always, where empty.
        rows: whether its arrays have a row for each option of a control.
        look: a look other than its name's: of several models beside each other, or of depths.
        legend: whether it is named in the legend; one of several marks of one name is.
        waits: whether it waits in the legend of an interactive figure; a static one does not draw it.
    """

    name: str
    when: Choice = field(default_factory=dict)
    rows: Rows | None = None
    look: Look | None = None
    legend: bool = True
    waits: bool = False

    VARY: ClassVar[dict[str, int]] = {}
    """The arrays that rows are taken of, with the number of their dimensions."""

    def __post_init__(self) -> None:
        more = 0 if self.rows is None else 1
        for name, ndim in self.VARY.items():
            value = getattr(self, name)
            if value is None:
                continue
            value = array(value)
            object.__setattr__(self, name, value)
            if value.ndim not in (ndim, ndim + more):
                raise ValueError(f"{name} of {self.name!r} has shape {value.shape}: it needs {ndim} dimension(s).")
            if more and value.ndim > ndim and len(value) != len(self.rows.keys):  # type: ignore[union-attr]
                raise ValueError(f"{name} of {self.name!r} has {len(value)} rows: it needs one per key of rows.")

    @property
    def looks(self) -> Look:
        return self.look or look_of(self.name)

    def at(self, choice: Choice) -> Self | None:
        """The mark at a setting of the controls, without rows; None where it is not drawn then."""
        if any(choice.get(name) != value for name, value in self.when.items()):
            return None
        if self.rows is None:
            return self
        chosen, keys = choice[self.rows.control], self.rows.keys
        if chosen not in keys and not self.rows.last:
            return None
        i = keys.index(chosen) if chosen in keys else len(keys) - 1
        parts = {
            name: value[i]
            for name, ndim in self.VARY.items()
            if (value := getattr(self, name)) is not None and value.ndim > ndim
        }
        return replace(self, rows=None, **parts)


@dataclass(frozen=True, kw_only=True)
class Line(Mark):
    """A curve, or points, with a band about it.

    Attributes:
        x, y: ``(n,)``.
        low, high: ends of the band, or None; :attr:`Panel.bands` says what they are.
        text: words under the pointer, one per point, instead of the values.
        marker: ``circle``, ``square``, ``ring`` or none.
        line: whether points are joined.
        width: of the line, 1 as usual.
        size: of the markers, 1 as usual.
        picks: a control that is set by touching a point, to that point's entry in ``picked``.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    text: tuple[str, ...] = ()
    marker: Literal["", "circle", "square", "ring"] = ""
    line: bool = True
    width: float = 1.0
    size: float = 1.0
    picks: str = ""
    picked: tuple[str, ...] = ()
    VARY: ClassVar[dict[str, int]] = {"x": 1, "y": 1, "low": 1, "high": 1}


@dataclass(frozen=True, kw_only=True)
class Band(Mark):
    """An area by itself, such as the middle 90 % of units: ``x``, ``low`` and ``high`` are ``(n,)``."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    strength: float = 0.2
    VARY: ClassVar[dict[str, int]] = {"x": 1, "low": 1, "high": 1}


@dataclass(frozen=True, kw_only=True)
class Rule(Mark):
    """A straight line over the whole panel, at ``x`` or at ``y``."""

    x: float | None = None
    y: float | None = None


@dataclass(frozen=True, kw_only=True)
class Path(Mark):
    """A path ``x``, ``y`` ``(S,)`` through a plane, coloured by depth, its start and its end ringed.

    ``sites`` per layer are told apart by markers; ``text`` names each sublayer.
    """

    x: np.ndarray
    y: np.ndarray
    sites: int = 1
    text: tuple[str, ...] = ()
    VARY: ClassVar[dict[str, int]] = {"x": 1, "y": 1}


@dataclass(frozen=True, kw_only=True)
class Paths(Mark):
    """Many thin paths ``x``, ``y`` ``(N, S)``, each with its own of ``labels``; ``text`` names each sublayer."""

    x: np.ndarray
    y: np.ndarray
    labels: tuple[str, ...] = ()
    text: tuple[str, ...] = ()
    VARY: ClassVar[dict[str, int]] = {"x": 2, "y": 2}


@dataclass(frozen=True, kw_only=True)
class HeatMap(Mark):
    """A map ``z`` ``(rows, columns)``: columns at ``x``, rows called ``labels``, colours from ``low`` to ``high``.

    ``colours`` are ``diverging`` (about 0), ``shares`` or ``amounts``; ``columns`` names each column under the pointer.
    """

    z: np.ndarray
    x: np.ndarray
    labels: tuple[str, ...]
    low: float
    high: float
    colours: Literal["diverging", "shares", "amounts"]
    bar: str
    columns: tuple[str, ...] = ()
    VARY: ClassVar[dict[str, int]] = {"z": 2, "x": 1}


@dataclass(frozen=True, kw_only=True)
class Distribution(Mark):
    """How ``values`` ``(n,)`` are spread, in a row of its own that is called by its name."""

    values: np.ndarray
    VARY: ClassVar[dict[str, int]] = {"values": 1}

    @property
    def known(self) -> np.ndarray:
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True, kw_only=True)
class Bars(Mark):
    """Bars of ``height`` ``(n,)`` at ``x`` ``(n,)``, each ``width`` wide; lying ones are ``along`` the x axis.

    Lying bars start at ``start`` and are as long as their ``height``; ``x`` is then the row.
    """

    x: np.ndarray
    height: np.ndarray
    width: np.ndarray
    start: np.ndarray | None = None
    text: tuple[str, ...] = ()
    VARY: ClassVar[dict[str, int]] = {"x": 1, "height": 1, "width": 0, "start": 1}


@dataclass(frozen=True, kw_only=True)
class Flow(Mark):
    """Where points go in a plane: from ``start`` ``(P, 2)`` to ``end`` ``(P, 2)``, coloured by ``value`` ``(P,)``.

    An interactive figure draws the way and a disc at its end; a static one an arrow of that direction from the start,
    its length scaled so that neighbours do not overlap. ``bar`` names the value.
    """

    start: np.ndarray
    end: np.ndarray
    value: np.ndarray
    bar: str
    text: tuple[str, ...] = ()
    VARY: ClassVar[dict[str, int]] = {"start": 2, "end": 2, "value": 1}


@dataclass(frozen=True, kw_only=True)
class Said(Mark):
    """A line of words over the panel at a setting of the controls; ``{0}``, ``{1}``, ... are ``numbers`` ``(m,)``."""

    words: str
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0))
    VARY: ClassVar[dict[str, int]] = {"numbers": 1}

    def told(self) -> str:
        return self.words.format(*(brief(value) for value in self.numbers))


# -- the panel ---------------------------------------------------------------------------------------------------------


class Caption(NamedTuple):
    """What is drawn, what a reader may conclude from it, and what not."""

    drawn: str
    read_for: str = ""
    not_for: str = ""


NO_CAPTION = Caption("")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Attributes:
        key: its file's name, its identifier on the page, and its key in W&B.
        figure: of the paper, as ``1E``; of what the paper has not, the figure that it belongs to.
        section: of the page, where it belongs to no figure and stands with others.
        title: what it shows.
        marks: what is drawn, from back to front.
        x, y: its axes; ``axes`` those of single options of the first control, where they differ.
        caption, alt: what stands under it, and what is read to somebody who cannot see it.
        note: what was counted or left out, in a few words over the panel.
        bands: what the bands about lines are.
        controls: by which marks are chosen.
        own_axes: whether options of a control have ranges of their own.
        square: whether one unit is as long on both axes.
        columns: how many options stand beside each other in a static figure.
        tall: its height, 1 as usual.
        wide: whether it takes the whole width of the page.
    """

    key: str
    title: str
    marks: tuple[Mark, ...]
    x: Axis
    y: Axis
    figure: str = ""
    section: str = ""
    caption: Caption = NO_CAPTION
    alt: str = ""
    note: str = ""
    bands: str = ""
    controls: tuple[Control, ...] = ()
    axes: Mapping[str, tuple[Axis, Axis]] = field(default_factory=dict)
    own_axes: bool = False
    square: bool = False
    columns: int = 2
    tall: float = 1.0
    wide: bool = False

    def __post_init__(self) -> None:
        options = {c.name: [value for value, _ in c.options] for c in self.controls}
        for mark in self.marks:
            asked = dict(mark.when) | ({} if mark.rows is None else {mark.rows.control: mark.rows.keys[0]})
            for name, value in asked.items():
                if value not in options.get(name, ()):
                    raise ValueError(f"panel {self.key!r}: {mark.name!r} is drawn when {name} is {value!r}: no option.")

    @property
    def first(self) -> dict[str, str]:
        """The controls as they are at first."""
        return {c.name: c.value for c in self.controls}

    def choices(self) -> Iterator[dict[str, str]]:
        """Every setting of the controls that a static figure draws."""
        for values in product(*(c.shown for c in self.controls)):
            yield dict(zip((c.name for c in self.controls), values, strict=True))

    def drawn(self, choice: Choice, *, waiting: bool = False) -> list[Mark]:
        """The marks at a setting of the controls; those that wait in the legend only if asked for."""
        found = (mark.at(choice) for mark in self.marks)
        return [mark for mark in found if mark is not None and (waiting or not mark.waits)]

    def axes_at(self, choice: Choice) -> tuple[Axis, Axis]:
        own = self.axes.get(choice[self.controls[0].name]) if self.controls else None
        return own or (self.x, self.y)

    def with_key(self, suffix: str) -> Panel:
        """The panel of another run on the same page: its key, and its controls, end in ``suffix``."""
        names = {c.name: c.name + suffix for c in self.controls}

        def renamed(mark: Mark) -> Mark:
            rows = None if mark.rows is None else mark.rows._replace(control=names[mark.rows.control])
            new = replace(mark, when={names[name]: value for name, value in mark.when.items()}, rows=rows)
            return replace(new, picks=names[new.picks]) if isinstance(new, Line) and new.picks else new

        marks = tuple(map(renamed, self.marks))
        controls = tuple(replace(c, name=names[c.name]) for c in self.controls)
        return replace(self, key=self.key + suffix, marks=marks, controls=controls)


def values_of(marks: Sequence[Mark], axis: Literal["x", "y"]) -> np.ndarray:
    """All finite values that marks have along an axis, their bands included."""
    found = [np.empty(0)]
    for mark in marks:
        if isinstance(mark, Flow):
            points = np.concatenate([mark.start, mark.end])
            found.append(points[:, "xy".index(axis)])
            continue
        names = ("x",) if axis == "x" else ("y", "low", "high")
        if not isinstance(mark, (Line, Band, Path, Paths)):
            continue
        known = {f.name for f in fields(mark)}
        found += [np.ravel(v) for n in names if n in known and (v := getattr(mark, n)) is not None]
    every = np.concatenate(found)
    return every[np.isfinite(every)]


# -- scales ------------------------------------------------------------------------------------------------------------

FISHER_TICKS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)
MINUS = "\N{MINUS SIGN}"


def fisher(values: Any) -> np.ndarray:
    """Fisher's z of correlations and cosines, so that .9 to .99 gets as much room as 0 to .8."""
    edge = 1 - 1e-6  # 1 itself would be at infinity
    return np.arctanh(np.clip(np.asarray(values, dtype=float), -edge, edge))


def fisher_ticks(values: np.ndarray) -> tuple[tuple[float, float], list[float]]:
    """Ends of an axis in Fisher's z, and the correlations that are labelled on it."""
    z = fisher(values)
    low, high = (float(z.min()), float(z.max())) if len(z) else (0.0, 1.0)
    pad = 0.05 * (high - low) + 1e-3
    ticks: list[float] = []
    for r in sorted({*FISHER_TICKS, *(-r for r in FISHER_TICKS[1:])}):
        at = float(np.arctanh(r))
        if low - pad <= at <= high + pad and (not ticks or at - np.arctanh(ticks[-1]) > 0.12 * (high - low)):
            ticks.append(r)
    return (low - pad, high + pad), ticks


def log_ticks(values: np.ndarray) -> tuple[tuple[float, float], list[float]] | None:
    """Ends of a logarithmic axis, as logarithms, and at least some labels on it; None without a positive value."""
    positive = values[values > 0]
    if not len(positive):
        return None
    low, high = float(np.log10(positive.min())), float(np.log10(positive.max()))
    pad = 0.04 * (high - low) + 0.01
    powers = range(int(np.floor(low - pad)), int(np.ceil(high + pad)) + 1)
    ticks: list[float] = []
    for steps in ((1.0,), (1.0, 2.0, 5.0)):
        found = [step * 10.0**power for power in powers for step in steps]
        ticks = [t for t in found if low - pad <= np.log10(t) <= high + pad]
        if len(ticks) >= 4:
            break
    else:  # over less than a decade, labels that are evenly spaced in value
        ends = 10 ** (low - pad), 10 ** (high + pad)
        size = 10 ** np.floor(np.log10((ends[1] - ends[0]) / 3))
        step = next(float(size * m) for m in (5, 2, 1, 0.5, 0.2) if (ends[1] - ends[0]) / (size * m) >= 3)
        found = [float(f"{k * step:.12g}") for k in range(int(ends[0] / step), int(ends[1] / step) + 2)]
        ticks = [t for t in found if ends[0] <= t <= ends[1] and t > 0]
    return (low - pad, high + pad), ticks[:: max(1, -(-len(ticks) // 7))]


def brief(value: Any, digits: int = 3) -> str:
    """A number as it is read: few digits, a true minus sign, and words for what is not defined."""
    if value is None or not np.isfinite(value):
        return "not defined"
    if 1000 <= abs(value) < 1e7:
        return f"{float(value):,.0f}".replace("-", MINUS)
    text = f"{float(value):.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
    return text.replace("-", MINUS)


def percent(share: Any, digits: int = 1) -> str:
    """A share in per cent, with the space that a unit has."""
    return f"{100 * float(share):.{digits}f} %".replace("-", MINUS)


def counted(n: int, noun: str) -> str:
    """A count with its noun in the right number."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def in_words(name: str, values: Any, where: Sequence[str]) -> str:
    """A curve for someone who cannot see it: where it starts and ends, its least and its largest value."""
    values = array(values)
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return f"{name}: not defined anywhere"
    first, last = known[0], known[-1]
    low, high = known[values[known].argmin()], known[values[known].argmax()]
    return (
        f"{name}: {brief(values[first])} at {where[first]}, {brief(values[last])} at {where[last]}, "
        f"least {brief(values[low])} at {where[low]}, largest {brief(values[high])} at {where[high]}"
    )
