"""Jacobians of a stream over depth: does anything pull back, does anything rotate, and what would chance give.

Pure linear algebra on square real matrices. ``J`` is the derivative of a state by the state before it, ``G = J - I``
that of the update between the two. Which numbers depend on the basis of the stream, which is not privileged: none of
those of :func:`spectrum` and :func:`lyapunov` change when the states are rotated by an orthogonal matrix (``J`` becomes
``Q J Q^T``). Under any other change of basis the eigenvalues, the share of complex ones and ``log|det|`` alone stay;
singular values, exponents of a finite product, the antisymmetric share and the departure from normality all move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from scipy.linalg.lapack import dgejsv
from scipy.special import gammaln
from torch import Tensor

Null = Literal["gaussian", "rotated"]
NULLS: tuple[str, ...] = get_args(Null)
_WINDOW = 500.0  # nats of singular values that go through one SVD in float64, whose range is some 1400
_MARGIN = 45.0  # nats beyond which two graded singular values do not see each other in float64: exp(-45) = 3e-20
_OVERSAMPLED = 10  # columns of subspace iteration beyond those that are wanted, and the least of a block


class Spectrum(NamedTuple):
    """Eigenvalues and singular values of ``J``, and what follows from them; leading dimensions ``(...)`` as given.

    Attributes:
        eigenvalues: ``(..., D)``, complex, in no particular order.
        singular_values: ``(..., D)``, falling.
        log_abs_det: ``(...)`` log|det J|; ``-inf`` for a singular matrix.
        rank: ``(...)`` singular values above ``D eps`` of the largest, int64.
        rms: ``(...)`` root mean square of the entries of ``G = J - I``.
        gain: ``(...)`` the largest singular value.
        expanding: ``(...)`` share of the singular values above 1.
        complex_share: ``(...)`` share of the eigenvalues that are not real. An iid real matrix has
            :func:`complex_share_of_chance`, so a large share says nothing by itself.
        antisymmetric: ``(...)`` :func:`antisymmetric_share` of ``G``.
        henrici: ``(...)`` Henrici's departure from normality of ``J``.
        henrici_update: ``(...)`` that of ``G``. The two have the same numerator, since a multiple of the identity moves
            the eigenvalues and nothing else: they differ by what it is divided by.
    """

    eigenvalues: Tensor
    singular_values: Tensor
    log_abs_det: Tensor
    rank: Tensor
    rms: Tensor
    gain: Tensor
    expanding: Tensor
    complex_share: Tensor
    antisymmetric: Tensor
    henrici: Tensor
    henrici_update: Tensor


def spectrum(j: Tensor) -> Spectrum:
    """The eigenvalues and singular values of each ``J`` ``(..., D, D)``, asked for once and shared by all that follows.

    Computed in the matrix's own float format; half precision in float32. Raises ``ValueError`` for matrices that are
    not square, not real or not finite.
    """
    j = _square("j", j)
    n = j.shape[-1]
    eigenvalues = torch.linalg.eigvals(j)
    singular_values = torch.linalg.svdvals(j)
    largest = singular_values[..., 0]
    departure = _departure(j, eigenvalues)
    update = j - torch.eye(n, dtype=j.dtype, device=j.device)
    return Spectrum(
        eigenvalues=eigenvalues,
        singular_values=singular_values,
        log_abs_det=torch.linalg.slogdet(j).logabsdet,
        rank=(singular_values > n * torch.finfo(j.dtype).eps * largest[..., None]).sum(-1),
        rms=_norm(update) / n,
        gain=largest,
        expanding=(singular_values > 1).to(j.dtype).mean(-1),
        complex_share=(eigenvalues.imag != 0).to(j.dtype).mean(-1),
        antisymmetric=antisymmetric_share(update),
        henrici=departure / _norm(j),
        henrici_update=departure / _norm(update),
    )


def henrici(a: Tensor) -> Tensor:
    """Henrici's departure from normality ``sqrt(|A|_F^2 - sum |lambda|^2) / |A|_F`` of ``(..., D, D)``: ``(...)``.

    0 for a normal matrix (symmetric, antisymmetric, orthogonal), towards 1 for a nilpotent one. It is a difference of
    squares: below about ``sqrt(eps)`` of the matrix's format it is rounding. Not defined (NaN) for a zero matrix. The
    same under orthogonal changes of basis only. Raises ``ValueError`` as :func:`spectrum` does.

    Source: Henrici 1962, Numerische Mathematik 4, 24-40.
    """
    a = _square("a", a)
    return _departure(a, torch.linalg.eigvals(a)) / _norm(a)


def antisymmetric_share(g: Tensor) -> Tensor:
    """Share of the energy of ``G`` ``(..., D, D)`` that is antisymmetric, ``|(G - G^T) / 2|^2 / |G|^2``: ``(...)``.

    1 for an infinitesimal rotation, 0 for a symmetric matrix (a gradient flow), and on average ``(1 - 1/D) / 2`` for
    independent entries of mean 0. Not defined (NaN) for a zero matrix. The same under orthogonal changes of basis only.
    Raises ``ValueError`` as :func:`spectrum` does.
    """
    g = _square("g", g)
    return (_norm(g - g.mT) / 2 / _norm(g)).square()


def complex_share_of_chance(n: int) -> float:
    """Share of complex eigenvalues that a real iid Gaussian ``n x n`` matrix has on average, exactly.

    It approaches ``1 - sqrt(2 / (pi n))``: .967 at 576 and .988 at 4096 units. Raises ``ValueError`` for ``n < 1``.

    Source: Edelman, Kostlan & Shub 1994, J. Amer. Math. Soc. 7, 247-267.
    """
    if n < 1:
        raise ValueError(f"n={n}: a matrix has at least one row; give a whole number from 1 on.")
    m = np.arange(0, n - 1, 2) if n % 2 == 0 else np.arange(1, n - 1, 2)
    ratios = np.exp(gammaln(m + 0.5) - gammaln(m + 1.0)) / math.sqrt(math.pi)  # (2m - 1)!! / (2m)!!
    return float(1 - (n % 2 + math.sqrt(2) * ratios.sum()) / n)


def participation_ratio(singular_values: Tensor) -> Tensor:
    """How many directions carry the energy of a matrix, ``(sum sigma^2)^2 / sum sigma^4`` of ``(..., D)``: ``(...)``.

    From 1 for rank one to ``D`` for a multiple of an orthogonal matrix; NaN for a zero matrix.
    """
    energy = (singular_values / singular_values.amax(-1, keepdim=True)).square()
    return energy.sum(-1).square() / energy.square().sum(-1)


def lyapunov(js: Tensor, k: int | None = None) -> Tensor:
    """Finite-time Lyapunov exponents ``ln(sigma_i) / S`` of the product ``js[-1] ... js[0]`` of ``(S, D, D)``, falling.

    The unit is nats per matrix: with the Jacobians of sublayers, twice that is nats per layer of two. Exponents belong
    to the product's singular values, and so to an orthonormal basis of the stream.

    The product is never multiplied out, since in float64 all its singular values below ``1e-16`` of the largest would
    be rounding. One QR sweep from each side leaves a product of triangular factors that is graded; it is kept as
    diagonal (in logarithms) times unit triangle, whose singular values one-sided Jacobi gives to high *relative*
    accuracy (Stewart 1997; Drmač & Veselić 2008). All ``D`` are resolved whatever their range, and their sum is
    ``sum log|det J| / S`` to rounding.

    Args:
        js: the first to act comes first; real and finite.
        k: the leading exponents alone, which subspace iteration finds sooner where they stand apart; default all.

    Returns:
        ``(k,)`` float64. A product of rank ``r`` has ``D - r`` exponents of ``-inf``.

    Raises:
        ValueError: other shapes, NaN or infinities, no matrix, ``k`` not from 1 to ``D``.
    """
    js = _square("js", js).to(torch.float64)
    if js.ndim != 3 or len(js) == 0:
        raise ValueError(f"js has shape {tuple(js.shape)}; give (S, D, D), one matrix per step, at least one.")
    n = js.shape[-1]
    k = n if k is None else k
    check_k(k, n)
    rank = n - max(_rank_deficit(j) for j in js)
    steps = [partial(torch.matmul, j) for j in js], [partial(torch.matmul, j.mT) for j in js]
    wanted = min(k, rank)
    found = None
    if 4 * (wanted + _OVERSAMPLED) <= rank:  # some columns several times cost less than all of them once
        found = leading_exponents(*steps, n, wanted, rank=rank, rounds=rank // wanted, device=js.device).value
    if found is None:
        found = leading_exponents(*steps, n, rank, rank=rank, device=js.device).value
        assert found is not None  # one round gives all of them
    found = found[:wanted]
    return torch.cat([found, found.new_full((k - wanted,), -torch.inf)])


class ProductsToTheEnd(NamedTuple):
    """Of the product from each matrix to the last: largest singular value, :func:`participation_ratio`, ``(S,)``."""

    gain: Tensor
    participation: Tensor


def products_to_the_end(js: Tensor) -> ProductsToTheEnd:
    """The products ``js[-1] ... js[s]`` of ``(S, D, D)`` for every ``s``, in float64.

    They are multiplied out, which the leading singular values survive; for small ones see :func:`lyapunov`. Raises
    ``ValueError`` as :func:`spectrum` does.
    """
    js = _square("js", js)
    product = torch.eye(js.shape[-1], dtype=torch.float64, device=js.device)
    gain, participation = [], []
    for j in js.flip(0):
        product = product @ j.to(torch.float64)
        energy = product.mT @ product
        participation.append(energy.trace().square() / energy.square().sum())
        gain.append(_largest(energy).sqrt())
    return ProductsToTheEnd(torch.stack(gain[::-1]), torch.stack(participation[::-1]))


Columns = Callable[[Tensor], Tensor]  # (D, p) -> (D, p), all columns by the same linear map


class Leading(NamedTuple):
    """Leading exponents of a product: ``value`` ``(k,)``, None where they had not come to rest after ``rounds``."""

    value: Tensor | None
    rounds: int


def leading_exponents(
    forward: Sequence[Columns],
    backward: Sequence[Columns],
    n: int,
    k: int,
    *,
    rank: int | None = None,
    rounds: int = 30,
    tolerance: float = 1e-9,
    device: torch.device | str = "cpu",
) -> Leading:
    """:func:`lyapunov` of linear maps that are only known by what they do to columns.

    By block Lanczos on either side (Golub & Kahan 1965; Musco & Musco 2015) where float64 holds the range of the
    leading ones in one matrix, else by subspace iteration, which needs more columns and holds any range.

    Args:
        forward: ``v -> J_s v`` of each step, the first to act first.
        backward: ``u -> J_s^T u`` of each, in the same order.
        n: ``D``.
        k: how many exponents.
        rank: of the product; default ``D``. At least ``k``: a direction that is lost has no logarithm.
        rounds: at most this many, each of them a sweep of some columns either way.
        tolerance: they have come to rest when none moves by more, in nats over the whole product.
        device: where the maps compute.

    Returns:
        The exponents in nats per step, falling, float64.
    """
    rank = n if rank is None else rank
    check_k(k, rank, least=0)
    if k == 0:
        return Leading(torch.empty(0, dtype=torch.float64, device=device), 0)
    width = min(rank, k + _OVERSAMPLED)
    if 2 * width <= rank:
        found = _lanczos(
            forward, backward, _start(n, max(_OVERSAMPLED, k - k // 4), device), k, rank, rounds, tolerance
        )
        if found is not None:
            return found
        width = min(rank, 2 * width)
    return _subspace(forward, backward, _start(n, width, device), k, rank, rounds, tolerance)


def _start(n: int, width: int, device: torch.device | str) -> Tensor:
    """A random orthonormal basis, the same whenever it is asked for."""
    drawn = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(drawn.to(device)).Q


def _lanczos(
    forward: Sequence[Columns],
    backward: Sequence[Columns],
    block: Tensor,
    k: int,
    rank: int,
    rounds: int,
    tolerance: float,
) -> Leading | None:
    """Blocks of columns there and back, each made orthogonal to those before it; all of them give the estimate.

    A sweep either way gives one, from below, so that the last two say what is still to come. None where the leading
    exponents span more than float64 tells apart, or the blocks fill the space.
    """
    resolved = math.log(tolerance / torch.finfo(torch.float64).eps)
    sides = block, block[:, :0]  # orthonormal bases of what went in, and of what came out
    images = block[:, :0], block[:, :0]  # of either
    scale: Tensor | None = None
    before: Tensor | None = None
    for sweep in range(2 * rounds):
        here, there = (0, 1) if sweep % 2 == 0 else (1, 0)
        basis, logarithms, triangle = _sweep(forward if here == 0 else [*reversed(backward)], block)
        scale = logarithms.max() if scale is None else scale
        image = basis @ ((logarithms - scale).exp()[:, None] * triangle)
        both = list(images)
        both[here] = torch.cat([images[here], image], 1)
        images = both[0], both[1]
        if images[here].shape[1] >= k:
            found = torch.linalg.svdvals(images[here])[:k].log() + scale
            if float(found[0] - found[-1]) > resolved:
                return None
            if before is not None and float((found - before).abs().max()) <= tolerance:
                return Leading(found / len(forward), sweep // 2 + 1)
            before = found
        if sides[there].shape[1] + block.shape[1] > rank:
            return None
        block = _orthogonal(basis, sides[there])
        both = list(sides)
        both[there] = torch.cat([sides[there], block], 1)
        sides = both[0], both[1]
    return Leading(None, rounds)


def _orthogonal(columns: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of the columns less what lies in ``basis``; the second pass takes what rounding left."""
    for _ in range(2):
        columns = torch.linalg.qr(columns - basis @ (basis.mT @ columns)).Q
    return columns


