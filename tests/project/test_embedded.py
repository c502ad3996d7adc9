"""The shipped model and text, and the three scripts that made them."""

import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.embedded.make_text import (
    SOURCES,
    dictionary_blocks,
    html_paragraphs,
    interleave,
    is_prose,
    pod_paragraphs,
    read_jsonl,
    read_wesnoth,
    split,
    without,
)
from examples.embedded.measure_lm import CountModels, model_losses, sample
from examples.embedded.train_lm import (
    encode_documents,
    main,
    make_model,
    pack,
    schedule,
    shorten,
    train_tokenizer,
)
from rsdyn.embedded import MODEL, TEXT


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and on a busy machine the wait for it costs threefold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def report():
    return json.loads((MODEL.parent / "report.json").read_text("utf-8"))


# What ships


def test_each_licence_of_the_shipped_text_lies_beside_it():
    """Every source with rows is named in the table, and is in the public domain or has its licence in ``licences/``."""
    table = (TEXT.parent / "README.md").read_text("utf-8").partition("| Debian package |")[2].partition("\n\n")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in table.splitlines() if line.startswith("| `")]
    licences = {name: licence for _, name, _, licence, shipped, *_ in rows if not shipped.startswith("none")}
    assert set(licences) == {json.loads(line)["source"] for line in TEXT.read_text("utf-8").splitlines()}
    files = {
        "CC-BY-SA-3.0": "CC-BY-SA-3.0",
        "Artistic": "Artistic",
        "PSF-2": "PSF-2.0",
        "PostgreSQL licence": "PostgreSQL",
    }
    for licence in licences.values():
        if not licence.startswith("public domain"):
            file = next(file for words, file in files.items() if licence.startswith(words))
            assert len((TEXT.parent / "licences" / f"{file}.txt").read_text("utf-8").split()) > 100


