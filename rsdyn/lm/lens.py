"""The Jacobian lens: a state carried to the end of the depth by the average derivative, and read there.

``J_l = E[d h_final / d h_l]`` over texts and source tokens, summed over targets: the source token and all after it. The
first tokens of a text and its last one, which has no next token, are neither (Gurnee et al. 2026, "Verbalizable
representations form a global workspace"; estimator and file as in their published code). ``h_l`` is the stream behind
block ``l``, ``h_final`` that behind the last block, ahead of the final norm: a lens reads ``head(norm(J_l h_l))``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.files import publish
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.tracing import output_of, stream_of

SKIPPED = 16  # first tokens of a text, of which some are sinks; as in the published code
ESTIMATOR = 2  # raise it whenever a text would add another derivative: a fit under way is then not resumed
BLOCK_BYTES = 2**29  # of the activations of the copies of a text that are differentiated together, about


@dataclass(frozen=True)
class JacobianLens:
    """A fitted lens.

    Attributes:
        j: by source layer, ``(D, D)`` float32: the state behind that block to the state behind the last one.
        n_prompts: texts that it was fitted on.
    """

    j: dict[int, Tensor]
    n_prompts: int

    @property
    def source_layers(self) -> list[int]:
        """The blocks behind which it can read, in order."""
        return sorted(self.j)

    @property
    def d_model(self) -> int:
        """``D``."""
        return len(next(iter(self.j.values())))

    def transport(self, layer: int, states: Tensor) -> Tensor:
        """States ``(..., D)`` behind block ``layer`` as they would stand behind the last; ``ValueError`` for others."""
        if layer not in self.j:
            raise ValueError(f"layer={layer}: this lens has {self.source_layers}; ask for one of them.")
        return states.to(torch.float32) @ self.j[layer].to(states.device).T

    def save(self, path: str | Path) -> None:
        """Write the published layout: ``J`` in float16, ``n_prompts``, ``source_layers``, ``d_model``."""
        if any(float(j.abs().max()) > torch.finfo(torch.float16).max for j in self.j.values()):
            raise ValueError("j: entries beyond the range of float16, in which the published layout keeps them.")
        content = {
            "J": {layer: self.j[layer].to(torch.float16) for layer in self.source_layers},
            "n_prompts": self.n_prompts,
            "source_layers": self.source_layers,
            "d_model": self.d_model,
        }
        _write(Path(path), content)

    @classmethod
    def load(cls, path: str | Path) -> JacobianLens:
        """Read the published layout, tensors and numbers alone.

        Raises ``UserError`` for a file that is not there, is no such file, or contradicts itself.
        """
        content = _read(Path(path))
        missing = [key for key in ("J", "n_prompts", "source_layers", "d_model") if key not in content]
        if missing:
            raise UserError(f"{path}: not a Jacobian lens; it lacks {', '.join(missing)}.")
        try:
            j = {int(layer): tensor.to(torch.float32) for layer, tensor in content["J"].items()}
            d, layers, n = (
                int(content["d_model"]),
                sorted(map(int, content["source_layers"])),
                int(content["n_prompts"]),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a Jacobian lens ({error}).") from error
        if sorted(j) != layers or not j or any(tensor.shape != (d, d) for tensor in j.values()):
            raise UserError(f"{path}: its matrices are not those of layers {layers} at {d} units, as it says.")
        if not all(bool(torch.isfinite(tensor).all()) for tensor in j.values()):
            raise UserError(f"{path}: it holds NaN or infinities.")
        return cls(j, n)


@dataclass
class LensFit:
    """A fit under way: sums over texts, in two halves, and how much each text moved the mean.

    Attributes:
        sums: by half (texts of even and of odd number), ``(L - 1, D, D)`` float64.
        counts: texts in each.
        changes: relative change of the mean by each text from the second on, mean over layers.
    """

    sums: list[Tensor]
    counts: list[int] = field(default_factory=lambda: [0, 0])
    changes: list[float] = field(default_factory=list)

    @classmethod
    def begin(cls, lm: LanguageModel) -> LensFit:
        """An empty fit of a model; ``UserError`` for one of a single layer."""
        if lm.n_layers < 2:
            raise UserError(f"name: {lm.name} has one layer, and a lens reads behind all layers but the last.")
        shape = lm.n_layers - 1, lm.n_units, lm.n_units
        return cls([torch.zeros(shape, dtype=torch.float64) for _ in range(2)])

    @property
    def n(self) -> int:
        """Texts so far."""
        return sum(self.counts)

    def add(self, of_text: Tensor) -> None:
        """One more text's ``(L - 1, D, D)``."""
        total, half = self.sums[0] + self.sums[1], self.n % 2
        new = (total + of_text) / (self.n + 1)
        if self.n:
            moved = (new - total / self.n).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)
            self.changes.append(float(moved.mean()))
        self.sums[half] += of_text
        self.counts[half] += 1

    def lens(self) -> JacobianLens:
        """The mean over all texts; ``ValueError`` without one."""
        if self.n == 0:
            raise ValueError("the lens has no text yet; add one.")
        mean = ((self.sums[0] + self.sums[1]) / self.n).to(torch.float32)
        return JacobianLens(dict(enumerate(mean)), self.n)

    def refit_cosine(self) -> Tensor | None:
        """Cosine between the lenses of the two halves, by layer ``(L - 1,)``; None with fewer than two texts."""
        if min(self.counts) == 0:
            return None
        return nn.functional.cosine_similarity(self.sums[0].flatten(1), self.sums[1].flatten(1), dim=1)

    def save(self, path: str | Path, made_from: str) -> None:
        """Keep the fit, to resume from; ``made_from`` says of which model and texts."""
        content = {"made_from": made_from, "sums": self.sums, "counts": self.counts, "changes": self.changes}
        _write(Path(path), content)

    @classmethod
    def load(cls, path: str | Path, made_from: str) -> LensFit:
        """A fit that was kept; ``UserError`` where it is of another model, other texts, or no fit."""
        content = _read(Path(path))
        if content.get("made_from") != made_from:
            raise UserError(
                f"{path}: a fit of another model, of other texts or settings. Remove it, or write elsewhere."
            )
        return cls(content["sums"], content["counts"], content["changes"])


