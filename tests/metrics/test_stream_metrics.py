"""The metrics of the analysis, as classes against numpy, in any order, and in two processes."""

import lightning as L
import numpy as np
import pytest
import torch
from two_processes import run_in_two

from rsdyn.dynamics.information import consecutive_information
from rsdyn.metrics.running import (
    Correlation,
    CosineSimilarity,
    FrozenSteps,
    GroupSums,
    Speed,
    StreamCovariance,
)
from rsdyn.metrics.samples import MutualInformation, UnitTrajectories

N, S, D = 41, 4, 7  # D does not divide by two processes
NAMES = ("consecutive", "all", "cosine", "speed", "covariance", "frozen", "mi", "kept")


@pytest.fixture(scope="module")
def x():
    """41 trajectories whose units are correlated over depth, one far from zero, one that is sometimes frozen."""
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(size=(N, S, D)), axis=1)
    x[..., 2] += 1e4
    x[::3, 1, 5] = x[::3, 2, 5]
    return torch.from_numpy(x)


def new():
    return {
        "consecutive": Correlation(S, D),
        "all": Correlation(S, D, "all"),
        "cosine": CosineSimilarity(S),
        "speed": Speed(S, torch.arange(D) != 2),
        "covariance": StreamCovariance(D),
        "frozen": FrozenSteps(S, D),
        "mi": MutualInformation("copula"),
        "kept": UnitTrajectories(limit=11),
    }


def feed(metrics, x, rows, cuts=()):
    for part in torch.tensor_split(rows, cuts):
        for name, metric in metrics.items():
            metric.update(x[part], part) if name in ("mi", "kept") else metric.update(x[part])


def flat(metrics) -> list[torch.Tensor]:
    """Every tensor that the metrics compute; of a unit share, what all processes have together."""
    out = [metrics[name].compute() for name in ("consecutive", "all", "frozen", "mi")]
    out += [*metrics["cosine"].compute(), *metrics["speed"].compute(), *metrics["covariance"].compute()]
    share = metrics["kept"].compute()
    return [*out, share.gather(share.x), share.sequence]


