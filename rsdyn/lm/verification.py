"""What ``rsdyn check`` says of a language model, line by line: what was verified on real tokens, and what was not.

The certificate (``certificate.py``) is taken at every opening and has to be cheap; this is the whole list, and takes as
long as it takes: continuing and replaying from *every* sublayer, padding on both sides, and what a certificate cannot
know, such as the weights that were not used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from rsdyn.errors import NonFiniteError, UnfitModelError, UserError
from rsdyn.lm.batches import PACKED
from rsdyn.lm.certificate import Identities, relative
from rsdyn.lm.continuing.continuation import continue_all, run_reference
from rsdyn.lm.continuing.layer_calls import first, reading_sites
from rsdyn.lm.continuing.self_check import rounding
from rsdyn.lm.given import GivenModel
from rsdyn.lm.model import LanguageModel, in_eval_mode
from rsdyn.lm.packing_trial import choose_layout
from rsdyn.lm.prefix import chat_frame, find_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rsdyn.lm.source import LMSource

TEXTS = (
    "The river ran slowly past the old mill, and nobody could say when it had last turned.",
    "In 1905 a clerk at the patent office in Bern published four papers; one of them says that what a clock shows "
    "depends on how it moves.",
)
_FLOAT16 = 65504.0


@dataclass(frozen=True)
class Check:
    """One line of a verification.

    Attributes:
        name: what was looked at, such as ``sums``.
        holds: whether it holds; None for what is told and cannot fail.
        words: what was found.
        numbers: the same for a machine.
    """

    name: str
    holds: bool | None
    words: str
    numbers: dict[str, Any]

    def line(self) -> str:
        """``ok``, ``FAIL`` or ``note``, the name, and what was found."""
        mark = {True: "ok", False: "FAIL", None: "note"}[self.holds]
        return f"{mark:<5} {self.name:<15} {self.words}"


@dataclass(frozen=True)
class Verification:
    """What was verified of a model.

    Attributes:
        model: one line that says which model it is.
        checks: the lines, in order.
    """

    model: str
    checks: tuple[Check, ...]

    @property
    def failure(self) -> Check | None:
        """The first check that does not hold."""
        return next((check for check in self.checks if check.holds is False), None)

    def lines(self) -> list[str]:
        """The whole, to be printed."""
        n = sum(check.holds is True for check in self.checks)
        end = f"All {n} checks hold." if self.failure is None else f"Does not hold: {self.failure.name}."
        return [self.model, "", *(check.line() for check in self.checks), "", end]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        failure = self.failure
        return {
            "model": self.model,
            "holds": failure is None,
            "first_failure": None if failure is None else failure.name,
            "checks": [asdict(check) for check in self.checks],
        }


def verify(
    model: LanguageModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    source: LMSource | None = None,
    on_check: Callable[[Check], object] = lambda check: None,
) -> Verification:
    """Verify a language model on two short texts; what fails is a line of the result, not an exception.

    Args:
        model: an open one, or any of transformers' decoders, which is left as it was (mode, gradients, hooks).
        tokenizer: the model's; without it random tokens stand in for text.
        source: where it was opened from, to tell what of its files was used.
        on_check: called with each line as it is known.

    Raises ``UserError`` for an encoder-decoder's model object or one whose architecture is not supported.
    """
    if not isinstance(model, LanguageModel):
        given = GivenModel(model)
        model = given.load(head=given.causal is not None)
    return _verify(model, tokenizer, source, on_check)


@in_eval_mode
@torch.inference_mode()
def _verify(
    lm: LanguageModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source: LMSource | None,
    on_check: Callable[[Check], object],
) -> Verification:
    checks: list[Check] = []

    def add(*found: Check) -> None:
        for check in found:
            checks.append(check)
            on_check(check)

    add(_weights(lm, source), *_head(lm))
    sequences = _sequences(lm, tokenizer)
    try:
        identities = Identities(lm, sequences)
    except NonFiniteError as error:
        add(Check("finite", False, str(error), {}))
        return Verification(describe(lm, source), tuple(checks))
    allowed, of_runs = identities.allowed, identities.of_runs

    def within(name: str, measure: Callable[[], Any], words: Callable[[Any], str], limit: float) -> bool:
        """Add the line of one identity, and say whether it holds."""
        try:
            found = measure()
        except UserError as error:
            add(Check(name, False, str(error), {"allowed": limit}))
            return False
        if found is None:
            return False
        numbers = found if isinstance(found, dict) else {"error": found}
        add(Check(name, True, words(found), {**numbers, "allowed": limit}))
        return True

    def sums(found: dict[str, float]) -> str:
        tokens = len(identities.run.streams[0])
        return f"{_sums_in_words(found)}; {lm.n_layers} layers, {tokens} tokens (allowed {allowed:.0e})"

    def to(words: str) -> Callable[[float], str]:
        return lambda error: f"{words} {_to(error)}"

    if not within("sums", identities.sums, sums, allowed):
        return Verification(describe(lm, source), tuple(checks))
    within("recorded", identities.recorded, to("the states of a whole forward"), allowed)
    within("hidden states", identities.hidden_states, to("transformers' own at each resid_pre"), allowed)
    within("log-probs", identities.log_probs, to("the model's own next-token log-probabilities"), allowed)
    if within("padded right", identities.padding, to("a row beside a longer one is the row alone"), of_runs):
        add(_padded_left(lm, identities.pair, of_runs), _packed(lm, sequences))
        add(*_from_every_sublayer(lm, identities.pair[1], of_runs))
    add(_range(lm, identities.run.streams))
    if tokenizer is not None:
        add(*_prefix(tokenizer))
    return Verification(describe(lm, source), tuple(checks))


def _to(error: float) -> str:
    return "exactly" if error == 0 else f"to {error:.0e}"


def describe(lm: LanguageModel, source: LMSource | None) -> str:
    """One line that says which model it is, and what it computes in."""
    name = lm.name if source is None else source.label
    dtype = str(lm.dtype).removeprefix("torch.")
    weights = "" if lm.quantisation is None else f", weights dequantised from {lm.quantisation}"
    at_once = "one block each" if lm.sites.has_one_block else "attention and MLP in parallel"
    kind = at_once if len(lm.sites.names) == 1 else f"{lm.n_sublayers} sublayers"
    return f"{name} ({lm.config.model_type}): {lm.n_layers} layers of {lm.n_units} units, {kind}, {dtype}{weights}"


def _sequences(lm: LanguageModel, tokenizer: PreTrainedTokenizerBase | None) -> list[np.ndarray]:
    if tokenizer is None:
        rng = np.random.default_rng(0)
        return [rng.integers(0, lm.config.vocab_size, size=n) for n in (14, 24)]
    opened_by = find_bos(tokenizer).bos_id
    texts = tokenizer(list(TEXTS), add_special_tokens=False)["input_ids"]
    return [np.array([opened_by, *ids]) for ids in texts]


def _sums_in_words(found: dict[str, float]) -> str:
    names = {
        "attention": "resid_pre + attention = resid_mid",
        "mlp": "resid_mid + MLP = the next resid_pre",
        "parallel": "resid_pre + attention + MLP = the next resid_pre",
        "block": "resid_pre + its block = the next resid_pre",
    }
    return ", ".join(f"{names[kind]} {_to(error)}" for kind, error in found.items())


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights(lm: LanguageModel, source: LMSource | None) -> Check:
    model = lm.base if lm.causal is None else lm.causal
    parameters = sum(p.numel() for p in model.parameters())
    numbers: dict[str, Any] = {"parameters": parameters, "unused": lm.unused}
    words = f"{parameters:,} parameters"
    if lm.unused is not None:
        return Check("weights", False, f"{words}; {lm.unused}", numbers)
    if source is None:
        return Check("weights", None, f"{words}; whether its files hold others was not looked at", numbers)
    if source.gguf is not None:
        file = source.gguf
        extra = file.n_numbers - (0 if file.rope_factors is None else len(file.rope_factors)) - parameters
        numbers |= {"in_file": file.n_numbers, "stored": file.stored}
        if extra:
            return Check("weights", False, f"{words}, and {file.n_numbers:,} numbers in the file: {extra:+,}", numbers)
        return Check("weights", True, f"{words}, all those of the file and no others; stored as {file.stored}", numbers)
    return Check("weights", True, f"{words}: none missing from its files, none in them unused", numbers)


def _head(lm: LanguageModel) -> Iterator[Check]:
    if lm.causal is None or not isinstance(lm.head, nn.Module):
        yield Check("LM head", None, "not loaded, or not in the weights: next-token probabilities were not checked", {})
        return
    head: Any = lm.head
    embedding: Any = lm.base.get_input_embeddings()
    asked = bool(getattr(lm.config, "tie_word_embeddings", False))
    same = head.weight.data_ptr() == embedding.weight.data_ptr()
    numbers = {"tied": same, "config_says_tied": asked}
    if asked and not same and not torch.equal(head.weight, embedding.weight):
        yield Check("LM head", False, "its config ties it to the embeddings, and its weights are others", numbers)
    elif not bool(head.weight.isfinite().all()) or not bool(head.weight.any()):
        yield Check("LM head", False, "its weights are zero, or not finite", numbers)
    else:
        words = "tied to the embeddings" if same else "its own weights" if not asked else "equal to the embeddings"
        yield Check("LM head", True, f"{words}, as its config says", numbers)


# --- batches ----------------------------------------------------------------------------------------------------------


def _padded_left(lm: LanguageModel, pair: Sequence[np.ndarray], allowed: float) -> Check:
    """A batch padded on the left, as for generation, against each row alone.

    rsdyn never pads there. With the mask alone most models count positions from the padding on, which is the commonest
    way to get a stream that is silently wrong.
    """
    alone = torch.cat([lm.record([s]) for s in pair]).to(lm.device)
    takes_positions = "position_ids" in inspect.signature(lm.base.forward).parameters
    mask_alone = _error(_left(lm, pair, positions=False), alone)
    numbers = {"mask_alone": mask_alone}
    if not takes_positions:
        holds = mask_alone <= allowed
        words = f"with a mask, which is all that it takes: each row alone {_to(mask_alone)}"
        return Check("padded left", holds, words, numbers)
    error = _error(_left(lm, pair, positions=True), alone)
    words = f"with mask and position_ids a row is the row alone {_to(error)}"
    if mask_alone > allowed:
        words += f"; with the mask alone it is {mask_alone:.0e} of its norm off: give position_ids"
    return Check("padded left", error <= allowed, words, {**numbers, "error": error})


def _left(lm: LanguageModel, pair: Sequence[np.ndarray], *, positions: bool) -> Tensor:
    """The trajectories of the last tokens ``(2, S, D)`` of a batch that is padded on the left."""
    width = max(map(len, pair))
    ids, mask = torch.zeros(len(pair), width, dtype=torch.int64), torch.zeros(len(pair), width, dtype=torch.int64)
    for row, sequence in enumerate(pair):
        ids[row, width - len(sequence) :] = torch.from_numpy(np.asarray(sequence, dtype=np.int64))
        mask[row, width - len(sequence) :] = 1
    where = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if positions else {}
    found = torch.empty(len(pair), lm.n_sublayers, lm.n_units, dtype=lm.dtype, device=lm.device)

    def take(s: int, stream: Tensor) -> None:
        found[:, s] = stream.view(len(pair), width, -1)[:, -1].to(found.device)

    with ExitStack() as hooks:
        reading_sites(lm, hooks, take)
        arguments = {"input_ids": ids, "attention_mask": mask, **where}
        lm.base(**{name: value.to(lm.device) for name, value in arguments.items()}, use_cache=False)
    return found


def _packed(lm: LanguageModel, sequences: Sequence[np.ndarray]) -> Check:
    layout = choose_layout(lm, sequences)
    if layout.name == PACKED:
        return Check("packed", True, "sequences end to end in one row: each is the row alone", {"packed": True})
    words = f"not possible, so batches are padded: {layout.reason}"
    return Check("packed", None, words, {"packed": False, "reason": layout.reason})


def _error(a: Tensor, b: Tensor) -> float:
    """The largest relative distance of states; inf for what is not finite."""
    return float(relative(a, b).nan_to_num(nan=torch.inf).max())


# --- from every sublayer ----------------------------------------------------------------------------------------------


def _from_every_sublayer(lm: LanguageModel, ids: np.ndarray, allowed: float) -> Iterator[Check]:
    """Replay the recorded state, and continue from a perturbed one, at each sublayer, against whole forwards."""
    try:
        reference = run_reference(lm, ids)
    except UserError as error:
        fails = isinstance(error, UnfitModelError)
        yield Check("continuation", False if fails else None, str(error), {})
        return
    own = torch.cat([reference.stream, reference.final[None]])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(own[:-1].shape, generator=generator).to(own)
    noisy = own[:-1] + 0.5 * own[:-1].norm(dim=-1, keepdim=True) / lm.n_units**0.5 * noise
    states = torch.stack([own[:-1], noisy], 1)  # (S, 2, D)
    continued = continue_all(lm, reference, list(enumerate(states)))
    other = np.append(ids[:-1], next(t for t in (*ids[:-1].tolist(), 0, 1) if t != ids[-1]))
    replay, continuation = [], []
    for s, found in enumerate(continued):
        whole = _whole_forwards(
            lm, [other, ids], s, states[s]
        )  # the recorded state behind another token; the noisy one
        here = torch.cat([found.stream, found.final[:, None]], 1)
        replay.append(_error(whole[0], own[s:]))
        continuation.append(max(_error(here[0], own[s:]), _error(here[1], whole[1])))
    for name, errors, limit, words in (
        ("replay", replay, allowed, "the recorded state, put into a run of another token, brings back the rest"),
        ("continuation", continuation, 3 * rounding(lm), "its own and a perturbed state go on as in whole forwards"),
    ):
        worst = int(np.argmax(errors))
        numbers = {"error": errors[worst], "at": worst, "allowed": limit, "sublayers": len(errors)}
        where = f"from each of {len(errors)} sublayers, {_to(errors[worst])} (allowed {limit:.0e})"
        first_bad = next((s for s, error in enumerate(errors) if error > limit), None)
        if first_bad is not None:
            where = f"not from sublayer {first_bad}: {errors[first_bad]:.1e} off (allowed {limit:.0e})"
        yield Check(name, first_bad is None, f"{words}: {where}", numbers)


def _whole_forwards(lm: LanguageModel, rows: Sequence[np.ndarray], s: int, states: Tensor) -> Tensor:
    """Whole forwards of rows of equal length whose last state at ``s`` is replaced: ``(rows, S + 1 - s, D)``."""
    found = torch.empty(len(rows), lm.n_sublayers + 1 - s, lm.n_units, dtype=lm.dtype, device=lm.device)

    def take(at: int, stream: Tensor) -> None:
        last = stream.view(len(rows), len(rows[0]), -1)[:, -1]
        if at == s:
            last.copy_(states)
        if at >= s:
            found[:, at - s] = last.to(found.device)

    def behind(module: nn.Module, args: Any, output: Any) -> None:
        found[:, -1] = first(output).view(len(rows), len(rows[0]), -1)[:, -1].to(found.device)

    ids = torch.from_numpy(np.stack(rows).astype(np.int64)).to(lm.device)
    with ExitStack() as hooks:
        reading_sites(lm, hooks, take)
        hooks.callback(lm.sites.layers[-1].register_forward_hook(behind).remove)
        lm.base(input_ids=ids, use_cache=False)
    return found


# --- what is told -----------------------------------------------------------------------------------------------------


def _range(lm: LanguageModel, streams: Sequence[Tensor]) -> Check:
    sizes = torch.stack([stream.float().abs().amax(0) for stream in streams])  # (S + 1, D)
    s, unit = divmod(int(sizes.argmax()), sizes.shape[1])
    largest = float(sizes.max())
    token = int(streams[s][:, unit].abs().argmax())
    where = "behind the last layer" if s == lm.n_sublayers else f"at sublayer {s}"
    room = f"float16 holds {_FLOAT16:,.0f}, {_FLOAT16 / largest:,.3g} times that"
    if largest > _FLOAT16:
        room = f"more than float16 holds ({_FLOAT16:,.0f}): compute in bfloat16 or float32"
    numbers = {"largest": largest, "sublayer": s, "unit": unit, "token": token, "fits_float16": largest <= _FLOAT16}
    words = f"largest |h| {largest:,.{1 if largest < 1000 else 0}f} (unit {unit}, token {token}, {where}); {room}"
    return Check("float16", None, words, numbers)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> Iterator[Check]:
    opening = find_bos(tokenizer)
    adds = "as its tokenizer does" if opening.note is None else "which its tokenizer would not put"
    yield Check("BOS", None, f"{opening.words} before each text, {adds}", {"bos": opening.words, "id": opening.bos_id})
    try:
        frame = chat_frame(tokenizer)
    except UserError as error:
        yield Check("chat template", None, str(error), {})
        return
    if frame is None:
        yield Check("chat template", None, "none: a base model, or its tokenizer does not tell", {"template": False})
        return
    before = len(tokenizer(frame.before, add_special_tokens=False)["input_ids"])
    after = len(tokenizer(frame.after, add_special_tokens=False)["input_ids"])
    numbers = {"template": True, "tokens_before": before, "tokens_after": after, "opens_with_bos": frame.opens_with}
    if frame.opens_with > 1:
        words = f"begins with {frame.opens_with} BOS in a row, and a model has seen one: mend it in its tokenizer"
        yield Check("chat template", False, words, numbers)
        return
    words = f"an instruct model: a user turn puts {before} tokens before a text and {after} behind it"
    again = tokenizer(frame.around("a"))["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    if again and frame.opens_with:
        words += "; encoded with special tokens once more it would have two BOS"
    yield Check("chat template", None, f"{words} (chat_template=user records that)", {**numbers, "twice": again})
