"""Continue a language model from a sublayer with given states: the primitive under every perturbation (METHOD 10).

Only the layers from the injection on run. With the last token's state replaced, the other tokens stay as they were in
the reference run, so their keys and values are computed once there and shared by every point. What runs are
transformers' own decoder layers, called as in the reference run (``layer_calls.py``), so nothing here depends on the
architecture; and each reference run is checked against whole forwards with perturbed states.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.continuing.layer_calls import BLOCK, LayerCall, Masks, reading_sites, record_calls
from rsdyn.lm.continuing.reference import Continued, Reference
from rsdyn.lm.continuing.self_check import checked, rounding
from rsdyn.lm.model import LanguageModel, in_eval_mode
from rsdyn.threads import side_by_side

__all__ = ["Continued", "Position", "Reference", "continue_all", "continue_from", "run_reference"]

Position = Literal["last", "all"]

_MASKABLE = ("eager", "sdpa")  # implementations of attention that take a mask of our own


@in_eval_mode
def run_reference(lm: LanguageModel, tokens: Sequence[int] | np.ndarray | Tensor) -> Reference:
    """Run a prompt, BOS included, and keep what continuing from any of its sublayers needs (METHOD section 10).

    At the end continuing is checked on this prompt: against the run itself, and against one whole forward of a few
    perturbed states. Raises ``UserError`` for an empty or over-long prompt, ids outside the vocabulary, and a model
    that cannot be continued; ``ValueError`` while an intervention is open.
    """
    ids = _check_tokens(lm, tokens)
    _check_model(lm)
    stream, final, calls = record_calls(lm, ids)
    if not torch.isfinite(stream).all() or not torch.isfinite(final).all():
        raise NonFiniteError(
            f"the stream of {lm.name} is not finite on this prompt of {len(ids)} tokens, in {lm.dtype}. Check the "
            "weights, or compute in a wider type (dtype=float32)."
        )
    with torch.inference_mode():
        log_probs = None if lm.head is None else lm.log_probs(final)
    kept = (stream.clone(), final.clone(), None if log_probs is None else log_probs.clone())  # no inference tensors
    reference = Reference(ids, *kept, calls, blocks=all(call.takes_blocks for call in calls))
    return checked(lm, reference, continue_all)


def continue_from(
    lm: LanguageModel,
    reference: Reference,
    sublayer: int,
    states: Tensor,
    *,
    position: Position = "last",
    freeze_attention: bool = False,
    log_probs: bool = False,
    batch_points: int = 1024,
) -> Continued:
    """Put each of ``states`` ``(P, D)`` in place of the stream at a sublayer and run the rest (METHOD section 10).

    Equal to one whole forward a point with a hook that replaces the stream, at a fraction of the cost. An injection at
    resid_mid moves the stream itself, not only what the MLP reads.

    Args:
        sublayer: ``s``, see :meth:`LanguageModel.sublayer` for that of a layer's site.
        states: any float dtype and device; finite.
        position: ``last`` replaces the last token's state alone; the other tokens stay at the reference. ``all`` puts
            the same state at every token: all values that attention averages are then equal, so nothing depends on
            the prompt, and what runs is one token that sees itself.
        freeze_attention: a control: what each layer's attention adds to the last token is taken from the reference
            run instead of being computed from the perturbed state, so that nothing is read again from the context and
            the MLPs alone answer. ``position`` then makes no difference.
        log_probs: also give next-token log-probabilities; the model must have been loaded with its LM head.
        batch_points: at most this many points go through the model together. Batches run side by side on a CPU's cores.

    Raises:
        ValueError: a sublayer that is not there, states of another shape, an unknown position, no LM head.
        NonFiniteError: states that are not finite, or a stream that is not after them.
    """
    options: dict[str, Any] = {"position": position, "freeze_attention": freeze_attention}
    return continue_all(lm, reference, [(sublayer, states)], log_probs=log_probs, batch_points=batch_points, **options)[
        0
    ]


@in_eval_mode
def continue_all(
    lm: LanguageModel,
    reference: Reference,
    injections: Sequence[tuple[int, Tensor]],
    *,
    position: Position = "last",
    freeze_attention: bool = False,
    log_probs: bool = False,
    batch_points: int = 1024,
) -> list[Continued]:
    """:func:`continue_from` for several ``(sublayer, states)`` at once: the batch grows as each sublayer is reached.

    Faster than one call an injection, since what is late in depth joins what began early. Returns one
    :class:`Continued` for each injection, in the order given.
    """
    _check_model(lm)
    if position not in get_args(Position):
        raise ValueError(f"position={position!r}: must be one of {', '.join(get_args(Position))}.")
    if position == "all" and not freeze_attention and reference.alone_error > 3 * rounding(lm):
        raise UserError(
            f"position=all: in {lm.name} a token that sees itself alone is {reference.alone_error:.1e} of the state's "
            "norm away from a sequence with one state at every token (attention sinks, say, weigh the number of "
            "tokens), and that is how the grid is computed. Use position=last."
        )
    if batch_points < 1:
        raise ValueError(f"batch_points={batch_points}: how many points go together; give at least 1.")
    if log_probs and lm.head is None:
        lm.log_probs(reference.final)  # says how to get the head
    given = [(s, _check_states(lm, s, states)) for s, states in injections]
    vocabulary = 0 if reference.log_probs is None else len(reference.log_probs)
    results = [
        Continued(
            torch.empty(len(x), lm.n_sublayers - s, lm.n_units, dtype=lm.dtype, device=lm.device),
            torch.empty_like(x),
            torch.empty(len(x), vocabulary, device=lm.device) if log_probs else None,
        )
        for s, x in given
    ]
    batches: list[list[_Piece]] = [[]]
    room = batch_points
    for i in sorted(range(len(given)), key=lambda i: given[i][0]):
        s, x = given[i]
        start = 0
        while start < len(x):
            if room == 0:
                batches.append([])
                room = batch_points
            rows = slice(start, min(start + room, len(x)))
            batches[-1].append(_Piece(s, x[rows], rows, results[i], results[i].stream[rows].unbind(1)))
            room -= rows.stop - start
            start = rows.stop
    batches = [batch for batch in batches if batch]

    running = threading.local()  # the batch that a thread carries: the hooks are the same for all

    def run(pieces: list[_Piece]) -> None:
        running.batch = _Batch(lm, reference, pieces, alone=position == "all" or freeze_attention)
        running.batch.run()

    with ExitStack() as hooks:
        later = [s for s in range(lm.n_sublayers) if s % len(lm.sites.names)]
        if later:  # ahead of a layer's first site nothing has to be read from inside it
            reading_sites(lm, hooks, lambda s, stream: running.batch.arrive(s, stream), sublayers=later)
        if freeze_attention:
            for attention, call in zip(lm.sites.attention, reference.calls, strict=True):
                hooks.enter_context(frozen_attention(attention, call, running))
        # closed before the hooks go, so that no thread is left running without them after an exception
        with closing(side_by_side(run, batches, lm.device, one_by_one=lm.is_spread)) as work:
            for _ in work:
                pass
    for (s, _), result in zip(given, results, strict=True):
        _check_result(lm, s, result)
    return results


@dataclass(frozen=True)
class _Piece:
    """Points that are injected together: their sublayer, states, and the rows of a result that they fill.

    ``stream`` has those rows of the result's stream, a tensor for each sublayer from the injection on.
    """

    sublayer: int
    states: Tensor
    rows: slice
    result: Continued
    stream: tuple[Tensor, ...]


class _Batch:
    """One batch of points on its way through the layers; its pieces are sorted by sublayer."""

    def __init__(self, lm: LanguageModel, reference: Reference, pieces: list[_Piece], *, alone: bool) -> None:
        self.lm, self.reference, self.pieces, self.alone = lm, reference, pieces, alone
        self.points = pieces[0].states[:0]  # (n, D) of the pieces that began, as they enter the layer that runs
        self.sizes: list[int] = []  # of those pieces
        self.begins = {piece.sublayer for piece in pieces}

    @torch.inference_mode()
    def run(self) -> None:
        """Carry the pieces to the end, and write into their results."""
        n_sites = len(self.lm.sites.names)
        masks: Masks = {}
        for layer in range(self.pieces[0].sublayer // n_sites, self.lm.n_layers):
            joining = [self.points]
            for piece in self.pieces[len(self.sizes) :]:
                if piece.sublayer >= (layer + 1) * n_sites:
                    break
                # a piece of a later site joins with the reference's state, and gets its own when that is reached
                waiting = self.reference.stream[layer * n_sites].expand_as(piece.states)
                states = piece.states if piece.sublayer == layer * n_sites else waiting
                joining.append(states.to(self.points.device))  # layers may lie on several
                self.sizes.append(piece.states.shape[0])
            self.points = torch.cat(joining) if len(joining) > 1 else self.points
            self.write(layer * n_sites, self.points)
            x = self.reference.calls[layer](self.lm.sites.layers[layer], self.rows(), alone=self.alone, masks=masks)
            self.points = x.reshape(-1, x.shape[-1])[: self.points.shape[0]]
        for piece, points in zip(self.pieces, self.split(self.points), strict=True):
            piece.result.final[piece.rows] = points
            if piece.result.log_probs is not None:
                piece.result.log_probs[piece.rows] = self.lm.log_probs(points)

    def rows(self) -> Tensor:
        """The points as a layer takes them, ``(rows, points of a row, D)``: rows of equal length, the last repeated."""
        n = len(self.points)
        rows = n if self.alone or not self.reference.blocks else -(-n // BLOCK)
        size = -(-n // rows)
        missing = rows * size - n
        x = torch.cat([self.points, self.points[-1:].expand(missing, -1)]) if missing else self.points
        return x.view(rows, size, -1)

    def arrive(self, s: int, stream: Tensor) -> None:
        """A later site of the layer that runs: pieces that begin there get their states; all write what they are."""
        if s in self.begins:
            for piece, points in zip(self.pieces, self.split(stream), strict=False):
                if piece.sublayer == s:
                    points.copy_(piece.states)
        self.write(s, stream)

    def write(self, s: int, stream: Tensor) -> None:
        for piece, points in zip(self.pieces, self.split(stream), strict=False):
            if piece.sublayer <= s:
                piece.stream[s - piece.sublayer].copy_(points)

    def split(self, stream: Tensor) -> tuple[Tensor, ...]:
        """The rows of each piece that began."""
        return torch.split_with_sizes(stream[: self.points.shape[0]], self.sizes)


@contextmanager
def frozen_attention(attention: nn.Module, call: LayerCall, running: Any) -> Iterator[None]:
    """While open, the attention module is not run, and gives every point what the reference's last token got."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        output = call.attention.expand_as(given)
        if call.gives_sum:
            output = output + running.batch.points.to(given.device).view_as(given)
        return output if call.n_outputs is None else (output, *[None] * (call.n_outputs - 1))

    before = vars(attention).get("forward")  # of the module itself where something has wrapped it, else of its class
    attention.forward = forward  # a hook could put its output in place, but only after it had run
    try:
        yield
    finally:
        del attention.forward
        if before is not None:
            attention.forward = before


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_tokens(lm: LanguageModel, tokens: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    ids = torch.as_tensor(np.asarray(tokens.cpu() if isinstance(tokens, Tensor) else tokens))
    if ids.numel() == 0:
        raise UserError("prompt: it is empty; give at least one token, BOS.")
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"prompt: {ids.dtype} of shape {tuple(ids.shape)}; give the token ids of one sequence, (T,).")
    if lm.max_tokens is not None and len(ids) > lm.max_tokens:
        raise UserError(f"prompt: {len(ids)} tokens, and {lm.name} takes at most {lm.max_tokens}; give a shorter one.")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= lm.config.vocab_size:
        raise UserError(
            f"prompt: token ids from {low} to {high}, and those of {lm.name} go from 0 to {lm.config.vocab_size - 1}; "
            "encode it with this model's tokenizer."
        )
    return ids.to(lm.device, torch.int64)


