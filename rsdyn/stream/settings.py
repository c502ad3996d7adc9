"""The settings of text and cache: `data.` and `cache.` keys."""

from dataclasses import dataclass
from typing import Literal

from rsdyn.options import (
    POSITIONS,
    SIZE,
    is_positions,
    is_size,
    setting,
)


@dataclass
class DataConfig:
    """The text, which sequences of it are kept, and how they are split and batched."""

    path: str | None = setting(
        None,
        "Text, jsonl or parquet file, or a folder in the Hub's layout; with neither data.path nor data.name, the "
        "embedded text.",
        also=("file",),
    )
    name: str | None = setting(None, "Dataset on the Hub, such as Salesforce/wikitext.", also=("dataset",))
    config: str | None = setting(None, "Configuration of that dataset, such as wikitext-103-raw-v1.", also=("subset",))
    stream: str | None = setting(
        None,
        "A stream that was recorded elsewhere, in place of a text: a file or folder as rsdyn.load reads it, with what "
        "it must be told in a JSON file beside it. lm.name is then the model that it is compared with.",
        also=("trajectories", "activations"),
    )
    split: str = setting("train", "Split of that dataset from which all sequences come.")
    revision: str | None = setting(None, "Branch, tag or commit of the dataset on the Hub; null is its main branch.")
    text_column: str = setting("text", "Column that holds the text.")
    limit: int | None = setting(
        None,
        "Keep only the first N sequences after the filter, in data.order; null keeps all.",
        low=1,
        also=("max_sequences", "max_samples"),
    )
    order: Literal["random", "corpus"] = setting(
        "random",
        "Which sequences come first: drawn at random from all of the text by the seed, so that the first N are a "
        "sample of it, or those that the text has first.",
    )
    order_seed: int | None = setting(
        None,
        "Seed of data.order=random; null is seed. A number of its own keeps the sequences, and so the cache, the same "
        "for runs of several seeds.",
    )
    document_column: str | None = setting(
        None,
        "Column that says which document a row is from, for intervals that leave out whole documents; null takes the "
        "embedded text's, or the articles that titles as in WikiText open, or else contiguous blocks of the text.",
    )
    group_column: str | None = setting(
        None,
        "Column that says which group a row is of, such as correct and wrong, a language or a task: every curve and "
        "finding is then given by group too, with the difference between groups. What has no value there is in no "
        "group.",
        also=("label_column", "groups", "labels"),
    )
    l_min: int = setting(100, "Keep sequences of more than so many characters (strict).", low=0, also=("min_length",))
    l_max: int = setting(500, "Keep sequences of fewer than so many characters (strict).", low=2, also=("max_length",))
    strip: bool = setting(
        False,
        "Take white space off a row's end before its characters are counted. As published, rows stay whole, and all of "
        "WikiText's end in one token.",
    )
    truncate: bool = setting(False, "Cut sequences longer than the LM's context instead of refusing them.")
    chat_template: Literal["none", "user"] = setting(
        "none",
        "none records each text as it is; user as a user turn of the tokenizer's chat template, up to where an "
        "instruct model would answer.",
    )
    condition: Literal["original", "shuffled", "shuffled_keep_last"] = setting(
        "original",
        "The text as it is, or a control: the tokens of each sequence shuffled (the paper's), or all but the last.",
        also=("shuffle", "shuffled"),
    )
    positions: str | dict[str, int] = setting(
        "last",
        "Tokens whose stream is recorded, each a trajectory of its own: the last of each sequence, all (BOS too), or k "
        "drawn of each.",
        allowed=POSITIONS,
        test=is_positions,
        also=("tokens",),
    )
    val_size: float = setting(0.1, "Sequences for validation: a fraction, or their number.", allowed=SIZE, test=is_size)
    test_size: float = setting(0.15, "Sequences for the test: a fraction, or their number.", allowed=SIZE, test=is_size)
    batch_by: Literal["sequence", "vector"] = setting(
        "vector",
        "A batch is whole sequences (the paper's; each recorded token counts as one), or vectors shuffled across them.",
    )
    batch_size: int = setting(512, "Vectors in a batch, or whole sequences with data.batch_by=sequence.", low=1)
    shuffle_shards: int = setting(4, "How many shards of the cache are shuffled together.", low=1)


@dataclass
class CacheConfig:
    """Recorded trajectories on disk, so that a sequence goes through the LM once, ever."""

    dir: str | None = setting(
        None, "Folder of the cache; null is $RSDYN_CACHE, else $XDG_CACHE_HOME/rsdyn, else ~/.cache/rsdyn."
    )
    dtype: Literal["bfloat16", "float32"] = setting("bfloat16", "Number format of the trajectories on disk.")
    enabled: bool = setting(True, "Keep the cache for later runs.")
    shard_sequences: int = setting(256, "Sequences in a shard.", low=1)