def _subspace(
    forward: Sequence[Columns],
    backward: Sequence[Columns],
    basis: Tensor,
    k: int,
    rank: int,
    rounds: int,
    tolerance: float,
) -> Leading:
    """The same columns there and back until the exponents rest; once, where they are as many as the rank."""
    before: Tensor | None = None
    for done in range(1, rounds + 1):
        for step in reversed(backward):
            basis = torch.linalg.qr(step(basis)).Q
        basis, logarithms, triangle = _sweep(forward, basis)
        found = _log_singular_values(logarithms, triangle)[:k]
        # the whole range of the product is in the basis at once; a part of it comes to rest
        if basis.shape[1] == rank or (before is not None and float((found - before).abs().max()) <= tolerance):
            return Leading(found / len(forward), done)
        before = found
    return Leading(None, rounds)


def check_k(k: int, n: int, *, least: int = 1) -> None:
    """Raise ``ValueError`` for a number of exponents that a product of ``n x n`` matrices has not."""
    if isinstance(k, bool) or not isinstance(k, int) or not least <= k <= n:
        raise ValueError(f"k={k}: a product of {n} x {n} matrices has exponents 1 to {n}; give a whole number of them.")


def matched_null(g: Tensor, kind: Null, generator: torch.Generator) -> Tensor:
    """A random update of the size of each ``G`` ``(..., D, D)``, in its dtype and on its device.

    ``gaussian`` keeps the RMS of the entries: independent normal entries. ``rotated`` keeps all singular values,
    between two independent random rotations (Haar): what an update of this spectrum does when nothing ties where it
    reads to where it writes. Raises ``ValueError`` for another kind, and as :func:`spectrum` does.
    """
    if kind not in NULLS:
        raise ValueError(f"kind={kind!r}: the matched nulls are {' and '.join(NULLS)}.")
    g = _square("g", g)
    n = g.shape[-1]
    if kind == "gaussian":
        return _normal(g, generator) * (_norm(g) / n)[..., None, None]
    left, right = (_rotation(g, generator) for _ in range(2))
    return left @ (torch.linalg.svdvals(g)[..., None] * right)


