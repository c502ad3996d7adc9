"""The page's tables of what single sequences say, and its section on shape."""

from types import SimpleNamespace

import torch
from every_panel import analysis, every_panel

from rsdyn.analysis.results import Example
from rsdyn.report.readout import examples


def with_examples(found):
    n = found.n_sublayers + 1
    one = Example("<b> once\nupon", " a", tuple(f"t{i}" for i in range(2 * n)), torch.full((n, 2), 0.25))
    found.main.readout.examples["7"] = one
    return SimpleNamespace(results=found, model="a model")


def test_an_example_is_a_table_of_tokens_by_sublayer():
    html = examples(with_examples(analysis()))
    assert html.count("<tr>") == 1 + 11  # a head, ten sublayers and the end
    assert "“t0” 25.0 %" in html and "“t21” 25.0 %" in html and "the end" in html
    assert "sequence 7: … &lt;b&gt; once" in html and "“␣a” in the text" in html and "<b>" not in html


def test_what_the_lens_does_not_read_is_left_empty():
    run = with_examples(analysis())
    one = run.results.main.readout.examples["7"]
    probability = one.probability.clone()
    probability[1] = torch.nan
    run.results.main.readout.examples["7"] = Example(one.text, one.follows, one.tokens, probability)
    assert "nan" not in examples(run).lower()


def test_without_examples_there_is_no_table():
    assert examples(SimpleNamespace(results=analysis(), model="a model")) == ""


def test_panels_of_no_figure_of_the_paper_are_those_of_shape():
    assert {k for k, p in every_panel().items() if not p.figure and not k.startswith(("jacobian", "groups_"))} == {
        "readout_kl", "readout_agreement", "readout_entropy", "readout_probability", "readout_rank",
        "readout_committed", "curvature", "curvature_tokens", "dimension_twonn", "dimension_mle",
        "dimension_participation",
        "dimension_components_90", "dimension_effective_rank",
        "dimension_matrix_entropy", "similarity_map", "similarity_adjacent", "similarity_with_main", "phases",
        "by_position",
    }  # fmt: skip
