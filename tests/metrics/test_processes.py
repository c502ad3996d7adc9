"""Work that several processes share, against the same work in one: real processes, forked, over gloo."""

import numpy as np
import pytest
import torch
from two_processes import run_in_two

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measures.mutual_information import mutual_information
from rsdyn.analysis.measures.pca import pca
from rsdyn.analysis.measures.rotation import random_walks, rotation
from rsdyn.analysis.probe import ResidualStreamProbe
from rsdyn.analysis.stored import flatten_part
from rsdyn.dynamics.information import consecutive_information
from rsdyn.dynamics.rotation_test import rotation_test
from rsdyn.metrics.processes import from_all, n_processes, shared_out
from rsdyn.metrics.samples import MutualInformation, UnitTrajectories
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch

WORLDS = (2, 5)  # five are more than there are sublayers and units
N, S, D = 40, 4, 3
EXACT = ("pca/over_depth/dimensions", "pca/over_depth/components_90", "mi/", "beyond")


def items(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((i,), float(i)), torch.tensor(i)


def shared(n: int) -> list[torch.Tensor]:
    return [t for pair in shared_out(items, range(n), "cpu") for t in pair]


def trajectories() -> torch.Tensor:
    """``(N, S, D)`` on a grid of 1/16, so that no sum over them rounds, whoever adds what first."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-64, 64, (N, S, D), generator=generator).cumsum(1) / 16
    x[..., 2] += 4000  # a massive unit
    return x.double()


def probed() -> Collected:
    """What a probe collects whose sequences were shared out as a sampler does; of five processes the last has none."""
    x, world = trajectories(), n_processes()
    rank = torch.distributed.get_rank() if world > 1 else 0
    rows = torch.arange(N)[rank :: max(1, world - 1)] if rank < max(1, world - 1) or world == 2 else torch.arange(0)
    rows = rows[rows % 2 == rank] if world == 2 else rows
    collected = Collected(n_sublayers=S, n_units=D, measures=("mutual_information", "rotation", "pca"))
    probe = ResidualStreamProbe(collected)
    batch = TrajectoryBatch(x[rows], rows)
    for dataloader in (0, 1):
        probe.test_step(batch, 0, dataloader)
    probe.on_test_epoch_end()
    return collected


def shares() -> list[torch.Tensor]:
    """Units shared out, then sublayers shared out, in every dtype; each process' part, and where it lies."""
    out = []
    for dtype in (torch.float64, torch.bfloat16):
        world = n_processes()
        rank = torch.distributed.get_rank() if world > 1 else 0
        kept = UnitTrajectories(None)
        rows = torch.arange(N)[rank::world]
        kept.update(trajectories()[rows].to(dtype), rows)
        with kept.sync_context():
            share = UnitTrajectories.compute(kept)
        out += [share.by_sublayer(), share.gather(share.x)]
    return out


def step_by_step() -> list[torch.Tensor]:
    """What a metric whose units are shared out gives in a step, of this process' own sequences, and of all."""
    world = n_processes()
    rank = torch.distributed.get_rank() if world > 1 else 0
    metric = MutualInformation("copula")
    rows = torch.arange(N)[rank::world]
    return [metric(trajectories()[rows], rows), metric.compute()]


def measured() -> dict[str, torch.Tensor]:
    """What analysis makes of the probe, and the walks beside it."""
    probe = probed()
    options = {"n": 20, "window": 8, "sites_per_layer": 2, "seed": 0}
    found = flatten_part(pca(probe, 0), "pca") | flatten_part(mutual_information(probe, "copula", 0), "mi")
    found |= flatten_part(rotation(probe, ["layer_shuffle"], shared=False, **options), "rotation")
    walk, beyond = random_walks(S, ["layer_shuffle", "sign_flip"], n_walks=300, **options)
    found |= {"walk": np.array(walk), "beyond": np.array([*beyond.values()])}
    return {name: torch.from_numpy(value) for name, value in found.items() if value.dtype.kind in "fi"}


def test_alone():
    assert n_processes() == 1
    assert from_all("found", "cpu") == ["found"]
    found = shared_out(lambda i: torch.tensor(i), range(7), "cpu")
    assert [int(t) for t in found] == list(range(7))
    assert shared_out(items, [], "cpu") == []


def test_walks_in_pieces_are_the_walks(monkeypatch):
    """Against one test of all of them at once."""
    options = {"n": 30, "window": 8, "sites_per_layer": 2, "seed": 3}
    _, beyond = random_walks(9, ["layer_shuffle", "increment_shuffle_windowed"], n_walks=300, **options)
    walks = torch.randn(9, 300, generator=torch.Generator().manual_seed(3)).cumsum(0)
    for null in ("layer_shuffle", "increment_shuffle_windowed"):
        test = rotation_test(walks, null, 30, 3)
        assert beyond[null] == float((test.p < 0.05).double().mean())
    assert beyond["layer_shuffle"] > 0


SCRIPT = """
import os
import sys
from datetime import timedelta

import torch
import test_processes as t

folder = sys.argv[1]


def one(world, rank):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    assert t.n_processes() == world
    found = {"of few": t.shared(1), "of many": t.shared(11), "of none": t.shared(0), "shares": t.shares()}
    found |= {"measured": t.measured(), "step by step": t.step_by_step()}
    torch.save(found, f"{folder}/{world}-{rank}.pt")

    def fail(i):
        if i == 1:
            raise ArithmeticError("of one process")
        return torch.tensor(i)

    try:
        t.shared_out(fail, range(world), "cpu")
    except ArithmeticError:
        os._exit(7)  # as rsdyn.run.script ends a process that failed
    except RuntimeError:
        os._exit(0)  # the others hear of it
    os._exit(1)


for world in t.WORLDS:
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                one(world, rank)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(99)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [7 if rank == 1 else 0 for rank in range(world)], codes
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process of each world found."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_two(SCRIPT, folder, seconds=150)
    return {(world, rank): torch.load(folder / f"{world}-{rank}.pt") for world in WORLDS for rank in range(world)}


def test_items_come_back_in_order_on_every_process(found):
    for of_process in found.values():
        for name, n in (("of few", 1), ("of many", 11), ("of none", 0)):
            expected = [t for i in range(n) for t in items(i)]
            assert len(of_process[name]) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(of_process[name], expected, strict=True))


@pytest.mark.parametrize("world", WORLDS)
def test_sublayers_are_shared_out_once_each_and_whole(found, world):
    x = trajectories()
    for i, dtype in ((0, torch.float64), (2, torch.bfloat16)):
        parts = [found[world, rank]["shares"][i] for rank in range(world)]
        assert torch.equal(torch.cat(parts, dim=1), x.to(dtype))
        assert [part.shape[1] for part in parts] == ([2, 2] if world == 2 else [1, 1, 1, 1, 0])
        for rank in range(world):  # and the units
            assert torch.equal(found[world, rank]["shares"][i + 1], x.to(dtype))


@pytest.mark.parametrize("world", WORLDS)
def test_a_step_is_of_a_process_own_sequences_and_the_end_of_all(found, world):
    whole = consecutive_information(trajectories(), "copula")
    for rank in range(world):
        step, end = found[world, rank]["step by step"]
        assert torch.equal(step, consecutive_information(trajectories()[rank::world], "copula"))
        assert torch.equal(end, whole)


def test_the_measures_are_the_same_in_any_number_of_processes(found):
    """What one process does whole, to the bit; the last digit of what is merged from all may go another way."""
    alone = measured()
    planted = {"pca/over_depth/dimensions/without_massive", "pca/ratio/without_massive", "pca/half_angles", "beyond"}
    assert planted <= set(alone)
    for where, of_process in found.items():
        assert set(of_process["measured"]) == set(alone)
        for name, expected in alone.items():
            value, said = of_process["measured"][name], f"{name} of process {where}"
            assert value.dtype == expected.dtype, said
            if name.startswith(EXACT):
                np.testing.assert_array_equal(value.numpy(), expected.numpy(), err_msg=said)
            else:
                # an angle near 0 is the root of what rounding leaves of 1 - cos
                close = {"rtol": 1e-9, "atol": 1e-5 if name == "pca/half_angles" else 1e-9}
                np.testing.assert_allclose(value.numpy(), expected.numpy(), **close, err_msg=said)
