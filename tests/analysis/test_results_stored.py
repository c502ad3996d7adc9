"""Typed results as flat arrays and back: to the bit, whatever is None, and refused where the layout is another."""

from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from rsdyn.analysis.measures import OF_STREAM, measure_of
from rsdyn.analysis.results import MEASURES, AnalysisResults, ConditionResults, Measured, curves, each_tensor
from rsdyn.analysis.settings import MASSIVE, PHASES, READOUT, SHAPE
from rsdyn.analysis.settings import MEASURES as ASKED_FOR
from rsdyn.analysis.stored import flatten, flatten_part, unflatten, unflatten_part
from rsdyn.errors import UserError
from rsdyn.files import LAYOUT

DTYPES = (torch.float64, torch.float32, torch.int64)


def made(kind, optional, depth=0, seed=None):
    """A result of a class, every field filled by its type; what may be None is made where ``optional``."""
    seed = [0] if seed is None else seed
    seed[0] += 1
    if is_dataclass(kind):
        hints = get_type_hints(kind, localns={"Tensor": Tensor})
        found = {}
        for f in fields(kind):
            of = [t for t in get_args(hints[f.name]) if t is not type(None)]
            may_be_none = type(None) in get_args(hints[f.name])
            of = of[0] if may_be_none else hints[f.name]
            if may_be_none and (not optional or (of is kind and depth > 0)):
                continue
            found[f.name] = made(of, optional, depth + (of is kind), seed)
        return kind(**found)
    if get_origin(kind) is dict:
        return {name: made(get_args(kind)[1], optional, depth, seed) for name in ("zebra", "ape")}
    if get_origin(kind) is tuple:
        return ("rotation", "cosine")
    if kind is Tensor:
        generator = torch.Generator().manual_seed(seed[0])
        shape = (3, 0, 2) if seed[0] % 5 == 0 else (2, 3)[: seed[0] % 3]
        x = (100 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(DTYPES[seed[0] % 3])
        return x if x.dtype == torch.int64 or not x.numel() else x.flatten().index_fill(0, torch.tensor(0), torch.nan)
    return {bool: True, int: 7, float: 0.1 + seed[0], str: f"words of {seed[0]}"}[kind]


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if is_dataclass(a):
        for f in fields(a):
            assert_same(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}")
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    else:
        assert a == b, where


@pytest.mark.parametrize("optional", [True, False], ids=["everything", "only what must be"])
def test_results_come_back_to_the_bit_through_a_file(optional, tmp_path):
    results = made(AnalysisResults, optional)
    np.savez_compressed(tmp_path / "results.npz", **flatten(results))
    with np.load(tmp_path / "results.npz") as file:  # of numbers and texts alone: no pickle
        again = unflatten(file)
    assert_same(results, again)
    assert again.main_name == "zebra" and again.main is again.conditions["zebra"]


def test_a_value_has_the_name_of_what_was_measured_and_the_rest_stands_below_it():
    found = Measured(torch.tensor([1.0, 2.0]), interval=torch.zeros(2, 2), n=9, without_massive=Measured(torch.ones(2)))
    arrays = flatten_part(found, "original/cosine/mean")
    name = "original/cosine/mean"
    assert list(arrays) == [name, f"{name}/interval", f"{name}/n", f"{name}/without_massive"]
    assert arrays[name].tolist() == [1, 2] and int(arrays[f"{name}/n"]) == 9
    assert_same(unflatten_part(Measured, arrays, name), found)


def test_the_measures_that_can_be_asked_for_are_the_fields_of_the_results():
    assert MEASURES[: len(ASKED_FOR)] == ASKED_FOR and {MASSIVE, *SHAPE, READOUT, PHASES} < set(MEASURES)
    assert all(measure_of(name).rows for name in OF_STREAM)  # each has a module of its name


def test_the_page_of_the_layout_names_every_part_of_a_measured_value_and_of_the_results():
    page = (Path(__file__).parents[2] / "docs" / "results-layout.md").read_text()
    for kind, form in ((Measured, "`/{}`"), (AnalysisResults, "`{}`")):
        for f in fields(kind):
            assert f.name == "value" or form.format(f.name) in page, f.name
    assert page.count(f"| `layout` | {LAYOUT} |") == 2


def test_a_missing_array_is_named():
    arrays = flatten(made(AnalysisResults, True))
    del arrays["ape/activations/mean"]
    with pytest.raises(UserError, match=r"a\.npz: the array 'ape/activations/mean' is missing\. Run the script again"):
        unflatten(arrays, "a.npz")


def test_everything_with_an_interval_is_found_by_its_path():
    found = dict(curves(made(ConditionResults, True)))
    assert {"correlation/mean", "velocity/speed", "pca/over_depth/explained", "rotation/regularity/mean"} <= set(found)
    assert "cosine/mean/without_massive" not in found
    assert all(isinstance(value, Measured) for value in found.values())


def test_each_tensor_is_changed_and_nothing_else():
    found = made(ConditionResults, True)
    changed = each_tensor(found, lambda x: x + 1)
    assert torch.equal(changed.cosine.mean.value.nan_to_num(0), (found.cosine.mean.value + 1).nan_to_num(0))
    key = "zebra"
    p = changed.rotation.nulls[key].p.nan_to_num(0)
    assert torch.equal(p, (found.rotation.nulls[key].p + 1).nan_to_num(0))
    assert_same(replace(changed.counts), found.counts)
