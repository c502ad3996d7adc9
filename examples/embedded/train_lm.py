"""Train the language model that ships with rsdyn: a small Llama, on two CPU cores, in about ninety minutes.

    python -m examples.embedded.train_lm DATA WORK --minutes 90  # DATA is what make_text.py wrote; resumes in WORK
    python -m examples.embedded.train_lm DATA WORK --export            # bf16 model folder, in from_pretrained's layout

The schedule runs by the clock, not by steps: other work on the machine then costs tokens, never the decay at the end.
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.embedded.make_text import Row, read_jsonl
from rsdyn.embedded import MODEL

BOS = "<|bos|>"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose post-processor prepends one BOS, as Llama 3's does."""
    bpe = Tokenizer(models.BPE())
    # Words keep their leading space; digits stand alone, or years and verse numbers would fill the small vocabulary.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[BOS], initial_alphabet=sorted(alphabet), show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, clean_up_tokenization_spaces=False, model_max_length=512
    )


def encode_documents(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Return one array of token ids a document: its paragraphs in order, each opened by BOS."""
    ids = tokenizer([row["text"] for row in rows])["input_ids"]
    grouped = itertools.groupby(range(len(rows)), key=lambda index: (rows[index]["source"], rows[index]["document"]))
    return [np.concatenate([np.asarray(ids[index], dtype=np.uint16) for index in group]) for _, group in grouped]


def pack(documents: list[np.ndarray], length: int, seed: int) -> torch.Tensor:
    """Concatenate the documents in a shuffled order and cut `[n, length + 1]`: the targets are the inputs, one on.

    Each epoch has its own seed, and so its own neighbours, and a cut at another offset.
    """
    rng = np.random.default_rng(seed)
    stream = np.concatenate([documents[index] for index in rng.permutation(len(documents))])
    offset = int(rng.integers(min(length, max(1, len(stream) - length))))
    rows = (len(stream) - offset - 1) // length
    if rows < 1:
        raise ValueError(f"documents hold {len(stream)} tokens, fewer than one row of length={length}; give more text")
    index = offset + np.arange(rows)[:, None] * length + np.arange(length + 1)
    return torch.from_numpy(stream[rng.permutation(index)].astype(np.int64))


def shorten(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Cut rows `[n, k * length + 1]` into `[n * k, length + 1]`, with the same targets.

    Attention over 512 tokens takes more time here than all matrix products: most of the training goes without.
    """
    return torch.cat([rows[:, start : start + length + 1] for start in range(0, rows.shape[1] - 1, length)])


def make_model(vocabulary: int, layers: int, hidden: int, context: int) -> LlamaForCausalLM:
    """Build an untrained Llama in the 8B's proportions: grouped queries, SwiGLU of 2.75 widths, tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
        # 0.02 is for widths in the thousands; 1/sqrt(width) would make the tied logits too large at the start.
        initializer_range=0.04,
    )
    model = LlamaForCausalLM(config)
    # GPT-2's rule: what is added to the stream starts small, so that the sum does not grow with depth.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.div_(math.sqrt(2 * layers))
            layer.mlp.down_proj.weight.div_(math.sqrt(2 * layers))
    return model


def mean_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats per token of rows `[n, length + 1]`."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def validate(model: LlamaForCausalLM, tokens: torch.Tensor, batch: int) -> float:
    """Return the mean loss over validation rows."""
    model.eval()
    # Compiling once more for a few rows without gradients would cost more than it saves.
    with autocast(tokens), torch.compiler.set_stance("force_eager"):
        total = sum(float(mean_loss(model, part)) * len(part) for part in tokens.split(batch))
    model.train()
    return total / len(tokens)


def autocast(tokens: torch.Tensor) -> torch.autocast:
    """Return the context in which matrix products run in bf16, two to four times as fast here as fp32."""
    return torch.autocast(tokens.device.type, dtype=torch.bfloat16)


def make_optimizers(model: LlamaForCausalLM, rate: float, muon_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    With few tokens, what each teaches decides. At 1.03 M tokens the validation loss was 5.10, with AdamW alone 5.40
    (one run each, peak rate 0.003, and its warm-up too short).
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": 0.1},
        {"params": norms, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.05, momentum=0.95, nesterov=True),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True),
    ]


def schedule(step: int, progress: float, warm_up: int, decay: float = 0.4) -> float:
    """Share of the peak learning rate: warm-up in steps, constant, a line to zero in the last share of time (WSD)."""
    return min((step + 1) / warm_up, 1.0, max(0.0, 1 - progress) / decay)


def sum_over_processes(model: LlamaForCausalLM) -> None:
    """Sum the gradients of all processes, in one message: each has its share of the batch."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def add_up(values: list[float], n_processes: int) -> list[float]:
    """The sum over processes of each value."""
    if n_processes == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def save_atomically(value: object, path: Path) -> None:
    """Write beside the target and rename, so that a kill never leaves half a checkpoint."""
    torch.save(value, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def batches(documents: list[np.ndarray], length: int, size: int, seed: int, skip: int) -> Iterator[torch.Tensor]:
    """Yield batches of packed rows, epoch after epoch, from batch number `skip` on."""
    for epoch in itertools.count():
        rows = pack(documents, length, seed + epoch)
        parts = rows.split(size)[: max(1, len(rows) // size)]  # the last, short one is dropped
        if skip < len(parts):
            yield from parts[skip:]
        skip = max(0, skip - len(parts))


def make_tokenizer(options: argparse.Namespace) -> None:
    """Put the tokenizer into the work folder, unless it is there: a given model's, else a new one."""
    folder = options.work / "tokenizer"
    given = options.tokenizer or options.start
    if folder.exists():
        return
    if given:
        PreTrainedTokenizerFast.from_pretrained(given).save_pretrained(folder)
    else:
        texts = [row["text"] for row in read_jsonl(options.data / "train.jsonl")]
        train_tokenizer(texts, options.vocabulary).save_pretrained(folder)


def train_as(rank: int, options: argparse.Namespace) -> None:
    """Be one of several processes of one thread each: on few cores faster than one process of several threads."""
    torch.set_num_threads(1)
    meeting = (options.work / "meeting").resolve()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.processes)
    train(options)
    dist.destroy_process_group()


def train(options: argparse.Namespace) -> None:
    """Train or resume until the time is spent, the steps are done, or validation has stopped improving."""
    rank, n_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    rows = read_jsonl(options.data / "train.jsonl")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.work / "tokenizer")
    documents = encode_documents(rows, tokenizer)
    valid = pack(encode_documents(read_jsonl(options.data / "valid.jsonl"), tokenizer), options.context, options.seed)

    model = make_model(len(tokenizer), options.layers, options.hidden, options.context).train()
    optimizers = make_optimizers(model, options.rate, options.muon_rate)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "best": math.inf, "best_at": 0.0}
    if options.compile:
        for layer in model.model.layers:  # one layer's code serves all; the whole model took minutes to compile
            layer.compile(dynamic=False)
    checkpoint = options.work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        state = saved["state"]
    elif options.start:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32).state_dict())
    if state.setdefault("stage", 1) < options.stage:  # a new schedule, from where the last one ended
        state |= {"stage": options.stage, "seconds": 0.0, "best": math.inf, "best_at": 0.0}

    log = (options.work / "log.jsonl").open("a", encoding="utf-8")
    micro_rows = max(1, options.micro // options.context)
    print(f"{sum(map(len, documents))} tokens, {len(valid)} validation rows, from step {state['step']}", flush=True)
    budget = 60 * options.minutes
    start = time.monotonic() - state["seconds"]
    last_check, checked_step, losses = state["seconds"], state["step"], []
    for tokens in batches(documents, options.context, options.batch, options.seed, state["step"]):
        if rank == 0 and state["step"] in options.save:
            keep(model, tokenizer, options.work, state["step"], validate(model, valid, micro_rows), options)
        # clocks differ, and all processes must stop at the same step
        state["seconds"] = add_up([time.monotonic() - start if rank == 0 else 0.0], n_processes)[0]
        progress = max(state["seconds"] / budget, state["step"] / options.steps)
        share = options.share * schedule(state["step"], progress, options.warm_up, options.decay)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * peak
        length = options.context if progress >= 0.75 else options.context // 4
        own = shorten(tokens, length)[rank::n_processes]
        for part in own.split(max(1, options.micro // length)):
            with autocast(part):
                loss = mean_loss(model, part) * (len(part) * length / tokens[:, 1:].numel())
            loss.backward()
            losses.append(loss.item())
        if n_processes > 1:
            sum_over_processes(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        done = progress >= 1
        if done or state["seconds"] - last_check >= 60 * options.check:
            own = valid[rank::n_processes]
            loss_here = validate(model, own, micro_rows) * len(own) / len(valid)
            valid_loss, train_loss = add_up([loss_here, sum(losses)], n_processes)
            if valid_loss < state["best"] - 0.002:
                state["best"], state["best_at"] = valid_loss, state["seconds"]
            entry = {
                "stage": state["stage"],
                "step": state["step"],
                "tokens": state["step"] * options.batch * options.context,
                "minutes": round(state["seconds"] / 60, 2),
                "train": round(train_loss / (state["step"] - checked_step), 4),
                "valid": round(valid_loss, 4),
                "rate": round(share, 4),
            }
            if rank == 0:
                log.write(json.dumps(entry) + "\n")
                log.flush()
                print(entry, flush=True)
                saved = {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "state": state,
                }
                save_atomically(saved, checkpoint)
            last_check, checked_step, losses = state["seconds"], state["step"], []
            if done or state["seconds"] - state["best_at"] > 60 * options.patience:
                break
    log.close()


def keep(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    work: Path,
    step: int,
    valid_loss: float,
    options: argparse.Namespace,
) -> None:
    """Write the model as it is after `step` steps to `work/saved/step-N`, and its validation loss to `saved.jsonl`."""
    write_model(model.state_dict(), tokenizer, work / "saved" / f"step-{step}", options)
    entry = {"step": step, "tokens": step * options.batch * options.context, "valid": round(valid_loss, 4)}
    with (work / "saved.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
    print(entry, flush=True)


def export(work: Path, target: Path, options: argparse.Namespace) -> None:
    """Write the checkpoint's model in bf16 with its tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    write_model(torch.load(work / "checkpoint.pt", weights_only=True)["model"], tokenizer, target, options)


def write_model(
    weights: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast, target: Path, options: argparse.Namespace
) -> None:
    """Write a model folder in bf16, with the tokenizer; each file is put in place by a rename."""
    model = make_model(len(tokenizer), options.layers, options.hidden, options.context)
    model.load_state_dict(weights)
    staging = target.with_name(target.name + ".tmp")
    model.bfloat16().save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    target.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        os.replace(path, target / path.name)
    staging.rmdir()


def main(argv: list[str] | None = None) -> None:
    """Train or export, as the options say."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("data", type=Path, help="folder with train.jsonl and valid.jsonl")
    parser.add_argument("work", type=Path, help="folder for tokenizer, checkpoint and log")
    parser.add_argument("--minutes", type=float, default=90.0, help="length of the schedule on the clock")
    parser.add_argument(
        "--steps", type=float, default=math.inf, help="length of the schedule in steps, if it ends first"
    )
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--micro", type=int, default=2048, help="tokens a forward pass")
    parser.add_argument("--rate", type=float, default=3e-3, help="AdamW's peak learning rate")
    parser.add_argument("--muon-rate", type=float, default=0.01, help="Muon's peak learning rate")
    parser.add_argument("--warm-up", type=int, default=100, help="steps of the warm-up")
    parser.add_argument("--check", type=float, default=3.0, help="minutes between validations, with a checkpoint each")
    parser.add_argument("--patience", type=float, default=20.0, help="minutes without a better validation loss")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; a fifth faster after a minute")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1, help="share each batch; faster than threads on few cores")
    parser.add_argument("--stage", type=int, default=1, help="above the checkpoint's: start a new schedule from it")
    parser.add_argument("--start", type=Path, help="model folder to begin from, where there is no checkpoint yet")
    parser.add_argument("--tokenizer", type=Path, help="model folder whose tokenizer to take instead of a new one")
    parser.add_argument("--share", type=float, default=1.0, help="of the peak learning rates, where this stage starts")
    parser.add_argument("--decay", type=float, default=0.4, help="last share of the time, in which the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=int, nargs="*", default=[], help="steps after which the model is kept, in bf16")
    parser.add_argument("--export", action="store_true", help="write the model folder instead of training")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder to export to")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.export:
        export(options.work, options.model, options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    make_tokenizer(options)
    if options.processes > 1:
        (options.work / "meeting").unlink(missing_ok=True)
        torch.multiprocessing.spawn(train_as, (options,), options.processes)
    else:
        train(options)


if __name__ == "__main__":
    main()
