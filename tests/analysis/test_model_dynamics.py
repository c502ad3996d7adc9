"""How alike two models move over depth: copies, twins, other texts; the measure behind it, and what a page says."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from compared_models import model
from two_processes import run_in_two

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.comparison import compare
from rsdyn.analysis.comparison_table import as_json, as_markdown, dynamics_answer
from rsdyn.analysis.measure import How
from rsdyn.analysis.measures.dsa import depth_states, findings
from rsdyn.analysis.model_dynamics import dynamics_between
from rsdyn.analysis.results import AnalysisResults, DepthStates
from rsdyn.analysis.settings import AnalysisConfig
from rsdyn.analysis.shape import check_installed, check_shape
from rsdyn.analysis.streams import measure_stream
from rsdyn.errors import UserError
from rsdyn.figures.comparison import dynamics_panels
from rsdyn.report.comparison import comparison_page
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch

pytest.importorskip("DSA", reason="dsa-metric is not installed: pip install -e '.[dsa]'")
N, S, D = 60, 20, 8


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turn(n, seed=0):
    return torch.linalg.qr(drawn(n, n, seed=seed))[0]


def moving(n_places=9, seed=0, angles=(0.4, 0.8), n=N):
    """Trajectories of a noisy linear system in five dimensions, two of its planes turning."""
    step = torch.eye(5, dtype=torch.float64)
    for k, a in enumerate(angles):
        step[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = torch.tensor(
            [[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=torch.float64
        )
    x = [drawn(n, 5, seed=seed)]
    for p in range(n_places - 1):
        x.append(x[-1] @ step.T + 0.1 * drawn(n, 5, seed=100 * seed + p + 7))
    return torch.stack(x, 1)


def kept(states, texts=None):
    texts = torch.arange(len(states)) * 7919 if texts is None else texts
    return DepthStates(states.float(), texts, torch.arange(len(states)) // 3)


# -- two models --------------------------------------------------------------------------------------------------------


def test_a_turned_copy_is_not_told_apart_and_shares_its_order():
    x = moving()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    (pair,), missing = dynamics_between({"a": kept(x), "b": kept(5 * x[order] @ turn(5), order * 7919)})
    assert not missing and pair.labels == ("a", "b") and pair.n == N and pair.n_layers == (10, 10)
    assert pair.at_least <= pair.distance + 1e-3 and pair.distance < 0.01 < pair.floor
    assert pair.told_apart is False and pair.order_shared and pair.p == 1 / 200


def test_a_model_of_other_frequencies_is_told_apart():
    (pair,), _ = dynamics_between({"slow": kept(moving()), "fast": kept(moving(14, seed=2, angles=(1.2, 1.9)))})
    assert pair.n_layers == (10, 15)
    assert pair.told_apart and pair.floor < pair.at_least <= pair.distance
    assert pair.p > 0.05


def test_sums_of_unrelated_steps_are_near_in_any_order():
    walks = {str(k): kept((drawn(N, 10, 5, seed=k + 1)).cumsum(1)) for k in range(2)}
    found, _ = dynamics_between(walks)
    assert len(found) == 1
    # a distance like that to a walk whose steps are shuffled, far below that of unlike systems
    assert all(pair.at_least < 3 * float(pair.shuffled.median()) for pair in found)


def test_who_is_not_compared_is_said():
    x = moving()
    constant, flat = x.clone(), x.clone()
    constant[:, 4], flat[..., 4] = 1.0, flat[..., 0]
    found, missing = dynamics_between(
        {
            "a": kept(x),
            "one in common": kept(x, torch.arange(N) * 7919 + (torch.arange(N) > 0)),
            "constant": kept(constant),
            "flat": kept(flat),
            "narrow": kept(x[..., :4]),
        }
    )
    assert not found
    said = "; ".join(missing)
    assert "constant: the states of its sequences are one and the same behind a layer" in said
    assert "flat: the states of its sequences fill 4 of 5 dimensions" in said
    assert "a and one in common: 1 of their sequences are of the same text, and 20 are needed" in said
    assert "a and narrow: 5 components of one and 4 of the other are kept" in said


def test_without_the_package_a_comparison_says_so(monkeypatch):
    monkeypatch.setattr("rsdyn.analysis.model_dynamics.find_spec", lambda name: None)
    found, (missing,) = dynamics_between({"a": kept(moving()), "b": kept(moving())})
    assert not found and "dsa-metric is not installed: pip install dsa-metric" in missing
    monkeypatch.setattr("rsdyn.analysis.shape.find_spec", lambda name: None)
    with pytest.raises(UserError, match="measures: dsa needs the package dsa-metric: pip install dsa-metric, or leave"):
        check_installed(["cosine", "dsa"])


# -- the measure -------------------------------------------------------------------------------------------------------


def probed(x, measures):
    collected = Collected(n_sublayers=x.shape[1], n_units=x.shape[2], measures=measures)
    batch = TrajectoryBatch(x, torch.arange(len(x)))
    collected.first_pass(batch)
    collected.between_passes()
    if collected.n_passes == 2:
        collected.second_pass(batch)
    collected.finish()
    return collected


def stream(x=None):
    """Sublayers of two sites whose layers' inputs are ``x`` ``(N, 10, 5)`` in ``D`` units; the first is one vector."""
    x = moving(10) if x is None else x
    wide = torch.nn.functional.pad(x, (0, D - 5)) @ turn(D, seed=9) + 1e-4 * drawn(N, 10, D, seed=8)
    out = drawn(N, S, D, seed=7)  # what attention writes is of no layer's input
    out[:, ::2] = wide
    out[:, 0] = out[0, 0]
    return out


