"""The metrics as functions, as classes, in batches, and in two processes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from two_processes import run_in_two

from rsdyn.dynamics.moments import moments
from rsdyn.metrics.running import MeanLoss, SquaredError, StreamMoments
from rsdyn.metrics.samples import FirstSequences

S, D = 3, 5


@pytest.fixture(scope="module")
def data():
    """40 sequences ``(40, S, D)`` in float32, some units far from zero, and an imperfect reconstruction."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, S, D)) + 1000 * rng.normal(size=(S, D))
    return torch.from_numpy(x).float(), torch.from_numpy(x + rng.normal(size=x.shape)).float()


CUTS = [(), (1,), (7, 7, 30), (0, 40), tuple(range(1, 40))]


def feed(metrics, data, rows, cuts=(), step="update"):
    """Give the sequences ``rows`` to each of the metrics in the batches that ``cuts`` make."""
    x, found = data
    for part in torch.tensor_split(rows, cuts):
        getattr(metrics["moments"], step)(x[part])
        getattr(metrics["errors"], step)(found[part], x[part])
        getattr(metrics["first"], step)(x[part], part)


def new(limit=11):
    return {"moments": StreamMoments(S, D), "errors": SquaredError(S, D), "first": FirstSequences(limit)}


def flat(metrics) -> list[torch.Tensor]:
    """Every tensor that the metrics compute."""
    return [*metrics["moments"].compute(), metrics["errors"].compute(), *metrics["first"].compute()]


def assert_right(results, data, limit=11):
    x, found = (t.double().numpy() for t in data)
    n, mean, m2, errors, values, numbers = (t.numpy() for t in results)
    assert n == len(x)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(m2 / n, x.var(0), rtol=1e-12)
    np.testing.assert_allclose(errors, ((found - x) ** 2).sum(0), rtol=1e-6)  # float32 differences
    np.testing.assert_array_equal(numbers, np.arange(limit))
    np.testing.assert_array_equal(values, x[:limit])
    assert mean.dtype == m2.dtype == errors.dtype == np.float64


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("step", ["update", "forward"])
def test_in_batches(data, cuts, step):
    if step == "forward":
        cuts = [c for c in cuts if 0 < c < 40]
    metrics = new()
    feed(metrics, data, torch.arange(40), cuts, step)
    assert_right(flat(metrics), data)


def test_class_equals_function(data):
    metrics = new()
    feed(metrics, data, torch.arange(40))
    for found, expected in zip(metrics["moments"].compute(), moments(data[0]), strict=True):
        assert torch.equal(found, expected)


def test_first_sequences_with_fewer_than_the_limit_and_with_gaps(data):
    x, _ = data
    metric = FirstSequences(100)
    metric.update(x[20:30], torch.arange(20, 30))
    metric.update(x[33:34], torch.arange(33, 34))
    values, numbers = metric.compute()
    assert numbers.tolist() == [*range(20, 30), 33] and torch.equal(values, x[numbers])


def test_first_sequences_keeps_no_more_than_the_limit(data):
    metric = FirstSequences(4)
    for i in range(40):
        metric.update(data[0][i : i + 1], torch.tensor([i]))
    assert sum(len(v) for v in metric.values) == 4


def test_other_shapes(data):
    x, _ = data
    for part in (x[:, 0], x[:, 0, 0]):
        metric = StreamMoments(*part.shape[1:])
        metric.update(part)
        np.testing.assert_allclose(metric.compute().std.numpy(), part.double().numpy().std(0), rtol=1e-12)


def test_computing_does_not_disturb(data):
    metrics, earlier = new(), []
    for rows in (torch.arange(25), torch.arange(25, 40)):
        feed(metrics, data, rows)
        earlier.append((flat(metrics), [t.clone() for t in flat(metrics)]))
    assert_right(flat(metrics), data)
    for found, kept in earlier:
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: m.clone(), lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_their_own_way(data, copier):
    metrics = new()
    feed(metrics, data, torch.arange(25))
    copies = {name: copier(metric) for name, metric in metrics.items()}
    before = [t.clone() for t in flat(metrics)]
    feed(copies, data, torch.arange(25, 40))
    assert_right(flat(copies), data)
    assert all(torch.equal(a, b) for a, b in zip(flat(metrics), before, strict=True))


def test_reset(data):
    metrics = new()
    for _ in range(2):
        for metric in metrics.values():
            metric.reset()
        feed(metrics, data, torch.arange(40), (9,))
        assert_right(flat(metrics), data)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.float32),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.type(torch.float16),
        lambda m: m.to("cpu", torch.float16),
    ],
)
@pytest.mark.parametrize("inside", [True, False], ids=["inside a module", "alone"])
def test_state_stays_float64(data, cast, inside):
    metrics = new()
    feed(metrics, data, torch.arange(20))
    for name in ("moments", "errors"):
        cast(nn.ModuleDict({"m": metrics[name]}) if inside else metrics[name])
    feed(metrics, data, torch.arange(20, 40))
    assert_right(flat(metrics), data)
    for name in ("moments", "errors"):
        metrics[name].reset()
    assert metrics["moments"].packed.dtype == metrics["errors"].total.dtype == torch.float64


