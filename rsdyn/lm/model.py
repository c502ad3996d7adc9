"""Record the residual stream of an open language model.

Finding and reading one is in ``source.py``, running on from a sublayer in ``continuation.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.batches import PACKED, SORTED, batches_apart, make_batches
from rsdyn.lm.head import behind_the_layers
from rsdyn.lm.packing import NotPackedError, Row, one_row, packed_attention
from rsdyn.lm.sites import RESID_PRE, find_sites, sublayer_index
from rsdyn.lm.tracing import output_of, stream_of
from rsdyn.threads import side_by_side

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

EXTRACTOR_VERSION = 2  # raise it whenever recording would give other numbers: it is part of the cache's key


class _StopForwardError(Exception):
    """Raised by the last hook: nothing behind the last site is needed."""


class Layout(NamedTuple):
    """How sequences lie in a batch, ``packed`` or ``sorted`` (``batches.py``), and why not packed, in a clause."""

    name: str
    reason: str | None = None


P = ParamSpec("P")
R = TypeVar("R")


def in_eval_mode(function: Callable[Concatenate[LanguageModel, P], R]) -> Callable[Concatenate[LanguageModel, P], R]:
    """Run a function of a language model inside :meth:`LanguageModel.evaluating`."""

    @wraps(function)
    def inside(lm: LanguageModel, *args: P.args, **kwargs: P.kwargs) -> R:
        with lm.evaluating():
            return function(lm, *args, **kwargs)

    return inside  # type: ignore[return-value]  # the stubs give what wraps makes a type of its own


class LanguageModel:
    """A base model and the sites of its stream.

    Args:
        base: transformers' model without the LM head, on its device.
        name: for messages.
        causal: the model with the LM head whose base ``base`` is; None when the head was not loaded. Whoever made the
            two keeps them: their training mode, hooks and ``requires_grad`` are the same after each call as before.
        unused: weights of the model's files that it has no place for, in a sentence; None for none.
        quantisation: what the weights were dequantised from, such as ``Q4_1``; None where they were not.

    Attributes:
        config: of the language model; a part of the whole config where the model also sees or hears.
        head: the LM head alone, or None.
        n_edits: how many interventions are open (``rsdyn.perturbation.states``).
        layout: of the batches that :meth:`record` makes; sorted, until ``layout.choose_layout`` has tried to pack.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        name: str = "lm",
        causal: PreTrainedModel | None = None,
        quantisation: str | None = None,
        unused: str | None = None,
    ) -> None:
        self.base, self.causal = base, causal
        self.head: nn.Module | None = None if causal is None else causal.get_output_embeddings()
        self.n_edits = 0
        self.layout = Layout(SORTED)
        self.config = base.config.get_text_config()
        self.name, self.quantisation, self.unused = name, quantisation, unused
        self._mode = threading.Lock()  # around the two that follow
        self._n_evaluating, self._training = 0, list[nn.Module]()
        self.sites = find_sites(base)
        self._tail = None if causal is None else behind_the_layers(causal, self.sites.final_norm)
        self._running = threading.local()  # the forward that a thread's hooks belong to
        parameter = next(base.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        # Of a model spread over devices by accelerate: where its first layer computes, though its weights may lie on
        # disk. A layer's weights come and go with each forward there, so forwards must not run side by side.
        hook = getattr(base.get_input_embeddings(), "_hf_hook", None)
        self.is_spread = hook is not None
        if hook is not None:
            self.device = torch.device(hook.execution_device)

    @property
    def n_sublayers(self) -> int:
        return len(self.sites.modules)

    @property
    def n_units(self) -> int:
        return int(self.config.hidden_size)

    @property
    def max_tokens(self) -> int | None:
        """The model's context, in tokens; None where nothing limits it (alibi)."""
        return context_length(self.config)

    @property
    def n_layers(self) -> int:
        return self.n_sublayers // len(self.sites.names)

    def sublayer(self, layer: int, site: str = RESID_PRE) -> int:
        """The sublayer of a layer's site; ``UserError`` for a layer or site that the model has not."""
        return sublayer_index(self.sites.names, self.n_layers, layer, site)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While open the model is in eval mode (no dropout); every module's own mode comes back, whatever happens."""
        with self._mode:
            if self._n_evaluating == 0:
                parts = [*self.base.modules(), *(() if self.causal is None else self.causal.modules())]
                self._training = [part for part in parts if part.training]
                for part in self._training:
                    part.training = False
            self._n_evaluating += 1
        try:
            yield
        finally:
            with self._mode:
                self._n_evaluating -= 1
                if self._n_evaluating == 0:
                    for part in self._training:
                        part.training = True

    def log_probs(self, final: Tensor) -> Tensor:
        """Next-token log-probabilities ``(..., V)``, float32, of states behind the last layer ``(..., D)``.

        What comes behind the LM head (soft-capping, a scale) is the model's own. Raises ``ValueError`` when the model
        was loaded without its LM head.
        """
        return self.logits(final).log_softmax(-1)

    def logits(self, final: Tensor) -> Tensor:
        """Next-token logits ``(..., V)``, float32, of states behind the last layer ``(..., D)``; as `log_probs`."""
        if self._tail is None:
            raise ValueError(
                f"log_probs: {self.name} was loaded without its LM head, and only the stream can be had. "
                "Load it with load(head=True)."
            )
        # without a graph through the weights, unless one through the states is wanted
        with self.evaluating(), torch.set_grad_enabled(torch.is_grad_enabled() and final.requires_grad):
            # through the class, since a model spread over devices has its forward replaced by one bound to the original
            logits = type(self._tail).forward(self._tail, inputs_embeds=final.reshape(1, -1, self.n_units)).logits
        return logits.float().view(*final.shape[:-1], -1)

    def record(
        self,
        sequences: Sequence[np.ndarray],
        *,
        positions: Sequence[np.ndarray] | None = None,
        batch_tokens: int = 1024,
        dtype: torch.dtype | None = None,
        numbers: Sequence[int] | None = None,
        final: bool = False,
        on_batch: Callable[[int], object] = lambda n: None,
    ) -> Tensor:
        """The trajectories of the last token of each sequence: ``(B, S, D)`` on the CPU (METHOD section 2).

        Args:
            sequences: token ids of each, BOS included; any lengths.
            positions: which tokens of each instead, BOS being 0, at least one of each; then the result is
                ``(n, S, D)``, the trajectories of a sequence together, in the order given.
            batch_tokens: at most this many tokens, padding included, go through the model together (one sequence at
                least). What goes together depends on ``sequences``, this number and ``layout`` alone.
            dtype: of the result; default the model's.
            numbers: of each sequence in its corpus, for messages; default from 0 on.
            final: also record the state behind the last layer, ahead of the final norm: ``(B, S + 1, D)``.
            on_batch: called with the number of sequences after each batch.

        With ``layout`` packed, sequences stand end to end in one row, without padding, and attend to themselves alone
        (``packing.py``). Else, and while an intervention is open, they are sorted by length and padded on the *right*,
        without an attention mask: a causal model never looks right, and left padding without position ids changes
        activations silently. Raises ``NonFiniteError`` naming sequence and sublayer when the stream is not finite, and
        ``ValueError`` for sequences of several lengths, or in several batches, while an intervention is open, which
        edits the last column of each batch.
        """
        lengths = [len(s) for s in sequences]
        numbers = range(len(lengths)) if numbers is None else numbers
        self._check_lengths(lengths, numbers)
        at = [np.array([n - 1]) for n in lengths] if positions is None else positions
        ends = np.cumsum([len(tokens) for tokens in at])
        out = torch.empty(int(ends[-1]), self.n_sublayers + final, self.n_units, dtype=dtype or self.dtype)
        layout, apart = SORTED if self.n_edits else self.layout.name, longrope_length(self.config)
        batches = make_batches(lengths, batch_tokens, layout, apart)
        if self.n_edits and (len(batches) > 1 or len(set(lengths)) > 1):
            raise ValueError(
                f"sequences: {len(sequences)} of several lengths, or too many for one batch, while an intervention is "
                "open. It edits the last column of a batch, which is not the last token of a shorter sequence; record "
                "sequences of one length, in one batch (batch_tokens), or one at a time."
            )

        def record(rows: list[int]) -> None:
            into = np.concatenate([np.arange(ends[i] - len(at[i]), ends[i]) for i in rows])
            self._record_batch([sequences[i] for i in rows], [at[i] for i in rows], out, torch.from_numpy(into), layout)

        with self.evaluating(), packed_attention(self.base) if layout == PACKED else nullcontext(), self._hooks(final):
            for group in batches_apart(batches, lengths, apart):
                work = side_by_side(record, group, self.device, one_by_one=self.is_spread)
                # closed before the hooks go, so that no thread is left running without them after an exception
                with closing(work) as parts:
                    for rows, _ in zip(group, parts, strict=True):
                        on_batch(len(rows))
        finite = torch.cat([torch.isfinite(part).all(-1) for part in out.split(256)])
        if not finite.all():
            number = int(np.searchsorted(ends, int((~finite).nonzero()[0, 0]), side="right"))
            # where it began: attention takes what is not finite to other tokens, also to those before it (0 x NaN)
            of_sequence = finite[ends[number] - len(at[number]) : ends[number]]
            sublayer, row = (~of_sequence).T.nonzero()[0].tolist()
            layer, site = divmod(sublayer, len(self.sites.names))
            token = "" if positions is None else f", token {at[number][row]}"
            place = f"sublayer {sublayer} ({self.sites.names[site]} of layer {layer})"
            place = place if sublayer < self.n_sublayers else "behind the last layer"
            raise NonFiniteError(
                f"the stream of {self.name} is not finite at sequence {numbers[number]}{token}, {place}, in "
                f"{self.dtype} stored as {out.dtype}. "
                "Nothing of it was written. Check the weights, or compute in a wider type (dtype=float32)."
            )
        return out

    @torch.inference_mode()
    def _record_batch(
        self, sequences: list[np.ndarray], at: list[np.ndarray], out: Tensor, into: Tensor, layout: str
    ) -> None:
        """Record tokens ``at`` of one batch into the rows ``into`` of ``out``, on the CPU."""
        lengths = [len(s) for s in sequences]
        is_packed = layout == PACKED
        width = sum(lengths) if is_packed else max(lengths)
        starts = np.cumsum([0, *lengths[:-1]]) if is_packed else np.arange(len(lengths)) * width
        ids = torch.zeros(width if is_packed else len(lengths) * width, dtype=torch.int64)
        for start, sequence in zip(starts, sequences, strict=True):
            ids[start : start + len(sequence)] = torch.from_numpy(np.asarray(sequence, dtype=np.int64))
        tokens = torch.from_numpy(np.concatenate([start + here for start, here in zip(starts, at, strict=True)]))
        wanted: dict[torch.device, Tensor] = {}  # on each device that layers lie on
        # the copy takes the wanted tokens only: a view of them would keep the whole activation alive. A GPU fills a
        # buffer of its own first, since to wait for it at each site takes longer; a CPU needs none.
        buffer, rows_there = out, into
        if self.device.type != "cpu":
            shape = (len(into), out.shape[1], self.n_units)
            buffer = torch.empty(shape, dtype=self.dtype, device=self.device)
            rows_there = torch.arange(len(into), device=self.device)
        sites = buffer.unbind(1)

        def take(sublayer: int, stream: Tensor) -> None:
            if stream.device not in wanted:
                wanted[stream.device] = tokens.to(stream.device)
            states = stream.index_select(0, wanted[stream.device]).to(self.dtype)
            sites[sublayer].index_copy_(0, rows_there, states.to(buffer.device, buffer.dtype))

        ids = ids.view(-1, width).to(self.device)
        if is_packed:
            with one_row(lengths) as row:
                self._forward(ids, take, len(sites), row)
        else:
            self._forward(ids, take, len(sites))
        if buffer is not out:
            out[into] = buffer.to("cpu").to(out.dtype)

    @contextmanager
    def _hooks(self, final: bool) -> Iterator[None]:
        """Hooks at every site while the context lasts, and none afterwards, whatever happens.

        The last one stops the forward: at the last site, or with ``final`` behind the last layer, as site ``S``.
        """

        def take(sublayer: int, stream: Tensor) -> None:
            # some families flatten the tokens of all rows into one dimension themselves
            self._running.take(sublayer, stream.reshape(self._running.n_tokens, self.n_units))
            self._running.fired += 1
            if sublayer == self.n_sublayers - 1 + final:
                raise _StopForwardError

        def hook(sublayer: int) -> Any:
            def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                take(sublayer, stream_of(args, kwargs))

            return pre_hook

        handles = [m.register_forward_pre_hook(hook(s), with_kwargs=True) for s, m in enumerate(self.sites.modules)]
        if final:
            behind = self.sites.layers[-1]
            handles.append(behind.register_forward_hook(lambda m, a, out: take(self.n_sublayers, output_of(out))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_lengths(self, lengths: Sequence[int], numbers: Sequence[int]) -> None:
        """Dynamic scaling of positions begins beyond the context, and depends on the neighbours and the past."""
        limit = self.max_tokens
        if limit is None or not any("dynamic" in rope["rope_type"] for rope in _rope_types(self.config)):
            return
        for number, length in zip(numbers, lengths, strict=True):
            if length > limit:
                raise UserError(
                    f"sequence {number} has {length} tokens, and the positions of {self.name} are scaled "
                    f"dynamically beyond {limit}: what is recorded would depend on the sequences beside it and before "
                    "it. Truncate the sequences."
                )

    def _forward(self, ids: Tensor, take: Callable[[int, Tensor], None], n_sites: int, row: Row | None = None) -> None:
        """One forward over ``ids`` ``(B, T)``, or over a packed row of them, inside :meth:`_hooks`.

        ``take(sublayer, stream (B T, D))`` is called at each of ``n_sites``, in order, in this thread; at the last one
        it stops.
        """
        self._running.take, self._running.fired, self._running.n_tokens = take, 0, ids.numel()
        places = {}
        if row is not None:  # each sequence's own positions, from 0 on
            places["position_ids"] = torch.cat([torch.arange(stop - start) for start, stop in row.bounds])[None]
        with suppress(_StopForwardError):
            self.base(input_ids=ids, use_cache=False, **{k: v.to(ids.device) for k, v in places.items()})
        if self._running.fired != n_sites:
            raise RuntimeError(f"{self._running.fired} of {n_sites} sites of {self.name} were reached.")
        stops_early = len(self.sites.names) == 1 and n_sites == self.n_sublayers
        attending = self.n_layers - stops_early  # it stops before the last layer's parallel attention
        if row is not None and row.calls != attending:
            raise NotPackedError(f"{row.calls} of {attending} layers called the attention function that it was given")


def context_length(config: PreTrainedConfig) -> int | None:
    """How many tokens a model takes at most; None where nothing limits them (alibi)."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        if getattr(text, name, None) is not None:
            return int(getattr(text, name))
    return None


def _rope_types(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The settings of each kind of rotary embedding that a model's layers have."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [part for part in (rope, *rope.values()) if isinstance(part, dict) and "rope_type" in part]


def longrope_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence that longrope treats as short; None for other positions.

    A longer one in the same forward turns the angles of all rows, so short and long ones must be kept apart.
    """
    text = config.get_text_config()
    lengths = [r.get("original_max_position_embeddings") for r in _rope_types(text) if r["rope_type"] == "longrope"]
    return next((int(n) for n in lengths if n is not None), None)
