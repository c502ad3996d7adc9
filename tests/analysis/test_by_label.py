"""Groups of sequences against each measured as a stream by itself, planted differences, and labels that say nothing."""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom

from rsdyn.analysis import by_label, group_table
from rsdyn.analysis.by_label import by_group
from rsdyn.analysis.collected import Collected
from rsdyn.analysis.group_design import Labelled, check_groups
from rsdyn.analysis.measure import How
from rsdyn.analysis.results import AnalysisResults, curves
from rsdyn.analysis.settings import AnalysisConfig, RotationConfig
from rsdyn.analysis.stored import flatten, unflatten
from rsdyn.analysis.streams import measure_stream
from rsdyn.errors import UserError
from rsdyn.stream.text.groups import SequenceGroups
from rsdyn.stream.trajectory_datamodule import TrajectoryBatch

ALL = ["activations", "correlation", "cosine", "velocity", "mutual_information", "rotation", "pca", "norm", "curvature"]
S, D = 8, 6


def stream(n, seed=0, s=S, d=D):
    torch.manual_seed(seed)
    return torch.randn(n, s, d).cumsum(1) + torch.randn(d)


def collect(x, measures, groups=None, largest=None):
    found = Collected(n_sublayers=x.shape[1], n_units=x.shape[2], measures=measures, keep=None, components=3,
                      groups=groups, largest=largest, keeps=True)  # fmt: skip
    batch = TrajectoryBatch(x, torch.arange(len(x)))
    found.first_pass(batch)
    found.between_passes()
    if found.n_passes == 2:
        found.second_pass(batch)
    found.finish()
    return found


def how_of(measures):
    settings = AnalysisConfig(measures=list(measures), rotation=RotationConfig(surrogates=9, nulls=["sign_flip"]))
    return How(settings, 2, 0)


def grouped(x, labels, documents=None, measures=("cosine", "norm"), names=("a", "b", "c")):
    labels = torch.as_tensor(labels)
    documents = torch.arange(len(x)) if documents is None else torch.as_tensor(documents)
    how, collected = how_of(measures), collect(x, measures)
    found = AnalysisResults({"original": measure_stream(collected, how, x.dtype)}, tuple(measures), 2, *x.shape[1:])
    names = tuple(names[: int(labels.max()) + 1])
    return by_group(collected, found, Labelled(names, labels, documents, "documents"), how), found


@pytest.fixture
def few_permutations(monkeypatch):
    monkeypatch.setattr(by_label, "FEWEST_PERMUTATIONS", 99)
    monkeypatch.setattr(by_label, "MOST_PERMUTATIONS", 99)
    monkeypatch.setattr(by_label, "COSTLY_SUBSETS", 40)


def test_a_group_is_measured_as_it_is_by_itself(few_permutations):
    """Every curve and its interval, at equal N: the same sequences as a stream of their own."""
    x, labels = stream(80), torch.arange(80) % 2
    documents = torch.arange(80) // 2 % 20
    found, _ = grouped(x, labels, documents, ALL)
    assert {curve.path for curve in found.curves.values()} == set(by_label.CURVES)
    for g in range(2):
        rows = labels == g
        own = SequenceGroups(documents[rows], 20, "documents")
        alone = measure_stream(collect(x[rows], ALL, own), how_of(ALL), x.dtype)
        known = dict(curves(alone))
        for key, curve in found.curves.items():
            if key == "explained":
                continue  # by the common components of all
            wanted = known[curve.path]
            torch.testing.assert_close(
                curve.value[g], wanted.value.reshape(curve.value[g].shape), rtol=1e-5, atol=1e-6, msg=key
            )
            # of some units; by simulation; a stream's own leave out ten groups, not twenty
            if key not in ("information", "density", "dimensions", "components_90"):
                ends = wanted.interval.reshape(2, -1)
                torch.testing.assert_close(curve.interval[:, g], ends, rtol=1e-4, atol=1e-4, msg=key)
        assert (found.curves["cosine"].n == 40).all()
    pca = SklearnExplained(x)
    torch.testing.assert_close(found.curves["explained"].value[1], pca(x[labels == 1]), rtol=1e-4, atol=1e-5)
    difference = found.curves["cosine"].value[0] - found.curves["cosine"].value[1]
    torch.testing.assert_close(found.curves["cosine"].difference[0], difference)
    row, level = found.rows["cosine_level"], found.curves["cosine"].value.mean(1)
    torch.testing.assert_close(row.value, level)
    torch.testing.assert_close(row.difference, level[:1] - level[1:])
    assert "correlation_trend" in found.rows and "information_early_fall" in found.rows and "turns" in found.rows


class SklearnExplained:
    """What the common components explain at each sublayer of some sequences about their own means."""

    def __init__(self, x):
        from sklearn.decomposition import PCA

        self.pca = PCA(3).fit(x.reshape(-1, x.shape[-1]).double().numpy())

    def __call__(self, x):
        flat = x.double().numpy()
        back = self.pca.inverse_transform(self.pca.transform(flat.reshape(-1, flat.shape[-1]))).reshape(flat.shape)
        missed = ((flat - back) ** 2).sum(-1).mean(0)
        return torch.from_numpy(1 - missed / ((flat - flat.mean(0)) ** 2).sum(-1).mean(0))


