"""Open a language model and record its residual stream.

Two steps, so that a run whose cache is complete never reads the weights: :func:`find_lm` learns all there is to know
from the config, :meth:`LMSource.load` reads the weights and gives a :class:`LanguageModel` that records. Running on
from a sublayer is in ``continuation.py``.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from rsdyn import embedded
from rsdyn.dynamics.parallel import side_by_side
from rsdyn.errors import NonFiniteError, UserError
from rsdyn.stream.hub import explain_hub_error, hub_reachable
from rsdyn.stream.sites import RESID_PRE, find_sites, site_names, sublayer_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOT_OF_THE_SHAPE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
EXTRACTOR_VERSION = 1  # raise it whenever recording would give other numbers: it is part of the cache's key
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LMSource:
    """What is known of a language model before its weights are read.

    Attributes:
        name: what the user called it.
        location: a folder, or a name on the Hub.
        commit: the Hub commit that the name resolved to; None for a folder.
        config: transformers' config of the model.
        site_names: the sites of one layer, in order.
        untrained: None for the weights that were saved, else the seed of random ones (:meth:`without_training`).
    """

    name: str
    location: str
    revision: str | None
    commit: str | None
    config: Any
    site_names: tuple[str, ...]
    trust_remote_code: bool = False
    untrained: int | None = None

    @property
    def label(self) -> str:
        """The model's name without the folders that lead to it."""
        name = self.name if self.commit or self.name == "embedded" else Path(self.location).resolve().name
        return name if self.untrained is None else f"{name}-untrained"

    def without_training(self, seed: int) -> LMSource:
        """The same architecture with the random weights that its authors start training from."""
        return replace(self, untrained=seed)

    @property
    def n_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def n_sublayers(self) -> int:
        """``S``: the layers times the sites of each."""
        return self.n_layers * len(self.site_names)

    @property
    def n_units(self) -> int:
        """``D``."""
        return int(self.config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """The model's context, in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    def identity(self) -> str:
        """What tells these weights from all others: the Hub's commit, or a digest of the folder's files."""
        if self.untrained is not None:
            shape = {k: v for k, v in self.config.to_dict().items() if k not in _NOT_OF_THE_SHAPE}
            text = json.dumps(shape, sort_keys=True, default=str)
            return f"untrained, seed {self.untrained}, shape xxh3 {xxhash.xxh3_128_hexdigest(text.encode())}"
        if self.commit is not None:
            return f"commit {self.commit}"
        digest = xxhash.xxh3_128()
        for file in sorted([Path(self.location) / "config.json", *Path(self.location).glob("*.safetensors")]):
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return f"xxh3 {digest.hexdigest()}"

    def tokenizer(self) -> Any:
        """The model's tokenizer; ``UserError`` when there is none."""
        from transformers import AutoTokenizer

        with _hub_errors(self.name, self.revision):
            return AutoTokenizer.from_pretrained(
                self.location,
                revision=self.commit or self.revision,
                trust_remote_code=self.trust_remote_code,
                local_files_only=self.commit is not None and not hub_reachable(),
            )

    def sublayer(self, layer: int, site: str = RESID_PRE) -> int:
        """The sublayer of a layer's site; ``UserError`` for a layer or site that the model has not."""
        return sublayer_index(self.site_names, self.n_layers, layer, site)

    def load(self, *, dtype: str = "float32", device: torch.device | str = "cpu", head: bool = False) -> LanguageModel:
        """Read the weights (safetensors only) and put the base model on ``device``.

        The LM head's are read with ``head=True`` alone: next-token probabilities need it, the stream does not. Raises
        ``UserError`` when the weights cannot be read, or hold no LM head where one was asked for.
        """
        from transformers import AutoModel, AutoModelForCausalLM

        if self.untrained is not None:
            base, top = self._without_weights(DTYPES[dtype], head)
            return LanguageModel(base.to(device), name=f"{self.name} (untrained)", head=top and top.to(device))
        from transformers.utils import logging as transformers_logging

        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # it would report the LM head, left out on purpose, as unexpected
        transformers_logging.disable_progress_bar()
        try:
            with _hub_errors(self.name, self.revision):
                kind: Any = AutoModelForCausalLM if head else AutoModel
                model, found = kind.from_pretrained(
                    self.location,
                    revision=self.commit or self.revision,
                    dtype=DTYPES[dtype],
                    local_files_only=self.commit is not None and not hub_reachable(),
                    use_safetensors=True,
                    trust_remote_code=self.trust_remote_code,
                    output_loading_info=True,
                )
        finally:
            transformers_logging.set_verbosity(verbosity)
            transformers_logging.enable_progress_bar()
        if head and found["missing_keys"]:  # transformers would draw them at random
            raise UserError(
                f"lm.name={self.name}: the next-token probabilities need {', '.join(sorted(found['missing_keys']))}, "
                "which its weights lack. Give a model that was saved with its LM head."
            )
        model = model.to(device)
        if head:
            return LanguageModel(model.base_model, name=self.name, head=model.get_output_embeddings())
        return LanguageModel(model, name=self.name)

    def _without_weights(self, dtype: torch.dtype, head: bool) -> tuple[Any, nn.Module | None]:
        """Base model and, if asked for, LM head with random weights; those of the base are the same either way."""
        from transformers import AutoModel, AutoModelForCausalLM

        options = {"dtype": dtype, "trust_remote_code": self.trust_remote_code}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cast(int, self.untrained))
            base = AutoModel.from_config(self.config, **options)
            if not head:
                return base, None
            top = AutoModelForCausalLM.from_config(self.config, **options).get_output_embeddings()
        if self.config.tie_word_embeddings:
            top.weight = base.get_input_embeddings().weight
        return base, top


def find_lm(name: str = "embedded", *, revision: str | None = None, trust_remote_code: bool = False) -> LMSource:
    """Resolve ``lm.name`` (a Hub name, a folder, or ``embedded``) to an :class:`LMSource`, without reading weights.

    Raises ``UserError`` for a folder or name that is not there, has no safetensors, is gated, needs remote code, or is
    of an unsupported architecture.
    """
    from transformers import AutoConfig

    location = str(embedded.MODEL) if name == "embedded" else name
    folder = Path(location).expanduser()
    is_folder = folder.is_dir()
    if is_folder:
        location = str(folder)
        _check_folder(name, folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise UserError(
            f"lm.name={name}: no such folder. Give a folder with config.json and *.safetensors, a name on the Hugging "
            "Face Hub such as meta-llama/Llama-3.1-8B, or 'embedded'."
        )
    with _hub_errors(name, revision):
        config = AutoConfig.from_pretrained(
            location,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=not is_folder and not hub_reachable(),
        )
    names = site_names(config.model_type)
    commit = None if is_folder else getattr(config, "_commit_hash", None)
    return LMSource(name, location, revision, commit, config, names, trust_remote_code)


def _check_folder(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"lm.name={name}: the folder has no config.json, so it is not a saved model.")
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"lm.name={name}: config.json is not valid JSON ({error}).") from error
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"lm.name={name}: the folder has no *.safetensors file, and other formats can run code when opened. Save "
            "the model with save_pretrained(..., safe_serialization=True)."
        )


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn whatever transformers and the Hub raise into one sentence with the cure."""
    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(
            f"lm.name={name}: its weights cannot be read ({error}); copy or download them again."
        ) from error
    except (OSError, ValueError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"lm.name={name}: it needs Python code of its own, which is not run unless you ask. If you trust its "
                "authors, set lm.trust_remote_code=true."
            ) from error
        raise explain_hub_error(error, kind="lm", name=name, revision=revision) from error


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
