"""A small version of benchmarks/jacobian_coverage.py: on made-up texts, intervals hold what they should."""

import numpy as np
import pytest
from benchmark_module import benchmark

from rsdyn.analysis import jacobians
from rsdyn.analysis.jacobians import JacobianResult
from rsdyn.analysis.sink import PRODUCTS

LAYERS, D, DOCUMENTS, OF_EACH = 4, 16, 40, 3


@pytest.fixture(scope="module")
def bench():
    return benchmark("jacobian_coverage")


@pytest.fixture(scope="module")
def world():
    """120 texts of 40 documents, whose curves share half their variance within a document; skewed gains."""
    rng = np.random.default_rng(0)
    s, owner = 2 * LAYERS, np.repeat(np.arange(DOCUMENTS), OF_EACH)
    result = JacobianResult(LAYERS, D, 2, documents=owner)

    def shared(*shape):
        return (rng.normal(size=(DOCUMENTS, *shape))[owner] + rng.normal(size=(len(owner), *shape))) / 2**0.5

    for series in ("full", "none"):
        depth = np.linspace(0, 1, s)
        curves = {name: 0.5 + 0.2 * depth + 0.05 * shared(s) for name in jacobians.CURVES}
        curves |= {
            "product_gain": np.exp(3 - depth + 0.5 * shared(1)),
            "product_participation": 2 + depth + 0.3 * shared(s),
        }
        curves |= {"exponents": np.sort(shared(D)) - 1, "growth": 0.2 + 0.02 * shared(), "singular": np.zeros((120, s))}
        result.curves[series] = curves
    for key in ("rest", "first"):
        result.sink[key] = {name: result.curves["none"][name] for name in PRODUCTS}
    return result


def test_every_row_covers(bench, world, monkeypatch):
    monkeypatch.setattr(jacobians, "N_DRAWS", 4)  # of the trends, which are not looked at here
    found = bench.coverage(world, 30, 60)
    smooth = {name: row["coverage"] for name, row in found.items() if "trend" not in name and row["told"] == 1}
    assert len(smooth) > 16
    assert min(smooth.values()) >= 83, smooth  # of 60 samples that cover 95 % fewer than 50 come once in thousands
    assert 91 <= np.mean(list(smooth.values())) <= 99.5
    assert 0.9 < np.mean([found[name]["width"] for name in smooth]) < 1.4  # Student's t of ten documents is 1.15


def test_texts_of_a_document_are_not_independent(bench, world):
    """The same samples with each text as a document of its own: intervals that are too narrow."""
    values = {True: [], False: []}
    claim = next(c for c in jacobians.claims_of(D, 2) if c.key == "antisymmetric_early")
    for k in range(60):
        index, owner = bench.drawn(world.documents, 30, np.random.default_rng(k))
        for whole in values:
            part = bench.part(world, index, owner if whole else np.arange(len(index)))
            values[whole].append(jacobians._value(part, "full", claim))
    truth = jacobians._value(world, "full", claim).value
    covered = {whole: bench.summary(found, truth)["coverage"] for whole, found in values.items()}
    assert covered[True] > covered[False] + 5


def test_it_resumes(bench, world, tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    half = bench.part(world, np.arange(7), world.documents[:7])
    bench.write(half, path)
    again = JacobianResult(LAYERS, D, 2)
    bench.read(again, path)
    for of in ("curves", "sink"):
        for series, curves in getattr(half, of).items():
            for name, values in curves.items():
                np.testing.assert_array_equal(getattr(again, of)[series][name], values)
