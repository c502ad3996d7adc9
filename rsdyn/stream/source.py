"""Find a language model: all there is to know of it before its weights are read, and how to read them.

Two steps, so that a run whose cache is complete never reads the weights: :func:`find_lm` learns all there is to know
from the config, :meth:`LMSource.load` reads the weights and gives a :class:`~rsdyn.stream.lm.LanguageModel`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import xxhash
from safetensors import SafetensorError
from torch import nn

from rsdyn import embedded
from rsdyn.errors import UserError
from rsdyn.stream.hub import explain_hub_error, hub_reachable
from rsdyn.stream.lm import LanguageModel
from rsdyn.stream.sites import RESID_PRE, site_names, sublayer_index

_NOT_OF_THE_SHAPE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
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