def _check_model(lm: LanguageModel) -> None:
    if lm.n_edits:
        raise ValueError(
            f"lm: {lm.n_edits} interventions are open, and they would edit what is continued. Leave them first."
        )
    used = getattr(lm.config, "_attn_implementation", None)
    if used not in _MASKABLE:
        raise UserError(
            f"lm: {lm.name} uses attention {used!r}, and continuing needs one that takes a mask of its own; choose "
            f"{' or '.join(_MASKABLE)} with set_attn_implementation."
        )


def _check_states(lm: LanguageModel, sublayer: int, states: Tensor) -> Tensor:
    """The states on the model's device in its dtype."""
    if isinstance(sublayer, bool) or not isinstance(sublayer, int) or not 0 <= sublayer < lm.n_sublayers:
        raise ValueError(
            f"sublayer={sublayer}: {lm.name} has {lm.n_sublayers}; give a whole number from 0 to {lm.n_sublayers - 1}."
        )
    if states.ndim != 2 or states.shape[1] != lm.n_units or len(states) == 0:
        raise ValueError(
            f"states: shape {tuple(states.shape)}, and the stream of {lm.name} has {lm.n_units} units; give (P, "
            f"{lm.n_units}), one row per point. A projection of another model gives another width."
        )
    finite = torch.isfinite(states).all(-1)
    if not finite.all():
        raise NonFiniteError(
            f"states: {int((~finite).sum())} of {len(states)} hold NaN or Inf, the first is point "
            f"{int((~finite).nonzero()[0])}; give finite states."
        )
    return states.detach().to(lm.device, lm.dtype)


def _check_result(lm: LanguageModel, sublayer: int, result: Continued) -> None:
    if result.final.isfinite().all():  # the stream is a running sum, which NaN and Inf never leave
        return
    finite = torch.cat([result.stream.isfinite().all(-1), result.final.isfinite().all(-1, keepdim=True)], 1)
    after = int((~finite).any(0).nonzero()[0])  # the first sublayer; behind it a bad point can spoil its block
    point = int((~finite[:, after]).nonzero()[0])
    raise NonFiniteError(
        f"states: point {point}, injected at sublayer {sublayer}, is not finite {after} sublayers later, in "
        f"{lm.dtype}. Compute in a wider type (dtype=float32), or inject nearer to the reference."
    )
