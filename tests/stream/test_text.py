import functools
import subprocess
import sys
from collections import Counter
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import PROSE, tiny_tokenizer

from rsdyn.errors import UserError
from rsdyn.perturbation.prompts import prompts_of
from rsdyn.perturbation.settings import PerturbConfig
from rsdyn.stream.text import tokens
from rsdyn.stream.text.tokens import Sequences, keep, load_rows, split, tokenise_one

tokenise = functools.partial(tokens.tokenise, order="corpus")  # the random order has tests of its own below

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), add_bos_by_template=True)


@pytest.fixture(scope="module")
def texts():
    """Rows of every length around the bounds, most of them in range, as WikiText mixes them with headings."""
    random = np.random.default_rng(0)
    rows = []
    for i in range(2500):
        rows.append(" ".join(random.permutation(PROSE)[: random.integers(1, 8)]) + f" {i} \n")
        if i % 5 == 0:
            rows += ["", " = Heading = \n"]
    return rows


def as_rows(texts, column="text"):
    import datasets

    return datasets.Dataset.from_dict({column: list(texts)})


def test_module_is_light():
    heavy = ("datasets", "transformers", "torch", "pyarrow", "huggingface_hub")
    code = f"import sys, rsdyn.stream.text.tokens; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# ---- filter


@pytest.mark.parametrize(
    ("length", "passes"), [(0, False), (99, False), (100, False), (101, True), (499, True), (500, False), (501, False)]
)
def test_bounds_are_strict_and_in_characters(length, passes):
    assert keep("é" * length, 100, 500) is passes


def test_rows_are_whole_unchanged_and_in_order(tokenizer, texts):
    sequences = tokenise(as_rows(texts), tokenizer, l_min=100, l_max=500, seed=0)
    kept = [text for text in texts if 100 < len(text) < 500]
    assert len(sequences) == len(kept)
    assert len(kept) > 1000  # more than one chunk
    assert [tokenizer.decode(sequences[i][1:]) for i in range(len(kept))] == kept
    assert sequences.n_rows == len(texts)


@pytest.mark.parametrize("limit", [1, 7, 999, 1000, 1001])
def test_limit_stops_the_reading(tokenizer, texts, limit):
    class Counted:
        read = 0

        def __len__(self):
            return len(texts)

        def __getitem__(self, rows):
            part = texts[rows]
            Counted.read += len(part)
            return {"text": part}

    sequences = tokenise(Counted(), tokenizer, limit=limit)
    whole = tokenise(as_rows(texts), tokenizer)
    assert len(sequences) == limit
    assert all(np.array_equal(sequences[i], whole[i]) for i in range(limit))
    kept = [row for row, text in enumerate(texts) if 100 < len(text) < 500]
    assert sequences.n_rows == kept[limit - 1] + 1
    assert Counted.read < sequences.n_rows + 1000


def test_null_rows_are_empty_rows(tokenizer):
    sequences = tokenise(as_rows([None, PROSE[0] * 2, None, ""]), tokenizer)
    assert len(sequences) == 1 and sequences.n_rows == 4


def test_nothing_left_says_what_was_seen(tokenizer):
    with pytest.raises(UserError, match=r"3 rows.*l_min=100.*l_max=500.*4 to 900 char.*another text") as caught:
        tokenise(as_rows(["abcd", "x" * 900, "y" * 100]), tokenizer)
    assert "data." not in str(caught.value)  # a library names its arguments
    with pytest.raises(UserError, match=r"0 rows.*no rows"):
        tokenise(as_rows([]), tokenizer)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"l_min": 500, "l_max": 100}, "l_min=500"),
        ({"l_min": 100, "l_max": 101}, "l_max=101"),
        ({"l_min": -1}, "l_min=-1"),
        ({"limit": 0}, "limit=0"),
        ({"condition": "shufled"}, "condition=shufled"),
        ({"max_tokens": 1}, "context of 1"),
    ],
)
def test_bad_settings(tokenizer, settings, key):
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        tokenise(as_rows(PROSE), tokenizer, **settings)