def uneven_losses():
    """Batches' losses and sizes of two processes: uneven ones, a process without any, one alone, and a NaN."""
    rng = np.random.default_rng(1)

    def some(count, dtype=torch.float32):
        sizes = rng.choice([1, 3, 64, 4096], count)
        return [(torch.tensor(rng.gamma(1.0) * 10.0 ** rng.integers(-3, 4), dtype=dtype), int(n)) for n in sizes]

    nothing: list = []
    first = [some(50), some(7, torch.float64), nothing, some(3, torch.bfloat16), some(2)]
    other = [some(13), nothing, some(5), some(200, torch.bfloat16), [(torch.tensor(torch.nan), 4)]]
    return [first, other]


def test_mean_loss_is_a_weighted_mean():
    """Against numpy's in float64; each loss counts with its vectors, not with its batch."""
    for losses in uneven_losses()[0]:
        metric = MeanLoss()
        for loss, n in losses:
            metric.update(loss.requires_grad_(), n)
        if losses:
            values, weights = zip(*((float(loss.detach()), n) for loss, n in losses), strict=True)
            assert float(metric.compute()) == pytest.approx(np.average(values, weights=weights), rel=1e-14)
            assert not metric.compute().requires_grad


TWO_PROCESSES = """
import os
import sys
from datetime import timedelta

import torch
from test_metrics import MeanLoss, feed, flat, new

folder = sys.argv[1]
other = os.fork()  # after the imports, which cost seconds
rank = 0 if other else 1
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=30)
)
data = torch.load(f"{folder}/data.pt")
for case, (rows, cuts) in enumerate(torch.load(f"{folder}/plan.pt")[rank]):
    metrics = new()
    if len(rows):
        feed(metrics, data, rows, cuts)
    together = flat(metrics)
    own = int(metrics["moments"].packed[0, 0, 0])
    assert own == len(rows), f"after compute process {rank} has {own} sequences, and had {len(rows)}"
    torch.save([t.clone() for t in together], f"{folder}/{case}-{rank}.pt")
means = []
for losses in torch.load(f"{folder}/losses.pt")[rank]:
    metric = MeanLoss()
    for loss, n in losses:
        metric.update(loss, n)
    means.append(metric.compute())
    assert float(metric.n) == sum(n for _, n in losses), "computing gave each process its own back"
torch.save(means, f"{folder}/means-{rank}.pt")
torch.distributed.destroy_process_group()
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def test_two_processes_equal_one(data, tmp_path):
    """Halves, interleaved as a sampler deals them, uneven, in other batches, and one process without any sequence."""
    rows = torch.arange(40)
    empty = rows[:0]
    plan = [
        [(rows[:20], ()), (rows[::2], (3, 9)), (rows[:37], (1, 2)), (rows, (5,)), (empty, ())],
        [(rows[20:], ()), (rows[1::2], (1,)), (rows[37:], ()), (empty, ()), (rows, (8, 8, 39))],
    ]
    torch.save(data, tmp_path / "data.pt")
    torch.save(plan, tmp_path / "plan.pt")
    losses = uneven_losses()
    torch.save(losses, tmp_path / "losses.pt")
    run_in_two(TWO_PROCESSES, tmp_path, seconds=60)

    alone = new()
    feed(alone, data, rows)
    expected = flat(alone)
    for case in range(len(plan[0])):
        for rank in range(2):
            found = torch.load(tmp_path / f"{case}-{rank}.pt")
            for a, b in zip(found, expected, strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape
                np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=1e-12, err_msg=f"case {case}, process {rank}")
    for case, (first, other) in enumerate(zip(*losses, strict=True)):
        values, weights = zip(*((float(loss), n) for loss, n in [*first, *other]), strict=True)
        for rank in range(2):
            mean = torch.load(tmp_path / f"means-{rank}.pt")[case]
            assert mean.dtype == torch.float64
            np.testing.assert_allclose(float(mean), np.average(values, weights=weights), rtol=1e-14)


def test_values_keep_their_axes_at_every_size():
    """torchmetrics squeezes whatever holds one number: one layer, one unit or one sequence would become scalars."""
    x = torch.randn(4, 1, 1)
    moments, errors, samples = StreamMoments(1, 1), SquaredError(1, 1), FirstSequences(1)
    moments.update(x)
    errors.update(x, x + 1)
    samples.update(x, torch.arange(4))
    assert moments.compute().mean.shape == (1, 1) == moments.compute().m2.shape
    assert errors.compute().shape == (1, 1)
    assert samples.compute()[0].shape == (1, 1, 1)
    distances = StreamMoments(1)
    distances.update(torch.ones(3, 1))
    before = distances.compute()
    assert before.mean.shape == (1,)
    distances.update(torch.full((3, 1), 5.0))
    assert before.mean.item() == 1 and distances.compute().mean.item() == 3  # no view of what goes on changing
