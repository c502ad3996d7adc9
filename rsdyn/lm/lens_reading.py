"""How well a Jacobian lens reads: beside the logit lens, against the distribution that the model ends with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rsdyn.dynamics.readout import readout
from rsdyn.dynamics.resampling import Interval, jackknife
from rsdyn.errors import UserError
from rsdyn.lm.lens import SKIPPED, JacobianLens
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.tracing import output_of

LOGIT, JACOBIAN = 0, 1  # the rows of a comparison


@dataclass(frozen=True)
class LensComparison:
    """The logit lens and a Jacobian lens behind the same layers, on texts that the lens was not fitted on.

    Attributes:
        layers: the blocks behind which both read, in order.
        tokens: ``(texts,)`` int64, how many tokens were read in each text.
        agreement: ``(2, layers, texts)``, share of the tokens at which the top token is the one that the model ends
            with; the logit lens first, the Jacobian lens second.
        kl: ``(2, layers, texts)``, mean KL(model || lens) in nats.
    """

    layers: list[int]
    tokens: Tensor
    agreement: Tensor
    kl: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """``(...)`` of ``values`` ``(..., texts)``: over all tokens."""
        return values @ self.tokens.to(values.dtype) / self.tokens.sum()

    def difference(self, values: Tensor) -> Interval:
        """Jacobian less logit lens, ``(layers,)``, with its 95 % interval over texts (delete-one jackknife).

        Raises ``ValueError`` for one text, which says nothing of others.
        """
        apart = values[JACOBIAN] - values[LOGIT]
        kept = 1 - torch.eye(len(self.tokens), dtype=apart.dtype)
        weights = kept * self.tokens.to(apart.dtype)
        return jackknife(self.mean(apart), (weights @ apart.T) / weights.sum(1, keepdim=True))

    def verdicts(self) -> dict[str, list[int]]:
        """Layers by what the interval of the difference in KL says: ``better``, ``worse`` or ``alike``.

        With one text there is no interval, and all are ``alike``.
        """
        if len(self.tokens) < 2:
            return {"better": [], "worse": [], "alike": self.layers}
        _, low, high = self.difference(self.kl)
        better, worse = (high < 0).tolist(), (low > 0).tolist()
        said = ["better" if b else "worse" if w else "alike" for b, w in zip(better, worse, strict=True)]
        return {
            word: [n for n, here in zip(self.layers, said, strict=True) if here == word]
            for word in ("better", "worse", "alike")
        }


@torch.no_grad()
def compare_lenses(
    lm: LanguageModel, lens: JacobianLens, texts: Sequence[np.ndarray], *, skip: int = SKIPPED
) -> LensComparison:
    """Read both lenses at every token from ``skip`` on of each text, behind each layer that the lens has.

    ``lm`` has its LM head. Raises ``UserError`` for a lens of another width or depth, and for no text or one of no more
    than ``skip`` tokens.
    """
    if lens.d_model != lm.n_units or not set(lens.source_layers) <= set(range(lm.n_layers - 1)):
        raise UserError(
            f"lens: it has layers {lens.source_layers} of {lens.d_model} units, and {lm.name} {lm.n_layers} layers of "
            f"{lm.n_units}. Take a lens of this model."
        )
    if not texts or min(len(tokens) for tokens in texts) <= skip:
        raise UserError(f"texts: give at least one, and each of more than the {skip} tokens that are skipped.")
    n_sites = len(lm.sites.names)
    agreement, kl = [], []
    for tokens in texts:
        at = np.arange(skip, len(tokens))
        stream = lm.record([tokens], positions=[at], dtype=lm.dtype)
        final = lm.log_probs(_behind_all(lm, tokens)[skip:])
        here = []
        for layer in lens.source_layers:
            states = stream[:, (layer + 1) * n_sites].to(lm.device)
            both = torch.stack([states, lens.transport(layer, states).to(lm.dtype)], 1)
            found = readout(final, lm.log_probs(both))
            here.append(torch.stack([found.agrees.double().mean(0), found.kl.double().mean(0)]).cpu())
        agreement.append(torch.stack([x[0] for x in here], 1))
        kl.append(torch.stack([x[1] for x in here], 1))
    n_tokens = torch.tensor([len(tokens) - skip for tokens in texts])
    return LensComparison(lens.source_layers, n_tokens, torch.stack(agreement, -1), torch.stack(kl, -1))


def _behind_all(lm: LanguageModel, tokens: np.ndarray) -> Tensor:
    """The states behind the last layer, ``(T, D)``."""
    found: list[Tensor] = []
    handle = lm.sites.layers[-1].register_forward_hook(lambda m, a, output: found.append(output_of(output)))
    try:
        lm.base(input_ids=torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None].to(lm.device), use_cache=False)
    finally:
        handle.remove()
    return found[0].view(len(tokens), -1)