# ---- BOS


@pytest.mark.parametrize(
    ("has", "opens", "says"),
    [
        ({"add_bos_by_template": True}, "<s>", None),
        ({}, "<s>", "adds no BOS"),
        ({"bos": False}, "</s>", "has no BOS"),
    ],
)
def test_exactly_one_bos(tmp_path, texts, has, opens, says):
    tokenizer = tiny_tokenizer(tmp_path, **has)
    own = tokenizer("a b").input_ids
    assert (own[0] == tokenizer.convert_tokens_to_ids(opens)) is (says is None)  # the three kinds are what they claim
    sequences = tokenise(as_rows(texts), tokenizer, limit=50)
    assert sequences.bos_id == tokenizer.convert_tokens_to_ids(opens)
    assert sequences.bos_note is None if says is None else says in sequences.bos_note
    for ids in (sequences[i] for i in range(50)):
        assert ids[0] == sequences.bos_id
        assert np.count_nonzero(ids == sequences.bos_id) == 1
        assert len(ids) > 1


FAMILIES = {  # class: byte-level or sentencepiece-like; special tokens; options; who opens; what is said of it
    "gpt2": ("GPT2Tokenizer", True, ["<|endoftext|>"], {}, "<|endoftext|>", "adds no BOS"),
    "opt": (
        *("GPT2Tokenizer", True, ["<s>", "</s>", "<pad>"]),
        {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>", "add_bos_token": True},
        *("</s>", None),
    ),
    "qwen": ("Qwen2Tokenizer", True, ["<|endoftext|>"], {}, "<|endoftext|>", "has no BOS"),
    "pythia": ("GPTNeoXTokenizer", True, ["<|endoftext|>", "<|padding|>"], {}, "<|endoftext|>", "adds no BOS"),
    "llama2": ("LlamaTokenizer", False, ["<unk>", "<s>", "</s>"], {"add_bos_token": True}, "<s>", None),
    "llama2-bare": ("LlamaTokenizer", False, ["<unk>", "<s>", "</s>"], {}, "<s>", "adds no BOS"),
    "gemma": (
        *("GemmaTokenizer", False, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]),
        {"add_bos_token": True},
        *("<bos>", None),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_tokenizers_open_each_sequence_once(family, tmp_path):
    """transformers' own classes over a vocabulary of ours: with and without BOS, EOS in its place, padding or none."""
    import json

    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    kind, is_byte_level, special, options, opens, says = FAMILIES[family]
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False) if is_byte_level else pre_tokenizers.Metaspace()
    backend.pre_tokenizer = level
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_byte_level else []
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*PROSE, *special], trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    getattr(transformers, kind)(vocab=model["vocab"], merges=merges, **options).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == kind
    rows = [*PROSE, f"{opens}{PROSE[0]} {opens}{opens}"]
    sequences = tokenise(as_rows(rows), tokenizer, l_min=10)
    assert sequences.bos_id == tokenizer.convert_tokens_to_ids(opens)
    assert sequences.bos_note is None if says is None else says in sequences.bos_note
    for row, ids in zip(rows, sequences, strict=True):
        assert ids[0] == sequences.bos_id and np.count_nonzero(ids == sequences.bos_id) == 1
        assert tokenizer.decode(ids[1:]).strip() == row
        assert np.array_equal(tokenise_one(tokenizer, row, sequences.bos_id), ids)


def test_equals_the_tokenizers_own_ids_where_it_adds_bos(tokenizer, texts):
    sequences = tokenise(as_rows(texts), tokenizer, limit=1500)
    kept = [text for text in texts if 100 < len(text) < 500][:1500]
    own = tokenizer(kept)["input_ids"]
    assert all(np.array_equal(sequences[i], own[i]) for i in range(1500))


def test_no_bos_and_no_eos_is_an_error(tmp_path):
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        tokenise(as_rows(PROSE), tiny_tokenizer(tmp_path, bos=False, eos=False), l_min=1)


