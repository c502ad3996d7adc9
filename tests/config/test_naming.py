"""Library errors name arguments; a program names the settings that they come from."""

import ast
import re
from pathlib import Path

import pytest

import rsdyn
from rsdyn.autoencoder.widths import geometric_widths
from rsdyn.config.naming import in_keys, keyed
from rsdyn.config.schema import options
from rsdyn.errors import UserError
from rsdyn.lm.source import find_lm
from rsdyn.perturbation.prompts import layers_of
from rsdyn.run.trainer import make_trainer
from rsdyn.stream.text.corpus import open_corpus

ROOT = Path(rsdyn.__file__).parent
KNOW_KEYS = ("config", "run", "commands")
# what a setting is, pages and layouts that show a finished run's settings, and programs of their own
SHOW_KEYS = (
    "options.py",
    "analysis/comparison.py",
    "figures/stream.py",
    "report/",
    "tracking/workspace",
    "stream/cache/__main__.py",
    "__main__.py",
)


@pytest.mark.parametrize(
    ("within", "text", "expected"),
    [
        ("data", "val_size=3, data.limit=5 and n_limit=2: lower val_size=3; limit it.",
         "data.val_size=3, data.limit=5 and n_limit=2: lower data.val_size=3; limit it."),
        ("analysis", "mi.estimator=ksg: raise `samples`", "analysis.mi.estimator=ksg: raise analysis.samples"),
        ("perturb", "layers: this model has no layer 9", "perturb.layers: this model has no layer 9"),
        (("data", "lm"), "`bos` and `limit` of the name", "lm.bos and data.limit of the name"),
        ("lm", "/runs/name=a and b-name=c", "/runs/name=a and b-name=c"),
    ],
)  # fmt: skip
def test_arguments_become_keys(within, text, expected):
    assert keyed(within, text) == expected


@pytest.mark.parametrize(
    ("raises", "starts"),
    [
        (lambda: find_lm("/nowhere/at/all"), "lm.name=/nowhere/at/all: "),
        (lambda: open_corpus(path="/nowhere.txt"), "data.path=/nowhere.txt: "),
        (lambda: open_corpus(path="a.txt", revision="v1"), "data.revision=v1 needs data.name"),
        (lambda: layers_of([9], 4), "perturb.layers: this model has no layer 9"),
        (lambda: geometric_widths(64, 64, 10), "cae.bottleneck=64: "),
    ],
)
def test_the_package_that_raises_says_whose_argument_it_is(raises, starts):
    with pytest.raises(UserError) as caught:
        raises()
    assert in_keys(caught.value).startswith(starts) and not str(caught.value).startswith(starts)


def test_what_names_keys_already_stays(monkeypatch):
    def raises():
        raise UserError("name=x")

    monkeypatch.setitem(raises.__globals__, "__name__", make_trainer.__module__)
    with pytest.raises(UserError) as caught:
        raises()
    assert in_keys(caught.value) == "name=x"


def test_no_message_of_the_library_names_a_key():
    names = "|".join(re.escape(key) for key in options() if "." in key)
    key = re.compile(rf"(?<![\w.])({names})(?![\w])")
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith((*(f"{wing}/" for wing in KNOW_KEYS), *SHOW_KEYS)) or path.name == "settings.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found += [f"{place}:{node.lineno}: {said}" for said in key.findall(node.value)]
    assert not found
