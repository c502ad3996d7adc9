"""Put other states in place of the stream: in an ordinary forward, as context managers, and as rows for a grid.

The context managers edit any forward of the model while they are open, and leave nothing behind; they may be nested.
Grids of states go through ``rsdyn.lm.continuing.continuation``, which gives the same at a hundredth of the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from rsdyn.dynamics.projection import Projection
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.continuing.continuation import Position
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.tracing import stream_of

OffPlane = Literal["drop", "keep"]


# -- in an ordinary forward --------------------------------------------------------------------------------------------


@contextmanager
def edit_stream(
    lm: LanguageModel, sublayer: int, edit: Callable[[Tensor], Tensor], *, position: Position = "last"
) -> Iterator[None]:
    """While open, every forward of ``lm.base`` (and ``lm.record``) has its stream edited at a sublayer.

    Args:
        sublayer: see :meth:`LanguageModel.sublayer` for that of a layer's site.
        edit: from the last token's states ``(B, D)`` to those that take their place, ``(B, D)`` or ``(D,)`` for all.
        position: ``last`` puts the result in the last column alone, ``all`` the same vector at every token.

    The last column is the last token where nothing is padded on the right: run sequences of one length. An edit at
    resid_mid moves the stream itself, not only what the MLP reads. Raises ``ValueError`` for a sublayer or position
    that is not there, and, inside the forward, for a result of another shape; ``NonFiniteError`` for one that is not
    finite.
    """
    if position not in get_args(Position):
        raise ValueError(f"position={position!r}: must be one of {', '.join(get_args(Position))}.")
    if isinstance(sublayer, bool) or not isinstance(sublayer, int) or not 0 <= sublayer < lm.n_sublayers:
        raise ValueError(
            f"sublayer={sublayer}: {lm.name} has {lm.n_sublayers}; give a whole number from 0 to {lm.n_sublayers - 1}."
        )

    def put(stream: Tensor) -> None:
        states = edit(stream[:, -1])
        _check_states(lm, states, len(stream))
        states = states.to(stream.device, stream.dtype)
        if position == "all":
            stream[:] = states[..., None, :]
        else:
            stream[:, -1] = states

    def replaced(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = stream_of(args, kwargs)
        stream = given.clone()
        put(stream)

        def exchanged(value: Any) -> Any:
            return stream if value is given else value

        return tuple(map(exchanged, args)), {name: exchanged(value) for name, value in kwargs.items()}

    def in_place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # a tensor that this hook returned would reach the MLP alone: the layer keeps its own for the sum
        put(stream_of(args, kwargs).view(*shape))  # some families have merged sequences and tokens here

    shape: list[int] = []

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape[:] = stream_of(args, kwargs).shape

    layer, site = divmod(sublayer, len(lm.sites.names))
    module = lm.sites.modules[sublayer]
    handles = [module.register_forward_pre_hook(in_place if site else replaced, with_kwargs=True)]
    if site:
        handles.append(lm.sites.layers[layer].register_forward_pre_hook(remember, with_kwargs=True))
    lm.n_edits += 1
    try:
        yield
    finally:
        lm.n_edits -= 1
        for handle in handles:
            handle.remove()


@contextmanager
def replace_stream(lm: LanguageModel, sublayer: int, states: Tensor, *, position: Position = "last") -> Iterator[None]:
    """While open, ``states``, ``(B, D)`` or ``(D,)`` for all rows, stand in place of the stream at a sublayer."""
    _check_states(lm, states, None)
    with edit_stream(lm, sublayer, lambda _: states, position=position):
        yield


@contextmanager
def teleport(
    lm: LanguageModel,
    sublayer: int,
    projection: Projection,
    point: Tensor,
    *,
    off_plane: OffPlane = "drop",
    position: Position = "last",
) -> Iterator[None]:
    """While open, the stream at a sublayer is moved to ``point`` ``(K,)`` of a projection's latent space (Fig. 4D).

    ``off_plane`` as in :func:`moved_states`.
    """
    _check_off_plane(off_plane)

    def edit(states: Tensor) -> Tensor:
        target = point.to(states.device, states.dtype)
        return torch.cat([moved_states(projection, x, target[None], off_plane, sublayer) for x in states])

    with edit_stream(lm, sublayer, edit, position=position):
        yield


@contextmanager
def add_noise(
    lm: LanguageModel,
    sublayer: int,
    sigma: float,
    *,
    generator: torch.Generator | None = None,
    position: Position = "last",
) -> Iterator[None]:
    """While open, Gaussian noise is added to the stream at a sublayer, anew in each forward; see :func:`noise_states`.

    With ``position="all"`` the last token's noisy state stands at every token.
    """
    _check_sigma(sigma)

    def edit(states: Tensor) -> Tensor:
        return torch.cat([noise_states(x, sigma, 1, generator=generator) for x in states])

    with edit_stream(lm, sublayer, edit, position=position):
        yield


@contextmanager
def swap(lm: LanguageModel, sublayer: int, trajectory: Tensor, *, position: Position = "last") -> Iterator[None]:
    """While open, the stream at a sublayer is the one that another sequence, of ``trajectory`` ``(S, D)``, had there.

    Raises ``ValueError`` for a trajectory of another model.
    """
    if trajectory.shape != (lm.n_sublayers, lm.n_units):
        raise ValueError(
            f"trajectory: shape {tuple(trajectory.shape)}, and those of {lm.name} are {(lm.n_sublayers, lm.n_units)}; "
            "give one that this model was recorded with."
        )
    with replace_stream(lm, sublayer, trajectory[sublayer], position=position):
        yield


# -- states for a grid -------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Points of a plane, ``(n n, 2)``, the second coordinate running fastest, and a state for each, ``(n n, D)``."""

    points: Tensor
    states: Tensor