def test_special_tokens_spelled_in_the_text_are_text(tmp_path):
    row = "<s>" + PROSE[0] + " <s> and </s> are marks.</s><s>"
    for has in ({"add_bos_by_template": True}, {}, {"bos": False}):
        tokenizer = tiny_tokenizer(tmp_path, **has)
        ids = tokenise(as_rows([row]), tokenizer)[0]
        assert np.count_nonzero(np.isin(ids, tokenizer.all_special_ids)) == 1
        assert tokenizer.decode(ids[1:]) == row
        tokens = tokenizer.encode(row, add_special_tokens=False)
        assert sum(token in tokenizer.all_special_ids for token in tokens) >= 2  # by default it would have been doubled


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    before = tokenizer("x <s> y").input_ids
    tokenise(as_rows(PROSE), tokenizer, l_min=1, limit=2)
    assert tokenizer._tokenizer.encode_special_tokens is False
    assert tokenizer("x <s> y").input_ids == before


def test_a_tokenizer_that_cannot_take_a_mark_as_text_is_refused_by_row():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(PROSE * 5, trainer)
    unigram = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert len(tokenise(as_rows(PROSE), unigram, l_min=1)) == len(PROSE)
    with pytest.raises(UserError, match=r"row 1 .*<s>.*two BOS"):
        tokenise(as_rows([PROSE[0], PROSE[1] + " <s> again"]), unigram, l_min=1)
    with pytest.raises(UserError, match=r"'<s> again' spells <s>.*two BOS"):
        tokenise_one(unigram, "<s> again", unigram.bos_token_id)


def test_a_row_without_tokens_is_refused():
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
    backend.normalizer = normalizers.Replace(" ", "")
    blind = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    with pytest.raises(UserError, match=r"row 1 .* no token"):
        tokenise(as_rows(["b" * 150, " " * 150]), blind)


# ---- shuffled control


def test_shuffle_permutes_all_but_bos(tokenizer, texts):
    plain = tokenise(as_rows(texts), tokenizer, limit=1200)
    mixed = tokenise(as_rows(texts), tokenizer, limit=1200, condition="shuffled", seed=3)
    assert np.array_equal(plain.offsets, mixed.offsets)
    moved = 0
    for i in range(1200):
        a, b = plain[i], mixed[i]
        assert b[0] == a[0] == plain.bos_id
        assert np.array_equal(np.sort(a), np.sort(b))
        moved += not np.array_equal(a, b)
    assert moved == 1200
    assert plain.digest != mixed.digest


def test_shuffle_depends_on_seed_and_index_alone(tokenizer, texts):
    rows = as_rows(texts)
    many = tokenise(rows, tokenizer, limit=1100, condition="shuffled", seed=3)
    few = tokenise(rows, tokenizer, limit=20, condition="shuffled", seed=3)
    assert all(np.array_equal(few[i], many[i]) for i in range(20))
    other = tokenise(rows, tokenizer, limit=20, condition="shuffled", seed=4)
    assert sum(np.array_equal(few[i], other[i]) for i in range(20)) == 0
    same_text = tokenise(as_rows([PROSE[0] * 2] * 2), tokenizer, condition="shuffled", seed=3)
    assert not np.array_equal(same_text[0], same_text[1])  # by index, not by text


def test_the_last_token_stays_where_it_is_to_be_kept(tokenizer, texts):
    plain = tokenise(as_rows(texts), tokenizer, limit=200)
    mixed = tokenise(as_rows(texts), tokenizer, limit=200, condition="shuffled_keep_last", seed=3)
    assert np.array_equal(plain.last_tokens, mixed.last_tokens)
    assert plain.last_tokens.tolist() == [plain[i][-1] for i in range(200)]
    assert mixed.digest == plain.shuffled(3, keep_last=True).digest != plain.shuffled(3).digest
    for i in range(200):
        a, b = plain[i], mixed[i]
        assert a[0] == b[0] and np.array_equal(np.sort(a), np.sort(b))
        assert not np.array_equal(a, b)
    short = tokenise(as_rows(["ab"]), tokenizer, l_min=0, condition="shuffled_keep_last")
    assert short[0][0] == plain.bos_id  # nothing to move, and no error


