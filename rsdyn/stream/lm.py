"""Record the residual stream of an open language model.

Finding and reading one is in ``source.py``, running on from a sublayer in ``continuation.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rsdyn.dynamics.parallel import side_by_side
from rsdyn.errors import NonFiniteError
from rsdyn.stream.sites import RESID_PRE, find_sites, sublayer_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXTRACTOR_VERSION = 1  # raise it whenever recording would give other numbers: it is part of the cache's key


class _StopForwardError(Exception):
    """Raised by the last hook: nothing behind the last site is needed."""


class LanguageModel:
    """A base model and the sites of its stream.

    Args:
        base: transformers' model without the LM head, on its device.
        name: for messages.
        head: the LM head, on the same device; None when it was not loaded.

    Attributes:
        n_edits: how many interventions are open (``rsdyn.interventions``).
    """

    def __init__(self, base: PreTrainedModel, *, name: str = "lm", head: nn.Module | None = None):
        self.base = base.eval().requires_grad_(False)
        self.head = None if head is None else head.eval().requires_grad_(False)
        self.n_edits = 0
        self.config = base.config
        self.name = name
        self.sites = find_sites(base, self.config.model_type)
        self._running = threading.local()  # the forward that a thread's hooks belong to
        parameter = next(base.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @property
    def n_sublayers(self) -> int:
        return len(self.sites.modules)

    @property
    def n_units(self) -> int:
        return int(self.config.hidden_size)

    @property
    def n_layers(self) -> int:
        return self.n_sublayers // len(self.sites.names)

    def sublayer(self, layer: int, site: str = RESID_PRE) -> int:
        """The sublayer of a layer's site; ``UserError`` for a layer or site that the model has not."""
        return sublayer_index(self.sites.names, self.n_layers, layer, site)

    def log_probs(self, final: Tensor) -> Tensor:
        """Next-token log-probabilities ``(..., V)``, float32, of states behind the last layer ``(..., D)``.

        Raises ``ValueError`` when the model was loaded without its LM head.
        """
        if self.head is None or self.sites.final_norm is None:
            raise ValueError(
                f"log_probs: {self.name} was loaded without its LM head, and only the stream can be had. "
                "Load it with load(head=True)."
            )
        return self.head(self.sites.final_norm(final)).float().log_softmax(-1)

    def record(
        self,
        sequences: Sequence[np.ndarray],
        *,
        batch_tokens: int = 1024,
        dtype: torch.dtype | None = None,
        first_index: int = 0,
        on_batch: Callable[[int], object] = lambda n: None,
    ) -> Tensor:
        """The trajectories of the last token of each sequence: ``(B, S, D)`` on the CPU (METHOD section 2).

        Args:
            sequences: token ids of each, BOS included; any lengths.
            batch_tokens: at most so many tokens, padding included, go through the model together (one sequence at
                least). What goes together depends on ``sequences`` and this number alone.
            dtype: of the result; default the model's.
            first_index: index of ``sequences[0]`` in its corpus, for messages.
            on_batch: called with the number of sequences after each batch.

        Sequences are sorted by length and padded on the *right*, without an attention mask: a causal model never looks
        right, and left padding without position ids changes activations silently. Raises ``NonFiniteError`` naming
        sequence and sublayer when the stream is not finite, and ``ValueError`` for sequences of several lengths, or in
        several batches, while an intervention is open, which edits the last column of each batch.
        """
        out = torch.empty(len(sequences), self.n_sublayers, self.n_units, dtype=dtype or self.dtype)
        batches = length_sorted_batches([len(s) for s in sequences], batch_tokens)
        if self.n_edits and (len(batches) > 1 or len({len(s) for s in sequences}) > 1):
            raise ValueError(
                f"sequences: {len(sequences)} of several lengths, or too many for one batch, while an intervention is "
                "open. It edits the last column of a batch, which is not the last token of a shorter sequence; record "
                "sequences of one length, in one batch (batch_tokens), or one at a time."
            )
        # closed before the hooks go, so that no thread is left running without them after an exception
        work = side_by_side(lambda rows: self._record_batch([sequences[i] for i in rows]), batches, self.device)
        with self._hooks(), closing(work) as parts:
            for rows, states in zip(batches, parts, strict=True):
                out[rows] = states.to("cpu").to(out.dtype)
                on_batch(len(rows))
        finite = torch.isfinite(out).all(-1)
        if not finite.all():
            row, sublayer = (~finite).nonzero()[0].tolist()
            layer, site = divmod(sublayer, len(self.sites.names))
            raise NonFiniteError(
                f"the stream of {self.name} is not finite at sequence {first_index + row}, sublayer {sublayer} "
                f"({self.sites.names[site]} of layer {layer}), in {self.dtype} stored as {out.dtype}. Nothing of it "
                "was written. Check the weights, or compute in a wider type (lm.dtype=float32)."
            )
        return out

    @torch.inference_mode()
    def _record_batch(self, sequences: list[np.ndarray]) -> Tensor:
        lengths = torch.tensor([len(s) for s in sequences])
        ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.from_numpy(np.asarray(sequence, dtype=np.int64))
        rows = torch.arange(len(sequences), device=self.device)
        last = (lengths - 1).to(self.device)
        # the copy into the buffer takes the last token only: a view of it would keep the whole activation alive
        states = torch.empty(len(sequences), self.n_sublayers, self.n_units, dtype=self.dtype, device=self.device)

        def take(sublayer: int, stream: Tensor) -> None:
            states[:, sublayer] = stream[rows, last]

        self._forward(ids.to(self.device), take)
        return states

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Hooks at every site while the context lasts, and none afterwards, whatever happens."""

        def hook(sublayer: int) -> Any:
            def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._running.take(sublayer, args[0] if args else kwargs["hidden_states"])
                self._running.fired += 1
                if sublayer == self.n_sublayers - 1:
                    raise _StopForwardError

            return pre_hook

        handles = [m.register_forward_pre_hook(hook(s), with_kwargs=True) for s, m in enumerate(self.sites.modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, ids: Tensor, take: Callable[[int, Tensor], None]) -> None:
        """One forward over ``ids`` ``(B, T)``, inside :meth:`_hooks`; it stops at the last site.

        ``take(sublayer, stream (B, T, D))`` is called at each site, in order, in this thread.
        """
        self._running.take, self._running.fired = take, 0
        with suppress(_StopForwardError):
            self.base(input_ids=ids, use_cache=False)
        if self._running.fired != self.n_sublayers:
            raise RuntimeError(f"{self._running.fired} of {self.n_sublayers} sites of {self.name} were reached.")


def length_sorted_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group sequences of like length: lists of positions whose padded size is at most ``batch_tokens`` tokens.

    Shortest first; ties in the order given, so the grouping depends on the arguments alone. A sequence longer than
    ``batch_tokens`` gets a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
