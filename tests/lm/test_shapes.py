"""The shipped shapes against what the Hub says of the files: their number of parameters, which nobody here chose."""

import re

import pytest
from transformers import AutoConfig

from rsdyn.config.command_line import load_config, preset_names
from rsdyn.lm.shapes import SHAPES
from rsdyn.lm.sites import site_names
from rsdyn.lm.weights import empty_model, n_parameters

LOCAL = ("embedded", "smollm2")


@pytest.mark.parametrize("name", SHAPES)
def test_the_parameters_are_those_of_the_files(name):
    shape = SHAPES[name]
    config = AutoConfig.for_model(**shape.config)
    assert n_parameters(empty_model(config, head=True)) == shape.parameters
    assert re.fullmatch("[0-9a-f]{40}", shape.revision)
    assert site_names(config)  # which follows a forward through the layers


def test_every_preset_has_its_shape():
    named = {load_config(["--config", preset], "train").lm.name for preset in preset_names()}
    assert named - set(LOCAL) == set(SHAPES)
