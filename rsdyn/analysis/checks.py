"""What analyze.py asks of its settings once the stream's size is known, before anything is recorded."""

from __future__ import annotations

from typing import Any, NamedTuple

from rsdyn.analysis.settings import CONDITIONS, NULLS, STREAM_NULLS, needs_streams
from rsdyn.analysis.shape import check_shape
from rsdyn.dynamics.information import MIN_SAMPLES
from rsdyn.errors import UserError

NOT_BY_DEFAULT = ("layer_shuffle_regradient",)
LEAST_SEQUENCES = 3
SMALL_LM = 20_000_000  # parameters, up to which several untrained LMs are measured by default: recording them is cheap
SEVERAL = 3


class Wanted(NamedTuple):
    """A stream that an analysis measures.

    Attributes:
        name: what it is called; the condition's own name for the first of its kind.
        condition: one of ``analysis.conditions``.
        untrained_seed: which of several untrained LMs, counted from 0.
    """

    name: str
    condition: str
    untrained_seed: int = 0


def streams_wanted(settings: Any, n_parameters: int) -> list[Wanted]:
    """The streams of an analysis in their order, the original first and further untrained LMs last.

    ``n_parameters`` of the language model decides how many untrained ones there are where ``untrained_seeds`` is null.
    """
    wanted = [Wanted(c, c) for c in CONDITIONS if c in settings.conditions]
    if "untrained" in settings.conditions:
        n_seeds = settings.untrained_seeds or (SEVERAL if n_parameters <= SMALL_LM else 1)
        wanted += [Wanted(f"untrained_{k + 1}", "untrained", k) for k in range(1, n_seeds)]
    return wanted


def nulls_of(settings: Any, *, own: bool) -> list[str]:
    """The null models to run, in order: those made of the stream itself (``own``), or those that are another one."""
    chosen = settings.rotation.nulls
    if chosen is None:
        chosen = [n for n in NULLS if n not in NOT_BY_DEFAULT]
        chosen = [n for n in chosen if n not in STREAM_NULLS or n in settings.conditions]
        if "original" not in settings.conditions:
            chosen = [n for n in chosen if n not in STREAM_NULLS]
    return [n for n in NULLS if n in chosen and (n in STREAM_NULLS) != own]


def check_settings(
    settings: Any, *, n_sequences: int, n_trajectories: int, n_sublayers: int, n_units: int, sites_per_layer: int
) -> None:
    """Raise ``UserError`` for what this stream cannot give, naming the key and the cure."""
    if n_sequences < LEAST_SEQUENCES and needs_streams(settings.measures):
        raise UserError(
            f"samples: too few sequences ({n_sequences}), since a correlation needs at least "
            f"{LEAST_SEQUENCES}. Raise `samples` or `limit`."
        )
    measures = settings.measures
    if "mutual_information" in measures:
        kept = min(n_trajectories, settings.keep or n_trajectories)
        needed = MIN_SAMPLES[settings.mi.estimator] + 1  # its interval leaves sequences out
        what = "sequences" if n_trajectories == n_sequences else "trajectories"
        if kept < needed:
            raise UserError(
                f"mi.estimator={settings.mi.estimator} needs at least {needed} {what} and gets {kept}. "
                "Raise `samples` and `keep`, or leave mutual_information out of `measures`."
            )
    if n_sublayers < 2:
        raise UserError(
            f"name: this model has {n_sublayers} sublayer, so nothing moves from one to the next. Take a deeper one."
        )
    if "rotation" in measures:
        if n_sublayers < 3:
            raise UserError(
                f"measures: rotation needs at least 3 sublayers and this model has {n_sublayers}. Leave it out."
            )
        if settings.rotation.window < 2 * sites_per_layer:
            raise UserError(
                f"rotation.window={settings.rotation.window} must be at least {2 * sites_per_layer} for a "
                f"stream of {sites_per_layer} site(s) a layer: below, no two steps of a kind share a window."
            )
        wrong = [u for u in settings.rotation.units or [] if u >= n_units]
        if wrong:
            raise UserError(
                f"rotation.units: {wrong[0]} is not a unit of this model, whose units are 0 to {n_units - 1}."
            )
    kept = min(n_trajectories, settings.keep or n_trajectories)
    check_shape(measures, n_trajectories=kept, n_sublayers=n_sublayers, sites_per_layer=sites_per_layer)
    most = min(n_units, n_trajectories * n_sublayers - 1)
    if "pca" in measures and settings.components is not None and settings.components > most:
        raise UserError(
            f"components={settings.components}: {n_trajectories} trajectories of {n_sublayers} sublayers of "
            f"{n_units} units have at most {most} principal components. Lower it, or leave it out."
        )
