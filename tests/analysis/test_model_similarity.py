"""How alike two models are on the same texts: itself, a turned copy, an untrained one, other texts, other orders."""

import dataclasses

import pytest
import torch
from compared_models import model

from rsdyn.analysis.comparison import compare
from rsdyn.analysis.comparison_table import as_json, as_markdown
from rsdyn.analysis.model_similarity import between, similarities
from rsdyn.analysis.results import Grams
from rsdyn.dynamics.similarity import cka_map, hollow_grams, packed

N, S, D = 90, 7, 24


def stream(n_sublayers=S, n_units=D, seed=0):
    """Trajectories whose geometry changes from sublayer to sublayer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, n_sublayers, n_units, dtype=torch.float64, generator=generator).cumsum(1)


def kept(x, texts=None):
    texts = torch.arange(len(x)) * 7919 if texts is None else texts
    return Grams(packed(hollow_grams(x)), texts, torch.arange(len(x)) // 3)


def turned(x, n_units=40, seed=5):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n_units, n_units, dtype=torch.float64, generator=generator))
    return 0.3 * torch.nn.functional.pad(x, (0, n_units - x.shape[2])) @ q - 2


def test_a_model_is_itself_and_a_turned_copy_in_more_units_too():
    x = stream()
    (same,), missing = similarities({"a": kept(x), "b": kept(turned(x))})
    assert not missing and same.labels == ("a", "b") and same.n == N
    torch.testing.assert_close(same.map, cka_map(x, turned(x)), rtol=0, atol=2e-4)
    torch.testing.assert_close(same.curve.value, torch.ones(S, dtype=torch.float64), rtol=0, atol=2e-4)
    assert float(same.mean.value) == pytest.approx(1, abs=2e-4)
    assert (same.map[0, 1:] < 0.9).all()  # other depths are other geometries


def test_a_stream_of_nothing_in_common_is_within_the_floor():
    (found,), _ = similarities({"a": kept(stream()), "b": kept(stream(5, seed=1))})
    assert found.map.shape == (S, 5) and 0 < found.floor < 0.1
    assert (found.map > found.floor).double().mean() < 0.3
    assert float(found.mean.low) < 0 < float(found.mean.high)


def test_of_another_depth_the_nearest_sublayer_is_taken():
    x = stream()
    (found,), _ = similarities({"deep": kept(x), "every other": kept(x[:, ::2])})
    exact = cka_map(x, x[:, ::2])
    at = [0, 0, 1, 2, 2, 2, 3]  # of 7 places over the 4: 0, .5, 1, 1.5, 2, 2.5, 3, halves to the even one
    torch.testing.assert_close(found.curve.value, exact[torch.arange(S), torch.tensor(at)], rtol=0, atol=2e-4)


def test_sequences_are_matched_by_their_text_whatever_the_order():
    x, order = stream(), torch.randperm(N, generator=torch.Generator().manual_seed(3))
    texts = torch.arange(N) * 31
    other = turned(x)[order][:70]
    (found,), missing = similarities({"a": kept(x, texts), "b": kept(other, texts[order][:70])})
    assert found.n == 70 and not missing
    torch.testing.assert_close(found.curve.value, torch.ones(S, dtype=torch.float64), rtol=0, atol=5e-4)
    _, missing = similarities({"a": kept(x, texts), "b": kept(other, texts[:70] + 31 * 80)})
    assert missing == ["a and b: 10 of their sequences are of the same text, and 20 are needed"]


def test_the_interval_covers_new_sequences():
    """A noisy copy: the CKA of many sequences lies in the intervals of few ones, nearly always."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, 8, dtype=torch.float64, generator=generator)
    y = x + 1.2 * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    truth = cka_map(x[:2000], y[:2000])[0, 0]
    hits = 0
    for k in range(40):
        part = slice(100 * k, 100 * (k + 1))
        grams = [hollow_grams(z[part]) for z in (x, y)]
        curve = between(("x", "y"), *grams, torch.arange(100), seed=k).curve
        hits += int(curve.low[0] <= truth <= curve.high[0])
    assert hits >= 34


def with_grams(of, **by_condition):
    settings = dict(of.facts.settings) | {"analysis.measures": ["correlation", "similarity"]}
    return dataclasses.replace(of, facts=dataclasses.replace(of.facts, settings=settings), grams=by_condition)


def test_a_comparison_has_every_pair_with_twins_and_says_who_is_missing():
    x, untrained = stream(), stream(seed=4)
    models = [
        with_grams(model("a"), original=kept(x), untrained=kept(untrained)),
        with_grams(model("b", n_units=40), original=kept(turned(x))),
        model("c", untrained=None),
        with_grams(model("d", untrained=None, positions="all")),
        with_grams(model("e", untrained=None)),
    ]
    found = compare(models)
    assert [pair.labels for pair in found.similar] == [("a", "b"), ("a", "a-untrained"), ("b", "a-untrained")]
    trained, twin = found.similar[:2]
    assert float(trained.mean.value) > 0.99 and float(twin.mean.value) < 0.2
    said = " ".join(found.not_similar)
    assert "c: similarity is not among the measures" in said and "d: models are compared at last tokens" in said
    assert "e: the run keeps no similarities" in said
    written = as_json(found)
    assert written["not_similar"] == list(found.not_similar)
    first = written["similarity"][0]
    assert first["models"] == ["a", "b"] and first["n_sequences"] == N
    assert first["curve"]["value"] == pytest.approx([1] * S, abs=1e-3) and len(first["map"]) == S
    assert first["same_depth"]["low"] <= first["same_depth"]["value"] <= first["same_depth"]["high"]
    table = as_markdown(found)
    assert "## Similarity between models" in table and "| a and b | 90 | 1.000" in table
    assert "Not compared state by state: c: similarity" in table
