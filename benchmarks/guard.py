"""A few seconds of each benchmark, so that a gross loss of speed is seen: every ratio against its baseline.

    python benchmarks/guard.py                 # prints the ratios; exit 1 where one is below half of the recorded one
    python benchmarks/guard.py --record        # writes the ratios found into guard.json, on an idle machine
    python benchmarks/guard.py correlation     # some of them

One thread, CPU time, the two sides of a ratio in turns in the same process, which keeps its pages as the scripts do
(``rsdyn.lm.allocator``): what else the machine does touches both. A ratio below half of the recorded one is measured
again, twice as long, before it counts as lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import least, table

from rsdyn.lm.allocator import keep_pages

RECORDED = Path(__file__).parent / "guard.json"
Pair = tuple[str, Callable[[], object], Callable[[], object], float]  # baseline's name, ours, it, ours over its work


@contextmanager
def recording() -> Iterator[Pair]:
    from inputs import random_llama, sequences
    from peers import transformers

    from rsdyn.lm.packing_trial import choose_layout

    lm, texts = random_llama(256, 6, head=True), sequences(24)
    lm.layout = choose_layout(lm, texts)
    plain = transformers(lm)
    yield "transformers, one by one", lambda: lm.record(texts), lambda: plain(texts, 1), 1.0


@contextmanager
def cache_reading() -> Iterator[Pair]:
    """Shuffled batches of one epoch, against one vector an item."""
    from bench_analysis import fill, open_stream
    from torch.utils.data import DataLoader, Dataset

    from rsdyn.stream.datamodule import ResidualStreamDataModule

    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), 1000, 16, 256)
        stream = open_stream(Path(folder), 1000, 16, 256)
        datamodule = ResidualStreamDataModule(stream, batch_size=4096)
        shards = [stream.shard(k) for k in range(stream.n_shards)]

        class Items(Dataset):
            def __len__(self) -> int:
                return 4096 * 2

            def __getitem__(self, i: int) -> Any:
                k, row = divmod(int(order[i]) // 16, 250)
                return shards[k].activations[row, int(order[i]) % 16]

        order = np.random.default_rng(0).permutation(1000 * 16)

        def ours() -> None:
            for _ in datamodule.train_dataloader():
                pass

        def theirs() -> None:
            for _ in DataLoader(Items(), batch_size=4096):
                pass

        datamodule.train_statistics(complete=True)  # once per run
        n_ours = sum(len(batch.x) for batch in datamodule.train_dataloader())
        yield "a dataset of one vector an item", ours, theirs, n_ours / (4096 * 2)


@contextmanager
def training() -> Iterator[Pair]:
    """An epoch through Lightning against a bare loop over the same batches."""
    import lightning as L
    from bench_analysis import fill, open_stream

    from rsdyn.autoencoder.training import LitAutoencoder
    from rsdyn.stream.datamodule import ResidualStreamDataModule

    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), 500, 16, 256)
        stream = open_stream(Path(folder), 500, 16, 256)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

        def model() -> LitAutoencoder:
            torch.manual_seed(0)
            return LitAutoencoder(autoencoder={"d_in": 256}, n_sublayers=16)

        def ours() -> None:
            trainer = L.Trainer(
                accelerator="cpu", devices=1, max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0,
                use_distributed_sampler=False, enable_checkpointing=False, **options,
            )  # fmt: skip
            trainer.fit(model(), datamodule=ResidualStreamDataModule(stream, batch_size=512))

        def theirs() -> None:
            cae = model().autoencoder
            adam = torch.optim.Adam(cae.parameters(), lr=1e-3, fused=True)
            for batch in ResidualStreamDataModule(stream, batch_size=512).train_dataloader():
                x = batch.x.float()
                loss = torch.nn.functional.mse_loss(cae(x)[1], x)
                adam.zero_grad()
                loss.backward()
                adam.step()

        yield "a bare PyTorch loop", ours, theirs, 1.0


@contextmanager
def continuing() -> Iterator[Pair]:
    from bench_perturb import hooked
    from inputs import random_llama

    from rsdyn.lm.continuing.continuation import continue_all, run_reference

    lm = random_llama(128, 8, head=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 4096, (15,), generator=generator)
    reference = run_reference(lm, ids)
    states = [(s, reference.stream[s] + torch.randn(100, 128, generator=generator)) for s in (0, 6, 14)]
    ours = partial(continue_all, lm, reference, states)
    theirs = partial(lambda: [hooked(lm, ids, s, x[:1]) for s, x in states for _ in range(2)])
    yield "one forward a point", ours, theirs, 50.0


@contextmanager
def correlation() -> Iterator[Pair]:
    from bench_moments import stream
    from torchmetrics import PearsonCorrCoef

    from rsdyn.dynamics.moments import correlation

    x = stream(500, 8, 1024)

    def theirs() -> None:
        for s in range(7):
            metric = PearsonCorrCoef(num_outputs=1024)
            metric.update(x[:, s], x[:, s + 1])
            metric.compute()

    yield "torchmetrics PearsonCorrCoef", lambda: correlation(x), theirs, 1.0


@contextmanager
def mutual_information() -> Iterator[Pair]:
    from bench_information import scipy_grid

    from rsdyn.dynamics.information import consecutive_information

    x = torch.randn(500, 9, 32, generator=torch.Generator().manual_seed(0)).cumsum(1)
    pair = x[:, -2:, 0].T.double().numpy()
    yield "scipy gaussian_kde", lambda: consecutive_information(x, "kde"), lambda: scipy_grid(pair), 8 * 32.0


@contextmanager
def rotations() -> Iterator[Pair]:
    from bench_rotation import naive, walks

    from rsdyn.dynamics.rotation_test import rotation_test

    a, null = walks(64, 256), "increment_shuffle_windowed"
    one = a[:, 0].double().numpy()
    yield "numpy, a surrogate at a time", lambda: rotation_test(a, null, 200), lambda: naive(null, one, 200), 256.0


WORKS: dict[str, Callable[[], Any]] = {
    "recording": recording,
    "cache reading": cache_reading,
    "training": training,
    "continuing": continuing,
    "correlation": correlation,
    "mutual information": mutual_information,
    "rotations": rotations,
}


def quiet() -> None:
    """Lightning's remarks on each of its Trainers."""
    import lightning.pytorch  # noqa: F401  its import sets the level

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def ratio(pair: Pair, turns: int) -> float:
    """How many times faster than the baseline ours is, for the same work."""
    _, ours, theirs, work = pair
    seconds = least(turns, {"ours": ours, "theirs": theirs})
    return work * seconds["theirs"] / seconds["ours"]