def test_white_space_at_the_end_goes_before_characters_are_counted(tokenizer):
    rows = as_rows(["a" * 101 + " \n", "b" * 100 + " \n", "  " + "c" * 120])
    whole, stripped = tokenise(rows, tokenizer), tokenise(rows, tokenizer, strip=True)
    assert (len(whole), len(stripped)) == (3, 2)  # the second has 100 characters without it, not more
    assert tokenizer.decode(stripped[0][1:]).strip() == "a" * 101
    assert len(set(stripped.last_tokens.tolist())) == 2
    assert np.array_equal(whole[2], stripped[1])  # what stands at the beginning stays


def test_every_permutation_is_equally_likely():
    from scipy.stats import chisquare

    from rsdyn.stream.text.tokens import _permutation

    counts = Counter(tuple(_permutation(0, i, 4)) for i in range(24_000))
    assert set(counts) == set(permutations(range(4)))
    assert chisquare(list(counts.values())).pvalue > 1e-3
    by_seed = Counter(tuple(_permutation(s, 5, 4)) for s in range(24_000))
    assert chisquare(list(by_seed.values())).pvalue > 1e-3


def test_the_hash_is_splitmix64():
    """The published sequence for seed 1234567 (Rosetta Code), since cache keys hang on it."""
    from rsdyn.stream.text.tokens import _hash

    golden, state, got = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        got.append(int(_hash(state)[0]))
        state = (state + golden) % 2**64
    assert got == [6457827717110365317, 3203168211198807973, 9817491932198370423]


# ---- context and vocabulary


def test_too_long_is_an_error_that_counts(tokenizer, texts):
    rows = as_rows(texts)
    lengths = tokenise(rows, tokenizer, limit=1500).lengths
    bound = int(np.median(lengths))
    with pytest.raises(UserError) as caught:
        tokenise(rows, tokenizer, limit=1500, max_tokens=bound)
    message = str(caught.value)
    assert f"{np.count_nonzero(lengths > bound)} of 1500 " in message
    assert f"longest has {lengths.max()}," in message
    assert f"context of {bound} tokens" in message
    assert "Set truncate=true" in message and "l_max=" in message
    assert len(tokenise(rows, tokenizer, limit=1500, max_tokens=int(lengths.max()))) == 1500


@pytest.mark.parametrize("condition", ["original", "shuffled"])
def test_truncation_keeps_the_first_tokens_and_counts(tokenizer, texts, condition):
    rows = as_rows(texts)
    whole = tokenise(rows, tokenizer, limit=200)
    bound = int(np.median(whole.lengths))
    cut = tokenise(rows, tokenizer, limit=200, max_tokens=bound, truncate=True, condition=condition)
    assert cut.n_truncated == np.count_nonzero(whole.lengths > bound) > 0
    assert whole.n_truncated == 0
    for i in range(200):
        a, b = whole[i][:bound], cut[i]
        assert np.array_equal(a, b) if condition == "original" else np.array_equal(np.sort(a), np.sort(b))


def test_ids_beyond_the_vocabulary(tokenizer, texts):
    rows = as_rows(texts)
    top = int(tokenise(rows, tokenizer).ids.max())
    assert len(tokenise(rows, tokenizer, limit=5, vocab_size=top + 1)) == 5
    with pytest.raises(UserError, match=rf"token {top} .*ends at {top - 1}"):
        tokenise(rows, tokenizer, vocab_size=top)


# ---- Sequences