def test_against_numpy(x):
    metrics = new()
    feed(metrics, x, torch.arange(N), (3, 20))
    a = x.numpy()
    whole = np.array([np.corrcoef(a[:, :, u].T) for u in range(D)])
    first, second = np.triu_indices(S, 1)
    np.testing.assert_allclose(metrics["all"].compute(), whole[:, first, second].T, atol=1e-9)
    np.testing.assert_allclose(metrics["consecutive"].compute(), whole[:, range(S - 1), range(1, S)].T, atol=1e-9)
    cosine = (a[:, 1:] * a[:, :-1]).sum(-1) / np.linalg.norm(a[:, 1:], axis=-1) / np.linalg.norm(a[:, :-1], axis=-1)
    np.testing.assert_allclose(metrics["cosine"].compute().mean, cosine.mean(0), rtol=1e-12)
    steps = np.linalg.norm(np.delete(np.diff(a, axis=1), 2, axis=-1), axis=-1)
    np.testing.assert_allclose(metrics["speed"].compute().mean, steps.mean(0), rtol=1e-10)
    np.testing.assert_allclose(metrics["speed"].compute().std, steps.std(0), rtol=1e-10)
    found = metrics["covariance"].compute()
    np.testing.assert_allclose(found.scatter / found.n, np.cov(a.reshape(-1, D).T, bias=True), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(metrics["frozen"].compute(), (np.diff(a, axis=1) == 0).mean(0), rtol=1e-12)
    assert metrics["frozen"].compute()[1, 5] == pytest.approx(14 / N)
    torch.testing.assert_close(metrics["mi"].compute(), consecutive_information(x, "copula"))
    share = metrics["kept"].compute()
    assert torch.equal(share.x, x[:11]) and share.sequence.tolist() == list(range(11))


def test_any_order_and_any_batches_give_the_same(x):
    expected = new()
    feed(expected, x, torch.arange(N))
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for rows, cuts in ((torch.arange(N), tuple(range(1, N))), (shuffled, (1, 1, 30)), (shuffled.flip(0), ())):
        metrics = new()
        feed(metrics, x, rows, cuts)
        for a, b in zip(flat(metrics), flat(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_sums_stay_float64(x, cast):
    metrics = new()
    module = torch.nn.ModuleDict(metrics)
    cast(module)
    feed(metrics, x, torch.arange(N))
    expected = new()
    feed(expected, x, torch.arange(N))
    for name in ("consecutive", "all", "frozen"):
        torch.testing.assert_close(metrics[name].compute(), expected[name].compute(), rtol=1e-12, atol=1e-12)


def test_in_anyones_module(x):
    """Lightning logs them, moves them and resets them between epochs as it does any torchmetric."""

    class Theirs(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.correlation, self.mi = Correlation(S, D), MutualInformation("copula")
            self.seen = []

        def test_step(self, batch, batch_idx):
            numbers, trajectories = batch
            self.correlation.update(trajectories)
            self.mi.update(trajectories, numbers)

        def on_test_epoch_end(self):
            self.seen.append((self.correlation.compute(), self.mi.compute()))
            self.correlation.reset()
            self.mi.reset()

    module = Theirs()
    data = torch.utils.data.TensorDataset(torch.arange(N), x)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", **quiet)
    for _ in range(2):
        trainer.test(module, torch.utils.data.DataLoader(data, batch_size=16), verbose=False)
    direct = new()
    feed(direct, x, torch.arange(N))
    for r, mi in module.seen:
        torch.testing.assert_close(r, direct["consecutive"].compute(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mi, direct["mi"].compute())


TWO_PROCESSES = """
import os
import sys
from datetime import timedelta

import torch
from test_stream_metrics import D, feed, flat, new

folder = sys.argv[1]
other = os.fork()  # after the imports, which cost seconds
rank = 0 if other else 1
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
x = torch.load(f"{folder}/x.pt")
for case, (rows, cuts, dtype) in enumerate(torch.load(f"{folder}/plan.pt")[rank]):
    metrics = new()
    if len(rows):
        feed(metrics, x.to(dtype), rows, cuts)
    share = metrics["kept"].compute()
    assert share.x.shape[-1] == (4, 3)[rank] and share.first_unit == (0, 4)[rank], share
    assert share.n_units == D
    torch.save(flat(metrics), f"{folder}/{case}-{rank}.pt")
    feed(metrics, x.to(dtype), rows[:0])  # computing gave each process its own samples back
    again = flat(metrics)
    torch.save(again, f"{folder}/{case}-{rank}-again.pt")
torch.distributed.destroy_process_group()
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def test_two_processes_equal_one(x, tmp_path):
    """Uneven shares, interleaved ones, a process without any sequence, and bf16, which not every backend carries."""
    rows, wide, half = torch.arange(N), torch.float64, torch.bfloat16
    empty = rows[:0]
    plan = [
        [(rows[:20], (), wide), (rows[::2], (3,), wide), (rows, (5,), wide), (empty, (), wide), (rows[:37], (), half)],
        [(rows[20:], (), wide), (rows[1::2], (), wide), (empty, (), wide), (rows, (8,), wide), (rows[37:], (), half)],
    ]
    torch.save(x, tmp_path / "x.pt")
    torch.save(plan, tmp_path / "plan.pt")
    run_in_two(TWO_PROCESSES, tmp_path, seconds=120)
    for case in range(len(plan[0])):
        alone = new()
        feed(alone, x.to(plan[0][case][2]), rows)
        for rank in range(2):
            for name in (f"{case}-{rank}", f"{case}-{rank}-again"):
                for a, b in zip(torch.load(tmp_path / f"{name}.pt"), flat(alone), strict=True):
                    assert a.dtype == b.dtype and a.shape == b.shape
                    scale = float(b.nan_to_num().abs().max())  # bf16 leaves the unit at 1e4 without variance: NaN
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * scale, equal_nan=True)


def test_group_sums_are_means_of_each_group(x):
    group = torch.arange(N) % 4
    group[group == 2] = 3  # one group is empty
    metric = GroupSums(group, [0, 2], D)
    for rows in (torch.arange(20, N), torch.arange(20)):
        metric.update(x[rows], rows)
    n, mean = metric.state
    assert n.tolist() == [(group == g).sum().item() for g in range(4)]
    for g in (0, 1, 3):
        np.testing.assert_allclose(mean[g], x[group == g][:, [0, 2]].mean(0), rtol=1e-12)
    assert mean[2].isnan().all()