def test_model_folder_is_small_and_holds_bf16_safetensors():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 12e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in MODEL.iterdir()
    }
    assert json.loads((MODEL / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True).dtype == torch.bfloat16


def test_model_is_a_llama_of_at_least_16_layers_and_128_units(model):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.num_hidden_layers >= 16 and model.config.hidden_size >= 128
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_tokenizer_prepends_exactly_one_bos_and_restores_the_text(tokenizer):
    text = "In the beginning — naïve “quotes”, 2024."
    ids = tokenizer(text)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.is_fast and tokenizer.bos_token == "<|bos|>"
    assert ids == [tokenizer.bos_token_id, *bare] and tokenizer.bos_token_id not in bare
    assert tokenizer.decode(bare) == text


def test_text_holds_enough_rows_in_the_papers_range_from_a_mix_of_sources():
    rows = read_jsonl(TEXT)
    texts = [row["text"] for row in rows]
    assert TEXT.stat().st_size <= 2e6
    assert sum(100 < len(text) < 500 for text in texts) >= 4000
    assert len(set(texts)) == len(texts) and all(text == " ".join(text.split()) for text in texts)
    assert all(row.keys() == {"text", "source", "document"} for row in rows)
    assert {row["source"] for row in rows} == {row["source"] for row in rows[:1000]}


def test_nothing_ships_that_is_under_the_gpl_alone():
    shipped = {row["source"] for row in read_jsonl(TEXT)}
    assert shipped == {source.name for source in SOURCES if source.held_out and source.ships}
    alone = {source.name for source in SOURCES if source.held_out and not source.ships}
    assert alone == {"wesnoth-1.16-*", "git-doc", "debian-reference-en", "debian-policy", "developers-reference"}


def test_loss_is_what_the_report_says_and_below_unigram_and_bigram(model, tokenizer, report):
    context = model.config.max_position_embeddings
    ids = [ids for row in read_jsonl(TEXT)[:220] if len(ids := tokenizer(row["text"])["input_ids"]) <= context][:200]
    loss = model_losses(model, ids).sum() / sum(len(sequence) - 1 for sequence in ids)
    stated = report["first_200"]
    assert loss == pytest.approx(stated["model_nats_per_token"], rel=0.01)
    whole = report["held_out"]
    assert whole["model_nats_per_token"] < whole["bigram_nats_per_token"] < whole["unigram_nats_per_token"]
    assert whole["rows"] == len(read_jsonl(TEXT)) == sum(of["rows"] for of in report["by_source"].values())
    assert all(f["model_nats_per_token"] < f["bigram_nats_per_token"] for f in report["by_source"].values())


def test_the_reports_sample_is_the_models_own(model, tokenizer, report):
    # A few tokens: rounding on another machine may part the ways later, and the sample's first words decide.
    stated = report["sample"]
    assert stated["text"].startswith(sample(model, tokenizer, 8, stated["temperature"], stated["seed"]))


# Extraction


def test_html_gives_paragraphs_without_code_tables_and_menus():
    page = """<html><head><title>T</title><style>p {}</style></head><body><nav><p>Home, next.</p></nav>
      <div class="sphinxsidebar"><p>Table of contents</p><div>x</div><p>more</p></div>
      <h1>Heading<a class="headerlink">¶</a></h1><p>Call <code>open()</code> &amp; read
      the&nbsp;file.<a class="headerlink">¶</a><pre>open(x)</pre><table><tr><td><p>cell</p></td></tr></table>
      <div class="para">DocBook says <b>so</b>.<ul><li><p>An item.</p></li></ul></div><dl><dt>x</dt><dd>y</dd></dl>"""
    assert html_paragraphs(page) == ["Call open() & read the file.", "DocBook says so.", "An item."]


def test_pod_gives_paragraphs_with_their_codes_resolved():
    pod = """=head1 NAME

Use C<< $a->{b} >> and B<I<never>> E<lt>this>, as L<the manual|perlfunc> says; see L<perlop>.X<index>

    my $code = 1;

=begin html

<p>not this</p>

=end html

=over 4

=item * option

What the option
does.

=cut
"""
    assert pod_paragraphs(pod) == [
        "Use $a->{b} and never <this>, as the manual says; see perlop.",
        "What the option does.",
    ]


def test_dictionary_and_scenarios_give_their_prose(tmp_path):
    text = "ONE, n. The first\nof them.\n\n    A poem\n    is left out.\n\nTWO, n. The next."
    assert list(dictionary_blocks(text, r"[A-Z]+,", r"\s", entries=2)) == [
        ("entries-001", ["ONE, n. The first of them."]),
        ("entries-002", ["TWO, n. The next."]),
    ]
    scenario = tmp_path / "Campaign" / "scenarios" / "01.cfg"
    scenario.parent.mkdir(parents=True)
    scenario.write_text('name= _ "No"\nstory= _ "He said: <i>""Go!""</i>\n\nThey went."\nmessage=_ "Yes."', "utf-8")
    expected = [("Campaign/01", ['He said: "Go!"', "They went.", "Yes."])]
    assert list(read_wesnoth(scenario, random.Random(0))) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("And the evening and the morning were the first day.", True),
        ("He said (as you may know) that this is “the end of it.”", True),
        ("See also the index", False),
        ("Shammua, Shaphat, Igal, Hoshea, Palti, Gaddiel, Gaddi, Ammiel.", False),
        ("if (x == 0) { return the_value[i] + 1; } // and so on to the end.", False),
        ("Das ist der Anfang von dem, was ihr alle nicht sehen wolltet.", False),
    ],
)
def test_prose_is_told_from_headings_lists_code_and_other_languages(text, expected):
    assert is_prose(text) is expected


def test_split_keeps_documents_whole_and_interleave_keeps_their_order():
    documents = [[{"text": f"{d}.{i}"} for i in range(5 + d)] for d in range(20)]
    taken, rest = split(documents, 60, random.Random(0))
    assert sorted(map(id, taken + rest)) == sorted(map(id, documents))
    assert 40 <= sum(map(len, taken)) <= 66
    merged = list(interleave(documents, random.Random(0)))
    assert all([row for row in merged if row in rows] == rows for rows in documents)
    assert merged == list(interleave(documents, random.Random(0)))
    assert len({row["text"].split(".")[0] for row in merged[:60]}) > 12


# Training and measuring


