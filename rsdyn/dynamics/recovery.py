"""Whether a perturbed stream comes back: distances to the reference over depth, and what growth of the norm feigns.

Three things look like recovery and are not. Writes that all trajectories share make the norm grow: the cosine to the
reference rises and the *relative* distance falls, while the distance itself stays. A stream that shrinks as a whole
takes the *absolute* distance down with it. A turn out of a plane brings a point nearer *in the plane*. So a contraction
is only claimed where the absolute and the relative distance in full space both fall (:class:`Rates`).

``P`` points are put in place of the stream at one sublayer; ``S'`` sublayers are recorded from there on, the first of
them being the states as they were put. All results are float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.special import stdtrit
from scipy.stats import binom
from torch import Tensor

from rsdyn.dynamics.projection import Projection
from rsdyn.dynamics.resampling import Interval

_CHUNK_ELEMENTS = 1 << 20  # of a float64 copy: 8 MB
_ROUNDING = 1e-5  # relative; what float32 alone may do to a distance over depth


class InPlane(NamedTuple):
    """Distances between latents, each ``(P, S')``.

    Attributes:
        distance: length of the difference of the latents.
        relative: that, over the norm of the reference *in full space*: a latent's own norm depends on where the origin
            happens to lie. For PCA it is the part in the plane of :attr:`Recovery.relative`; for an autoencoder, whose
            latents have a scale of their own, only its course over depth means something.
        mse: squared difference, averaged over the ``K`` latent dimensions (the paper's measure).
    """

    distance: Tensor
    relative: Tensor
    mse: Tensor


class Recovery(NamedTuple):
    """How far each point is from the reference at each sublayer since the injection, ``(P, S')`` unless noted.

    Attributes:
        distance: length of the displacement, perturbed minus reference.
        relative: that, over the reference's norm at the same sublayer.
        cosine: cosine of the perturbed state and the reference.
        alignment: cosine of the displacement and the displacement as it was put. It stays at 1 while the displacement
            only grows or shrinks, and falls as it turns, or as it gives way to another one.
        norm: ``(S',)``, of the reference.
        plane: the same in the plane of a projection, or None.
    """

    distance: Tensor
    relative: Tensor
    cosine: Tensor
    alignment: Tensor
    norm: Tensor
    plane: InPlane | None


@torch.no_grad()
def recovery(
    reference: Tensor, perturbed: Tensor, projection: Projection | None = None, first_sublayer: int = 0
) -> Recovery:
    """Distances, cosines and errors of perturbed trajectories about the reference (METHOD section 10).

    Args:
        reference: ``(S', D)``, the unperturbed trajectory from the injection on, any floating dtype.
        perturbed: ``(P, S', D)``, likewise; controls (random directions of matched norm, swapped-in states, frozen
            attention) go through the same function.
        projection: adds the measures in its plane.
        first_sublayer: sublayer of the injection, for a projection that needs to know it.

    A state or a reference that is not finite gives NaN where it occurs; so does a zero vector in a cosine or under a
    division. Raises ``ValueError`` for other shapes and for integers.
    """
    _check_trajectories(reference, perturbed)
    target = reference.to(torch.float64)
    norm = _length(target)
    rows = max(1, _CHUNK_ELEMENTS // target.numel())
    parts = [_about(target, part.to(torch.float64)) for part in perturbed.split(rows)]
    distance, cosine, alignment = (torch.cat(measure) for measure in zip(*parts, strict=True))
    plane = None if projection is None else _in_plane(reference, perturbed, projection, first_sublayer, norm, rows)
    return Recovery(distance, distance / norm, cosine, alignment, norm, plane)


def _about(target: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance, cosine and alignment, each ``(p, S')``, of ``x`` ``(p, S', D)``."""
    displacement = x - target
    distance = _length(displacement)
    cosine = (x * target).sum(-1) / _length(x) / _length(target)
    alignment = (displacement * displacement[:, :1]).sum(-1) / distance / distance[:, :1]
    return distance, cosine.clamp(-1, 1), alignment.clamp(-1, 1)


def _in_plane(
    reference: Tensor, perturbed: Tensor, projection: Projection, first_sublayer: int, norm: Tensor, rows: int
) -> InPlane:
    dtype = next((p.dtype for p in projection.parameters()), torch.float64)  # a network has its own, PCA takes any
    sublayer = first_sublayer + torch.arange(len(reference), device=reference.device)
    target = projection.encode(reference.to(dtype), sublayer).to(torch.float64)
    parts = [
        projection.encode(part.to(dtype), sublayer.expand(part.shape[:2])).to(torch.float64) - target
        for part in perturbed.split(rows)
    ]
    difference = torch.cat(parts)
    distance = _length(difference)
    return InPlane(distance, distance / norm, difference.square().mean(-1))


class Rates(NamedTuple):
    """Slopes over depth of logarithms, per sublayer: below 0 something falls (natural logarithm; -0.1 is 10 %).

    Attributes:
        absolute: ``(P,)``, of the distance.
        growth: scalar, of the reference's norm.
        relative: ``(P,)``, of the relative distance: exactly ``absolute - growth``.
        contraction: ``(P,)``, the larger of absolute and relative. Below 0 the points come nearer in a way that neither
            growth nor shrinking of the stream can feign: ``log rate`` for a linear contraction towards where the
            reference rests, and not below 0 for shared writes, for growth or decay of everything, and for a turn.
    """

    absolute: Tensor
    growth: Tensor
    relative: Tensor
    contraction: Tensor


def rates(distance: Tensor, norm: Tensor, steps: int | None = None) -> Rates:
    """Rates of contraction and of growth, fitted by least squares over depth (METHOD section 10).

    Args:
        distance: ``(P, S')``, :attr:`Recovery.distance`; in a plane too, where a turn out of it passes for contraction.
        norm: ``(S',)``, of the reference.
        steps: fit over the first ``steps`` sublayers after the injection; default, and where there are fewer, all.

    A point that reaches the reference exactly has the rate minus infinity. NaN for one that was put there, for a
    distance that is not finite, for a norm that is not or is zero, and where no sublayer follows the injection. Raises
    ``ValueError`` for other shapes and ``steps`` below 1.
    """
    if norm.ndim != 1 or distance.ndim != 2 or distance.shape[1] != len(norm):
        raise ValueError(
            f"distance of shape {tuple(distance.shape)} and norm of shape {tuple(norm.shape)}: give (P, S') and (S',), "
            "of the same sublayers."
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps={steps}: a slope needs at least 1 sublayer after the injection; give more, or None.")
    kept = slice(None) if steps is None else slice(steps + 1)
    absolute, growth = _slope(distance[:, kept]), _slope(norm.where(norm > 0, torch.nan)[None, kept])[0]
    relative = absolute - growth
    return Rates(absolute, growth, relative, torch.maximum(absolute, relative))


def _slope(values: Tensor) -> Tensor:
    """Slope ``(P,)`` of the logarithm of ``values`` ``(P, S')`` over the sublayers."""
    values = values.to(torch.float64)
    t = torch.arange(values.shape[1], dtype=torch.float64, device=values.device)
    t -= t.mean()
    slope = values.log() @ (t / t.square().sum())  # 0 / 0 is NaN where there is one sublayer only
    slope = torch.where((values[:, 1:] == 0).any(1), -torch.inf, slope)
    return torch.where(values.isfinite().all(1) & (values[:, 0] > 0), slope, torch.nan)


def step_rates(distance: Tensor) -> Tensor:
    """Logarithm of what each sublayer multiplies the distance by, ``(P, S' - 1)`` of ``distance`` ``(P, S')``.

    Entry s is from sublayer s to s + 1 after the injection: below 0 where the attention or the MLP in between brings
    the point nearer. Of absolute distances, so that growth of the norm does not enter. NaN between two zeros.
    """
    log = distance.to(torch.float64).log()
    return log[:, 1:] - log[:, :-1]


def against_control(distance: Tensor, control: Tensor) -> Tensor:
    """What is left of each distance, over what is left of the controls' (METHOD section 10).

    Args:
        distance: ``(P, S')``, absolute, or relative (the result is the same: the reference's norm cancels).
        control: ``(C, S')``, of controls put at about the same distances at the same sublayer, such as random
            directions of matched norm; what is left of them is their geometric mean.

    Returns:
        ``(P, S')``: ``(d_s / d_0) / exp(mean log(c_s / c_0))``, 1 at the injection. Below 1 the points come back
        further than their controls do. It is 1 throughout wherever all displacements fare alike, in a pure growth *and*
        in a contraction alike in all directions: a comparison with the control, and no measure of contraction by
        itself. NaN for a point, and everywhere if a control, was put on the reference itself.

    Raises:
        ValueError: for other shapes, different sublayers, and no control.
    """
    if distance.ndim != 2 or control.ndim != 2 or distance.shape[1:] != control.shape[1:] or len(control) == 0:
        raise ValueError(
            f"distance of shape {tuple(distance.shape)} and control of shape {tuple(control.shape)}: give (P, S') and "
            "(C, S') with at least one control, of the same sublayers."
        )
    distance, control = distance.to(torch.float64), control.to(torch.float64)
    left, expected = (x / x[:, :1].where(x[:, :1] > 0, torch.nan) for x in (distance, control))
    return left / expected.log().mean(0).exp()


def nearer(distance: Tensor, margin: float = _ROUNDING) -> Tensor:
    """Whether each point ends nearer to the reference than it was put: 1 or 0, ``(P,)`` of ``distance`` ``(P, S')``.

    Nearer is by more than the share ``margin`` of the distance as put, so that rounding decides nothing. NaN where
    either distance is not finite, for a point put on the reference itself, and where no sublayer follows. Raises
    ``ValueError`` for a margin outside [0, 1).
    """
    if not 0 <= margin < 1:
        raise ValueError(f"margin={margin}: it is a share of the distance; give at least 0 and below 1.")
    put, end = distance[:, 0].to(torch.float64), distance[:, -1].to(torch.float64)
    defined = put.isfinite() & end.isfinite() & (put > 0) & (distance.shape[1] > 1)
    return torch.where(defined, (end < put * (1 - margin)).to(torch.float64), torch.nan)


class Summary(NamedTuple):
    """One layer of injection in numbers: float64 scalars, means over the points.

    Attributes:
        plane_mse: the paper's: over the sublayers after the injection, too; NaN without a plane.
        plane_relative: distance in the plane over the reference's norm, at the end; NaN without a plane.
        relative_put, relative: relative distance as put and at the end.
        cosine_put, cosine: cosine to the reference as put and at the end.
        alignment: of the displacement at the end with the one that was put.
        absolute_rate, growth_rate, relative_rate, contraction: as in :class:`Rates`.
        nearer_absolute, nearer_relative, nearer: fraction of points that end nearer than they were put, in absolute
            distance, in relative distance, and in both, which neither growth nor shrinking can feign.
        undefined: number of points left out of all of these: not finite somewhere, or put on the reference itself.
    """

    plane_mse: Tensor
    plane_relative: Tensor
    relative_put: Tensor
    relative: Tensor
    cosine_put: Tensor
    cosine: Tensor
    alignment: Tensor
    absolute_rate: Tensor
    growth_rate: Tensor
    relative_rate: Tensor
    contraction: Tensor
    nearer_absolute: Tensor
    nearer_relative: Tensor
    nearer: Tensor
    undefined: Tensor


def summary(found: Recovery, steps: int | None = None) -> Summary:
    """What the closing table says of one layer of injection (METHOD section 10).

    ``steps`` is that of :func:`rates`; everything else looks at the last sublayer. Rates and fractions are NaN where no
    sublayer follows the injection, and everything is where no point is defined.
    """
    defined = found.relative.isfinite().all(1) & (found.distance[:, 0] > 0)
    distance, relative = found.distance[defined], found.relative[defined]
    cosine, slopes = found.cosine[defined], rates(distance, found.norm, steps)
    closer, relatively = nearer(distance), nearer(relative)
    missing = distance.new_tensor(torch.nan)
    return Summary(
        plane_mse=missing if found.plane is None else found.plane.mse[defined, 1:].mean(),
        plane_relative=missing if found.plane is None else found.plane.relative[defined, -1].mean(),
        relative_put=relative[:, 0].mean(),
        relative=relative[:, -1].mean(),
        cosine_put=cosine[:, 0].mean(),
        cosine=cosine[:, -1].mean(),
        alignment=found.alignment[defined, -1].mean(),
        absolute_rate=slopes.absolute.mean(),
        growth_rate=slopes.growth,
        relative_rate=slopes.relative.mean(),
        contraction=slopes.contraction.mean(),
        nearer_absolute=closer.mean(),
        nearer_relative=relatively.mean(),
        nearer=torch.minimum(closer, relatively).mean(),
        undefined=(~defined).sum().to(torch.float64),
    )


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Divergence ``KL(p || q)`` of next-token distributions, in nats, ``(P,)`` (METHOD section 10).

    Args:
        log_p: ``(P, V)`` or ``(V,)``, of the perturbed points; log-probabilities or logits, any floating dtype: both
            sides are normalised here, in float64, so that rounding upstream shows in the second order only.
        log_q: ``(V,)`` or ``(P, V)``, of the reference.

    Tokens that are impossible (``-inf``) in ``p`` add nothing; one that is possible in ``p`` and impossible in ``q``
    gives infinity. NaN gives NaN. Raises ``ValueError`` for other shapes.
    """
    shapes = (tuple(log_p.shape), tuple(log_q.shape))
    rows = {len(x) for x in (log_p, log_q) if x.ndim == 2}
    if not all(x.ndim in (1, 2) for x in (log_p, log_q)) or shapes[0][-1] != shapes[1][-1] or len(rows) > 1:
        raise ValueError(
            f"log_p of shape {shapes[0]} and log_q of shape {shapes[1]}: give (P, V) and (V,), of the same tokens."
        )
    size = max(1, _CHUNK_ELEMENTS // max(1, shapes[0][-1]))
    p = log_p.expand(max(rows, default=1), -1).split(size)
    q = log_q.split(size) if log_q.ndim == 2 else (log_q,) * len(p)
    return torch.cat([_kl(a, b) for a, b in zip(p, q, strict=True)])


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_p, log_q = (x.to(torch.float64).log_softmax(-1) for x in (log_p, log_q))
    p, q = log_p.exp(), log_q.exp()
    # q - p sums to 0; with it an error in a normalisation cancels to the first order
    terms = torch.where(p == 0, q, p * (log_p - log_q) + (q - p))
    return terms.sum(-1).clamp(min=0)


def mean_over_prompts(values: Tensor, level: float = 0.95) -> Interval:
    """Mean over prompts with Student's t interval: for shares, and for differences within each prompt (METHOD 10).

    Args:
        values: ``(prompts, ...)``, already averaged over each prompt's points: points of one prompt share its context
            and its reference, and are no sample of prompts.
        level: of confidence.

    The ends are NaN for one prompt, and not finite where a prompt is not. 95 % intervals of 20 prompts drawn from the
    embedded text covered 92-97 % for differences from points that stay put (``benchmarks/prompt_intervals.py``). Raises
    ``ValueError`` without prompts, and for a ``level`` not between 0 and 1.
    """
    values = _check_prompts(values, level)
    m, mean = len(values), values.mean(0)
    if m < 2:
        return Interval(mean, torch.full_like(mean, torch.nan), torch.full_like(mean, torch.nan))
    error = values.std(0) * float(stdtrit(m - 1, (1 + level) / 2)) / m**0.5
    return Interval(mean, mean - error, mean + error)


def median_over_prompts(values: Tensor, level: float = 0.95) -> Interval:
    """Median over prompts with its distribution-free interval: for sizes, which are skewed over prompts.

    ``values`` ``(prompts, ...)`` as in :func:`mean_over_prompts`. The ends are two of the values themselves, the k-th
    from either end, with the largest k for which the interval covers the median of *any* distribution at least so often
    as ``level`` says (David & Nagaraja 2003, 7.1): the 6th of 20 covers 95.9 %. An interval of the *mean* covers less:
    one prompt in twenty has a divergence twice the others', and of 20 prompts a third of samples has none of those, so
    that 80 % is all it reached. The ends are NaN with fewer than 6 prompts, which no such interval reaches 95 % with.
    Raises ``ValueError`` as there.
    """
    values = _check_prompts(values, level)
    m = len(values)
    value = values.quantile(0.5, dim=0)
    k = int(binom.ppf((1 - level) / 2, m, 0.5))  # values outside on either side: at most this many with (1 - level) / 2
    while k > 0 and 2 * binom.cdf(k - 1, m, 0.5) > 1 - level:
        k -= 1
    if k < 1:
        return Interval(value, torch.full_like(value, torch.nan), torch.full_like(value, torch.nan))
    ordered = values.sort(0).values
    undefined = values.isnan().any(0)
    return Interval(value, *(end.where(~undefined, torch.nan) for end in (ordered[k - 1], ordered[m - k])))


def _check_prompts(values: Tensor, level: float) -> Tensor:
    if values.ndim == 0 or len(values) == 0:
        raise ValueError(f"values of shape {tuple(values.shape)}: give (prompts, ...), with at least one prompt.")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a confidence lies between 0 and 1; give 0.95 for 95 %.")
    return values.to(torch.float64)


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1)


def _check_trajectories(reference: Tensor, perturbed: Tensor) -> None:
    if reference.ndim != 2 or reference.numel() == 0:
        raise ValueError(f"reference of shape {tuple(reference.shape)}: give (S', D), sublayers by units, not empty.")
    if perturbed.ndim != 3 or perturbed.shape[1:] != reference.shape or len(perturbed) == 0:
        raise ValueError(
            f"perturbed of shape {tuple(perturbed.shape)}: give (P, {reference.shape[0]}, {reference.shape[1]}), at "
            "least one point, with the reference's sublayers and units."
        )
    for name, x in (("reference", reference), ("perturbed", perturbed)):
        if not x.is_floating_point():
            raise ValueError(f"{name} is {x.dtype}: states are floating point; convert it.")
