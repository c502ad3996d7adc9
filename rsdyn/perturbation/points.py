"""Put points into the stream of prompts, run them on, and measure whether they come back; the controls beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rsdyn.dynamics.controls import random_writes, stays_put
from rsdyn.dynamics.projection import Projection
from rsdyn.dynamics.recovery import Recovery, kl, nearer, rates, recovery, summary
from rsdyn.errors import UserError
from rsdyn.lm.continuing.continuation import continue_all, run_reference
from rsdyn.lm.continuing.reference import Reference
from rsdyn.lm.model import LanguageModel
from rsdyn.perturbation.linear import linear_ranges
from rsdyn.perturbation.plane import Plane, Recorded, encode
from rsdyn.perturbation.prompts import Prompt
from rsdyn.perturbation.result import FROZEN, RANDOM, SCALARS, STILL, SWAPPED, WRITES, At, Found
from rsdyn.perturbation.said import said_along
from rsdyn.perturbation.settings import PerturbConfig
from rsdyn.perturbation.states import (
    grid_states,
    noise_states,
    random_directions,
    swapped_states,
    through_projection,
)

KEPT = (*SCALARS, "relative_curve", "cosine_curve")


def measure(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    sublayers: dict[int, int],
    plane: Plane,
    trajectories: Recorded,
    settings: PerturbConfig,
    *,
    seed: int,
    done: Callable[[int], object] = lambda n: None,
) -> Found:
    """Perturb each prompt at each layer, with the points and with the controls, and measure recovery."""
    projection = plane.projection.to(lm.device)
    position: Any = settings.position  # a choice of the schema's
    n_points = settings.grid.n**2 if settings.kind == "teleport" else settings.points
    drawn = tuple(number for number, prompt in enumerate(prompts) if prompt.sequence is not None)
    found = Found(settings.kind, len(prompts), n_points, sublayers, drawn)
    found.several = bool((trajectories.sequence.diff() == 0).any())
    generator, of_writes = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    for number, prompt in enumerate(prompts):
        reference = run_reference(lm, prompt.tokens)
        points = {
            layer: _states(settings, plane, reference, s, trajectories, prompt, generator)
            for layer, s in sublayers.items()
        }
        found.n_points = min(found.n_points, *(len(states) for states in points.values()), n_points)
        conditions: dict[str, dict[int, Tensor]] = {settings.kind: points}
        conditions[RANDOM] = {
            layer: random_directions(reference.stream[s], points[layer], generator=generator)
            for layer, s in sublayers.items()
        }
        rows = {layer: _usable(trajectories, s, reference.stream[s], prompt) for layer, s in sublayers.items()}
        if number == 0:
            there = trajectories.sequence if trajectories.swappable is None else trajectories.swappable.nonzero()
            found.alike = {layer: len(there) - len(usable) for layer, usable in rows.items()}
        if settings.kind != "swap":
            conditions[SWAPPED] = {
                layer: _swapped(trajectories, rows[layer], s, reference.stream[s], n_points, generator)
                for layer, s in sublayers.items()
                if len(rows[layer])
            }
        conditions[FROZEN] = points
        for condition, states in conditions.items():
            if not states:
                continue
            continued = continue_all(
                lm,
                reference,
                [(s, states[layer]) for layer, s in sublayers.items() if layer in states],
                position=position,
                freeze_attention=condition == FROZEN,
                log_probs=True,
            )
            for layer, result in zip(states, continued, strict=True):
                assert result.log_probs is not None
                at, s = (layer, condition), sublayers[layer]
                _add(found, at, reference, result.stream, result.log_probs, projection, s, number)
                if number == 0 and condition == settings.kind:
                    found.said[layer] = said_along(lm, reference, s, result)
            if condition == settings.kind:
                _add_unmoved(found, lm, reference, points, projection, sublayers, number, of_writes)
        if number == 0:
            found.reference = encode(projection, reference.stream).cpu()
            if settings.position == "last":
                ranges = linear_ranges(lm, prompt.tokens.tolist(), {s: points[layer] for layer, s in sublayers.items()})
                found.linear = {layer: ranges[s] for layer, s in sublayers.items()}
        done(1)
    return found


def _states(
    settings: PerturbConfig,
    plane: Plane,
    reference: Reference,
    s: int,
    trajectories: Recorded,
    prompt: Prompt,
    generator: torch.Generator,
) -> Tensor:
    state = reference.stream[s]
    off_plane: Any = settings.off_plane
    if settings.kind == "teleport":
        grid = grid_states(plane.projection, state.to(torch.float32), plane.ranges, settings.grid.n, off_plane, s)
        return grid.states.to(state.dtype)
    if settings.kind == "noise":
        noisy = noise_states(state, settings.noise.sigma, settings.points, generator=generator)
        return _through(settings, plane, state, s, noisy)
    rows = _usable(trajectories, s, state, prompt)
    if len(rows) == 0:
        raise UserError(
            "kind=swap: there are no other sequences whose state differs from the prompt's, to swap in. Give "
            "more text (`limit`, `samples`), deeper `layers`, or another prompt."
        )
    return _through(settings, plane, state, s, _swapped(trajectories, rows, s, state, settings.points, generator))


def _through(settings: PerturbConfig, plane: Plane, state: Tensor, s: int, states: Tensor) -> Tensor:
    """States as they are, or what the projection holds of them, as ``perturb.through`` says."""
    if settings.through == "full":
        return states
    x, reference = states.to(torch.float32), state.to(torch.float32)
    off_plane: Any = settings.off_plane
    return through_projection(plane.projection, reference, x, off_plane, s).to(state.dtype)


def _usable(trajectories: Recorded, s: int, state: Tensor, prompt: Prompt) -> Tensor:
    """The trajectories that may be swapped in, and whose state is not the prompt's own.

    At the first sublayer the same token is the same state, but for the cache's rounding, and putting it in would
    perturb nothing. No token of the prompt's own sequence is one.
    """
    own = state.to("cpu", torch.float32)
    away = torch.cat([(part[:, s].to(torch.float32) - own).norm(dim=-1) for part in trajectories.x.split(256)])
    usable = away > 0.02 * own.norm()
    if prompt.sequence is not None:
        usable &= trajectories.sequence != prompt.sequence
    if trajectories.swappable is not None:
        usable &= trajectories.swappable
    return usable.nonzero().flatten()


def _swapped(trajectories: Recorded, rows: Tensor, s: int, state: Tensor, n: int, generator: torch.Generator) -> Tensor:
    states = swapped_states(trajectories.x[rows, s][:, None], 0, n=min(n, len(rows)), generator=generator)
    return states.to(state.device, state.dtype)


def _add_unmoved(
    found: Found,
    lm: LanguageModel,
    reference: Reference,
    points: dict[int, Tensor],
    projection: Projection,
    sublayers: dict[int, int],
    number: int,
    generator: torch.Generator,
) -> None:
    """The same points where no layer moves them: standing still, and taking random steps."""
    for layer, states in points.items():
        s = sublayers[layer]
        way = torch.cat([reference.stream[s:], reference.final[None]])
        for condition, moved in (
            (STILL, stays_put(states, len(way))),
            (WRITES, random_writes(states, way, generator=generator)),
        ):
            log_probs = lm.log_probs(moved[:, -1])
            _add(found, (layer, condition), reference, moved[:, :-1], log_probs, projection, s, number)


def _add(
    found: Found,
    at: At,
    reference: Reference,
    stream: Tensor,
    log_probs: Tensor,
    projection: Projection,
    s: int,
    number: int,
) -> None:
    """Measure one batch of points of a prompt, and keep its means; of the first prompt, the points themselves."""
    found.prompts.setdefault(at, []).append(number)
    measured: Recovery = recovery(reference.stream[s:], stream, projection, s)
    numbers = summary(measured)
    assert reference.log_probs is not None
    divergence = kl(reference.log_probs, log_probs)
    defined = measured.relative.isfinite().all(1) & (measured.distance[:, 0] > 0)  # the points that summary() counts
    curves = {"relative_curve": measured.relative[defined].mean(0), "cosine_curve": measured.cosine[defined].mean(0)}
    values = found.values.setdefault(at, {})
    for name, value in (numbers._asdict() | curves | {"kl": divergence[defined].mean()}).items():
        if name in KEPT:
            values.setdefault(name, []).append(torch.as_tensor(value).cpu())
    ends = found.ends.setdefault(at, {})
    for name, value in {
        "relative_put": measured.relative[:, 0],
        "relative": measured.relative[:, -1],
        "cosine_put": measured.cosine[:, 0],
        "cosine": measured.cosine[:, -1],
        "kl": divergence,
        "nearer": torch.minimum(nearer(measured.distance), nearer(measured.relative)),
        "contraction": rates(measured.distance, measured.norm).contraction,
    }.items():
        ends.setdefault(name, []).append(value.cpu())
    if number == 0:
        found.of_points[at] = {
            "relative": measured.relative.cpu(),
            "cosine": measured.cosine.cpu(),
            "kl": divergence.cpu(),
            "latents": encode(projection, stream, s).cpu(),
        }
