"""Leave a layer out, or exchange it with the next: what it does to the predictions of whole texts.

The stream is not moved to a point here; the map that moves it is changed. A layer whose absence costs little adds
little that later layers read; two that can change places do not build on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.dynamics.prediction import mean_per_token, next_token_losses
from rsdyn.dynamics.recovery import kl
from rsdyn.dynamics.resampling import Interval
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.continuing.layer_order import run_in_order, run_whole
from rsdyn.lm.model import LanguageModel
from rsdyn.perturbation.prompts import Prompt
from rsdyn.perturbation.result import as_dict


@dataclass(frozen=True)
class LayerEffect:
    """What one change of layers does, over texts.

    Attributes:
        layer: the one that is left out, or exchanged with the next.
        kl: KL(plain || changed) of the next token, nats, mean over tokens.
        loss: change of the loss, nats per token: the logarithm of the ratio of perplexities.
        perplexity: its change in per cent.
    """

    layer: int
    kl: Interval
    loss: Interval
    perplexity: Interval

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"layer": self.layer}
        for name in ("kl", "loss", "perplexity"):
            out |= as_dict(name, getattr(self, name))
        return out


@dataclass(frozen=True)
class LayerEffects:
    """What came of changing each layer in turn.

    Attributes:
        kind: ``skip`` or ``swap_layers``.
        layers: which, in order.
        n_tokens: ``(texts,)``, predicted tokens of each text.
        plain: ``(texts,)``, the sum of their losses in the plain run.
        loss, kl: ``(texts, layers)``, sums over tokens: of the loss, and of KL(plain || changed).
        drawn: which texts were drawn from the corpus: results are over these, or over all where none were.
    """

    kind: str
    layers: list[int]
    n_tokens: Tensor
    plain: Tensor
    loss: Tensor
    kl: Tensor
    drawn: tuple[int, ...] = ()

    @property
    def sample(self) -> list[int]:
        """The numbers of the texts that results are over."""
        return [*(self.drawn or range(len(self.n_tokens)))]

    @property
    def effects(self) -> list[LayerEffect]:
        """Of each layer, over the texts of the sample."""
        n = self.n_tokens[self.sample]
        divergence = mean_per_token(self.kl[self.sample], n)
        change = mean_per_token((self.loss - self.plain[:, None])[self.sample], n)
        percent = Interval(*(100 * torch.expm1(end) for end in change))
        table = []
        for i, layer in enumerate(self.layers):
            of = (Interval(*(end[i] for end in found)) for found in (divergence, change, percent))
            table.append(LayerEffect(layer, *of))
        return table

    @property
    def perplexity(self) -> Interval:
        """Of the plain run, over the same texts."""
        found = mean_per_token(self.plain[self.sample], self.n_tokens[self.sample])
        return Interval(*(end.exp() for end in found))

    def of_text(self, number: int) -> tuple[Tensor, Tensor]:
        """One text's own KL and change of perplexity in per cent, ``(layers,)`` each."""
        n = self.n_tokens[number]
        return self.kl[number] / n, 100 * torch.expm1((self.loss[number] - self.plain[number]) / n)

    def to_dict(self) -> dict[str, Any]:
        """What ``summary.json`` has of it."""
        return {
            "kind": self.kind,
            "layers": self.layers,
            "n_prompts": len(self.n_tokens),
            "n_drawn": len(self.drawn),
            "n_tokens": int(self.n_tokens[self.sample].sum()),
            "perplexity": float(self.perplexity.value),
            "effects": [effect.to_dict() for effect in self.effects],
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], kind: str, *, drawn: bool) -> LayerEffects:
        """What :meth:`arrays` gave, read back; ``KeyError`` where an array is missing."""
        names = {"n_tokens": "n_tokens", "plain": "plain_loss", "loss": "loss", "kl": "kl"}
        parts = {field: torch.from_numpy(np.asarray(arrays[name])) for field, name in names.items()}
        sample = tuple(int(i) for i in arrays["sample"]) if drawn else ()
        return cls(kind, [int(layer) for layer in arrays["layers"]], **parts, drawn=sample)

    def arrays(self) -> dict[str, Any]:
        """Everything as arrays, a row per text."""
        arrays = {"n_tokens": self.n_tokens, "plain_loss": self.plain, "loss": self.loss, "kl": self.kl}
        return {
            **{name: value.numpy() for name, value in arrays.items()},
            "layers": torch.tensor(self.layers).numpy(),
            "sample": torch.tensor(self.sample).numpy(),
        }


def changed_layers(kind: str, layers: Sequence[int] | None, n_layers: int) -> list[int]:
    """The layers that are changed in turn, all by default; ``UserError`` for one that cannot be."""
    last = n_layers - 1 if kind == "skip" else n_layers - 2
    if last < 0:
        raise UserError("kind=swap_layers: the model has one layer, and none to exchange it with. Skip it.")
    chosen = [*range(last + 1)] if layers is None else [*layers]
    if chosen[-1] > last:
        raise UserError(
            f"layers: with kind={kind} layer {chosen[-1]} would be exchanged with the one behind it, "
            f"and there is none. Give layers from 0 to {last}."
        )
    return chosen


def order_of(kind: str, layer: int, n_layers: int) -> list[int]:
    """The order in which layers run when one is left out, or exchanged with the next."""
    order = [*range(n_layers)]
    if kind == "skip":
        del order[layer]
    else:
        order[layer], order[layer + 1] = order[layer + 1], order[layer]
    return order


@torch.no_grad()
def measure_layers(
    lm: LanguageModel,
    texts: Sequence[Prompt],
    layers: Sequence[int],
    kind: str,
    *,
    done: Callable[[int], object] = lambda n: None,
) -> LayerEffects:
    """Change each of ``layers`` in turn, on each text.

    Raises ``NonFiniteError`` where a changed stream is not finite, and as :func:`run_whole` does.
    """
    sums: list[Tensor] = []  # (layers + 1, 2) of each text: of the loss and of KL; the plain run's come last
    for text in texts:
        run = run_whole(lm, text.tokens)
        plain = lm.log_probs(run.final)
        rows = []
        for layer in layers:
            changed = run_in_order(lm, run, order_of(kind, layer, lm.n_layers))
            if not changed.isfinite().all():
                raise NonFiniteError(
                    f"kind={kind}: the stream of {lm.name} is not finite when layer {layer} is changed, in "
                    f"{lm.dtype}. Compute in a wider type (dtype=float32), or leave it out of `layers`."
                )
            log_probs = lm.log_probs(changed)
            rows.append((next_token_losses(log_probs, run.tokens).sum(), kl(plain[:-1], log_probs[:-1]).sum()))
        own = next_token_losses(plain, run.tokens).sum()
        sums.append(torch.stack([torch.stack(row) for row in (*rows, (own, torch.zeros_like(own)))]).cpu())
        done(1)
    loss, divergence = torch.stack(sums).unbind(-1)
    return LayerEffects(
        kind,
        [*layers],
        n_tokens=torch.tensor([len(text.tokens) - 1 for text in texts]),
        plain=loss[:, -1],
        loss=loss[:, :-1],
        kl=divergence[:, :-1],
        drawn=tuple(i for i, text in enumerate(texts) if text.sequence is not None),
    )
