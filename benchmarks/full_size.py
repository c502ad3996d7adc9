"""A model of Llama 3.1 8B's exact shape, random weights, through ``train.py --config paper``, beside what --plan says.

python benchmarks/full_size.py --folder llama-8b-random          needs 16 GB of disk, 20 GB of memory
python benchmarks/full_size.py --folder small --layers 2 --hidden 256 --mlp 512 --heads 4 --kv-heads 2 --vocab 4096

Writes the model in the Hub's layout, shard by shard, so that no more than one shard is ever in memory; the numbers are
random, the shapes, the dtype and the files are the real ones. The tokenizer and the text are the embedded ones, since
nothing is downloaded: its 2,048 ids are a part of the 128,256. Then, each in a process of its own: the plan; reading
the weights; ``train.py``. Prints a table of what was measured beside what was planned.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "rsdyn" / "embedded" / "model"


def write_model(folder: Path, args: argparse.Namespace) -> float:
    """Write config, tokenizer and weights of the shape asked for; returns the gigabytes of weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED / name, folder / name)
    embedded = json.loads((EMBEDDED / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
        bos_token_id=embedded["bos_token_id"],
        eos_token_id=embedded["eos_token_id"],
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if shards[-1] and filled + size > args.shard_gb * 1e9:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    generator = torch.Generator().manual_seed(0)
    # One large draw, from which every matrix takes a stretch at its own offset: eight billion normal numbers would take
    # minutes each time, and here only shapes count.
    pool = torch.randn(2**24, generator=generator).mul_(0.02).to(torch.bfloat16)
    where, total = {}, 0
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for j, name in enumerate(names):
            shape = shapes[name]
            n = shape.numel()
            if len(shape) == 1:  # norms
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                copies = -(-(n + j) // len(pool))
                tensors[name] = pool.repeat(copies)[j : j + n].reshape(shape).clone()
            where[name] = file
            total += 2 * n
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total / 1e9


class Watched:
    """A command, run to its end, with the largest resident memory of its process, and its seconds.

    ``anonymous`` is the part that is not mapped from files: weights mapped from their files count as resident, but can
    be dropped and read again when memory runs short.
    """

    def __init__(self, *command: str, env: dict[str, str] | None = None):
        start = time.monotonic()
        self.lines: list[tuple[float, str]] = []
        self.peak = self.anonymous = 0
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(env or {})}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1,
        )  # fmt: skip
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                try:
                    words = Path(f"/proc/{process.pid}/status").read_text()
                except OSError:
                    return
                found = {k: int(v) * 1024 for k, v in re.findall(r"(VmHWM|RssAnon):\s+(\d+)", words)}
                self.peak = max(self.peak, found.get("VmHWM", 0))
                self.anonymous = max(self.anonymous, found.get("RssAnon", 0))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        assert process.stdout is not None
        for line in process.stdout:
            self.lines.append((time.monotonic() - start, line.rstrip()))
        self.code = process.wait()
        done.set()
        watcher.join()
        self.seconds = time.monotonic() - start

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


LOAD = """
import sys, time, torch
from rsdyn.lm.source import find_lm
source = find_lm(sys.argv[1])
began = time.monotonic()
lm = source.load(dtype="bfloat16")
opened = time.monotonic() - began
began = time.monotonic()
total = sum(float(p.flatten()[:: 2048].sum()) for p in lm.base.parameters())  # a number of each page
print(f"opened in {opened:.1f} s, every page read in {time.monotonic() - began:.1f} s")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model goes; kept, and used again")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--shard-gb", type=float, default=4.9, help="like the real one's")
    parser.add_argument("--limit", type=int, default=16, help="sequences")
    parser.add_argument("settings", nargs="*", help="further key=value for train.py")
    args = parser.parse_args()
    args.folder = args.folder.resolve()  # the children run in the repository's root
    work = args.folder.parent / f"{args.folder.name}-run"
    shutil.rmtree(work, ignore_errors=True)
    if not (args.folder / "model.safetensors.index.json").exists():
        began = time.monotonic()
        size = write_model(args.folder, args)
        print(f"wrote {size:.2f} GB of weights in {time.monotonic() - began:.0f} s")
    config = json.loads((args.folder / "config.json").read_text())
    print(f"{config['num_hidden_layers']} layers of {config['hidden_size']} units, {args.limit} sequences")
    settings = [
        *("--config", "paper", f"lm.name={args.folder}", "lm.batch_tokens=512"),
        *("data.name=null", "data.config=null", f"data.limit={args.limit}", "data.val_size=0.2", "data.test_size=0.2"),
        *("trainer.max_epochs=1", f"cache.dir={work / 'cache'}", "tracking.mode=disabled", *args.settings),
    ]
    plan = Watched(sys.executable, "train.py", *settings, "--plan")
    print("\n".join(f"  plan | {line}" for _, line in plan.lines))
    load = Watched(sys.executable, "-c", LOAD, str(args.folder))
    print(f"  load | {load.text}")
    run = Watched(sys.executable, "train.py", *settings, f"run.dir={work / 'run'}")
    print("\n".join(f"{seconds:6.0f} | {line}" for seconds, line in run.lines))
    if run.code:
        sys.exit(f"train.py ended with {run.code}")
    summary = json.loads((work / "run" / "summary.json").read_text())
    cache = sum(file.stat().st_size for file in (work / "cache").rglob("*.safetensors"))
    rows = [
        ("the plan itself, peak memory", _gib(plan.peak), f"{plan.seconds:.0f} s"),
        ("reading the weights, peak memory", _gib(load.peak), f"{load.seconds:.0f} s"),
        ("  of it not mapped from files", _gib(load.anonymous), ""),
        ("train.py, peak memory", _gib(run.peak), f"{run.seconds:.0f} s, {summary['seconds']['fit']:.0f} s to fit"),
        ("  of it not mapped from files", _gib(run.anonymous), ""),
        ("  planned, about", _planned(plan.text, r"about (.*?) a process"), ""),
        ("cache", f"{cache / 2**20:.1f} MiB", f"planned {_planned(plan.text, r'Cache: .*?: (.*?), of which')}"),
        ("autoencoder", f"{summary['n_parameters']:,}", f"planned {_planned(plan.text, r'Autoencoder: +([0-9,]+)')}"),
    ]
    print()
    for label, measured, more in rows:
        print(f"{label:<36}{measured:>14}   {more}")


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def _planned(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "not in the plan's words"


if __name__ == "__main__":
    main()