def test_sequences(tokenizer, texts):
    sequences = tokenise(as_rows(texts), tokenizer, limit=30)
    assert isinstance(sequences, Sequences)
    assert sequences.ids.dtype == np.int32 and sequences.offsets.dtype == np.int64
    assert sequences[0].dtype == np.int64
    assert sequences.offsets[0] == 0 and sequences.offsets[-1] == sequences.n_tokens == len(sequences.ids)
    assert [len(ids) for ids in sequences] == sequences.lengths.tolist()
    assert np.array_equal(sequences[-1], sequences[29])
    for index in (30, -31):
        with pytest.raises(IndexError):
            sequences[index]
    with pytest.raises(ValueError, match="read-only"):
        sequences.ids[0] = 5
    with pytest.raises(AttributeError):
        sequences.n_rows = 3


def test_digest_follows_content_and_bounds_alone():
    def make(ids, offsets, **kw):
        return Sequences(np.array(ids, "i4"), np.array(offsets, "i8"), 9, 0, 0, None)

    base = make([0, 1, 2, 0, 3], [0, 3, 5])
    assert base.digest == make([0, 1, 2, 0, 3], [0, 3, 5]).digest
    assert base.digest != make([0, 1, 2, 0, 4], [0, 3, 5]).digest
    assert base.digest != make([0, 1, 2, 0, 3], [0, 2, 5]).digest
    big_endian = Sequences(base.ids.astype(">i4"), base.offsets.astype(">i8"), 9, 0, 0, None)
    assert big_endian.digest == base.digest
    assert len(base.digest) == 32 and int(base.digest, 16)


def test_same_result_in_another_process(tokenizer, texts, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "rows.txt").write_text("\n".join(text.strip() for text in texts[:300]))
    code = f"""
import sys, datasets
from transformers import AutoTokenizer
from rsdyn.stream.text.tokens import tokenise
rows = datasets.Dataset.from_dict({{"text": open({str(tmp_path / "rows.txt")!r}).read().split("\\n")}})
print(tokenise(rows, AutoTokenizer.from_pretrained({str(tmp_path)!r}), condition="shuffled", seed=7).digest)
"""
    env = {"PATH": "", "HF_HOME": str(tmp_path / "hf"), "PYTHONHASHSEED": "77", "TOKENIZERS_PARALLELISM": "false"}
    env["PYTHONPATH"] = ":".join(path for path in sys.path if path)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    rows = as_rows((tmp_path / "rows.txt").read_text().split("\n"))
    assert out.strip() == tokens.tokenise(rows, tokenizer, condition="shuffled", seed=7).digest


def test_rows_from_a_file_go_straight_in(tokenizer, texts, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "rows.txt").write_text("".join(text if text.endswith("\n") else text + "\n" for text in texts))
    sequences = tokenise(load_rows(path=tmp_path / "rows.txt"), tokenizer)
    direct = tokenise(as_rows([text.rstrip("\n") for text in texts]), tokenizer)
    assert sequences.digest == direct.digest and sequences.n_rows == len(texts)


def test_a_byte_order_mark_opens_no_row(tokenizer, texts):
    """One that the reader of a dataset left there, as in a Hub's file of text."""
    marked = tokenise(as_rows(["\ufeff" + texts[0], *texts[1:]]), tokenizer)
    assert marked.digest == tokenise(as_rows(texts), tokenizer).digest


# ---- splits


@pytest.mark.parametrize(
    ("n", "val", "test", "sizes"),
    [
        (1000, 0.1, 0.1, (800, 100, 100)),
        (1000, 150, 50, (800, 150, 50)),
        (100_000, 0.15, 1, (84_999, 15_000, 1)),
        (3, 0.1, 0.1, (1, 1, 1)),
        (5, 0.01, 3.0, (1, 1, 3)),
        (15, 0.1, 0.1, (11, 2, 2)),
    ],
)
def test_split_sizes_and_partition(n, val, test, sizes):
    parts = split(n, val_size=val, test_size=test, seed=0)
    assert tuple(len(parts[key]) for key in ("train", "val", "test")) == sizes
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(n))
    assert all(np.all(np.diff(part) > 0) for part in parts.values())
    again = split(n, val_size=val, test_size=test, seed=0)
    assert all(np.array_equal(parts[key], again[key]) for key in parts)


