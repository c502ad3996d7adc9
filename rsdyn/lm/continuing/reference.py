"""What a run of a prompt leaves behind: the reference run, and the runs that continue from it with other states."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from rsdyn.lm.continuing.layer_calls import LayerCall


@dataclass(frozen=True)
class Reference:
    """An unperturbed run of one prompt, and what continuing from it needs.

    Attributes:
        tokens: ``(T,)`` int64.
        stream: ``(S, D)``, the last token's trajectory.
        final: ``(D,)``, its state behind the last layer, ahead of the final norm.
        log_probs: ``(V,)`` float32, of the next token; None when the model was loaded without its LM head.
        calls: what each layer was called with.
        blocks: whether points go through the layers side by side, as the tokens of a sequence.
        alone_error: how far one token that sees itself alone is from a sequence with its state at every token.
    """

    tokens: Tensor
    stream: Tensor
    final: Tensor
    log_probs: Tensor | None
    calls: tuple[LayerCall, ...] = field(repr=False)
    blocks: bool = field(repr=False)
    alone_error: float = field(repr=False, default=0.0)


@dataclass(frozen=True)
class Continued:
    """The last token's stream from an injection on, for ``P`` points; on the model's device, in its dtype.

    Attributes:
        stream: ``(P, S - s, D)`` at the sublayers ``s, s + 1, ..., S - 1``; the injected state comes first.
        final: ``(P, D)`` behind the last layer, ahead of the final norm.
        log_probs: ``(P, V)`` float32, of the next token; None when they were not asked for.
    """

    stream: Tensor
    final: Tensor
    log_probs: Tensor | None