# --- the parts --------------------------------------------------------------------------------------------------------


def _square(name: str, a: Tensor) -> Tensor:
    """The matrices, in float32 at least."""
    if not isinstance(a, Tensor) or a.ndim < 2 or a.shape[-1] != a.shape[-2] or a.shape[-1] == 0:
        shape = tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__
        raise ValueError(f"{name}: {shape}, but it must be a tensor of square matrices, (..., D, D).")
    if not a.is_floating_point():
        raise ValueError(f"{name}: {a.dtype}, but it must be real floating point; convert it with .double().")
    finite = torch.isfinite(a).flatten(-2).all(-1)
    if not finite.all():
        raise ValueError(
            f"{name}: {int((~finite).sum())} of {finite.numel()} matrices hold NaN or infinities. Leave them out, or "
            "compute them in a wider format."
        )
    return a.to(torch.float32) if a.dtype in (torch.float16, torch.bfloat16) else a


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a)


def _departure(a: Tensor, eigenvalues: Tensor) -> Tensor:
    """``sqrt(|A|_F^2 - sum |lambda|^2)``, of ``A - c I``: the same for every c, and least rounded at the mean one."""
    n = a.shape[-1]
    mean = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    centred = a - mean[..., None, None] * torch.eye(n, dtype=a.dtype, device=a.device)
    energy = _norm(centred).square() - (eigenvalues - mean[..., None]).abs().square().sum(-1)
    return energy.clamp(min=0).sqrt()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return drawn.to(like.device)


