"""Any shard of a corpus' trajectories: from the cache when it is there, from the language model when it is not."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rsdyn.stream.cache import DTYPES, DamagedShardError, Shard, TrajectoryCache
from rsdyn.stream.lm import EXTRACTOR_VERSION, LanguageModel
from rsdyn.stream.source import LMSource
from rsdyn.stream.text import Sequences

log = logging.getLogger(__name__)


class TrajectoryStream:
    """The trajectories of a corpus, by shard; each sequence goes through the language model once, ever.

    Args:
        lm: the model; its weights are read when the first shard is missing, and not before.
        sequences: the corpus.
        made_from: further facts of the text for the cache's manifest (name, split, condition, ...); they enter the key.
        cache_dir: the cache folder, or None to keep nothing: then a shard is recorded each time it is asked for.
        dtype: of the stored activations, ``bfloat16`` or ``float32``.
        shard_sequences: sequences a shard.
        batch_tokens, lm_dtype, matmul_precision: how the model runs, see :meth:`LanguageModel.record`.

    ``device`` is where the model goes (set it before the first shard), ``on_record`` is called with the number of
    sequences after each batch that went through the model.
    """

    def __init__(
        self,
        lm: LMSource,
        sequences: Sequences,
        *,
        made_from: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        dtype: str = "bfloat16",
        shard_sequences: int = 256,
        batch_tokens: int = 1024,
        lm_dtype: str = "float32",
        matmul_precision: str = "highest",
    ):
        self.lm, self.sequences = lm, sequences
        self.n_sequences, self.n_sublayers, self.n_units = len(sequences), lm.n_sublayers, lm.n_units
        self.dtype = DTYPES[dtype]
        self.shard_sequences = shard_sequences
        self.n_shards = -(-self.n_sequences // shard_sequences)
        self.batch_tokens, self.lm_dtype, self.matmul_precision = batch_tokens, lm_dtype, matmul_precision
        self.device: torch.device | str = "cpu"
        self.on_record: Callable[[int], None] = lambda n: None
        self.n_recorded = 0
        self._model: LanguageModel | None = None
        self.cache: TrajectoryCache | None = None
        if cache_dir is not None:
            fields = {
                "lm": lm.label,
                "weights": lm.identity(),
                "tokens": sequences.digest,
                "sites": list(lm.site_names),
                "lm_dtype": lm_dtype,
                "matmul_precision": matmul_precision,
                "batch_tokens": batch_tokens,
                "extractor": EXTRACTOR_VERSION,
                **(made_from or {}),
            }
            self.cache = TrajectoryCache(
                cache_dir,
                fields,
                label=f"{fields['lm']}-{fields.get('condition', 'original')}",
                n_sequences=self.n_sequences,
                n_sublayers=self.n_sublayers,
                n_units=self.n_units,
                dtype=dtype,
                shard_sequences=shard_sequences,
            )

    @property
    def lm_loaded(self) -> bool:
        return self._model is not None

    def open(self, samples: int | None = None) -> None:
        """Make or check the cache folder and see that what is missing fits on the disk; ``UserError`` otherwise.

        ``samples``, here and below: only the shards of the first so many sequences will be wanted; default all.
        """
        if self.cache is not None:
            packages = ("torch", "transformers", "safetensors")
            self.cache.open(made_by={name: version(name) for name in packages})
            self.cache.check_free_space(self.missing(samples))

    def bounds(self, k: int) -> tuple[int, int]:
        """First and one-past-last sequence of shard ``k``."""
        return k * self.shard_sequences, min((k + 1) * self.shard_sequences, self.n_sequences)

    def shards_of(self, samples: int | None = None) -> int:
        """How many shards, from the first one on, hold the first ``samples`` sequences."""
        return self.n_shards if samples is None else min(self.n_shards, -(-samples // self.shard_sequences))

    def missing(self, samples: int | None = None) -> list[int]:
        """The shards that the language model still has to record."""
        absent = range(self.n_shards) if self.cache is None else self.cache.missing()
        return [k for k in absent if k < self.shards_of(samples)]

    def n_missing(self, samples: int | None = None) -> int:
        """How many sequences the language model still has to record."""
        return sum(stop - start for start, stop in map(self.bounds, self.missing(samples)))

    def shard(self, k: int) -> Shard:
        """Shard ``k``. A damaged one is named in a warning, and recorded again."""
        if self.cache is None:
            return self._record(k)
        if self.cache.has(k):
            try:
                return self.cache.read(k)
            except DamagedShardError as damage:
                warnings.warn(f"{damage}; it is recorded again.", stacklevel=2)
                self.cache.discard(k)
        shard = self._record(k)
        self.cache.write(k, shard)
        return shard

    def _record(self, k: int) -> Shard:
        if self._model is None:
            self._model = self.lm.load(dtype=self.lm_dtype, device=self.device)
        start, stop = self.bounds(k)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul_precision)
        try:
            activations = self._model.record(
                [self.sequences[i] for i in range(start, stop)],
                batch_tokens=self.batch_tokens,
                dtype=self.dtype,
                first_index=start,
                on_batch=self.on_record,
            )
        finally:
            torch.set_float32_matmul_precision(before)
        self.n_recorded += stop - start
        lengths = torch.from_numpy(self.sequences.lengths[start:stop].astype("int32"))
        return Shard(activations, torch.arange(start, stop), lengths)

    def release_lm(self) -> None:
        """Drop the language model, if it was loaded, once nothing is left to record."""
        self._model = None
