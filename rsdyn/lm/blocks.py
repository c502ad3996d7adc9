"""The running sum of any torch module: named blocks, each of which adds to what it is given (a ViT, a ResNet stage).

Nothing is known of such a module but the names of its blocks, so the sum itself is the certificate: the input of each
block is the output of the one before, and what a block adds is the sum of outputs of parts of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.tracing import output_of, stream_of

MOST_PARTS = 3  # whose outputs are summed: attention and MLP, and a third for what adds once more


@dataclass(frozen=True)
class BlockCertificate:
    """How far the blocks of a module are from adding to one running sum; each is relative, 0 is exact.

    Attributes:
        chain: of a block's input from the output of the block before.
        sums: of what a block adds from the sum of outputs of its parts, relative to what it adds.
        parts: the names of these, of each block.
    """

    chain: float
    sums: float
    parts: tuple[tuple[str, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"chain": self.chain, "sums": self.sums, "parts": [list(names) for names in self.parts]}


def find_blocks(model: nn.Module, sites: Sequence[str]) -> list[nn.Module]:
    """The modules of these names, in order. Raises ``UserError`` for a name that is not there, or fewer than two."""
    if len(sites) < 2:
        raise UserError(f"sites={list(sites)}: a trajectory has at least two points. Name every block, in order.")
    names = dict(model.named_modules())
    for site in sites:
        if site not in names:
            some = [name for name in names if name.count(".") == site.count(".") and name][:8]
            raise UserError(f"sites: this {type(model).__name__} has no module {site!r}; it has {', '.join(some)}, ...")
    return [names[site] for site in sites]


@torch.no_grad()
def record_blocks(
    model: nn.Module, inputs: Any, sites: Sequence[str], *, tolerance: float = 1e-4
) -> tuple[Tensor, BlockCertificate]:
    """The inputs of a module's blocks ``(B, S, P, D)`` in one forward of ``inputs``, ``P`` being their positions.

    Args:
        model: any module; it runs in eval mode, and each part's own mode comes back.
        inputs: a tensor, or a dictionary of keyword arguments.
        sites: the names of the blocks, in order. Their inputs are ``(B, P, D)``, or images ``(B, D, H, W)``, whose
            places are the positions.
        tolerance: the largest relative error of the sums that passes.

    Raises ``UserError`` where the sum identity fails, naming the block, and ``NonFiniteError`` for NaN or Inf.
    """
    blocks = find_blocks(model, sites)
    given: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}
    parts: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(blocks))}

    def before(i: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if i in given:
                raise UserError(f"sites: {sites[i]} runs more than once in a forward, so its input is not one stream.")
            given[i] = stream_of(args, kwargs).clone()

        return hook

    def after(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            made[i] = output_of(output).clone()

        return hook

    def part(i: int, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found = output_of(output) if isinstance(output, (Tensor, tuple, list)) else None
            if found is not None and i in given and found.shape == given[i].shape:
                parts[i][name] = found.clone()

        return hook

    handles = []
    training = [part for part in model.modules() if part.training]
    try:
        model.eval()
        for i, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(before(i), with_kwargs=True))
            handles.append(block.register_forward_hook(after(i)))
            handles += [m.register_forward_hook(part(i, name)) for name, m in block.named_modules() if name]
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for kept in training:
            kept.training = True
    for i, site in enumerate(sites):
        if i not in given:
            raise UserError(f"sites: {site} was not reached in a forward of these inputs.")
        if given[i].shape != given[0].shape:
            raise UserError(
                f"sites: the stream at {site} has the shape {tuple(given[i].shape)}, and at {sites[0]} "
                f"{tuple(given[0].shape)}. A running sum keeps its shape: name the blocks of one stage."
            )
        if not torch.isfinite(given[i]).all():
            raise NonFiniteError(f"the stream at {site} is not finite. Check the weights and the inputs.")
    certificate = _certify(sites, given, made, parts, tolerance)
    return torch.stack([_positions(given[i]) for i in range(len(sites))], 1), certificate


def _positions(stream: Tensor) -> Tensor:
    """``(B, P, D)`` of a stream ``(B, P, D)``, of vectors ``(B, D)`` or of images ``(B, D, H, W)``."""
    if stream.ndim == 2:
        return stream[:, None]
    return stream.flatten(2).transpose(1, 2) if stream.ndim == 4 else stream


def _relative(a: Tensor, b: Tensor) -> float:
    size = b.double().norm()
    return float((a.double() - b.double()).norm() / size) if size > 0 else float((a.double() - b.double()).norm())


def _certify(
    sites: Sequence[str],
    given: dict[int, Tensor],
    made: dict[int, Tensor],
    parts: dict[int, dict[str, Tensor]],
    tolerance: float,
) -> BlockCertificate:
    chain, sums, names = 0.0, 0.0, []
    for i, site in enumerate(sites):
        if i + 1 < len(sites):
            off = _relative(given[i + 1], made[i])
            if not off <= tolerance:
                raise UserError(
                    f"sites: the input of {sites[i + 1]} is not the output of {site} (relative error {off:.1e}, "
                    f"{tolerance:.0e} allowed), so they are not blocks of one running sum."
                )
            chain = max(chain, off)
        added = made[i] - given[i]
        off, chosen = _explained(added, parts[i], tolerance)
        if not off <= tolerance:
            raise UserError(
                f"sites: what {site} adds to its input is no sum of what its parts give (relative error {off:.1e}, "
                f"{tolerance:.0e} allowed): it does more than add, as a norm or a ReLU after the sum does."
            )
        sums = max(sums, off)
        names.append(chosen)
    return BlockCertificate(chain, sums, tuple(names))


def _explained(added: Tensor, parts: dict[str, Tensor], tolerance: float) -> tuple[float, tuple[str, ...]]:
    """The fewest parts whose outputs sum to what was added, and how far off they are."""
    best: tuple[float, tuple[str, ...]] = (float("inf"), ())
    for n in range(1, MOST_PARTS + 1):
        for names in combinations(parts, n):
            total = parts[names[0]]
            for name in names[1:]:
                total = total + parts[name]
            off = _relative(total, added)
            if off < best[0]:
                best = (off, names)
        if best[0] <= tolerance:
            return best
    return best
