"""The stream and its DataModule: once each, in a fixed order, whatever the cache, the processes and the batch size."""

import signal
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from rsdyn.errors import UserError
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import find_lm
from rsdyn.stream import datamodule
from rsdyn.stream.cache import ahead
from rsdyn.stream.datamodule import ResidualStreamDataModule
from rsdyn.stream.trajectories import TrajectoryStream

N = 60


@pytest.fixture
def make_stream(tiny_llama, make_sequences, tmp_path):
    def make(n=N, cache=True, **options):
        options = {"shard_sequences": 8, "batch_tokens": 256, **options}
        return TrajectoryStream(
            find_lm(str(tiny_llama)), make_sequences(n), cache_dir=tmp_path / "cache" if cache else None, **options
        )

    return make


def opened(stream):
    stream.open()
    return stream


def all_batches(loader):
    return [tuple(t.clone() for t in batch) for batch in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def trainer_at(epoch, batch=0):
    """What a DataModule asks of a Trainer that has finished some epochs, and some batches of the next."""
    progress = SimpleNamespace(current=SimpleNamespace(ready=batch))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(current_epoch=epoch, fit_loop=loop)


# -- the stream --------------------------------------------------------------------------------------------------------


def test_each_sequence_is_recorded_once_ever(make_stream):
    stream = opened(make_stream())
    assert stream.n_missing() == N
    first = [stream.shard(k).activations.clone() for k in range(stream.n_shards)]
    assert stream.n_recorded == N
    second = [stream.shard(k).activations for k in range(stream.n_shards)]
    assert stream.n_recorded == N
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    later = opened(make_stream())
    assert later.n_missing() == 0
    assert torch.equal(later.shard(3).activations, first[3])
    assert not later.lm_loaded


def test_a_shard_holds_what_the_model_gives(make_stream, tiny_llama):
    stream = opened(make_stream(dtype="float32"))
    shard = stream.shard(2)
    alone = find_lm(str(tiny_llama)).load().record([stream.sequences[19]])[0]
    torch.testing.assert_close(shard.activations[19 - 16], alone, rtol=1e-5, atol=1e-5)
    assert shard.index.tolist() == list(range(16, 24))
    assert shard.n_tokens.tolist() == stream.sequences.lengths[16:24].tolist()


def test_a_shard_made_again_has_the_same_bytes(make_stream, tmp_path):
    """In any order, by whoever: what goes through the model together depends on the shard alone."""
    first = opened(make_stream())
    for k in range(first.n_shards):
        first.shard(k)
    before = {k: first.cache.path(k).read_bytes() for k in range(first.n_shards)}
    for k in before:
        first.cache.discard(k)
    second = opened(make_stream())
    for k in reversed(range(second.n_shards)):
        second.shard(k)
    assert {k: second.cache.path(k).read_bytes() for k in before} == before


def test_a_damaged_shard_is_named_and_recorded_again_alone(make_stream):
    stream = opened(make_stream())
    for k in range(stream.n_shards):
        stream.shard(k)
    good = stream.cache.path(2).read_bytes()
    stream.cache.path(2).write_bytes(good[: len(good) // 2])
    again = opened(make_stream())
    with pytest.warns(UserWarning, match="shard 2 .* is damaged"):
        again.shard(2)
    assert again.n_recorded == 8
    assert again.cache.path(2).read_bytes() == good


def test_without_a_cache_nothing_is_written(make_stream, tmp_path):
    stream = opened(make_stream(cache=False))
    assert torch.equal(stream.shard(1).activations, stream.shard(1).activations)
    assert stream.n_recorded == 16
    assert not (tmp_path / "cache").exists()


def test_not_finite_activations_are_never_cached(make_stream, monkeypatch):
    stream = opened(make_stream())
    real = LanguageModel._record_batch

    @torch.inference_mode()
    def poisoned(self, sequences, at, out, into, layout):
        real(self, sequences, at, out, into, layout)
        out[into[-1], 4, 3] = float("inf")

    monkeypatch.setattr(LanguageModel, "_record_batch", poisoned)
    with pytest.raises(UserError, match=r"sublayer 4 \(resid_pre of layer 2\)"):
        stream.shard(0)
    assert stream.cache.missing() == list(range(stream.n_shards))


@pytest.mark.parametrize(
    "change", [{"dtype": "float32"}, {"lm_dtype": "bfloat16"}, {"batch_tokens": 255}, {"matmul_precision": "medium"},
               {"made_from": {"condition": "shuffled"}}]
)  # fmt: skip
def test_settings_that_change_the_numbers_change_the_key(make_stream, change):
    assert make_stream(**change).cache.key != make_stream().cache.key


def test_other_tokens_have_another_key(make_stream, make_sequences, tiny_llama, tmp_path):
    other = TrajectoryStream(find_lm(str(tiny_llama)), make_sequences(N, seed=1), cache_dir=tmp_path / "cache")
    same_again = TrajectoryStream(find_lm(str(tiny_llama)), make_sequences(N, seed=1), cache_dir=tmp_path / "cache")
    assert other.cache.key != make_stream(batch_tokens=1024, shard_sequences=256).cache.key
    assert other.cache.key == same_again.cache.key


# -- the batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_by", ["vector", "sequence"])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 10_000])
def test_an_epoch_holds_every_training_vector_once(make_stream, batch_by, batch_size):
    stream = opened(make_stream())
    data = ResidualStreamDataModule(stream, batch_by=batch_by, batch_size=batch_size, shuffle_shards=3)
    loader = data.train_dataloader()
    batches = all_batches(loader)
    assert len(batches) == len(loader)
    step = batch_size * (stream.n_sublayers if batch_by == "sequence" else 1)
    assert all(len(x) == step for x, _, _ in batches[:-1])
    x, sublayer, sequence = (torch.cat(parts) for parts in zip(*batches, strict=True))
    pairs = sorted(zip(sequence.tolist(), sublayer.tolist(), strict=True))
    assert pairs == [(i, s) for i in data.splits["train"] for s in range(stream.n_sublayers)]
    everything = torch.cat([stream.shard(k).activations for k in range(stream.n_shards)])
    assert torch.equal(x, everything[sequence, sublayer])


def test_a_paper_batch_is_one_sequence(make_stream):
    stream = opened(make_stream())
    data = ResidualStreamDataModule(stream, batch_by="sequence", batch_size=1)
    for _, sublayer, sequence in all_batches(data.train_dataloader()):
        assert sublayer.tolist() == list(range(stream.n_sublayers))
        assert len(set(sequence.tolist())) == 1


def test_vectors_are_mixed_across_sequences(make_stream):
    data = ResidualStreamDataModule(opened(make_stream()), batch_by="vector", batch_size=12, shuffle_shards=4)
    distinct = [len(set(sequence.tolist())) for _, _, sequence in all_batches(data.train_dataloader())]
    assert np.mean(distinct) > 6


def test_batches_are_the_same_cold_and_warm_and_differ_by_epoch_and_seed(make_stream):
    def batches(seed=0, epoch=0):
        data = ResidualStreamDataModule(opened(make_stream()), batch_size=20, seed=seed)
        data.trainer = trainer_at(epoch)
        return all_batches(data.train_dataloader())

    cold = batches()
    assert same(cold, batches())
    assert not same(cold, batches(epoch=1))
    assert not same(cold, batches(seed=1))


@pytest.mark.parametrize("batch_by", ["vector", "sequence"])
@pytest.mark.parametrize(("batch_size", "shuffle_shards"), [(7, 1), (7, 3), (20, 2), (50, 1), (130, 1), (10_000, 2)])
@pytest.mark.parametrize("epoch", [0, 2])
def test_an_epoch_goes_on_at_any_batch_with_the_same_batches(make_stream, batch_by, batch_size, shuffle_shards, epoch):
    """Whatever windows and batches have to do with each other: a batch may take many windows, or a window many."""

    def batches(first, rank=0):
        data = ResidualStreamDataModule(
            opened(make_stream()), batch_by=batch_by, batch_size=batch_size, shuffle_shards=shuffle_shards
        )
        data.set_process(rank, 2)
        data.trainer = trainer_at(epoch, first)
        return all_batches(data.train_dataloader()), data

    for rank in range(2):
        whole, complete = batches(0, rank)
        for first in sorted({*range(0, len(whole), 1 + len(whole) // 5), len(whole) - 1}):
            rest, data = batches(first, rank)
            assert same(rest, whole[first:])
            for a, b in zip(
                data.train_statistics(complete=True), complete.train_statistics(complete=True), strict=True
            ):
                assert torch.equal(a, b)  # the same bits


def test_going_on_late_in_an_epoch_reads_only_what_is_needed(make_stream):
    stream = opened(make_stream())
    data = ResidualStreamDataModule(stream, batch_size=6, shuffle_shards=1)
    n = len(all_batches(data.train_dataloader()))
    again = ResidualStreamDataModule(opened(make_stream()), batch_size=6, shuffle_shards=1)
    again.trainer = trainer_at(3, n - 1)
    again.train_statistics(complete=True)
    read = []
    again.stream.shard = lambda k, *more, real=again.stream.shard: read.append(k) or real(k, *more)
    assert len(all_batches(again.train_dataloader())) == 1
    assert len(read) <= 2 < stream.n_shards


def plainly_shuffled(stream, data, epoch, batch_by, batch_size, shuffle_shards):
    """An epoch's batches, made in whole tensors: windows of shards, what is left over first, then a permutation."""
    rng = np.random.default_rng([data.seed, epoch, data.rank])
    shards = rng.permutation(data.own_shards)
    pool, batches, unit = None, [], stream.n_sublayers
    for i in range(0, len(shards), shuffle_shards):
        window = [stream.shard(k) for k in shards[i : i + shuffle_shards]]
        index = torch.cat([shard.index for shard in window])
        rows = torch.isin(index, torch.from_numpy(data.splits["train"]))
        x, index = torch.cat([shard.activations for shard in window])[rows], index[rows]
        new = [x.flatten(0, 1), torch.arange(unit).repeat(len(x)), index.repeat_interleave(unit)]
        order = torch.from_numpy(rng.permutation(len(x) if batch_by == "sequence" else len(x) * unit))
        if batch_by == "sequence":
            order = (order[:, None] * unit + torch.arange(unit)).flatten()
        new = [t[order] for t in new]
        pool = new if pool is None else [torch.cat(pair) for pair in zip(pool, new, strict=True)]
        step = batch_size * (unit if batch_by == "sequence" else 1)
        is_last = i + shuffle_shards >= len(shards)
        while len(pool[0]) >= step or (is_last and len(pool[0])):
            batches.append(tuple(t[:step] for t in pool))
            pool = [t[step:] for t in pool]
    return batches


@pytest.mark.parametrize("batch_by", ["vector", "sequence"])
@pytest.mark.parametrize("kept_bytes", [0, 1 << 30])
def test_batches_are_those_of_a_plain_shuffle_and_may_be_kept(make_stream, monkeypatch, batch_by, kept_bytes):
    """Whether the vectors stay in memory or come by windows; no batch is written to while somebody has it."""
    monkeypatch.setattr(datamodule, "KEPT_BYTES", kept_bytes)
    stream = opened(make_stream())
    for batch_size, shuffle_shards in ((7, 3), (50, 1), (10_000, 2)):
        options = {"batch_by": batch_by, "batch_size": batch_size, "shuffle_shards": shuffle_shards}
        data = ResidualStreamDataModule(stream, **options)
        for epoch in range(3):
            data.trainer = trainer_at(epoch)
            given = list(data.train_dataloader())
            assert same(given, plainly_shuffled(stream, data, epoch, **options))


@pytest.mark.parametrize(("kept_bytes", "reads"), [(0, 2), (1 << 30, 0)])
def test_what_fits_in_memory_is_read_once(make_stream, monkeypatch, kept_bytes, reads):
    monkeypatch.setattr(datamodule, "KEPT_BYTES", kept_bytes)
    stream = opened(make_stream())
    data = ResidualStreamDataModule(stream, batch_size=9, shuffle_shards=2)
    all_batches(data.train_dataloader())
    read = []
    stream.shard = lambda k, *more, real=stream.shard: read.append(k) or real(k, *more)
    for epoch in (1, 2):
        data.trainer = trainer_at(epoch)
        all_batches(data.train_dataloader())
    assert sorted(read) == sorted(list(range(stream.n_shards)) * reads)
    data.teardown("fit")
    assert data._kept is None


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_windows_are_read_ahead_in_their_order(make_stream, monkeypatch, room):
    """However little room there is, from the window on in which the epoch goes on; not what is kept in memory."""
    monkeypatch.setattr(ahead, "ROOM_BYTES", room)
    stream = opened(make_stream())
    for kept_bytes in (0, 1 << 30):
        monkeypatch.setattr(datamodule, "KEPT_BYTES", kept_bytes)
        data = ResidualStreamDataModule(stream, batch_size=9, shuffle_shards=3)
        options = {"batch_by": "vector", "batch_size": 9, "shuffle_shards": 3}
        for epoch in range(2):
            read, real = [], stream.cache.read_ahead
            monkeypatch.setattr(stream.cache, "read_ahead", lambda k, read=read, real=real: read.append(k) or real(k))
            data.trainer = trainer_at(epoch)
            assert same(list(data.train_dataloader()), plainly_shuffled(stream, data, epoch, **options))
            drawn = np.random.default_rng([data.seed, epoch, data.rank]).permutation(data.own_shards).tolist()
            assert read == (drawn if epoch == 0 or kept_bytes == 0 else [])
    n = len(list(data.train_dataloader()))
    again = ResidualStreamDataModule(stream, batch_size=9, shuffle_shards=3)
    again.train_statistics(complete=True)
    again.trainer, read[:] = trainer_at(1, n - 1), []
    list(again.train_dataloader())
    assert (
        read == drawn[-2:]
    )  # 8 shards by threes: the last window alone is wanted, and what it takes of the one before
    data.teardown("fit")
    assert data._ahead is None


def test_a_batch_that_lightning_or_a_user_holds_is_not_written_to(make_stream, monkeypatch):
    """In Lightning's own loop, training and validation; and where nobody keeps them, two or three take turns."""
    monkeypatch.setattr(datamodule, "KEPT_BYTES", 0)
    stream = opened(make_stream())

    class Keeper(L.LightningModule):
        def __init__(self, keep):
            super().__init__()
            self.keep, self.kept, self.most = keep, [], 0
            self.weight = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            loss = self.weight * batch.x.float().square().mean()
            self.most = max(self.most, len(self.trainer.datamodule._batch_memory._lent))
            self.seen(batch)
            return loss

        def validation_step(self, batch, batch_idx):
            self.seen(batch)

        def seen(self, batch):
            if self.keep:
                self.kept.append((batch, [t.clone() for t in batch]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    for keep in (True, False):
        module, data = Keeper(keep), ResidualStreamDataModule(stream, batch_size=20, shuffle_shards=2)
        trainer = L.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        if keep:
            assert len(module.kept) > 3 * data.n_train_batches
            assert all(torch.equal(a, b) for batch, copy in module.kept for a, b in zip(batch, copy, strict=True))
        else:
            assert module.most <= 3


def test_a_wish_to_stop_ends_recording_with_an_empty_batch(make_stream):
    stream = opened(make_stream(batch_tokens=64))
    stop = SimpleNamespace(signum=None)

    def recorded(n):
        stop.signum = signal.SIGTERM if stream.n_recorded >= 16 else None

    data = ResidualStreamDataModule(stream, batch_size=10, shuffle_shards=2, on_record=recorded, stop=stop)
    *given, last = all_batches(data.train_dataloader())
    assert given and len(last[0]) == 0 and last[0].shape[1:] == given[0][0].shape[1:]
    assert stream.n_recorded == 16 and len(stream.missing()) == stream.n_shards - 2


def test_a_wish_to_stop_outside_training_batches_is_passed_on_by_a_process_that_is_alone(make_stream):
    stop = SimpleNamespace(signum=signal.SIGTERM, leave=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    data = ResidualStreamDataModule(opened(make_stream()), batch_size=10, stop=stop)
    with pytest.raises(KeyboardInterrupt):
        all_batches(data.val_dataloader())
    data.set_process(0, 2)
    assert all_batches(data.val_dataloader())


def test_the_first_batch_needs_only_the_first_window(make_stream):
    """The first epoch trains while it extracts."""
    stream = opened(make_stream())
    iterator = iter(ResidualStreamDataModule(stream, batch_size=10, shuffle_shards=2).train_dataloader())
    next(iterator)
    assert stream.n_recorded == 16


def test_validation_and_test_hold_their_sequences_in_order(make_stream):
    stream = opened(make_stream())
    data = ResidualStreamDataModule(stream, val_size=0.2, test_size=10)
    for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        batches = all_batches(loader)
        assert len(batches) == len(loader)
        sequence = torch.cat([b[2] for b in batches])
        assert sequence[:: stream.n_sublayers].tolist() == data.splits[part].tolist()
        assert torch.cat([b[1] for b in batches]).tolist() == list(range(stream.n_sublayers)) * len(data.splits[part])


def test_statistics_are_those_of_the_training_split(make_stream):
    stream = opened(make_stream())
    data = ResidualStreamDataModule(stream, batch_size=10, shuffle_shards=2)
    next(iter(data.train_dataloader()))
    early = data.train_statistics()
    assert early.n < len(data.splits["train"])
    found = data.train_statistics(complete=True)
    x = torch.cat([stream.shard(k).activations for k in range(stream.n_shards)])[data.splits["train"]].double().numpy()
    assert found.n == len(x)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.variance, x.var(0), rtol=1e-9)


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("n", [60, 41, 33])
def test_processes_share_the_work_without_overlap(make_stream, world_size, n):
    parts = {"train": [], "val": [], "test": []}
    lengths, recorded, dropped = [], 0, 0
    for rank in range(world_size):
        stream = opened(make_stream(n))
        data = ResidualStreamDataModule(stream, batch_by="vector", batch_size=16)
        data.set_process(rank, world_size)
        for shard in set(data.own_shards):  # each process as if alone: the others' shards are not there yet
            stream.cache.discard(shard)
        batches = all_batches(data.train_dataloader())
        lengths.append(len(batches))
        parts["train"] += [(i, s) for _, t, q in batches for s, i in zip(t.tolist(), q.tolist(), strict=True)]
        for part, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
            parts[part] += [i for _, _, q in all_batches(loader) for i in q[:: stream.n_sublayers].tolist()]
        data.train_statistics(complete=True)
        recorded += stream.n_recorded
        dropped = data.dropped
    assert len(set(lengths)) == 1  # uneven ones would hang
    assert recorded == n
    for part in ("val", "test"):
        assert sorted(parts[part]) == data.splits[part].tolist()
    assert len(set(parts["train"])) == len(parts["train"])
    assert len(parts["train"]) + dropped == len(data.splits["train"]) * stream.n_sublayers


def test_more_processes_than_shards_is_refused(make_stream):
    data = ResidualStreamDataModule(opened(make_stream()))
    with pytest.raises(UserError, match=r"devices.*shard_sequences"):
        data.set_process(0, 9)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_sequences(make_stream, n):
    with pytest.raises(UserError, match=r"val_size=0.1 and test_size=0.15 need at least 3"):
        ResidualStreamDataModule(make_stream(n))


def test_shards_are_announced_once(tiny_llama, make_sequences, tmp_path):
    stream = TrajectoryStream(find_lm(str(tiny_llama)), make_sequences(45), cache_dir=tmp_path, shard_sequences=8)
    stream.open()
    seen = []
    data = ResidualStreamDataModule(stream, batch_size=64, on_shard=lambda batch: seen.append(batch.sequence))
    for _ in range(2):
        list(data.train_dataloader())
    data.train_statistics(complete=True)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(45))


# -- other positions than the last -------------------------------------------------------------------------------------

POSITIONS = pytest.mark.parametrize("positions", ["all", {"sample": 3}])


def trajectories_of(stream):
    """Every trajectory ``(n, S, D)`` and its sequence ``(n,)``, in the corpus' order."""
    shards = [stream.shard(k) for k in range(stream.n_shards)]
    return torch.cat([s.activations for s in shards]), torch.cat([s.index for s in shards])


def sums_by_vector(x, sublayer, sequence):
    """What came, whatever its order: a line a vector, sorted."""
    lines = torch.cat([sequence[:, None].double(), sublayer[:, None].double(), x.double()], 1).numpy()
    return lines[np.lexsort(lines.T[::-1])]


@POSITIONS
@pytest.mark.parametrize("batch_by", ["vector", "sequence"])
def test_every_recorded_token_is_given_once_and_no_sequence_is_in_two_splits(make_stream, positions, batch_by):
    stream = opened(make_stream(positions=positions, shard_sequences=16))
    data = ResidualStreamDataModule(stream, batch_by=batch_by, batch_size=9)
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    x, index = trajectories_of(stream)
    assert len(x) == stream.positions.counts.sum() > N
    seen = {}
    for part, loader in loaders.items():
        batches = all_batches(loader)
        assert len(batches) == len(loader)
        given = [torch.cat(parts) for parts in zip(*batches, strict=True)]
        rows = torch.isin(index, torch.from_numpy(data.splits[part]))
        sublayer = torch.arange(stream.n_sublayers).repeat(int(rows.sum()))
        expected = (x[rows].flatten(0, 1), sublayer, index[rows].repeat_interleave(stream.n_sublayers))
        np.testing.assert_array_equal(sums_by_vector(*given), sums_by_vector(*expected))
        seen[part] = set(given[2].tolist())
        most = 9 * (stream.n_sublayers if batch_by == "sequence" else 1)
        most = most if part == "train" else 16 * stream.n_sublayers  # no more at a time than of last tokens
        assert max(len(batch[0]) for batch in batches) <= most
        if batch_by == "sequence" and part == "train":
            for _, sublayer, sequence in batches[:-1]:
                assert sublayer.tolist() == list(range(stream.n_sublayers)) * 9
                assert all(len(set(s)) == 1 for s in sequence.view(9, -1).tolist())
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]
    train = x[torch.isin(index, torch.from_numpy(data.splits["train"]))].double()
    statistics = data.train_statistics(complete=True)
    torch.testing.assert_close(statistics.mean, train.mean(0))
    torch.testing.assert_close(statistics.m2, ((train - train.mean(0)) ** 2).sum(0))


@POSITIONS
def test_several_tokens_go_on_in_the_middle_of_an_epoch_and_come_without_a_cache(make_stream, positions):
    def batches(first, cache=True, rank=0):
        data = ResidualStreamDataModule(
            opened(make_stream(positions=positions, cache=cache)), batch_size=50, shuffle_shards=2
        )
        data.set_process(rank, 2)
        data.trainer = trainer_at(1, first)
        return all_batches(data.train_dataloader())

    sequences = []
    for rank in range(2):
        whole = batches(0, rank=rank)
        for first in (1, len(whole) // 2, len(whole) - 1):
            assert same(batches(first, rank=rank), whole[first:])
        sequences.append({i for batch in whole for i in batch[2].tolist()})
    assert not sequences[0] & sequences[1]
    assert same(batches(0, cache=False, rank=1), whole)