def measured(x, main=None):
    collected = probed(x.float(), ("cosine", "dsa"))
    return measure_stream(collected, How(AnalysisConfig(measures=["cosine", "dsa"]), main=main), torch.float32)


def test_states_are_those_behind_layers_in_components_of_unit_size():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = stream()
    states, share = depth_states(probed(x.float(), ("dsa",)))
    assert states.shape == (N, 9, 5)
    behind = x[:, 2::2] - x[:, 2::2].mean(0)
    rows = (behind / behind.square().mean((0, 2), keepdim=True).sqrt()).flatten(0, 1).numpy()
    theirs = decomposition.PCA(5).fit(rows)
    assert float(share) == pytest.approx(theirs.explained_variance_ratio_.sum(), abs=1e-5)
    expected = behind.numpy() @ theirs.components_.T
    signs = np.sign((expected * states.numpy()).sum((0, 1)))
    np.testing.assert_allclose(states.numpy(), expected * signs, atol=1e-4)


def test_what_an_analysis_says_of_a_stream_and_of_another_beside_it():
    x = stream()
    main = measured(x)
    assert float(main.dsa.share.value) > 0.99 and float(main.dsa.predicted.value) > 0.5
    assert main.dsa.halves.shape == (3,) and 0 < float(main.dsa.halves.amax()) < 0.1 and main.dsa.with_main is None
    turned = measured(3 * x @ turn(D, seed=4), probed(x.float(), ("cosine", "dsa")))
    other = measured(stream(moving(10, seed=3, angles=(1.3, 2.0))), probed(x.float(), ("cosine", "dsa")))
    assert float(turned.dsa.with_main.value) < 0.01 < 0.1 < float(other.dsa.with_main.value)
    rows = findings(AnalysisResults({"original": main, "untrained": other}, ("cosine", "dsa"), 2, S, D))
    assert [row.key for row in rows] == ["dsa_predicted", "dsa_with_main"]
    assert set(rows[0].values) == {"original", "untrained"} and set(rows[1].values) == {"untrained"}
    assert "100% of the variance in 5 components" in str(rows[0].values["original"])
    assert rows[1].of_main and rows[1].values["untrained"].n == N


def test_a_constant_stream_is_not_defined_and_says_why():
    x = stream()
    x[:, 6] = x[0, 6]
    found = measured(x)
    assert torch.isnan(found.dsa.predicted.value) and found.dsa.halves.isnan().all()
    (row,) = findings(AnalysisResults({"original": found}, ("cosine", "dsa"), 2, S, D))
    value = row.values["original"]
    assert not value.defined and "one and the same" in value.reason and str(value) == "not defined"


def test_too_few_layers_or_sequences_are_refused_first():
    check_shape(["dsa"], n_trajectories=20, n_sublayers=12)
    check_shape(["dsa"], n_trajectories=20, n_sublayers=6, sites_per_layer=1)
    with pytest.raises(UserError, match="measures: dsa needs at least 6 layers, and this model has 5"):
        check_shape(["dsa"], n_trajectories=20, n_sublayers=10)
    with pytest.raises(UserError, match="dsa needs at least 20 sequences and gets 19"):
        check_shape(["dsa"], n_trajectories=19, n_sublayers=12)


