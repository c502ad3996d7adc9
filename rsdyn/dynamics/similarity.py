"""How alike two sets of states are, whatever basis each is written in: debiased centred kernel alignment.

Linear CKA (Kornblith et al. 2019) of few samples in many units is near 1 for unrelated states. The debiased one puts
the unbiased estimator of HSIC (Song et al. 2012, equation 5) in its three places: its expectation is 0 where the states
are independent, and it can be a little below 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rsdyn.threads import side_by_side

LEAST = 4  # the unbiased estimator divides by n - 3
_BLOCK = 1 << 15


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Debiased linear CKA of two sets of states of the same ``N`` samples; a scalar, float64.

    Args:
        x: ``(N, D)``.
        y: ``(N, E)``, row by row of the same samples.

    Returns:
        1 for copies that are rotated, shifted or scaled, 0 in expectation for independent states; NaN where either is
        constant. The expectation over sequences is that of a sample: no bias from ``N`` or ``D`` is left.

    Raises:
        ValueError: for other shapes, numbers of samples that differ, fewer than four, or what is not finite.
    """
    for name, value in (("x", x), ("y", y)):
        if value.ndim != 2:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: give (N, D), samples by units.")
        _check_finite(name, value)
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} samples and y {len(y)}: they must be the same samples, row by row.")
    a, b = centred_gram(x), centred_gram(y)
    return _aligned((a * b).sum(), (a * a).sum(), (b * b).sum())