def test_a_planted_difference_is_found_and_what_does_not_differ_is_not():
    """Group a's states are twice as long, by document: norm and speed differ, cosine and correlation do not."""
    x, documents = stream(120, seed=1), torch.arange(120) // 4
    labels = documents % 2
    x[labels == 0] *= 2
    found, _ = grouped(x, labels, documents, ["cosine", "norm", "velocity", "correlation"])
    assert (found.exchange, found.movable, found.permutations) == ("documents", 120, 1999)
    for key in ("norm_level", "speed_level"):
        row = found.rows[key]
        assert row.p == pytest.approx(0.0005) and row.p_holm < 0.05
        assert row.difference_interval[0] > 0 and row.value[0] > 1.5 * row.value[1]
    assert found.curves["norm"].p == pytest.approx(0.0005)
    assert found.rows["cosine_level"].p > 0.01 and found.rows["correlation_mean"].p > 0.01
    assert "differ between a and b (Holm p < 0.05)" in group_table.headline(found)


@pytest.mark.parametrize("by", ["documents", "sequences"])
def test_labels_that_mean_nothing_are_rejected_as_often_as_they_should(few_permutations, by):
    """Documents that differ; labels of whole documents, or of sequences in them: five per cent at .05."""
    n_sets, ps, covered = 80, [], 0
    for i in range(n_sets):
        torch.manual_seed(i)
        documents = torch.arange(60) // 5
        x = torch.randn(60, 4, 3).cumsum(1) + 2 * torch.randn(12, 1, 3)[documents]
        labels = torch.randperm(12)[documents] % 2 if by == "documents" else torch.randperm(60) % 2
        found, _ = grouped(x, labels, documents, ["norm"])
        assert found.exchange == ("documents" if by == "documents" else "within")
        ps.append(float(found.rows["norm_level"].p[0]))
        low, high = found.rows["norm_level"].difference_interval[:, 0]
        covered += bool(low < 0 < high)
    rejected = sum(p <= 0.05 for p in ps)
    assert binom.ppf(0.001, n_sets, 0.05) <= rejected <= binom.ppf(0.999, n_sets, 0.05)
    assert covered >= binom.ppf(0.001, n_sets, 0.95)


def test_groups_of_one_sequence_of_unequal_size_and_without_labels(few_permutations):
    x = stream(61)
    labels = torch.tensor([0] * 40 + [1] * 15 + [2] + [-1] * 5)
    measures = ["cosine", "norm", "rotation", "mutual_information", "correlation"]
    found, _ = grouped(x, labels, None, measures)
    assert found.sequences.tolist() == [40, 15, 1] and found.unlabelled == 5
    assert found.contrasts == ("a - the rest", "b - the rest")
    row = found.rows["cosine_level"]
    assert row.n.tolist() == [40, 15, 1] and row.value.isfinite().all()
    assert row.interval[:, :2].isfinite().all() and row.interval[:, 2].isnan().all()
    turns, mi = found.rows["turns"], found.rows["information_level"]
    assert turns.n.tolist() == mi.n.tolist() == [15, 15, 0] and turns.equal_n and not row.equal_n
    assert mi.value[:2].isfinite().all() and mi.value[2].isnan() and found.rows["correlation_mean"].value[2].isnan()
    said = " ".join(found.notes)
    assert "5 sequences have no label: they are in the whole alone." in said
    assert "Group c has 1 sequence of 1 document: too small for an interval." in said
    assert "Group c is not compared: it has fewer than 10 sequences." in said
    text = json.dumps(group_table.as_json(found), allow_nan=False)
    assert json.loads(text)["sequences"] == {"a": 40, "b": 15, "c": 1}
    assert "too few sequences" in group_table.as_markdown(found) and "nan" not in group_table.as_markdown(found)
    for width in (60, 200):
        assert all(len(line) <= width for line in group_table.as_text(found, width))
    two, _ = grouped(x, torch.tensor([0] * 55 + [1] + [-1] * 5), None, measures)
    assert not two.contrasts and two.rows["cosine_level"].difference.numel() == 0
    assert "No two groups are large enough to be compared." in two.notes
    json.dumps(group_table.as_json(two), allow_nan=False)
    assert "too small to be compared" in group_table.headline(two) and group_table.as_text(two, 200)


def test_one_group_alone_is_refused():
    with pytest.raises(UserError, match="all 7 sequences that are compared are of one group, b, so"):
        check_groups(Labelled(("a", "b"), torch.tensor([1] * 7 + [0]), torch.arange(8), "documents"), 7)
    with pytest.raises(UserError, match="have no label"):
        check_groups(Labelled(("a", "b"), torch.tensor([-1] * 7 + [0]), torch.arange(8), "documents"), 7)


def test_without_massive_units_and_in_a_file_and_back(few_permutations, tmp_path):
    x = stream(40)
    x[..., 2] += 4000 * torch.arange(1, S + 1)
    found, whole = grouped(x, torch.arange(40) % 2, None, ["cosine", "norm", "pca", "correlation"])
    assert found.rows["norm_level_without_massive"].value.max() < 0.01 * found.rows["norm_level"].value.min()
    alone = dict(curves(whole.main))["norm/mean"].without_massive.value
    both = found.curves["norm_without_massive"].value
    torch.testing.assert_close(both.mean(0), alone, rtol=1e-5, atol=1e-6)
    assert "dimensions_level_without_massive" not in found.rows and "dimensions_level" in found.rows
    results = AnalysisResults(whole.conditions, whole.measures, 2, S, D, found)
    np.savez(tmp_path / "r.npz", **flatten(results))
    with np.load(tmp_path / "r.npz") as file:
        back = unflatten({k: file[k] for k in file.files})
    assert back.by_group.names == found.names and list(back.by_group.rows) == list(found.rows)
    assert back.by_group.notes == found.notes and back.by_group.contrasts == ("a - b",)
    assert group_table.as_json(back.by_group) == group_table.as_json(found)
    assert unflatten(flatten(whole)).by_group is None