def test_split_is_random_by_seed_and_spread_over_the_index():
    from scipy.stats import kstest

    a = split(20_000, val_size=0.1, test_size=0.1, seed=0)
    b = split(20_000, val_size=0.1, test_size=0.1, seed=1)
    common = len(np.intersect1d(a["val"], b["val"]))
    assert 130 < common < 270  # 200 expected, sd 13
    for part in a.values():
        assert kstest(part / 20_000, "uniform").pvalue > 1e-3


def test_split_does_not_follow_the_shuffle():
    """One seed serves both; sharing the hash would tie who is in val to how its tokens are mixed."""
    from rsdyn.stream.text.tokens import _permutation

    val = split(24_000, val_size=0.5, test_size=1, seed=0)["val"]
    first = Counter(int(_permutation(0, int(i), 4)[0]) for i in val)
    assert all(abs(count - 3000) < 250 for count in first.values())


@pytest.mark.parametrize(
    ("n", "val", "test", "needed"),
    [
        (0, 0.1, 0.1, 3),
        (1, 0.1, 0.1, 3),
        (2, 0.1, 0.1, 3),
        (50, 40, 10, 51),
        (2, 0.1, 1, 3),
        (10, 0.5, 8, 17),
        (3, 0.9, 1, 16),
    ],
)
def test_split_too_small_says_how_many_are_needed(n, val, test, needed):
    with pytest.raises(UserError) as caught:
        split(n, val_size=val, test_size=test, seed=0)
    message = str(caught.value)
    assert f"{n} sequence" in message and f"at least {needed}." in message
    assert all(key in message for key in ("val_size=", "test_size=", "limit"))
    split(needed, val_size=val, test_size=test, seed=0)
    with pytest.raises(UserError):
        split(needed - 1, val_size=val, test_size=test, seed=0)


@pytest.mark.parametrize(
    ("val", "test", "key"), [(0, 0.1, "val"), (0.1, -1, "test"), (1.5, 1, "val"), (0.1, float("nan"), "test")]
)
def test_split_sizes_out_of_range(val, test, key):
    with pytest.raises(UserError, match=rf"^{key}_size="):
        split(100, val_size=val, test_size=test, seed=0)


def test_split_fractions_that_leave_nothing():
    with pytest.raises(UserError, match="nothing to train on"):
        split(100, val_size=0.5, test_size=0.5, seed=0)


def test_shuffling_afterwards_is_the_shuffled_condition(tmp_path):

    rows = [{"text": text * 2} for text in PROSE]
    import datasets

    table = datasets.Dataset.from_list(rows)
    tokenizer = tiny_tokenizer(tmp_path)
    options = {"text_column": "text", "l_min": 10, "l_max": 500, "seed": 5}
    plain = tokenise(table, tokenizer, **options)
    shuffled = tokenise(table, tokenizer, condition="shuffled", **options)
    assert plain.shuffled(5).digest == shuffled.digest != plain.digest
    assert plain.shuffled(6).digest != shuffled.digest
    for i in range(len(plain)):
        assert sorted(plain[i]) == sorted(shuffled[i]) and plain[i][0] == shuffled[i][0] == plain.bos_id


# ---- what else may stand before a text: lm.bos and data.chat_template


CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }} {% endfor %}[answer]"


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_no_bos_or_another_token(tokenizer):
    texts = as_rows([line for line in PROSE if len(line) > 60])
    auto, none = (tokenise(texts, tokenizer, l_min=50, bos=bos, order="corpus") for bos in ("auto", "none"))
    assert none.bos_id is None and none.fixed == (0, 0) and none.opened_by == "nothing (bos=none)"
    for i in range(len(none)):
        assert none[i].tolist() == plain(tokenizer, texts[i]["text"]) == auto[i][1:].tolist()
    shuffled = none.shuffled(0)
    assert sorted(shuffled[0]) == sorted(none[0]) and shuffled[0][0] != none[0][0]  # nothing is kept in its place
    ended = tokenise(texts, tokenizer, l_min=50, bos="</s>", order="corpus")
    assert {int(ended[i][0]) for i in range(len(ended))} == {tokenizer.eos_token_id} and ended.fixed == (1, 0)
    assert len({auto.digest, none.digest, ended.digest}) == 3  # the cache's key
    with pytest.raises(UserError, match=r"bos=<nope>: no token of this model's vocabulary.* such as <s>"):
        tokenise(texts, tokenizer, l_min=50, bos="<nope>")


@pytest.mark.parametrize("opening", ["", "<s>"])
def test_a_user_turn_is_what_transformers_would_give_the_model(tmp_path, opening):
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.chat_template = opening + CHAT
    texts = as_rows([f" {line} \n" for line in PROSE])
    found = tokenise(texts, tokenizer, l_min=10, chat_template="user", order="corpus")
    for i in range(len(found)):
        turn = [{"role": "user", "content": texts[i]["text"]}]
        expected = tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        assert found[i].tolist() == list(expected)
    assert found.bos_id == (tokenizer.bos_token_id if opening else None)
    before, behind = found.fixed
    assert before >= len(plain(tokenizer, opening + "[user]")) and behind >= len(plain(tokenizer, "[answer]"))
    shuffled = found.shuffled(3)
    for i in range(len(found)):
        assert shuffled[i][:before].tolist() == found[i][:before].tolist()
        assert shuffled[i][-behind:].tolist() == found[i][-behind:].tolist()
        assert sorted(shuffled[i]) == sorted(found[i]) and shuffled[i].tolist() != found[i].tolist()
    one = tokenise_one(tokenizer, PROSE[0], found.bos_id, chat_template="user")
    assert one.tolist() == found[0].tolist() and found.chat_template == "user"
    lm, settings = SimpleNamespace(tokenizer=lambda: tokenizer, max_tokens=500), PerturbConfig(prompt=PROSE[0])
    settings.from_text = 1  # prompts, written or drawn, are given as the text was
    written, drawn = prompts_of(settings, found, lm, seed=0)
    assert written.tokens.tolist() == found[0].tolist() and drawn.tokens.tolist() == found[drawn.sequence].tolist()


def test_templates_that_are_refused(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    rows = as_rows(PROSE)
    with pytest.raises(UserError, match="has no chat template"):
        tokenise(rows, tokenizer, l_min=10, chat_template="user")
    tokenizer.chat_template = "<s><s>" + CHAT
    with pytest.raises(UserError, match=r"begins with 2 <s> in a row"):
        tokenise(rows, tokenizer, l_min=10, chat_template="user")
    tokenizer.chat_template = "<s>" + CHAT
    with pytest.raises(UserError, match=r"bos=none and chat_template=user"):
        tokenise(rows, tokenizer, l_min=10, chat_template="user", bos="none")
    with pytest.raises(UserError, match=r"row 0 of the text spells </s>, which means something else in a chat"):
        tokenise(as_rows(["He wrote </s> on the wall and left."]), tokenizer, l_min=10, chat_template="user")
    with pytest.raises(UserError, match="would cut the chat template's end"):
        tokenise(rows, tokenizer, l_min=10, chat_template="user", max_tokens=20, truncate=True)
    with pytest.raises(UserError, match="chat_template=assistant"):
        tokenise(rows, tokenizer, l_min=10, chat_template="assistant")


def test_an_instruct_model_on_plain_text_gets_a_note(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, add_bos_by_template=True)
    assert tokenise(as_rows(PROSE), tokenizer, l_min=10).bos_note is None
    tokenizer.chat_template = CHAT
    assert "an instruct model), and this is plain text" in tokenise(as_rows(PROSE), tokenizer, l_min=10).bos_note