def cka_map(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Debiased linear CKA between all sublayers, ``(S, S)``, or of one stream's with another's, ``(S, S')``; float64.

    Each sublayer's Gram matrix is made once, and all pairs come from one product.

    Args:
        x: ``(N, S, D)``.
        y: ``(N, S', E)`` of the same samples, such as another model's; default ``x`` itself.

    Raises:
        ValueError: as :func:`cka`.
    """
    for name, value in (("x", x), ("y", x if y is None else y)):
        if value.ndim != 3:
            raise ValueError(f"{name} of shape {tuple(value.shape)}: give (N, S, D), samples by sublayers by units.")
        _check_finite(name, value)
    if y is not None and len(x) != len(y):
        raise ValueError(f"x has {len(x)} samples and y {len(y)}: they must be the same samples, row by row.")
    a = _flat_grams(x)
    return _products_of(a, a if y is None else _flat_grams(y))


def _products_of(a: Tensor, b: Tensor) -> Tensor:
    products = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for left, right in zip(a.split(_BLOCK, dim=1), b.split(_BLOCK, dim=1), strict=True):
        products += left @ right.T  # float32 products, summed in float64
    of_a, of_b = (f.square().sum(1, dtype=torch.float64) for f in (a, b))
    return _aligned(products, of_a[:, None], of_b[None, :])


def centred_gram(x: Tensor) -> Tensor:
    """The Gram matrix of states ``(N, D)`` without its diagonal, centred so that products of two are unbiased.

    ``(N, N)`` float64. Each entry loses its row's and column's sums over ``N - 2`` and gains the whole sum over
    ``(N - 1)(N - 2)``; the mean product of two such matrices over ``N (N - 3)`` is the unbiased HSIC.
    """
    return _unbiased(_hollow_gram(x))


def _unbiased(gram: Tensor) -> Tensor:
    """A Gram matrix without its diagonal, centred; in place."""
    n, rows = len(gram), gram.sum(0)
    gram -= (rows[:, None] + rows[None, :]) / (n - 2) - rows.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0)


def hollow_grams(x: Tensor) -> Tensor:
    """The Gram matrices of the sublayers of ``(N, S, D)``, each of length 1 and without its diagonal: ``(S, N, N)``.

    Float32, for the functions that take pairs of them; zero where a sublayer is constant.
    """
    n, s, _ = x.shape
    out = torch.empty(s, n, n, dtype=torch.float32, device=x.device)
    # on another device than a CPU float32 products may be TF32
    dtype = torch.float32 if x.device.type == "cpu" else torch.float64

    def one(k: int) -> Tensor:
        gram = _hollow_gram(x[:, k], dtype)
        size = gram.norm(dtype=torch.float64)
        return gram.div_(torch.where(size > 0, size, 1.0))

    for k, gram in enumerate(side_by_side(one, range(s), x.device)):
        out[k] = gram
    return out


def map_of(grams: Tensor, others: Tensor | None = None) -> Tensor:
    """Debiased CKA between all of ``S`` :func:`hollow_grams`, or theirs with ``S'`` others of the same samples.

    ``(S, S)`` or ``(S, S')``, float64; NaN where a sublayer is constant.
    """
    flat = _flat(grams)
    return _products_of(flat, flat if others is None else _flat(others))


def _flat(grams: Tensor) -> Tensor:
    """The upper triangles of hollow Gram matrices, centred and of length 1."""
    s, n, _ = grams.shape
    above = torch.triu_indices(n, n, 1, device=grams.device)
    flat = torch.empty(s, above.shape[1], dtype=torch.float32, device=grams.device)
    for out, gram in zip(flat, grams, strict=True):
        centred = _unbiased(gram.to(torch.float64))[above[0], above[1]]
        size = centred.norm()
        out.copy_(centred / torch.where(size > 0, size, torch.nan))
    return flat


def packed(grams: Tensor) -> Tensor:
    """The upper triangles of :func:`hollow_grams` ``(S, N, N)`` to be kept: ``(S, N (N - 1) / 2)`` float16, RMS 1.

    Half precision moves a CKA of some hundred samples by less than 1e-4.
    """
    n = grams.shape[-1]
    above = torch.triu_indices(n, n, 1, device=grams.device)
    flat = grams[:, above[0], above[1]]
    size = flat.square().mean(1, keepdim=True).sqrt()
    return (flat / torch.where(size > 0, size, 1.0)).clamp(-6e4, 6e4).to(torch.float16)


def unpacked(pairs: Tensor, n: int) -> Tensor:
    """The hollow Gram matrices ``(S, N, N)`` of ``n`` samples that :func:`packed` gave, float32, of any length.

    Raises:
        ValueError: where the pairs are not those of ``n`` samples.
    """
    if pairs.shape[-1] != n * (n - 1) // 2:
        raise ValueError(f"pairs has {pairs.shape[-1]} columns: {n} samples have {n * (n - 1) // 2} pairs.")
    above = torch.triu_indices(n, n, 1, device=pairs.device)
    grams = torch.zeros(len(pairs), n, n, dtype=torch.float32, device=pairs.device)
    grams[:, above[0], above[1]] = pairs.to(torch.float32)
    return grams + grams.mT


def without_each_group(grams: Tensor, others: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Debiased CKA of pairs of :func:`hollow_grams`, of all samples and without each group of them.

    Everything that the estimator takes of a subset are sums over blocks of the two matrices, so each pair is read once
    and not once per group.

    Args:
        grams, others: ``(P, N, N)``, the pairs.
        group: ``(N,)``, the group of each sample.

    Returns:
        ``(P,)`` of all samples, and ``(G, P)`` without each group in rising order, float64; NaN where fewer than four
        samples are left, or the states are constant. One group gives ``(0, P)``.
    """
    known = group.unique()
    n, n_pairs = len(group), len(grams)
    member = (group[:, None] == known).to(grams.device, torch.float32)  # (N, G)
    left = [n, *(n - int((group == g).sum()) for g in known)] if len(known) > 1 else [n]
    found = torch.empty(len(left), n_pairs, dtype=torch.float64, device=grams.device)

    def one(p: int) -> Tensor:
        k, m = grams[p], others[p]
        pairs = {"km": (k, m), "kk": (k, k), "mm": (m, m)}
        blocks = {name: (member.T @ (a * b) @ member).to(torch.float64) for name, (a, b) in pairs.items()}
        rows = {"k": (k @ member).to(torch.float64), "m": (m @ member).to(torch.float64)}  # (N, G)
        each = {name: _hsic(blocks[name], rows[name[0]], rows[name[1]], member, left) for name in pairs}
        sizes = (each["kk"] * each["mm"]).clamp(min=0).sqrt()
        return each["km"] / torch.where(sizes > 1e-12, sizes, torch.nan)

    for p, values in enumerate(side_by_side(one, range(n_pairs), grams.device)):
        found[:, p] = values
    return found[0], found[1:]


def _hsic(blocks: Tensor, of_k: Tensor, of_m: Tensor, member: Tensor, left: Sequence[int]) -> Tensor:
    """Unbiased HSIC, times N (N - 3), of all samples and without each group (Song et al. 2012, equation 5)."""
    member = member.to(torch.float64)
    out = []
    for g, n in enumerate(left, start=-1):  # -1: all samples
        if n < LEAST:
            out.append(torch.tensor(torch.nan, dtype=torch.float64, device=blocks.device))
            continue
        stays = torch.ones(len(blocks), dtype=torch.float64, device=blocks.device)
        if g >= 0:
            stays[g] = 0
        inside = member @ stays
        k, m = (of_k @ stays) * inside, (of_m @ stays) * inside
        trace = stays @ blocks @ stays
        whole = k.sum() * m.sum() / ((n - 1) * (n - 2))
        out.append(trace + whole - 2 / (n - 2) * (k @ m))
    return torch.stack(out)


def permuted_floor(grams: Tensor, others: Tensor, *, n: int = 5, seed: int = 0) -> Tensor:
    """Debiased CKA of pairs of :func:`hollow_grams` whose samples do not belong together, ``(n, P)``.

    Those of the second are permuted, by an order of its own for each value: what unrelated states of these spectra
    give. The mean is 0; the spread is what a similarity must stand above.
    """
    generator = torch.Generator().manual_seed(seed)
    size = grams.shape[-1]
    found = torch.empty(n, len(grams), dtype=torch.float64, device=grams.device)
    orders = [[torch.randperm(size, generator=generator) for _ in range(n)] for _ in grams]

    def one(p: int) -> Tensor:
        # permuted rows and columns keep a matrix's own sums, so only the product of the two is taken anew
        k, m = (_unbiased(pair[p].to(torch.float64)).to(pair.dtype) for pair in (grams, others))
        sizes = k.norm(dtype=torch.float64) * m.norm(dtype=torch.float64)
        at = [order.to(m.device) for order in orders[p]]
        products = torch.stack([(k * m[order][:, order]).sum(dtype=torch.float64) for order in at])
        return products / torch.where(sizes > 1e-12, sizes, torch.nan)

    for p, values in enumerate(side_by_side(one, range(len(grams)), grams.device)):
        found[:, p] = values
    return found


def permuted_map(grams: Tensor, others: Tensor, *, n: int = 5, seed: int = 0) -> Tensor:
    """:func:`map_of` two sets of Gram matrices whose samples do not belong together, ``(n, S, S')``.

    The samples of the second are permuted, in one order for all its sublayers.
    """
    generator = torch.Generator().manual_seed(seed)
    size = grams.shape[-1]
    above = torch.triu_indices(size, size, 1, device=grams.device)
    flat, centred = _flat(grams), torch.stack([_unbiased(gram.to(torch.float64)).to(gram.dtype) for gram in others])
    found = []
    for _ in range(n):
        order = torch.randperm(size, generator=generator).to(grams.device)
        rows, columns = order[above]
        found.append(_products_of(flat, centred[:, rows, columns]))
    return torch.stack(found)


def _hollow_gram(x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Products of all pairs of different states ``(N, D)``, about their mean, which the estimator does not see."""
    if len(x) < LEAST:
        raise ValueError(f"x has {len(x)} samples: the debiased estimator needs at least {LEAST}.")
    x = x.detach().to(torch.float64)
    x = x - x[0]  # exactly zero where all are equal, which less their mean they need not be
    x = (x - x.mean(0)).to(dtype)
    return (x @ x.T).fill_diagonal_(0)


def _flat_grams(x: Tensor) -> Tensor:
    """The upper triangles of the sublayers' :func:`centred_gram`, of unit length: ``(S, N (N - 1) / 2)`` float32."""
    n, s, _ = x.shape
    above = torch.triu_indices(n, n, 1, device=x.device)
    out = torch.empty(s, above.shape[1], dtype=torch.float32, device=x.device)
    for k in range(s):
        found = centred_gram(x[:, k])[above[0], above[1]]
        size = found.norm()
        out[k] = (found / torch.where(size > 0, size, torch.nan)).to(torch.float32)
    return out


def _check_finite(name: str, x: Tensor) -> None:
    if not x.isfinite().all():
        raise ValueError(f"{name}: it holds NaN or infinities. Leave those samples, sublayers or units out.")


def _aligned(product: Tensor, of_x: Tensor, of_y: Tensor) -> Tensor:
    sizes = (of_x * of_y).sqrt()
    return product.to(torch.float64) / torch.where(sizes > 0, sizes, torch.nan)
