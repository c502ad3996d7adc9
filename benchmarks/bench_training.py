"""Training the autoencoder through Lightning against a bare PyTorch loop, and the first epoch, which records too.

    python benchmarks/bench_training.py                              # about three minutes
    python benchmarks/bench_training.py --cases 4096:64:20           # units:batch:steps, the paper's widths

Both loops get the same batches, compute the same losses (checked) and look at each of them. They take turns and the
median step counts, of CPU time on one thread, so that a busy machine slows both; validation is not counted. `Lightning
alone` is its loop around the same three lines, without callbacks and logs of ours. The floor is the matrix products at
the rate of a large one, and Adam's traffic at memcpy's. The first epoch runs on the embedded language model, from
an empty cache and once all was recorded, four times, in either order; the least CPU seconds count.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from rsdyn.autoencoder.model import CompressingAutoencoder
from rsdyn.autoencoder.training import LitAutoencoder
from rsdyn.lm.allocator import keep_pages
from rsdyn.lm.source import find_lm
from rsdyn.private import NoProfiler
from rsdyn.run.checkpoints import LAST, BestCheckpoint, LastCheckpoint, WholeCheckpointIO
from rsdyn.run.progress import Guard, History, Patience, Progress
from rsdyn.run.signals import Stop
from rsdyn.stream.cache import Shard
from rsdyn.stream.datamodule import ResidualStreamDataModule
from rsdyn.stream.text.tokens import Sequences
from rsdyn.stream.trajectories import TrajectoryStream


class Stream:
    """A stream that is in memory."""

    def __init__(self, x: Tensor):
        self.x, self.dtype, self.device, self.cache = x, x.dtype, torch.device("cpu"), None
        self.n_sequences, self.n_sublayers, self.n_units = x.shape
        self.shard_sequences, self.n_shards = 256, -(-len(x) // 256)

    def bounds(self, k: int) -> tuple[int, int]:
        return k * 256, min(k * 256 + 256, self.n_sequences)

    def rows_of(self, k: int, sequences: Any) -> Tensor:
        return torch.from_numpy(sequences - self.bounds(k)[0])

    def turns(self, k: int) -> None:
        return None

    def shard(self, k: int, on_record: object = None) -> Shard:
        start, stop = self.bounds(k)
        lengths = torch.zeros(stop - start, dtype=torch.int32)
        return Shard(self.x[start:stop], torch.arange(start, stop), lengths)


class Alone(L.LightningModule):
    """The loss and Adam, nothing else."""

    def __init__(self, autoencoder: CompressingAutoencoder):
        super().__init__()
        self.autoencoder = autoencoder

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.autoencoder, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)


class Clock(L.Callback):
    """When each step of the last epoch began, in CPU seconds, and its loss."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self.times, self.losses = [], []

    def on_train_batch_start(self, *args: Any) -> None:
        self.times.append(time.process_time())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def loss_of(autoencoder: CompressingAutoencoder, batch: Any) -> Tensor:
    x = autoencoder.standardise(batch.x.to(torch.float32), batch.sublayer)
    return torch.nn.functional.mse_loss(autoencoder(x)[1], x)


def trainer_of(callbacks: list[L.Callback], epochs: int, *, validates: bool) -> L.Trainer:
    """Ours, or where nothing ``validates``, Lightning's as it comes."""
    return L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=validates, num_sanity_val_steps=0, log_every_n_steps=20, use_distributed_sampler=False,
        limit_val_batches=None if validates else 0, plugins=[WholeCheckpointIO()], callbacks=callbacks,
        profiler=NoProfiler() if validates else None,
    )  # fmt: skip


def through_lightning(data: ResidualStreamDataModule, epochs: int) -> tuple[list[float], list[float]]:
    """As train.py does it, with all that rides along but a logger: W&B's is measured elsewhere."""
    torch.manual_seed(0)
    module = LitAutoencoder(
        autoencoder={"d_in": data.stream.n_units, **arguments_of(data)}, n_sublayers=data.stream.n_sublayers,
        lr=1e-3, warmup_steps=0, schedule="constant",
    )  # fmt: skip
    clock, stop = Clock(), Stop()
    with tempfile.TemporaryDirectory() as folder:
        last = LastCheckpoint(Path(folder) / LAST, stop, identity={}, records_in=data.records_in)
        ride = [Patience(10), History(), Progress(), BestCheckpoint(Path(folder)), last, Guard(stop)]
        trainer_of([clock, *ride], epochs, validates=True).fit(module, datamodule=data)
    return np.diff(clock.times).tolist(), clock.losses


def arguments_of(data: ResidualStreamDataModule) -> dict[str, Any]:
    return {"layers": "paper", "standardise": "unit", "n_sublayers": data.stream.n_sublayers}


def autoencoder_of(data: ResidualStreamDataModule) -> CompressingAutoencoder:
    torch.manual_seed(0)
    return CompressingAutoencoder(data.stream.n_units, **arguments_of(data))


def lightning_alone(data: ResidualStreamDataModule) -> list[float]:
    clock = Clock()
    trainer_of([clock], 1, validates=False).fit(Alone(autoencoder_of(data)), datamodule=data)
    return np.diff(clock.times).tolist()


