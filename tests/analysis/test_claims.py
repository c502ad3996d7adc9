"""Claims of other papers: prompts, verdicts, and each statistic on records whose answer is known."""

import json
import math

import pytest
import torch

from rsdyn.analysis.claims import KINDS, Claim, Measurements, as_json, as_markdown, as_text, claims, prompts
from rsdyn.analysis.finding import Value
from rsdyn.commands.claims import main
from rsdyn.stream.trajectories import TrajectoryStream


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def walk(n, s, d, seed):
    return drawn(n, s, d, seed=seed).cumsum(1)


def straight(n, s, d, seed, wobble):
    """Paths along one direction each, whose steps wobble about it."""
    steps = drawn(n, 1, d, seed=seed) + wobble * drawn(n, s, d, seed=seed + 1)
    return steps.cumsum(1)


def recorded(seed, *, curves=False, changed=False):
    kinds = {kind: walk(20, 13, 40, seed + i) for i, kind in enumerate(KINDS)}
    if curves:
        kinds["lexical"] = straight(20, 13, 40, seed, 0.2)
        sets = prompts()["paraphrase"].sets
        kinds["paraphrase"] = drawn(5, 1, 40, seed=seed)[sets] * torch.linspace(0, 6, 13)[:, None] + drawn(20, 13, 40)
    right = torch.full((6, 10), 95)
    right[:, 0] = 5
    return Measurements(
        prompts=kinds,
        texts=walk(120, 12, 24, seed),
        over_tokens=math.pi / 2 - 0.1 * torch.arange(26).expand(8, -1) * curves + 0.01 * drawn(8, 26, seed=seed),
        over_tokens_apart=torch.full((8, 26), math.pi / 2),
        plain=torch.full((6,), 100) if changed else None,
        skip=right if changed else None,
        swap=right[:, :9] if changed else None,
        sites=2,
    )


@pytest.fixture(scope="module")
def table():
    pytest.importorskip("ruptures")
    of = {"trained": recorded(0, curves=True, changed=True), "untrained": recorded(50)}
    return {claim.key: claim for claim in claims(of, torch.arange(120) % 6)}


def test_there_are_twenty_different_prompts_of_each_kind_that_end_alike():
    kinds = prompts()
    assert tuple(kinds) == KINDS
    for of in kinds.values():
        assert len(set(of.texts)) == 20 and len(of.sets) == 20
        assert not any(text.endswith(".") for text in of.texts)  # the last token alone would tell kinds apart
    assert kinds["paraphrase"].sets.bincount().tolist() == kinds["lexical"].sets.bincount().tolist() == [4] * 5
    pairs = kinds["ambiguity"]
    assert pairs.sets.bincount().tolist() == [2] * 10 and int(pairs.control.sum()) == 10
    for k in range(10):
        one, other = (pairs.texts[i].split()[-1] for i in (pairs.sets == k).nonzero().flatten().tolist())
        assert one == other


def test_planted_differences_hold_and_walks_do_not(table):
    assert table["curvature_difference"].verdict == "holds"
    assert table["curvature_difference"].values["untrained"].value == pytest.approx(0, abs=0.1)
    assert table["curvature_difference_shuffled"].verdict == "not"  # what was planted is in the steps, in any order
    assert table["curvature_reasoning"].values["trained"].value == pytest.approx(math.pi / 2, abs=0.05)
    assert table["convergence_beyond_chance"].verdict == "holds"
    assert table["convergence"].values["trained"].value > 0.4 > 0.2 > table["convergence"].values["untrained"].value
    assert table["bifurcation"].verdict == "not"
    assert table["straightening"].verdict == "holds"
    assert table["straightening"].values["without_massive"].value == pytest.approx(0, abs=1e-3)


def test_layers_that_are_left_out_cost_what_was_planted(table):
    middle, first = table["skip_middle"], table["swap_first"]
    assert middle.values["trained"].value == pytest.approx(0.95) and middle.verdict == "holds"
    assert first.values["trained"].value == pytest.approx(-0.9) and first.verdict == "holds"