def grid_ranges(latents: Tensor, padding: float = 0.1) -> Tensor:
    """The range of trajectories in a plane, ``(2, 2)``: a row ``[min, max]`` for each component (METHOD section 10).

    Args:
        latents: ``(..., 2)``, encoded states of the reference trajectories.
        padding: how far the range reaches past the data on either side, as a share of its width.

    Raises ``ValueError`` for latents that are not of a plane, not finite, or do not vary.
    """
    if latents.shape[-1:] != (2,) or latents.numel() == 0:
        raise ValueError(f"latents: shape {tuple(latents.shape)}; give (..., 2), states encoded in a plane.")
    flat = latents.reshape(-1, 2)
    low, high = flat.amin(0), flat.amax(0)
    if not (torch.isfinite(low) & torch.isfinite(high)).all() or not (low < high).all():
        raise ValueError(
            f"latents: from {low.tolist()} to {high.tolist()}, which is no range; give the finite latents of at least "
            "two different states, or set the range by hand."
        )
    reach = padding * (high - low)
    return torch.stack([low - reach, high + reach], -1)


def grid_points(ranges: Tensor, n: int = 10) -> Tensor:
    """``n`` by ``n`` points ``(n n, 2)`` that fill ``ranges`` ``(2, 2)``, a row ``[min, max]`` for each component.

    Raises ``ValueError`` for fewer than two points a side, and a range whose min is not below its max.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise UserError(f"n={n}: points along each side of the grid; at least 2, the paper has 10.")
    ranges = torch.as_tensor(ranges)
    if ranges.shape != (2, 2):
        raise ValueError(f"ranges: shape {tuple(ranges.shape)}; give [[min, max], [min, max]], a row a component.")
    if not torch.isfinite(ranges).all() or not (ranges[:, 0] < ranges[:, 1]).all():
        raise UserError(f"ranges={ranges.tolist()}: each min has to be below its max, and both finite.")
    if not ranges.is_floating_point():
        ranges = ranges.to(torch.get_default_dtype())
    steps = torch.linspace(0, 1, n, dtype=ranges.dtype, device=ranges.device)
    first, second = (torch.lerp(low, high, steps) for low, high in ranges)
    return torch.cartesian_prod(first, second)


def grid_states(
    projection: Projection,
    reference: Tensor,
    ranges: Tensor,
    n: int = 10,
    off_plane: OffPlane = "drop",
    sublayer: int | None = None,
) -> Grid:
    """A state for each point of a grid over a projection's plane (paper 2.8, METHOD section 10).

    Args:
        projection: PCA or autoencoder with two latent dimensions.
        reference: ``(D,)`` the unperturbed state at the sublayer.
        ranges, n: see :func:`grid_points`.
        off_plane, sublayer: see :func:`moved_states`.
    """
    points = grid_points(ranges, n).to(reference.device, reference.dtype)
    return Grid(points, moved_states(projection, reference, points, off_plane, sublayer))


@torch.no_grad()
def moved_states(
    projection: Projection,
    reference: Tensor,
    points: Tensor,
    off_plane: OffPlane = "drop",
    sublayer: int | None = None,
) -> Tensor:
    """The reference state moved to points of a projection's latent space: ``(P, D)``.

    Args:
        reference: ``(D,)``.
        points: ``(P, K)``.
        off_plane: ``drop`` decodes the point alone, and all that lies outside the plane is lost (the paper); ``keep``
            adds what the plane does not hold of the reference, ``x + decode(z') - decode(encode(x))``. These are
            different experiments.
        sublayer: of the reference, for a projection that needs it.

    Raises ``ValueError`` for a reference or points of another width than the projection's.
    """
    _check_off_plane(off_plane)
    if reference.ndim != 1 or points.ndim != 2:
        raise ValueError(
            f"reference, points: shapes {tuple(reference.shape)} and {tuple(points.shape)}; give (D,) and (P, K)."
        )
    at = None if sublayer is None else torch.tensor(sublayer, device=reference.device)
    try:
        latent = projection.encode(reference, at)
    except RuntimeError as error:
        raise UserError(
            f"reference: a state of {len(reference)} units, which the projection cannot encode; it was made from "
            "another model. Fit it on the stream of this one."
        ) from error
    if latent.shape[-1] != points.shape[1]:
        raise UserError(
            f"projection: it has {latent.shape[-1]} latent dimensions and the points have {points.shape[1]}; a grid "
            "needs a projection to 2."
        )
    many = None if at is None else at.expand(len(points))
    states = projection.decode(points.to(reference.dtype), many)
    if off_plane == "keep":
        states = reference + (states - projection.decode(latent, at))
    return states


def noise_states(reference: Tensor, sigma: float, n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """``n`` states ``(n, D)``: the reference ``(D,)`` with Gaussian noise of ``sigma`` times its own norm.

    The noise of each unit has the standard deviation ``sigma |x| / sqrt(D)``, so that its norm is ``sigma |x|`` in the
    root mean square. ``generator`` lives on the CPU, and draws the same on every device. Raises ``ValueError`` for a
    ``sigma`` that is not positive.
    """
    _check_sigma(sigma)
    size = sigma * reference.norm() / reference.shape[-1] ** 0.5
    return reference + size * _normal(n, reference, generator)


@torch.no_grad()
def through_projection(
    projection: Projection,
    reference: Tensor,
    states: Tensor,
    off_plane: OffPlane = "drop",
    sublayer: int | None = None,
) -> Tensor:
    """Perturbed states ``(P, D)``, noise or swaps, reduced to what a projection holds of them (METHOD section 10).

    The reference is moved to each state's latents as :func:`moved_states` does it: ``drop`` leaves their decoding
    alone, ``keep`` adds what the projection does not hold of the reference. The size of a noise is thus its size before
    the projection, of which a plane holds a share of about ``K / D``.
    """
    at = None if sublayer is None else torch.full((len(states),), sublayer, device=states.device)
    return moved_states(projection, reference, projection.encode(states, at), off_plane, sublayer)


def random_directions(reference: Tensor, states: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """A control for any perturbation: each state as far from the reference as before, in a random direction.

    From ``reference`` ``(D,)`` and perturbed ``states`` ``(P, D)`` to ``(P, D)``: directions are uniform on the sphere,
    and ``|control - reference| = |state - reference|`` point by point, so recovery starts from the same distances.
    """
    distance = (states - reference).norm(dim=-1, keepdim=True)
    directions = _normal(len(states), reference, generator)
    return reference + distance * directions / directions.norm(dim=-1, keepdim=True)


def swapped_states(
    trajectories: Tensor,
    sublayer: int,
    *,
    exclude: int | None = None,
    n: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Real states of the same sublayer from other sequences: ``(n, D)``, no sequence twice.

    Args:
        trajectories: ``(N, S, D)``.
        exclude: the sequence that is perturbed, when it is one of these.
        n: how many, drawn at random; default all, in order.

    Raises ``ValueError`` when there are not so many others.
    """
    if trajectories.ndim != 3 or not 0 <= sublayer < trajectories.shape[1]:
        raise ValueError(
            f"trajectories: shape {tuple(trajectories.shape)}, sublayer={sublayer}; give (N, S, D), and a "
            "sublayer from 0 to S - 1."
        )
    others = [i for i in range(len(trajectories)) if i != exclude]
    wanted = len(others) if n is None else n
    if not 1 <= wanted <= len(others):
        raise UserError(
            f"swap: {len(others)} other sequences to take a state from, and n={n}; at least 1 and at most one "
            "from each. Give more sequences, or a smaller n."
        )
    rows = others if n is None else [others[i] for i in torch.randperm(len(others), generator=generator)[:n].tolist()]
    return trajectories[rows, sublayer]


def _normal(n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(n, like.shape[-1], generator=generator).to(like.device, like.dtype)


def _check_off_plane(off_plane: str) -> None:
    if off_plane not in get_args(OffPlane):
        raise ValueError(f"off_plane={off_plane!r}: must be one of {', '.join(get_args(OffPlane))}.")


def _check_sigma(sigma: float) -> None:
    if not 0 < sigma < float("inf"):
        raise UserError(f"sigma={sigma}: the noise's size as a share of the state's norm; give a number above 0.")


def _check_states(lm: LanguageModel, states: Tensor, rows: int | None) -> None:
    """``rows``: of the batch that is edited; None when it is not known yet."""
    fits = states.ndim == 1 or (states.ndim == 2 and rows in (None, len(states)))
    if not fits or states.shape[-1] != lm.n_units:
        wanted = f"({'B' if rows is None else rows}, {lm.n_units})"
        raise ValueError(
            f"states: shape {tuple(states.shape)}, and {lm.name} needs {wanted}, one row per sequence, or "
            f"({lm.n_units},) for all of them."
        )
    if not torch.isfinite(states).all():
        raise NonFiniteError("states: they hold NaN or Inf; give finite states.")