def bare(data: ResidualStreamDataModule) -> tuple[list[float], list[float]]:
    autoencoder = autoencoder_of(data)
    autoencoder.set_statistics(data.train_statistics(complete=True))
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=1e-3, fused=True)
    data.trainer = None
    times, losses = [], []
    for batch in data.train_dataloader():
        times.append(time.process_time())
        loss = loss_of(autoencoder, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.diff(times).tolist(), losses


def floors() -> tuple[float, float]:
    """Matrix products in FLOP/s and memcpy in bytes/s, read and written, on this thread."""
    a, b = torch.ones(1024, 1024), torch.ones(64 << 20, dtype=torch.uint8)
    c = torch.empty_like(b)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(8):
            start = time.process_time()
            work()
            seconds.append(time.process_time() - start)
        return min(seconds)

    return 2 * 1024**3 / best(lambda: a @ a), 2 * len(b) / best(lambda: c.copy_(b))


def case(units: int, batch: int, steps: int, repeats: int, limits: tuple[float, float]) -> str:
    sublayers = 32
    x = torch.randn(int(batch * steps / sublayers / 0.75) + 8, sublayers, units).bfloat16()
    seconds: dict[str, list[float]] = {"bare": [], "alone": [], "ours": []}
    # all in one window, so that the statistics of the first step are those of the whole split, as the bare loop's
    options: dict[str, Any] = {"batch_size": batch, "shuffle_shards": 10**6}
    for _ in range(repeats):
        data = [ResidualStreamDataModule(Stream(x), **options) for _ in range(3)]  # type: ignore[arg-type]
        times, expected = bare(data[0])
        seconds["bare"] += times
        seconds["alone"] += lightning_alone(data[1])
        times, losses = through_lightning(data[2], 1)
        seconds["ours"] += times
        assert losses == expected, "the two loops did not compute the same"
    plain, alone, ours = (float(np.median(s)) for s in seconds.values())
    autoencoder = CompressingAutoencoder(units, layers="paper")
    n = sum(p.numel() for p in autoencoder.parameters())
    floor = 6 * n * batch / limits[0] + 28 * n / limits[1]
    goal = 0.98 if batch >= 4096 else 0.95
    verdict = "reached" if plain / ours >= goal else "missed"
    cells = [f"{units}", f"{n:,}", f"{batch}", *(f"{t * 1e3:.2f}" for t in (floor, plain, alone, ours))]
    return " | ".join([*cells, f"{plain / alone:.3f}", f"{plain / ours:.3f}", f"{goal}", verdict])


def first_epoch(n: int, *, together_first: bool) -> tuple[float, float, float]:
    """CPU seconds of a first epoch from an empty cache, of recording alone, and of an epoch once all is recorded."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 130, n)
    ids = rng.integers(3, 2000, int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    text = Sequences(ids=ids, offsets=offsets, n_rows=n, n_truncated=0, bos_id=0, bos_note=None)

    def stream_in(folder: str) -> TrajectoryStream:
        stream = TrajectoryStream(find_lm("embedded"), text, cache_dir=folder)
        stream.open()
        return stream

    def seconds(work: Callable[[], Any]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def epoch(stream: TrajectoryStream) -> float:
        return seconds(lambda: through_lightning(ResidualStreamDataModule(stream, batch_size=512), 1))

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        together = epoch(stream_in(one)) if together_first else 0.0
        stream = stream_in(two)
        recording = seconds(lambda: [stream.shard(k) for k in range(stream.n_shards)])
        training = epoch(stream_in(two))
        return together or epoch(stream_in(one)), recording, training


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Lightning's training loop against a bare one.")
    default = ["128:64:200", "512:64:200", "1024:64:100", "4096:64:8", "128:4096:12", "512:4096:8"]
    parser.add_argument("--cases", nargs="*", default=default, help="units:batch:steps each")
    parser.add_argument("--sequences", type=int, default=1024, help="of the first epoch; 0 leaves it out")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_pages()  # as the scripts do
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    limits = floors()
    print(f"One thread: matrix products {limits[0] / 1e9:.0f} GFLOP/s, memcpy {limits[1] / 1e9:.1f} GB/s both ways.\n")
    columns = ("units", "parameters", "batch", "floor, ms", "bare, ms", "Lightning alone, ms", "ours, ms")
    columns += ("bare / alone", "bare / ours", "goal", "")
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for words in args.cases:
        units, batch, steps = map(int, words.split(":"))
        print(f"| {case(units, batch, steps, args.repeats, limits)} |", flush=True)
    if args.sequences:
        first_epoch(64, together_first=True)  # what is done once a process
        runs = np.array([first_epoch(args.sequences, together_first=bool(i % 2)) for i in range(4)]).min(0)
        ratio = runs[0] / (runs[1] + runs[2])
        verdict = "reached" if ratio <= 1 else "missed"
        print(
            f"\nFirst epoch, {args.sequences} sequences, training while extracting: {runs[0]:.1f} s; extraction "
            f"{runs[1]:.1f} s, then training {runs[2]:.1f} s: {ratio:.3f} of the sum (goal: 1.0, {verdict})."
        )


if __name__ == "__main__":
    main()
