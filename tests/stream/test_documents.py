"""Which sequences come first, which document each belongs to, and which are left out together."""

import numpy as np
import pytest
import torch
from tiny_models import PROSE, tiny_tokenizer

from rsdyn.embedded import DOCUMENT_COLUMN
from rsdyn.errors import UserError
from rsdyn.stream.text.corpus import load_rows
from rsdyn.stream.text.documents import document_of
from rsdyn.stream.text.groups import sequence_groups
from rsdyn.stream.text.tokens import tokenise

WIKITEXT = [
    *("", " = Valkyria Chronicles III = \n", "", " Senjō no Valkyria 3 is a game . \n"),
    *(" = = Gameplay = = \n", " As .. \n", "", " = Tower Building = \n", "", " The Tower = a building \n"),
    *(" = = = Details = = = \n", " = 5 \n", " x = y = \n", " = E = mc ² = \n", " Energy . \n"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), add_bos_by_template=True)


def as_rows(texts, **columns):
    import datasets

    return datasets.Dataset.from_dict({"text": list(texts), **columns})


def prose(n):
    """Rows of which every third is too short to be kept."""
    return [f"{PROSE[i % 6]} {i}" if i % 3 else f"short {i}" for i in range(n)]


# ---- the order


def test_the_random_order_is_a_function_of_seed_and_row_and_its_beginning_does_not_depend_on_the_limit(tokenizer):
    rows = as_rows(prose(2500))
    every = tokenise(rows, tokenizer, l_min=50, seed=7)
    kept = [i for i, text in enumerate(prose(2500)) if len(text) > 50]
    assert sorted(every.rows.tolist()) == kept and every.rows.tolist() != kept
    assert every.n_rows == 2500
    few = tokenise(rows, tokenizer, l_min=50, seed=7, limit=300)
    assert few.rows.tolist() == every.rows[:300].tolist()
    assert all(np.array_equal(few[i], every[i]) for i in range(300))
    in_order = tokenise(rows, tokenizer, l_min=50, order="corpus")
    assert in_order.rows.tolist() == kept
    where = {row: i for i, row in enumerate(kept)}
    assert all(np.array_equal(every[i], in_order[where[row]]) for i, row in enumerate(every.rows.tolist()))
    other = tokenise(rows, tokenizer, l_min=50, seed=8, limit=300)
    assert other.rows.tolist() != few.rows.tolist() and other.digest != few.digest
    # one more row of text moves none of the others past each other
    longer = tokenise(as_rows([*prose(2500), PROSE[0]]), tokenizer, l_min=50, seed=7).rows.tolist()
    assert [row for row in longer if row < 2500] == every.rows.tolist()


def test_the_first_sequences_are_a_sample_of_the_whole_text(tokenizer):
    """Of ten documents one behind the other, the first hundred of two thousand rows are from all, about ten each."""
    documents = np.arange(2000) // 200
    text = as_rows([f"{PROSE[i % 6]} {i}" for i in range(2000)])
    found = tokenise(text, tokenizer, l_min=50, limit=100, seed=0, documents=documents)
    counts = np.bincount(found.documents, minlength=10)
    assert ((counts - 10) ** 2 / 10).sum() < 27.9  # chi squared of 9 degrees of freedom, p = .001
    assert set(tokenise(text, tokenizer, l_min=50, limit=100, order="corpus", documents=documents).documents) == {0}


def test_an_unknown_order_is_refused(tokenizer):
    with pytest.raises(UserError, match="order=shuffled must be random or corpus"):
        tokenise(as_rows(PROSE), tokenizer, order="shuffled")


# ---- documents


def test_titles_as_in_wikitext_open_documents():
    assert document_of(as_rows(WIKITEXT)).tolist() == [0] + [1] * 6 + [2] * 6 + [3] * 2
    stripped = [row.rstrip("\n") for row in WIKITEXT]  # as a .txt file is read
    assert document_of(as_rows(stripped)).tolist() == document_of(as_rows(WIKITEXT)).tolist()
    assert document_of(as_rows(WIKITEXT[1:])).tolist() == [0] * 6 + [1] * 6 + [2] * 2


@pytest.mark.parametrize(
    "texts", [PROSE, [" = One title = \n", *PROSE], ["= a =", "== b ==", *PROSE], [None, *PROSE], []]
)
def test_text_without_titles_has_no_documents_that_anybody_knows(texts):
    assert document_of(as_rows(texts)) is None


def test_a_column_names_documents_wherever_their_rows_stand():
    names = ["b", "a", "b", None, "c", "a"]
    assert document_of(as_rows(PROSE, doc=names), document_column="doc").tolist() == [0, 1, 0, -1, 2, 1]
    assert document_of(as_rows(PROSE, doc=[7, 7, 1, 1, 7, 2]), document_column="doc").tolist() == [0, 0, 1, 1, 0, 2]
    picked = as_rows(PROSE, doc=names).select([5, 0, 2])  # through an index, as splits are
    assert document_of(picked, document_column="doc").tolist() == [0, 1, 1]


