"""A model object that a person has opened already, where a run would have found one by its name.

It answers what :class:`~rsdyn.lm.source.LMSource` answers, so that the stream, its cache and the controls need not know
which of the two they have. What is handed in comes back as it was: :class:`~rsdyn.lm.model.LanguageModel` sees to that.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import nn

from rsdyn.errors import UserError
from rsdyn.lm.head import base_of
from rsdyn.lm.model import LanguageModel, context_length
from rsdyn.lm.model_lock import one_at_a_time
from rsdyn.lm.sites import RESID_PRE, Sites, find_sites, sublayer_index
from rsdyn.lm.source import shape_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GivenModel:
    """A transformers model, with or without its LM head, or one that PEFT has wrapped.

    Args:
        model: the object; adapters that PEFT has put into it stay in place and take part.
        name: for labels and messages; default the name it was loaded by, else its class.

    Raises ``UserError`` where the model has no running sum to record, or its base model cannot be found.
    """

    trust_remote_code = False
    device_map = None
    commit = revision = None
    untrained: int | None = None

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        wrapped: Any = model
        inner: Any = wrapped.get_base_model() if hasattr(model, "peft_config") else model
        self.model = inner
        self.causal: PreTrainedModel | None = None
        self.base: PreTrainedModel = inner
        if inner.get_output_embeddings() is not None:
            self.causal = inner
            try:
                self.base = base_of(inner)[1]
            except ValueError as error:
                raise UserError(f"model: {error} Give the base model itself.") from error
        self.config: Any = inner.config
        self._sites: Sites = find_sites(self.base)
        loaded_from = str(getattr(self.config, "_name_or_path", "") or "")
        self.name = name or loaded_from.rstrip("/").rsplit("/", 1)[-1] or type(inner).__name__

    @property
    def label(self) -> str:
        return self.name if self.untrained is None else f"{self.name}-untrained"

    @property
    def site_names(self) -> tuple[str, ...]:
        return self._sites.names

    @property
    def n_sublayers(self) -> int:
        return len(self._sites.modules)

    @property
    def n_layers(self) -> int:
        return self.n_sublayers // len(self.site_names)

    @property
    def n_units(self) -> int:
        return int(self.config.get_text_config().hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @property
    def max_tokens(self) -> int | None:
        """The model's context; None where nothing bounds it."""
        return context_length(self.config)

    @property
    def device(self) -> torch.device:
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> str:
        return str(next(self.base.parameters()).dtype).removeprefix("torch.")

    @cached_property
    def _digest(self) -> str:
        digest = xxhash.xxh3_128(shape_digest(self.config).encode())
        for key, value in self.base.state_dict().items():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def identity(self) -> str:
        """What tells this model from all others: a digest of its config and of every weight."""
        return f"object, xxh3 {self._digest}"

    def sublayer(self, layer: int, site: str = RESID_PRE) -> int:
        """The sublayer of a layer's site; ``UserError`` for a layer or site that the model has not."""
        return sublayer_index(self.site_names, self.n_layers, layer, site)

    def check_memory(self, **_: Any) -> None:
        """It is in memory already."""

    def tokenizer(self) -> Any:
        """A model object brings no tokenizer."""
        raise UserError("tokenizer: strings need one. Give tokenizer=..., or token ids in place of strings.")

    def load(self, *, dtype: str = "float32", device: torch.device | str = "cpu", head: bool = False) -> LanguageModel:
        """The model as it is, in its own format and on its own device."""
        if head and self.causal is None:
            raise UserError(
                f"model: next-token probabilities need its LM head, and {type(self.model).__name__} has none. Give the "
                "model that AutoModelForCausalLM opens."
            )
        return LanguageModel(self.base, name=self.name, causal=self.causal if head else None)

    def without_training(self, seed: int) -> GivenModel:
        """A model of the same class and config with the random weights that its authors start training from."""
        config = copy.deepcopy(self.config)
        with one_at_a_time(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = type(self.model)._from_config(config, dtype=next(self.base.parameters()).dtype)
        found = GivenModel(fresh.to(self.device), self.name)
        found.untrained = seed
        return found
