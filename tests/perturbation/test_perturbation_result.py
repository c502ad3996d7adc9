"""What is said of points beyond standing still: right where the answer is known."""

from types import SimpleNamespace

import pytest
import torch

from rsdyn.dynamics.controls import random_writes, stays_put
from rsdyn.dynamics.projection import PCA
from rsdyn.perturbation.plane import Plane
from rsdyn.perturbation.points import _add
from rsdyn.perturbation.result import STILL, WRITES, Found
from rsdyn.perturbation.words import closing_table, words

P, S, D = 30, 10, 24
PLANE = PCA(torch.zeros(D), torch.eye(D)[:, :2], torch.ones(2), torch.tensor(9.0))


def found_of(move, n_prompts=21, drawn=True):
    """``move(reference (S, D), states (P, D))`` moves the points; each prompt's reference travels its own way."""
    numbers = tuple(range(1, n_prompts)) if drawn else ()
    found = Found("teleport", n_prompts, P, {3: 0}, numbers)
    for number in range(n_prompts):
        generator = torch.Generator().manual_seed(number)
        way = torch.randn(D, generator=generator, dtype=torch.float64)
        steps = torch.linspace(1, 6, S, dtype=torch.float64)[:, None]
        reference = SimpleNamespace(stream=steps * way, log_probs=torch.zeros(5))
        # some lie ahead of the reference, some behind it
        ahead = 8 * torch.rand(P, 1, generator=generator, dtype=torch.float64) - 1
        states = ahead * way + 0.5 * torch.randn(P, D, generator=generator, dtype=torch.float64)
        for condition, stream in (
            ("teleport", move(reference.stream, states)),
            (STILL, stays_put(states, S)),
            (WRITES, random_writes(states, reference.stream, generator=generator)),
        ):
            _add(found, (3, condition), reference, stream, torch.zeros(P, 5), PLANE, 0, number)
    return found


def test_a_system_that_never_moves_recovers_nothing():
    """Though most of its points end nearer to the reference, which comes to them."""
    found = found_of(lambda reference, states: stays_put(states, S))
    (beyond,) = found.beyond_still
    rows = {row.condition: row for row in found.rows}
    assert rows["teleport"]["nearer"] > 0.4
    for difference in (beyond.nearer, beyond.contraction):
        assert difference.value == 0 and difference.low <= 0 <= difference.high
    assert beyond.mse_ratio.value == 1
    assert any(
        "+0 [+0, +0] percentage points over 20 prompts. Not told apart" in line for line in words(found, plane())
    )


def test_random_steps_are_not_told_from_recovery_by_their_own_size():
    found = found_of(lambda reference, states: random_writes(states, reference, generator=torch.Generator()))
    (beyond,) = found.beyond_still
    assert beyond.nearer.high <= 0 or beyond.nearer.low <= 0 <= beyond.nearer.high
    assert beyond.nearer.value <= 0


def test_a_linear_contraction_is_recovery_beyond_standing_still():
    rate = 0.7 ** torch.arange(S, dtype=torch.float64)[None, :, None]
    found = found_of(lambda reference, states: reference + (states - reference[0])[:, None] * rate)
    (beyond,) = found.beyond_still
    rows = {row.condition: row for row in found.rows}
    assert rows["teleport"]["nearer"] == 1
    assert beyond.nearer.low > 0 and beyond.contraction.high < 0 and beyond.mse_ratio.high < 1
    assert float(beyond.nearer.value) == pytest.approx(1 - rows[STILL]["nearer"])
    assert rows["teleport"]["contraction"] == pytest.approx(torch.log(torch.tensor(0.7, dtype=torch.float64)).item())
    assert any("They recover beyond what standing still feigns" in line for line in words(found, plane()))


def test_the_prompt_is_not_part_of_the_sample_of_the_text():
    found = found_of(lambda reference, states: stays_put(states, S))
    assert found.counted(3, "teleport") == [*range(1, 21)] and len(found.by_prompt(3, "teleport", "nearer")) == 20
    own = float(found.values[3, "teleport"]["nearer"][0])
    assert found.of_prompt(3, "teleport", "nearer") == own
    text = "\n".join(words(found, plane()))
    assert f"{100 * own:.0f} and {100 * own:.0f} % at layer 3" in text
    assert "Over 20 prompts of the text: shares are means, the other numbers medians." in closing_table(found)
    assert found.arrays()["sample"].tolist() == [*range(1, 21)]
    alone = found_of(lambda reference, states: stays_put(states, S), n_prompts=1, drawn=False)
    (beyond,) = alone.beyond_still
    assert beyond.nearer.low.isnan() and "nearer_interval" not in beyond.to_dict()
    assert any("One prompt says nothing of others." in line for line in words(alone, plane()))


def plane(owned=None):
    massive = () if owned is None else (7,)
    return Plane(PLANE, torch.zeros(2, 2), torch.tensor([0.6, 0.2]), "PC", massive, owned)


def test_it_is_said_when_massive_units_own_the_plane():
    assert plane(torch.tensor([0.3, 0.1])).words() == [] and plane().words() == []
    (line,) = plane(torch.tensor([0.81, 0.02])).words()
    assert "unit 7" in line and "81 % of PC 1 and 2 % of PC 2" in line and "60 % and 20 % of the variance" in line
