"""Any shard of a corpus' trajectories: from the cache when it is there, from the language model when it is not."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.errors import NonFiniteError, UserError
from rsdyn.lm.allocator import give_back
from rsdyn.lm.certificate import Certificate, certify
from rsdyn.lm.model import EXTRACTOR_VERSION, LanguageModel, longrope_length
from rsdyn.lm.packing_trial import choose_layout
from rsdyn.lm.source import LMSource
from rsdyn.stream.cache import DTYPES, DamagedShardError, Shard, TrajectoryCache
from rsdyn.stream.drift import canary_rows, compare, tolerance
from rsdyn.stream.text.positions import Positions, kinds
from rsdyn.stream.text.tokens import Sequences

log = logging.getLogger(__name__)
SAY_AGAIN_SECONDS = 60.0


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "safetensors")}


class TrajectoryStream:
    """The trajectories of a corpus, by shard; each sequence goes through the language model once, ever.

    Args:
        lm: the model; its weights are read when the first shard is missing, and not before.
        sequences: the corpus.
        positions: which tokens of each sequence, and
        position_seed: the seed of the order in which they are drawn, see :class:`.text.positions.Positions`.
        made_from: further facts of the text for the cache's manifest (name, split, condition, ...); they enter the key.
        cache_dir: the cache folder, or None to keep nothing: then a shard is recorded each time it is asked for.
        dtype: of the stored activations, ``bfloat16`` or ``float32``.
        shard_sequences: sequences a shard.
        batch_tokens, lm_dtype, matmul_precision: how the model runs, see :meth:`LanguageModel.record`.
        layout: ``auto``, ``packed`` or ``sorted``, see :func:`rsdyn.lm.packing_trial.choose_layout`.

    ``device`` is where the model goes (set it before the first shard), ``on_record`` is called with the number of
    sequences after each batch that went through the model.
    """

    def __init__(
        self,
        lm: LMSource,
        sequences: Sequences,
        *,
        positions: str | dict[str, int] = "last",
        position_seed: int = 0,
        made_from: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        dtype: str = "bfloat16",
        shard_sequences: int = 256,
        batch_tokens: int = 1024,
        lm_dtype: str = "float32",
        matmul_precision: str = "highest",
        layout: str = "auto",
    ):
        self.lm, self.sequences = lm, sequences
        self.n_sequences, self.n_sublayers, self.n_units = len(sequences), lm.n_sublayers, lm.n_units
        self.dtype = DTYPES[dtype]
        self.shard_sequences = shard_sequences
        self.n_shards = -(-self.n_sequences // shard_sequences)
        self.positions = Positions(positions, sequences.lengths, seed=position_seed)
        self.batch_tokens, self.lm_dtype, self.matmul_precision = batch_tokens, lm_dtype, matmul_precision
        self.layout = layout
        self.device: torch.device | str = "cpu"
        self.on_record: Callable[[int], object] = lambda n: None
        self.n_recorded = 0
        self.certificate: dict[str, Any] | None = None  # of the model that recorded; None before any did
        self.on_certificate: Callable[[Certificate], object] = lambda certificate: None
        self._model: LanguageModel | None = None
        self._given: LanguageModel | None = None  # open already
        self._said = -SAY_AGAIN_SECONDS
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
                "layout": layout,
                "extractor": EXTRACTOR_VERSION,
                "trust_remote_code": lm.trust_remote_code,
                **(made_from or {}),
                **self.positions.key(),
            }
            per_shard = [self.n_trajectories(*self.bounds(k)) for k in range(self.n_shards)]
            self.cache = TrajectoryCache(
                cache_dir,
                fields,
                label=f"{fields['lm']}-{fields.get('condition', 'original')}",
                n_sequences=self.n_sequences,
                n_sublayers=self.n_sublayers,
                n_units=self.n_units,
                dtype=dtype,
                shard_sequences=shard_sequences,
                shard_trajectories=None if self.positions.is_last else per_shard,
            )

    @property
    def lm_loaded(self) -> bool:
        return self._model is not None

    def open(self, samples: int | None = None) -> None:
        """Make or check the cache folder and see that what is missing fits on the disk; ``UserError`` otherwise.

        ``samples``, here and below: only the shards of the first so many sequences will be wanted; default all.
        """
        if self.cache is not None:
            for note in self.cache.open(made_by=_versions(), wanted=range(self.shards_of(samples))):
                log.warning("%s.", note)
            self.certificate = self.cache.manifest().get("certificate")
            if missing := self.missing(samples):
                self.cache.check_free_space(missing)

    def bounds(self, k: int) -> tuple[int, int]:
        """First and one-past-last sequence of shard ``k``."""
        return k * self.shard_sequences, min((k + 1) * self.shard_sequences, self.n_sequences)

    def n_trajectories(self, start: int = 0, stop: int | None = None) -> int:
        """How many trajectories sequences ``start`` to ``stop`` have (default: all), recorded or not."""
        return int(self.positions.counts[start:stop].sum())

    def rows_of(self, k: int, sequences: np.ndarray) -> Tensor:
        """Where in shard ``k`` the trajectories of some of its sequences, by number, are."""
        start, stop = self.bounds(k)
        if self.positions.is_last:
            return torch.from_numpy(sequences - start)
        ends = np.cumsum(self.positions.counts[start:stop])
        rows = [np.arange(ends[i] - self.positions.counts[start + i], ends[i]) for i in sequences - start]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *rows]))

    def turns(self, k: int) -> Tensor | None:
        """``(n,)`` int64, the turn of each trajectory of shard ``k`` among those of its sequence; None for ``last``."""
        if self.positions.is_last:
            return None
        return torch.from_numpy(np.concatenate([self.positions.turns(i) for i in range(*self.bounds(k))]))

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
        """Shard ``k``; when it is not in the cache it is recorded, by one process at a time.

        A damaged one is named in a warning, and recorded again. Where another run is recording it, this one says so,
        waits, and reads what the other wrote.
        """
        if self.cache is None:
            return self._record(k)
        is_damaged = False
        try:
            return self.cache.read(k)
        except FileNotFoundError:
            pass
        except DamagedShardError as damage:
            is_damaged = True
            warnings.warn(f"{damage}; it is recorded again.", stacklevel=2)
        with self.cache.lock(k, on_wait=lambda holder: self._say_waiting(k, holder)):
            try:
                shard = self.cache.read(k)  # by now another process may have recorded it
            except FileNotFoundError:
                pass
            except DamagedShardError as damage:
                if not is_damaged:
                    warnings.warn(f"{damage}; it is recorded again.", stacklevel=2)
                self.cache.discard(k)
            else:
                if not is_damaged:  # it was missing, so a bar counts on it
                    start, stop = self.bounds(k)
                    self.on_record(stop - start)
                return shard
            shard = self._record(k)
            self.cache.write(k, shard)
        return shard

    def read(self, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """The trajectories of the first ``samples`` sequences (default: all) as one tensor, for work at hand.

        What is missing is recorded first; :meth:`open` is called here. All of it is in memory: ``trainer.test`` with a
        :class:`~rsdyn.stream.trajectory_datamodule.TrajectoryDataModule` reads what is too much for that.

        Returns:
            activations: ``(n, S, D)``, in the cache's dtype; ``n`` is ``samples`` where each sequence has one
                trajectory, that of its last token (METHOD 2), and else that of all their recorded tokens.
            sequence: ``(n,)`` int64, the number of each one's sequence in its corpus, never falling.

        Raises ``UserError`` where ``samples`` is not from 1 to the number of sequences, or what is missing cannot be
        recorded.
        """
        samples = self.n_sequences if samples is None else samples
        if not 1 <= samples <= self.n_sequences:
            raise UserError(
                f"samples={samples}: the corpus has {self.n_sequences} sequences. Give a number from 1 to "
                f"{self.n_sequences}, or leave it out."
            )
        self.open(samples)
        n = self.n_trajectories(0, samples)
        activations = torch.empty(n, self.n_sublayers, self.n_units, dtype=self.dtype)
        sequence = torch.empty(n, dtype=torch.int64)
        start = 0
        for k in range(self.shards_of(samples)):
            shard = self.shard(k)
            stop = min(n, start + len(shard.index))
            activations[start:stop] = shard.activations[: stop - start]
            sequence[start:stop] = shard.index[: stop - start]
            start = stop
        return activations, sequence

    def _say_waiting(self, k: int, holder: str) -> None:
        if time.monotonic() - self._said >= SAY_AGAIN_SECONDS:
            self._said = time.monotonic()
            log.warning(
                "Another run (%s) is recording shard %d of %d of %s: this one waits for what it wants too, and reads "
                "what the other has written.",
                *(holder, k, self.n_shards, self.cache.folder if self.cache else None),
            )

    def _record(self, k: int) -> Shard:
        if self._model is None:
            model = self._given or self.lm.load(dtype=self.lm_dtype, device=self.device)
            self._certify(model)
            self._check_canary(model)
            self._model = model
        start, stop = self.bounds(k)
        activations = self._trajectories(self._model, list(range(start, stop)), self.on_record)
        self.n_recorded += stop - start
        index = torch.arange(start, stop)
        lengths = torch.from_numpy(self.sequences.lengths[start:stop].astype("int32"))
        if self.positions.is_last:
            return Shard(activations, index, lengths)
        counts = torch.from_numpy(self.positions.counts[start:stop])
        position = torch.from_numpy(np.concatenate([self.positions.of(i) for i in range(start, stop)]).astype("int32"))
        return Shard(
            activations,
            index.repeat_interleave(counts),
            lengths.repeat_interleave(counts),
            position,
            kinds(activations, position),
        )

    def _trajectories(
        self, model: LanguageModel, rows: list[int], on_batch: Callable[[int], object] = lambda n: None
    ) -> Tensor:
        with self.precision():
            return model.record(
                [self.sequences[i] for i in rows],
                positions=None if self.positions.is_last else [self.positions.of(i) for i in rows],
                batch_tokens=self.batch_tokens,
                dtype=self.dtype,
                first_index=rows[0],
                on_batch=on_batch,
            )

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Inside, float32 is multiplied as precisely as ``matmul_precision`` says."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.matmul_precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def _certify(self, model: LanguageModel) -> None:
        """See that what is recorded is the model's stream, and say in the manifest how well it is (METHOD 2)."""
        texts = [self.sequences[i] for i in range(min(32, self.n_sequences))]
        with self.precision():
            model.layout = choose_layout(model, texts, self.layout)
            certificate = certify(model, texts, opened_by=self.sequences.opened_by)
        self.certificate = certificate.to_dict()
        self.on_certificate(certificate)
        if self.cache is not None:
            self.cache.add_to_manifest("certificate", self.certificate)

    def _check_canary(self, model: LanguageModel) -> None:
        """Record a few sequences of the cache's first shard again, before anything is added to the cache.

        The weights' digest and the settings are in the key; what is not (libraries, processors, a damaged file in
        memory) would go on in other numbers than it began. Raises ``UserError`` beyond what rounding explains.
        """
        if self.cache is None or (found := self._first_shard()) is None:
            return
        k, shard = found
        start, stop = self.bounds(k)
        lengths = self.sequences.lengths[start:stop].tolist()
        together = canary_rows(lengths, self.batch_tokens, model.layout.name, longrope_length(model.config))
        numbers = [start + i for i in together]
        rows = torch.cat([self.rows_of(k, np.array([i])) for i in numbers])
        try:
            again = self._trajectories(model, numbers)
        except NonFiniteError as error:
            names = ", ".join(map(str, numbers))
            raise NonFiniteError(
                f"{error} It was recording sequences {names} again, to compare them with the cache, in which they are "
                "finite; their numbers count from the first of them."
            ) from error
        canary = compare(again, shard.activations[rows])
        allowed = tolerance(lm_dtype=self.lm_dtype, matmul_precision=self.matmul_precision, stored=self.dtype)
        if canary.difference == 0:
            return
        theirs, ours = self.cache.manifest()["made_by"], _versions()
        changed = [name for name in ours if theirs.get(name) != ours[name]]
        differ = ", ".join(f"{name} {theirs.get(name)} there, {ours[name]} here" for name in changed)
        number = int(shard.index[rows[canary.row]])
        where = f"sequence {number} recorded again differs from the cache by {canary.difference:.1e}"
        reason = f" ({differ})" if differ else ""
        if canary.difference <= allowed:
            log.warning("%s of its norm, which is rounding: another processor or other libraries%s.", where, reason)
            return
        raise UserError(
            f"cache.dir={self.cache.root}: {where} of its norm at sublayer {canary.sublayer} ({allowed:.0e} is "
            f"rounding), so these weights or libraries{reason} make other numbers than those that filled "
            f"{self.cache.folder.name}. Nothing was added to it. Go back to what filled it, remove it (python -m "
            f"rsdyn.stream.cache prune {self.cache.folder.name} --yes), or choose another cache.dir."
        )

    def _first_shard(self) -> tuple[int, Shard] | None:
        """The first shard in the cache that is whole."""
        assert self.cache is not None
        for k in range(self.n_shards):
            with suppress(FileNotFoundError, DamagedShardError):
                return k, self.cache.read(k)
        return None

    def record_with(self, model: LanguageModel) -> None:
        """Record what is missing with a model that is open already, instead of reading its weights once more."""
        self._given = model

    def release_lm(self) -> None:
        """Drop the language model, if it was loaded, once nothing is left to record, and what memory it worked in."""
        self._given = None
        if self._model is not None:
            self._model = None
            give_back()
