"""Any shard of a corpus' trajectories: from the cache what is there, from the language model what is not."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsdyn.errors import UserError
from rsdyn.lm.allocator import give_back
from rsdyn.lm.certificate import Certificate, certify
from rsdyn.lm.model import EXTRACTOR_VERSION, LanguageModel, longrope_length
from rsdyn.lm.packing_trial import choose_layout
from rsdyn.lm.source import LMSource
from rsdyn.stream.cache import DTYPES, DamagedShardError, Shard, TrajectoryCache, sequence_keys
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
        made_from: further facts of the text for the index of its corpus (name, split, condition, ...).
        cache_dir: the cache folder, or None to keep nothing: then a shard is recorded each time it is asked for.
        dtype: of the stored activations, ``bfloat16`` or ``float32``.
        shard_sequences: sequences a shard.
        batch_tokens, lm_dtype, matmul_precision: how the model runs, see :meth:`LanguageModel.record`.
        layout: ``auto``, ``packed`` or ``sorted``, see :func:`rsdyn.lm.packing_trial.choose_layout`.
        on_certificate: called with the certificate of the model when it was loaded to record.

    ``device`` is where the model goes (set it before the first shard). ``on_record``, of whatever may record, is called
    with the number of sequences after each batch that went through the model.
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
        on_certificate: Callable[[Certificate], object] = lambda certificate: None,
    ) -> None:
        self.lm, self.sequences = lm, sequences
        self.n_sequences, self.n_sublayers, self.n_units = len(sequences), lm.n_sublayers, lm.n_units
        self.dtype = DTYPES[dtype]
        self.shard_sequences = shard_sequences
        self.n_shards = -(-self.n_sequences // shard_sequences)
        self.positions = Positions(positions, sequences.lengths, seed=position_seed)
        self.batch_tokens, self.lm_dtype, self.matmul_precision = batch_tokens, lm_dtype, matmul_precision
        self.layout = layout
        self.device: torch.device | str = "cpu"
        self.n_recorded = 0
        self.certificate: dict[str, Any] | None = None  # of the model that recorded; None before any did
        self._on_certificate = on_certificate
        self._model: LanguageModel | None = None
        self._given: LanguageModel | None = None  # open already
        self._said = -SAY_AGAIN_SECONDS
        self.cache: TrajectoryCache | None = None
        if cache_dir is not None:
            corpus = {
                **(made_from or {}),
                "tokens": sequences.digest,
                **self.positions.key(),
            }
            condition = str(corpus.pop("condition", "original"))
            self.cache = TrajectoryCache(
                cache_dir,
                {
                    "weights": lm.identity(),
                    "condition": condition,
                    "sites": list(lm.site_names),
                    "lm_dtype": lm_dtype,
                    "matmul_precision": matmul_precision,
                    "batch_tokens": batch_tokens,
                    "layout": layout,
                    "extractor": EXTRACTOR_VERSION,
                    "trust_remote_code": lm.trust_remote_code,
                },
                label=f"{lm.label}-{condition}",
                keys=sequence_keys(
                    (sequences.ids[i:j] for i, j in pairwise(sequences.offsets)),
                    (self.positions.mark(i) for i in range(self.n_sequences)),
                ),
                n_sublayers=self.n_sublayers,
                n_units=self.n_units,
                dtype=dtype,
                shard_sequences=shard_sequences,
                counts=None if self.positions.is_last else self.positions.counts,
                corpus=corpus,
            )

    notes: tuple[str, ...] = ()  # what a reader of any result must know, where the stream was brought
    tokens_are_known = True

    @property
    def lm_loaded(self) -> bool:
        return self._model is not None

    def open(self, samples: int | None = None) -> None:
        """Make or check the cache folder and see that what is missing fits on the disk; ``UserError`` otherwise.

        ``samples``, here and below: only the shards of the first N sequences will be wanted; default all.
        """
        if self.cache is not None:
            for note in self.cache.open(
                made_by={"lm": self.lm.label, **_versions()}, wanted=range(self.shards_of(samples))
            ):
                log.warning("%s.", note)
            certificate = self.cache.manifest().get("certificate")
            if certificate is not None:  # of the model; what opens each text is this corpus' own
                self.certificate = {**certificate, "opened_by": self.sequences.opened_by}
            self.cache.check_free_space(self.missing_sequences(samples))

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

    def missing_sequences(self, samples: int | None = None) -> np.ndarray:
        """The numbers of the sequences that the language model still has to record; recording goes by whole shards."""
        stop = self.bounds(self.shards_of(samples) - 1)[1]
        return np.arange(stop) if self.cache is None else self.cache.missing_sequences(0, stop)

    def missing(self, samples: int | None = None) -> list[int]:
        """The shards of which the language model still has to record something."""
        return np.unique(self.missing_sequences(samples) // self.shard_sequences).tolist()

    def n_missing(self, samples: int | None = None) -> int:
        """How many sequences the language model still has to record."""
        return len(self.missing_sequences(samples))

    def shard(self, k: int, on_record: Callable[[int], object] = lambda n: None) -> Shard:
        """Shard ``k``; what of it is not in the cache is recorded, by one process at a time.

        A damaged file is named in a warning, and what it held recorded again. Where another run is recording the shard,
        this one says so, waits, and reads what the other wrote.
        """
        if self.cache is None:
            return self._with_kinds(self._record(np.arange(*self.bounds(k)), on_record))
        said: set[Path] = set()
        try:
            return self._with_kinds(self.cache.read(k))
        except FileNotFoundError:
            pass
        except DamagedShardError as damage:
            _say_damaged(damage, said)
        awaited = len(self.cache.missing_sequences(*self.bounds(k)))  # a bar counts on them
        with self.cache.lock(k, on_wait=lambda holder: self._say_waiting(k, holder)):
            while True:
                shard: Shard | None
                try:
                    shard = self.cache.read(k)  # by now another process may have recorded it
                except FileNotFoundError:
                    missing = self.cache.missing_sequences(*self.bounds(k))
                    recorded = self._record(missing, on_record)
                    self.cache.write(k, recorded)
                    awaited -= len(missing)
                    shard = recorded if len(recorded.index) == self.n_trajectories(*self.bounds(k)) else None
                except DamagedShardError as damage:
                    _say_damaged(damage, said)
                    self.cache.remove_damaged(damage)
                    shard = None
                if shard is not None:
                    break
        if awaited > 0 and not said:
            on_record(awaited)
        return self._with_kinds(shard)

    def _with_kinds(self, shard: Shard) -> Shard:
        if shard.position is None:
            return shard
        return replace(shard, kind=kinds(shard.activations, shard.position))

    def read(
        self, samples: int | None = None, on_record: Callable[[int], object] = lambda n: None
    ) -> tuple[Tensor, Tensor]:
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
            shard = self.shard(k, on_record)
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

    def _record(self, numbers: np.ndarray, on_record: Callable[[int], object] = lambda n: None) -> Shard:
        """The trajectories of some sequences, by number, that go through the model together."""
        if self._model is None:
            model = self._given or self.lm.load(dtype=self.lm_dtype, device=self.device)
            self._certify(model)
            self._check_canary(model)
            self._model = model
        activations = self._trajectories(self._model, numbers.tolist(), on_record)
        self.n_recorded += len(numbers)
        index, lengths = torch.from_numpy(numbers), torch.from_numpy(self.sequences.lengths[numbers].astype("int32"))
        if self.positions.is_last:
            return Shard(activations, index, lengths)
        counts = torch.from_numpy(self.positions.counts[numbers])
        position = torch.from_numpy(np.concatenate([self.positions.of(i) for i in numbers.tolist()]).astype("int32"))
        return Shard(activations, index.repeat_interleave(counts), lengths.repeat_interleave(counts), position)

    def _trajectories(
        self, model: LanguageModel, rows: list[int], on_batch: Callable[[int], object] = lambda n: None
    ) -> Tensor:
        with self.precision():
            return model.record(
                [self.sequences[i] for i in rows],
                positions=None if self.positions.is_last else [self.positions.of(i) for i in rows],
                batch_tokens=self.batch_tokens,
                dtype=self.dtype,
                numbers=rows,
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
        self._on_certificate(certificate)
        if self.cache is not None:
            self.cache.add_to_manifest("certificate", self.certificate)

    def _check_canary(self, model: LanguageModel) -> None:
        """Record a few sequences that the cache has again, before anything is added to it.

        The weights' digest and the settings are in the key; what is not (libraries, processors, a damaged file in
        memory) would go on in other numbers than it began. Raises ``UserError`` beyond what rounding explains.
        """
        if self.cache is None or (found := next(self.cache.recorded_before(), None)) is None:
            return
        of_file, recorded = found
        lengths = recorded.n_tokens.tolist()
        apart = longrope_length(model.config)
        batch = canary_rows(lengths, self.batch_tokens, model.layout.name, apart, known=of_file >= 0)
        numbers = of_file[batch.rows].tolist()
        ends = recorded.trajectories.cumsum(0)
        rows = torch.cat([torch.arange(int(ends[i] - recorded.trajectories[i]), int(ends[i])) for i in batch.rows])
        again = self._trajectories(model, numbers)
        canary = compare(again, recorded.activations[rows])
        allowed = tolerance(lm_dtype=self.lm_dtype, matmul_precision=self.matmul_precision, stored=self.dtype)
        if canary.difference == 0:
            return
        theirs, ours = self.cache.manifest()["made_by"], _versions()
        changed = [name for name in ours if theirs.get(name) != ours[name]]
        differ = ", ".join(f"{name} {theirs.get(name)} there, {ours[name]} here" for name in changed)
        of_row = torch.arange(len(numbers)).repeat_interleave(recorded.trajectories[batch.rows])
        number = numbers[int(of_row[canary.row])]
        where = f"sequence {number} recorded again differs from the cache by {canary.difference:.1e}"
        reason = f" ({differ})" if differ else ""
        if canary.difference <= allowed and not batch.is_whole:
            return  # they went through the model beside others then, which rounds otherwise
        if canary.difference <= allowed:
            log.warning("%s of its norm, which is rounding: another processor or other libraries%s.", where, reason)
            return
        raise UserError(
            f"dir={self.cache.root}: {where} of its norm at sublayer {canary.sublayer} ({allowed:.0e} is "
            f"rounding), so these weights or libraries{reason} make other numbers than those that filled "
            f"{self.cache.folder.name}. Nothing was added to it. Go back to what filled it, remove it (python -m "
            f"rsdyn.stream.cache prune {self.cache.folder.name} --yes), or choose another `dir`."
        )

    def record_with(self, model: LanguageModel) -> None:
        """Record what is missing with a model that is open already, instead of reading its weights once more."""
        self._given = model

    def release_lm(self) -> None:
        """Drop the language model, if it was loaded, once nothing is left to record, and what memory it worked in."""
        self._given = None
        if self._model is not None:
            self._model = None
            give_back()


def _say_damaged(damage: DamagedShardError, said: set[Path]) -> None:
    if damage.path not in said:
        said.add(damage.path)
        warnings.warn(f"{damage}; what it held is recorded again.", stacklevel=3)