def test_a_column_that_names_none_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"document_column=doc holds list"):
        document_of(as_rows(PROSE, doc=[["a"]] * 6), document_column="doc")
    with pytest.raises(UserError, match=r"document_column=dok is not among.*text, doc"):
        document_of(as_rows(PROSE, doc=["a"] * 6), document_column="dok")
    documents = document_of(as_rows(PROSE, doc=["a", None] * 3), document_column="doc")
    with pytest.raises(UserError, match="row 1 of the text names no document"):
        tokenise(as_rows(PROSE), tokenizer, l_min=10, documents=documents, order="corpus")
    long = [text * (1 if i % 2 else 2) for i, text in enumerate(PROSE)]  # a row that is not kept needs none
    assert tokenise(as_rows(long), tokenizer, l_min=110, documents=documents).documents.tolist() == [0, 0, 0]


# ---- groups


def sequences(make_sequences, n, documents=None, rows=None):
    from dataclasses import replace

    return replace(make_sequences(n), documents=documents, row_of=rows)


def test_groups_are_whole_documents_of_about_equal_size(make_sequences):
    rng = np.random.default_rng(0)
    documents = rng.permutation(np.repeat(np.arange(150), rng.geometric(0.15, 150)))
    found = sequence_groups(sequences(make_sequences, len(documents), documents))
    assert found.n_clusters == 150 and found.kind == "documents" and found.n_groups == 20 and found.too_few == ""
    for d in range(150):
        assert len(found.group[torch.from_numpy(documents == d)].unique()) == 1
    sizes = found.group.bincount().tolist()
    assert max(sizes) - min(sizes) <= 2
    assert found.of(torch.tensor([5, 5, 0])).tolist() == [found.group[5], found.group[5], found.group[0]]
    # of the first few only their own documents count
    few = sequence_groups(sequences(make_sequences, len(documents), documents), 12)
    assert len(few.group) == 12 and few.n_clusters == len(set(documents[:12]))


def test_few_documents_are_groups_of_their_own_and_it_is_said(make_sequences):
    found = sequence_groups(sequences(make_sequences, 30, np.repeat([0, 1, 2], 10)))
    assert found.n_groups == 3 and found.too_few == "rests on 3 documents: too few"
    one = sequence_groups(sequences(make_sequences, 5, np.zeros(5, np.int64)))
    assert one.n_groups == 1 and one.too_few == "rests on 1 document: too few"
    assert sequence_groups(sequences(make_sequences, 4)).too_few == "rests on 4 blocks: too few"


def test_without_documents_they_are_contiguous_blocks_of_the_corpus_in_any_order(make_sequences):
    rows = np.random.default_rng(1).permutation(5000)[:203]
    found = sequence_groups(sequences(make_sequences, 203, None, rows))
    in_order = found.group[torch.from_numpy(np.argsort(rows))]
    assert (in_order.diff() >= 0).all() and found.n_groups == 20 and found.kind == "blocks"
    assert sorted(found.group.bincount().tolist()) == [10] * 17 + [11] * 3


def test_sequences_by_themselves(make_sequences):
    found = sequence_groups(sequences(make_sequences, 50, np.zeros(50, np.int64)), resample="sequences")
    assert found.n_clusters == 50 and found.group.bincount().tolist() == [3] * 10 + [2] * 10
    assert found.words() == "50 sequences, in 20 groups"


# ---- the column, out of files


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_the_column_comes_with_the_text_out_of_every_kind_of_file(kind, tmp_path):
    file = tmp_path / f"rows.{kind}"
    table = as_rows(PROSE, doc=[3, 3, 1, 1, 3, 2], other=[None] * 6)
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](str(file))
    rows = load_rows(path=file, document_column="doc")
    assert rows.column_names == ["text", "doc"] and rows["text"][:] == PROSE
    assert document_of(rows, document_column="doc").tolist() == [0, 0, 1, 1, 0, 2]
    assert load_rows(path=file).column_names == ["text"]
    with pytest.raises(UserError, match=r"document_column=dok is not in .*Columns there: text, doc, other"):
        load_rows(path=file, document_column="dok")


def test_a_file_of_lines_has_no_such_column(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text("\n".join(PROSE))
    with pytest.raises(UserError, match=r"document_column=doc is not in .*Columns there: text\."):
        load_rows(path=file, document_column="doc")


def test_the_embedded_text_has_documents():
    rows = load_rows(document_column=DOCUMENT_COLUMN)
    number = document_of(rows, document_column=DOCUMENT_COLUMN)
    assert number.max() > 130 and np.bincount(number).max() < 0.15 * len(rows)