def inline_rows(count=200):
    words = (
        "the king of a city went out and he said to all his men that we shall see what the day will bring us".split()
    )
    rng = random.Random(0)
    return [
        {"text": " ".join(rng.choices(words, k=20)).capitalize() + ".", "source": "inline", "document": str(i // 10)}
        for i in range(count)
    ]


def test_training_makes_a_model_that_loads_and_resumes(tmp_path):
    data, work, folder = tmp_path / "data", tmp_path / "work", tmp_path / "model"
    data.mkdir()
    rows = inline_rows()
    for name, part in (("train", rows[:180]), ("valid", rows[180:])):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    shape = ["--vocabulary", "320", "--layers", "2", "--hidden", "32", "--context", "64"]
    command = [
        str(data),
        str(work),
        *shape,
        "--batch",
        "4",
        "--micro",
        "128",
        "--warm-up",
        "2",
        "--check",
        "0",
        "--threads",
        "1",
        "--model",
        str(folder),
    ]
    main([*command, "--steps", "3", "--save", "0", "3"])
    main([*command, "--steps", "10", "--save", "0", "8"])
    main([*command, "--export"])
    kept = read_jsonl(work / "saved.jsonl")
    assert [entry["step"] for entry in kept] == [0, 3, 8] and kept[0]["valid"] > kept[-1]["valid"] + 0.2
    for entry in kept:
        saved = AutoModelForCausalLM.from_pretrained(work / "saved" / f"step-{entry['step']}", local_files_only=True)
        assert saved.dtype == torch.bfloat16
    log = read_jsonl(work / "log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, len(log) + 1)) and len(log) > 10
    assert log[-1]["valid"] < log[0]["valid"] - 0.2
    trained = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = own([row["text"] for row in rows[180:]])["input_ids"]
    assert all(sequence.count(own.bos_token_id) == 1 for sequence in ids)
    loss = model_losses(trained.eval(), ids).sum() / sum(len(sequence) - 1 for sequence in ids)
    assert loss == pytest.approx(log[-1]["valid"], rel=0.15)
    # two processes resume from the exported model: its loss is where they start
    command[1] = str(tmp_path / "again")
    main([*command, "--start", str(folder), "--processes", "2", "--steps", "2", "--share", "0.01", "--threads", "1"])
    again = read_jsonl(tmp_path / "again" / "log.jsonl")
    assert [entry["step"] for entry in again] == [1, 2, 3]
    assert again[0]["valid"] == pytest.approx(log[-1]["valid"], abs=0.02)


def test_documents_that_must_stay_unseen_are_left_out():
    rows = [{"text": f"{d} {i}", "source": "s", "document": d} for d in "abc" for i in range(2)]
    documents = [rows[:2], rows[2:4], rows[4:]]
    unseen = [rows[0], {"text": rows[2]["text"], "source": "other", "document": "x"}]
    assert without(documents, unseen) == [[rows[3]], rows[4:]]
    assert without(documents, rows) == [] and without(documents, []) == documents


def test_rows_are_packed_in_document_order_with_shifted_targets():
    tokenizer = train_tokenizer([row["text"] for row in inline_rows()], 320)
    documents = encode_documents(inline_rows(), tokenizer)
    assert len(documents) == 20 and all(document[0] == tokenizer.bos_token_id for document in documents)
    rows = pack([np.arange(100, dtype=np.uint16)], 8, seed=3)
    assert rows.shape[1] == 9 and len(rows) >= 11
    assert torch.equal(rows - rows[:, :1], torch.arange(9).expand(len(rows), 9))
    short = shorten(rows, 4)
    assert short.shape == (2 * len(rows), 5)
    assert sorted(short[:, 1:].flatten().tolist()) == sorted(rows[:, 1:].flatten().tolist())
    with pytest.raises(ValueError, match="length=512"):
        pack([np.arange(100, dtype=np.uint16)], 512, seed=0)


def test_schedule_warms_up_stays_and_falls_to_zero():
    rates = [schedule(step, 0.0, 4) for step in (0, 1, 3, 9)]
    assert rates == pytest.approx([0.25, 0.5, 1, 1])
    rates = [schedule(9, progress, 4) for progress in (0.5, 0.6, 0.8, 1.0, 1.1)]
    assert rates == pytest.approx([1, 1, 0.5, 0, 0])


def test_count_models_agree_with_the_formula_by_hand():
    counts = CountModels([[0, 1, 2], [0, 1, 1]], vocabulary=4)
    unigram, bigram = counts.losses([[0, 1], [1, 3], [3, 2]])
    # Seen after something: 1 three times, 2 once; one added to each of four tokens.
    p = np.array([1, 4, 2, 1]) / 8
    assert unigram == pytest.approx(-np.log(p[[1, 3, 2]]))
    assert bigram == pytest.approx(-np.log([(2 + 1 * p[1]) / (2 + 1), (0 + 2 * p[3]) / (2 + 2), p[2]]))


def test_model_losses_do_not_depend_on_what_shares_the_batch():
    torch.manual_seed(0)
    model = make_model(50, 2, 32, 64).eval()
    ids = [torch.randint(0, 50, (n,)).tolist() for n in (5, 40, 17, 2)]
    alone = np.concatenate([model_losses(model, [sequence]) for sequence in ids])
    assert model_losses(model, ids) == pytest.approx(alone, rel=1e-5)