def _rotation(like: Tensor, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal matrices: QR with the signs of R's diagonal put back (Mezzadri 2007)."""
    q, r = torch.linalg.qr(_normal(like, generator))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def _largest(energy: Tensor, k: int = 8, powers: int = 8) -> Tensor:
    """The largest eigenvalue of a symmetric matrix: Rayleigh-Ritz on the Krylov blocks of its own largest columns."""
    n = len(energy)
    if n <= 2 * k * powers:
        return torch.linalg.eigvalsh(energy)[-1]
    basis = block = torch.linalg.qr(energy[:, energy.diagonal().topk(k).indices]).Q
    for _ in range(powers - 1):
        block = energy @ block
        for _ in range(2):  # once leaves what rounding brings back
            block = block - basis @ (basis.mT @ block)
        block = torch.linalg.qr(block).Q
        basis = torch.cat([basis, block], 1)
    basis = torch.linalg.qr(basis).Q
    return torch.linalg.eigvalsh(basis.mT @ energy @ basis)[-1]


def _rank_deficit(j: Tensor) -> int:
    """How many singular values are 0 to working precision.

    Asked only where the diagonal of a triangular factor says that some may be; of a matrix whose rows and columns have
    been scaled to length 1, since a diagonal of 1 and 1e-20 has full rank.
    """
    n = len(j)
    diagonal = torch.linalg.qr(j, mode="r").R.diagonal().abs()
    if diagonal.min() > 1e-10 * diagonal.max():
        return 0
    scaled = j
    for _ in range(3):
        for dim in (0, 1):
            length = scaled.norm(dim=dim, keepdim=True)
            scaled = scaled / torch.where(length > 0, length, 1.0)
    values = torch.linalg.svdvals(scaled)
    return int((values <= n * torch.finfo(j.dtype).eps * values[0]).sum())


def _sweep(forward: Sequence[Columns], basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Carry an orthonormal basis through all steps: the last basis, and the triangular factor of the product.

    The factor ``(p, p)`` comes as logarithms of its diagonal, which is made positive, and a triangle with a diagonal of
    1: it is ``diag(exp(logarithms)) triangle``.
    """
    width = basis.shape[1]
    logarithms = basis.new_zeros(width)
    triangle = torch.eye(width, dtype=basis.dtype, device=basis.device)
    for step in forward:
        basis, r = torch.linalg.qr(step(basis))
        diagonal = r.diagonal()
        basis = basis * diagonal.sign()  # of a diagonal that is positive the logarithm is all there is
        unit = r / diagonal[:, None]
        # the upper part alone is multiplied out: the exponentials of the other could be infinite, and 0 times that NaN
        ratios = (logarithms[None] - logarithms[:, None]).triu().exp()
        triangle = (unit * ratios) @ triangle
        logarithms = logarithms + diagonal.abs().log()
    return basis, logarithms, triangle


def _log_singular_values(logarithms: Tensor, triangle: Tensor) -> Tensor:
    """Logarithms of the singular values of ``diag(exp(logarithms)) triangle``, falling.

    They are taken in windows of 500 nats: a window's neighbours beyond 45 nats are not seen in float64.
    """
    logs, rows = logarithms.cpu().numpy(), triangle.cpu().numpy()
    if logs.max() - logs.min() <= _WINDOW:
        return _jacobi(logs, rows).to(logarithms.device)
    for _ in range(4):  # each parts what lies far apart further, and only then does a window stand on its own
        order = np.argsort(-logs)
        logs, rows = logs[order], rows[order]
        r = np.linalg.qr(rows.T, mode="r")  # (D T)^T = Q R D, whose singular values are those of R D
        diagonal = np.diag(r)
        rows = r / diagonal[:, None] * np.exp(np.triu(logs[None] - logs[:, None]))
        logs = logs + np.log(np.abs(diagonal))
        rows = rows * np.sign(diagonal)[:, None]
    falling = -np.minimum.accumulate(logs)
    found, start = np.empty_like(logs), 0
    while start < len(logs):
        stop = int(np.searchsorted(falling, falling[start] + _WINDOW - 2 * _MARGIN, side="right"))
        first = int(np.searchsorted(falling, falling[start] - _MARGIN))
        last = int(np.searchsorted(falling, falling[stop - 1] + _MARGIN, side="right"))
        part = _jacobi(logs[first:last], rows[first:last, first:last]).numpy()
        found[start:stop] = part[start - first : stop - first]
        start = stop
    return torch.from_numpy(found).to(logarithms.device)


def _jacobi(logs: np.ndarray, rows: np.ndarray) -> Tensor:
    """The same for one window, by LAPACK's preconditioned one-sided Jacobi on ``(D T)^T``, columns well scaled."""
    top = float(logs.max())
    columns = np.asfortranarray((rows * np.exp(logs - top)[:, None]).T)
    # joba=0: the columns may be scaled at will; jobu, jobv=3: singular values alone; jobr=0: nothing small is cut off
    values, _, _, work, _, info = dgejsv(columns, joba=0, jobu=3, jobv=3, jobr=0, jobp=0)
    if info != 0:
        raise ValueError(f"js: the one-sided Jacobi SVD of the product did not converge (LAPACK dgejsv, info {info}).")
    values = np.sort(values)[::-1] * (work[1] / work[0])
    with np.errstate(divide="ignore"):
        return torch.from_numpy(np.log(values) + top)
