"""Options that pass through to Lightning: each is honoured, or refused before any work with its reason."""

import pytest

from rsdyn.config.command_line import load_config
from rsdyn.config.trainer_options import check_max_steps
from rsdyn.errors import UserError


def load(option, script="train"):
    epochs = ["trainer.max_epochs=2"] if script == "train" else []
    return load_config([f"trainer.options.{option}", *epochs], script)


@pytest.mark.parametrize(
    ("option", "why", "cure"),
    [
        ("check_val_every_n_epoch=3", "validation loss", "from 1 to 2"),
        ("check_val_every_n_epoch=0", "validation loss", "from 1 to 2"),
        ("check_val_every_n_epoch=null", "validation loss", "from 1 to 2"),
        ("val_check_interval=0.5", "validation loss", "check_val_every_n_epoch"),
        ("limit_val_batches=0", "what every run needs", "data.val_size"),
        ("limit_val_batches=true", "what every run needs", "data.val_size"),
        ("limit_train_batches=0.0", "what every run needs", "data.limit"),
        ("limit_test_batches=0", "a part of the sequences", "data.test_size"),
        ("limit_test_batches=1", "a part of the sequences", "data.test_size"),
        ("fast_dev_run=true", "no checkpoint", "trainer.max_epochs=1"),
        ("fast_dev_run=3", "no checkpoint", "trainer.max_epochs=1"),
        ("barebones=true", "no checkpoint", "trainer.max_epochs=1"),
        ("enable_checkpointing=false", "from its checkpoint", "run.dir"),
        ("overfit_batches=0.5", "those that are trained on", "data.limit"),
        ("max_time=00:00:01:00", "no best one", "trainer.max_epochs"),
        ("max_steps=0", "nothing would be trained", "-1"),
        ("max_steps=1.5", "whole number", ">= 0"),
        ("min_epochs=-1.5", "whole number", ">= 0"),
    ],
)
def test_what_takes_away_what_a_run_rests_on_is_refused(option, why, cure):
    with pytest.raises(UserError) as caught:
        load(option)
    text = str(caught.value)
    assert text.startswith(f"trainer.options.{option.partition('=')[0]}=") and "is not allowed" in text
    assert why in text and cure in text and "\n" not in text


@pytest.mark.parametrize(
    "option",
    [
        *("check_val_every_n_epoch=2", "fast_dev_run=false", "limit_val_batches=1", "limit_train_batches=0.5"),
        *("max_steps=-1", "max_steps=500", "max_time=null", "num_sanity_val_steps=2", "min_epochs=1", "min_steps=50"),
        *("enable_checkpointing=true", "limit_test_batches=1.0", "gradient_clip_val=1", "profiler=simple"),
    ],
)
def test_the_others_pass(option):
    assert load(option).trainer.options


@pytest.mark.parametrize("option", ["limit_test_batches=0.5", "limit_test_batches=3", "limit_predict_batches=2"])
def test_analyze_measures_all_that_it_says(option):
    with pytest.raises(UserError, match=r"a part of the sequences.*analysis\.samples"):
        load(option, "analyze")


def test_max_steps_must_reach_the_end_of_an_epoch():
    with pytest.raises(UserError, match=r"max_steps=9 ends within the first epoch of 10 steps.*10 or more"):
        check_max_steps({"max_steps": 9}, batches=10)
    check_max_steps({"max_steps": 10}, batches=10)
    check_max_steps({"max_steps": 4, "accumulate_grad_batches": 3}, batches=10)
    check_max_steps({"max_steps": -1}, batches=10)
    check_max_steps({}, batches=10)
