"""Tiny tokenizers (and, beside them, tiny LMs) made on the spot and saved in folders as the Hub would hold them."""

from pathlib import Path

PROSE = [
    "The river ran slowly past the old mill, and nobody in the village could say when it had last turned.",
    "She opened the letter twice, read it once, and put it in the drawer where the others were kept.",
    "A system that moves through many states may still return, again and again, to a few of them.",
    "Numbers such as 12, 305 and 7,481 were written on the wall; some < 10, some > 1000.",
    "In the morning the wind had changed, and the boats that had waited for three days put out to sea.",
    "He asked what the word meant. It means, she said, that a thing is larger than it looks.",
]


def tiny_tokenizer(folder, *, bos: bool = True, eos: bool = True, add_bos_by_template: bool = False, vocab_size=400):
    """Train a byte-level BPE on a few sentences, save it in `folder` and return it as AutoTokenizer opens it.

    `bos` and `eos` say which of the two the tokenizer has ("<s>", "</s>"); `add_bos_by_template` puts BOS through the
    post-processor, as Llama 3's tokenizer does, whatever `add_bos_token` says.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokens = {key: token for key, token, has in (("bos_token", "<s>", bos), ("eos_token", "</s>", eos)) if has}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(tokens.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(PROSE, trainer)
    if add_bos_by_template:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(Path(folder))
    return AutoTokenizer.from_pretrained(Path(folder))


def tiny_lm(
    folder,
    *,
    model_type: str = "llama",
    layers: int = 3,
    width: int = 32,
    context: int = 256,
    seed: int = 0,
    max_shard_size="5GB",
):
    """Save a causal LM of a real family with random weights and a tokenizer in `folder`, and return the folder.

    The weights are drawn wide enough that every block moves the stream by about its own size, as trained ones do.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer(folder, add_bos_by_template=True)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        initializer_range=0.15,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(Path(folder), max_shard_size=max_shard_size)
    return Path(folder)


def write_hub_cache(hub, kind, name, revisions):
    """Keep folders as revisions of ``models`` or ``datasets`` of the Hub, as huggingface_hub's cache folder does."""
    import hashlib
    import shutil

    from fake_hub import commit_of

    repo = Path(hub) / f"{kind}--{name.replace('/', '--')}"
    for revision, folder in revisions.items():
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / revision).write_text(commit_of(folder))
        for path in Path(folder).rglob("*"):
            if path.is_file():
                blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
                link = repo / "snapshots" / commit_of(folder) / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                blob.parent.mkdir(exist_ok=True)
                shutil.copy(path, blob)
                if not link.exists():
                    link.symlink_to(blob)