def text_jacobian(lm: LanguageModel, tokens: Sequence[int] | np.ndarray, *, skip: int = SKIPPED) -> Tensor:
    """One text's share of a lens, ``(L - 1, D, D)`` float64 on the CPU.

    At ``[l, i, j]``: the derivative of unit ``i`` behind the last layer, summed over the tokens from ``skip`` on but
    the last one, by unit ``j`` behind block ``l`` at one of these tokens, averaged over them. Copies of the text go
    through the whole model side by side, as many as memory allows; all rows share one forward.

    Raises ``UserError`` for a text of no more than ``skip + 1`` tokens, ``NonFiniteError`` for derivatives that are
    not.
    """
    ids = torch.as_tensor(np.asarray(tokens), dtype=torch.int64)
    if ids.ndim != 1 or len(ids) <= skip + 1:
        raise UserError(
            f"tokens: {len(ids)} of a text, of which the first {skip} and the last are skipped; give a longer one."
        )
    n_sites, n_units = len(lm.sites.names), lm.n_units
    inner = int(getattr(lm.config, "intermediate_size", None) or 4 * n_units)
    of_copy = lm.n_layers * len(ids) * (10 * n_units + 4 * inner) * lm.dtype.itemsize
    copies = max(1, min(n_units, BLOCK_BYTES // of_copy))
    behind: list[Tensor] = []
    final: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = stream_of(args, kwargs)
        if not behind:
            stream.requires_grad_()  # nothing before it is differentiated
        behind.append(stream)

    out = torch.empty(lm.n_layers - 1, n_units, n_units, dtype=torch.float64)
    with ExitStack() as hooks, torch.enable_grad():
        for module in lm.sites.modules[n_sites::n_sites]:
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        last = lm.sites.layers[-1].register_forward_hook(lambda m, a, output: final.append(output_of(output)))
        hooks.callback(last.remove)
        lm.base(input_ids=ids.expand(copies, -1).to(lm.device), use_cache=False)
        ends = final[0].view(copies, len(ids), n_units)[:, skip:-1]
        starts = list(range(0, n_units, copies))
        for start in starts:
            dims = torch.arange(start, min(start + copies, n_units), device=ends.device)
            total = ends[torch.arange(len(dims)), :, dims].sum()
            pulled = torch.autograd.grad(total, behind, retain_graph=start != starts[-1])
            for layer, grad in enumerate(pulled):
                rows = grad.view(copies, len(ids), n_units)[: len(dims), skip:-1].mean(1, dtype=torch.float64)
                out[layer, start : start + len(dims)] = rows.cpu()
    if not torch.isfinite(out).all():
        raise NonFiniteError(f"the derivatives of {lm.name} are not finite, in {lm.dtype}. Compute in float32.")
    return out


def _write(path: Path, content: dict[str, Any]) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    publish(path, [file.getvalue()])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise UserError(f"{path}: cannot be read as tensors and numbers ({type(error).__name__}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a lens.")
    return content