TWO_PROCESSES = """
import os, sys, torch
from pathlib import Path

from rsdyn.analysis.collected import Collected
from rsdyn.analysis.measures.dsa import depth_states
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch

folder = Path(sys.argv[1])
other = os.fork()
rank = int(other == 0)
torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
x = torch.load(folder / "x.pt")
collected = Collected(n_sublayers=x.shape[1], n_units=x.shape[2], measures=("dsa",))
own = torch.arange(len(x))[rank::2]
batch = TrajectoryBatch(x[own], own)
collected.first_pass(batch)
collected.between_passes()
collected.second_pass(batch)
collected.finish()
torch.save(depth_states(collected), folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
if other:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def test_two_processes_equal_one(tmp_path):
    x = stream().float()[:, :18]  # nine sublayers each, so that layers are shared out unevenly
    torch.save(x, tmp_path / "x.pt")
    run_in_two(TWO_PROCESSES, tmp_path, seconds=120)
    states, share = depth_states(probed(x, ("dsa",)))
    for rank in range(2):
        mine, held = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(held, share, rtol=1e-6, atol=0)
        torch.testing.assert_close(mine, states, rtol=1e-4, atol=1e-4)


# -- what is shown -----------------------------------------------------------------------------------------------------


def with_states(of, **by_condition):
    settings = dict(of.facts.settings) | {"analysis.measures": ["correlation", "dsa"]}
    return dataclasses.replace(of, facts=dataclasses.replace(of.facts, settings=settings), states=by_condition)


@pytest.fixture(scope="module")
def comparison():
    x = moving()
    walk = drawn(N, 9, 5, seed=4).cumsum(1)
    return compare(
        [
            with_states(model("a"), original=kept(x), untrained=kept(walk)),
            with_states(model("b", n_units=40), original=kept(x @ turn(5))),
            model("c", untrained=None),
            with_states(model("d", untrained=None, positions="all")),
        ]
    )


def test_a_comparison_has_every_pair_with_twins_and_says_who_is_missing(comparison):
    pairs = {pair.labels: pair for pair in comparison.dynamics}
    assert set(pairs) == {("a", "b"), ("a", "a-untrained"), ("b", "a-untrained")}
    assert pairs["a", "b"].distance < 0.01 and pairs["a", "a-untrained"].told_apart
    said = " ".join(comparison.no_dynamics)
    assert "c: dsa is not among the measures" in said and "d: models are compared at last tokens" in said
    assert "the run keeps no states" in said  # of b's twin
    (told,) = dynamics_answer(comparison)
    assert told.startswith("Of 1 pair of models, 0 differ") and "1 is nearer to each other than to the same" in told


def test_it_stands_in_every_output(comparison):
    written = as_json(comparison)
    assert written["dynamics"]["components"] == 5 and written["dynamics"]["delays"] == 1
    first = written["dynamics"]["pairs"][0]
    assert first["models"] == ["a", "b"] and first["n_layers"] == [10, 10] and first["p"] == 0.005
    assert first["told_apart"] is False and first["at_least"] <= first["distance"] + 1e-3
    table = as_markdown(comparison)
    assert "## Dynamics of the models over depth" in table and "| a and b | 60 | 10 and 10 | 0.0" in table
    assert "Dynamics not compared: c: dsa is not among the measures." in table
    (panel,) = dynamics_panels(comparison)
    (map_,) = panel.marks
    assert [label.split()[0] for label in map_.labels] == ["1", "2", "3"]
    labels = [label.split()[1] for label in map_.labels]
    assert set(labels) == {"a", "b", "a-untrained"} and [tick[1] for tick in panel.y.ticks] == list(map_.labels)
    np.testing.assert_array_equal(map_.z, map_.z.T)
    i, j = labels.index("a"), labels.index("b")
    assert map_.z[i, j] == pytest.approx(comparison.dynamics[0].distance) and np.isnan(np.diag(map_.z)).all()
    html = comparison_page(comparison, {"dynamics": [panel]})
    assert 'id="dynamics"' in html and "Distance of dynamics over depth" in html and "halves of one model" in html


def test_nobody_who_did_not_ask_reads_of_it():
    plain = compare([model("a"), model("b")])
    assert not plain.dynamics and not plain.no_dynamics
    assert "Dynamics of the models" not in as_markdown(plain)
    assert 'id="dynamics"' not in comparison_page(plain, {})