def examine(
    works: Mapping[str, Callable[[], Any]], recorded: Mapping[str, float], turns: int = 3
) -> tuple[dict[str, float], list[str], list[list[str]]]:
    """The ratios, the names of those that are lost (below half of what is recorded), and the lines of the table."""
    found, lost, rows = {}, [], []
    for name, make in works.items():
        with make() as pair:
            value = ratio(pair, turns)
            if name in recorded and value < recorded[name] / 2:
                value = max(value, ratio(pair, 2 * turns))
        found[name] = value
        before = recorded.get(name)
        if before is not None and value < before / 2:
            lost.append(name)
        verdict = "not recorded" if before is None else "LOST" if name in lost else "kept"
        rows.append([name, pair[0], f"{value:.3g} ×", "-" if before is None else f"{before:.3g} ×", verdict])
    return found, lost, rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="work", help=f"of: {', '.join(WORKS)}; default all")
    parser.add_argument("--record", action="store_true", help="write the ratios found into guard.json")
    options = parser.parse_args()
    if unknown := [name for name in options.works if name not in WORKS]:
        parser.error(f"{', '.join(unknown)}: must be of {', '.join(WORKS)}")
    torch.set_num_threads(1)
    keep_pages()
    quiet()
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    works = {name: make for name, make in WORKS.items() if not options.works or name in options.works}
    found, lost, rows = examine(works, {} if options.record else recorded)
    print(table(["work", "against", "ratio", "recorded", "verdict"], rows))
    if options.record:
        RECORDED.write_text(json.dumps({**recorded, **{k: round(v, 3) for k, v in found.items()}}, indent=2) + "\n")
    for name in works.keys() - recorded.keys() if not options.record else ():
        lost.append(name)
        print(f"guard.py: error: {name} is not in {RECORDED.name}; run with --record.", file=sys.stderr)
    for name in found.keys() & recorded.keys() & {*lost}:
        print(f"guard.py: error: {name} is below half of the speed recorded in {RECORDED.name}.", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
