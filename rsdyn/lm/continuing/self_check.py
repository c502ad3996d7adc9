"""Does continuing from a sublayer give what whole forwards of transformers give? Asked on each reference run.

A model whose layers look at more than they are given again would be continued wrongly, and nothing else would say so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rsdyn.errors import UnfitModelError, UserError
from rsdyn.lm.continuing.layer_calls import BLOCK, first, reading_sites, refusing
from rsdyn.lm.model import LanguageModel

if TYPE_CHECKING:
    from rsdyn.lm.continuing.reference import Continued, Reference

ContinueAll = Callable[..., "list[Continued]"]

# What roundings make of the difference to a whole forward, relative to the state. Seen in 47 families and at 32 layers:
# up to 3e-6 in float32, 9e-3 in float16, 4e-2 in bfloat16; a wrong formula makes 3e-2 to 1. Thrice this is refused.
_ROUNDING = {torch.float64: 3e-5, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}
# torch.set_float32_matmul_precision lets float32 be multiplied with as many digits as these have
_DIGITS = {"highest": torch.float32, "high": torch.float16, "medium": torch.bfloat16}


def checked(lm: LanguageModel, reference: Reference, continue_all: ContinueAll) -> Reference:
    """The reference, with points one by one where side by side they are wrong; ``UserError`` where both are.

    The points of this check go through the layers in one block, and differ so much that a look at each other shows.
    The first is the run's own state, and of the last two pieces' last points whole forwards are run as well: one begins
    at layer 0, one at the last site of the middle layer. A third forward has one state at every token.
    """
    middle = lm.n_layers // 2 * len(lm.sites.names) + len(lm.sites.names) - 1
    generator = torch.Generator().manual_seed(0)
    early, late = (_noisy(reference.stream[s], n, generator) for s, n in ((0, BLOCK // 2), (middle, BLOCK // 4)))
    early[0] = reference.stream[0]
    whole = _whole_forwards(lm, reference.tokens, early[-1], middle, late[-1])
    own = torch.cat([reference.stream, reference.final[None]])

    def errors(reference: Reference) -> tuple[float, float]:
        """Of perturbing the last token, and of one token alone in place of a sequence of equal ones."""
        with refusing(lm, "its layers do not run for one token alone"):
            from_early, from_late = continue_all(lm, reference, [(0, early), (middle, late)])
            (frozen,) = continue_all(lm, reference, [(0, early[:1])], freeze_attention=True)
            (alone,) = continue_all(lm, reference, [(0, early[-1:])], position="all")
        distances = (
            _distance(from_early, 0, own),
            _distance(from_early, -1, whole[0]),
            _distance(from_late, -1, whole[1, middle:]),
            _distance(frozen, 0, own),
        )
        return max(distances), _distance(alone, 0, whole[2])

    try:
        found, alone = errors(reference)
    except UserError:
        if not reference.blocks:
            raise
        found = alone = torch.inf  # side by side; one by one may do, or says the same
    if found > rounding(lm) and reference.blocks:
        one_by_one = replace(reference, blocks=False)
        again, alone_again = errors(one_by_one)
        if again < found / 2:  # and where it is not, it was rounding after all
            reference, found, alone = one_by_one, again, alone_again
    if found > 3 * rounding(lm):
        raise UnfitModelError(
            f"name: {lm.name} cannot be continued from a sublayer: from perturbed states it comes {found:.1e} of "
            f"the state's norm away from whole forwards of transformers, and {3 * rounding(lm):.0e} is allowed in "
            f"{lm.dtype}. Its layers look at more than states, keys and values. Give another model."
        )
    return replace(reference, alone_error=alone)


def rounding(lm: LanguageModel) -> float:
    """What roundings make, at most, of a relative difference between two ways of running the model."""
    return _ROUNDING[_DIGITS[torch.get_float32_matmul_precision()] if lm.dtype == torch.float32 else lm.dtype]


def _noisy(state: Tensor, n: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(n, len(state), generator=generator).to(state)
    return state + 0.5 * state.norm() / len(state) ** 0.5 * noise


def _distance(result: Continued, point: int, expected: Tensor) -> float:
    """The largest relative distance of a point's states from those ``(n, D)`` of a whole forward; inf for NaN."""
    states = torch.cat([result.stream[point], result.final[point, None]])
    distances = (states - expected).float().norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-30)
    return float(distances.nan_to_num(nan=torch.inf).max())


@torch.inference_mode()
def _whole_forwards(lm: LanguageModel, tokens: Tensor, early: Tensor, middle: int, late: Tensor) -> Tensor:
    """Three plain forwards of a prompt in one batch: the last token's states ``(3, S + 1, D)``, the final one included.

    The first has ``early`` in place of the last token's stream at sublayer 0, the second ``late`` at ``middle``, the
    third ``early`` at every token.
    """
    states = torch.empty(3, lm.n_sublayers + 1, lm.n_units, dtype=lm.dtype, device=lm.device)

    def take(s: int, stream: Tensor) -> None:
        stream = stream.view(3, len(tokens), -1)
        if s == 0:
            stream[0, -1] = early
            stream[2] = early
        if s == middle:
            stream[1, -1] = late
        states[:, s] = stream[:, -1]

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        states[:, -1] = first(output)[:, -1]

    with ExitStack() as hooks:
        reading_sites(lm, hooks, take)
        hooks.callback(lm.sites.layers[-1].register_forward_hook(behind).remove)
        lm.base(input_ids=tokens.expand(3, -1), use_cache=False)
    return states