def test_transport_needs_more_texts_than_units(table):
    rate = table["residual_rate"]
    assert rate.values["trained"].n == 120 and rate.verdict in ("holds", "holds untrained too")  # walks grow
    few = {s: recorded(0)._replace(texts=walk(40, 12, 24, 1)) for s in ("trained", "untrained")}
    found = {c.key: c for c in claims(few, torch.arange(40) % 4)}
    assert found["residual_rate"].verdict == "cannot tell" and "needs 48 texts" in found["residual_rate"].reason
    assert found["skip_middle"].verdict == "cannot tell"


def test_verdicts():
    def claim(untrained=None, low=0.0, high=None, **trained):
        values = {"trained": Value(**trained)} | ({} if untrained is None else {"untrained": untrained})
        return Claim("key", "paper", "", "", "", values, low=low, high=high)

    assert claim(value=1.0, low=None, high=None).verdict == ""
    assert Claim("k", "p", "", "", "", {"trained": Value(1.0, 0.5, 1.5)}, low=0.0).verdict == "holds"
    assert Claim("k", "p", "", "", "", {"trained": Value(1.0, -0.5, 1.5)}, low=0.0).verdict == "not"
    both = {"trained": Value(1.0, 0.5, 1.5), "untrained": Value(2.0, 1.5, 2.5)}
    assert Claim("k", "p", "", "", "", both, low=0.0).verdict == "holds untrained too"
    assert Claim("k", "p", "", "", "", both, low=0.0, high=2.0).verdict == "holds"
    assert Claim("k", "p", "", "", "", {"trained": Value(math.nan)}, low=0.0).verdict == "cannot tell"


def test_words_and_numbers(table):
    rows = [*table.values()]
    text = "\n".join(as_text(rows))
    for source in ("arXiv 2606.09287", "arXiv 2410.01545", "arXiv 2406.19384", "Hosseini & Fedorenko 2023"):
        assert source in text
    lines = as_markdown(rows, "a title").splitlines()
    assert lines[0] == "# a title" and len({line.count(" | ") for line in lines[2:] if "---" not in line}) == 1
    assert {row["key"] for row in as_json(rows)} == set(table)


def test_what_was_recorded_is_not_recorded_again(tiny_llama, tmp_path, monkeypatch, capsys):
    """The second run reads the texts from the cache, and a longer one records what is new; the numbers are the same."""
    pytest.importorskip("ruptures")
    recorded = []
    plain = TrajectoryStream._record

    def counted(self, numbers, *more):
        recorded.append(len(numbers))
        return plain(self, numbers, *more)

    monkeypatch.setattr(TrajectoryStream, "_record", counted)

    def run(n):
        recorded.clear()
        words = [str(tiny_llama), "--texts", str(n), "--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "t.json")]
        assert main(words) == 0
        capsys.readouterr()
        return sum(recorded), json.loads((tmp_path / "t.json").read_text())

    (first, table), (again, same) = run(70), run(70)
    assert (first, again) == (2 * 70, 0)
    values, others = (
        {(row["key"], series): value["value"] for row in of["claims"] for series, value in row["values"].items()}
        for of in (table, same)
    )
    known = {place: value for place, value in values.items() if value is not None}
    assert {place: others[place] for place in known} == pytest.approx(known, rel=1e-4, abs=1e-5)
    assert set(values) == set(others) and ("curvature_lexical", "trained") in known
    assert run(80)[0] == 2 * 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embedded", "--texts", "2"], "--texts 2: give at least 3"),
        (["embedded", "--seed", "-1"], "--seed -1: give at least 0"),
        (["embedded", "-o", "table.txt"], "ends in .md or .json"),
        (["/nowhere/model"], "nowhere"),
    ],
)
def test_mistakes_of_the_command(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err
