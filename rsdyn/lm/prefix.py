"""What stands before a text when a model reads it: BOS, and the chat template of an instruct model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rsdyn.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = "Rsdyn, a Text"  # stands for a text when a template is taken apart: a change of any kind shows


class Opening(NamedTuple):
    """The token that opens every sequence.

    Attributes:
        bos_id: its id; None for no such token.
        words: what is put before each sequence, for a line: ``<s>``, or ``nothing (lm.bos=none)``.
        note: what a run should say where the tokenizer itself would put something else; None where it would not.
    """

    bos_id: int | None
    words: str
    note: str | None


def find_bos(tokenizer: PreTrainedTokenizerBase, wanted: str = "auto") -> Opening:
    """The token that opens every sequence of text.

    Args:
        wanted: ``auto`` takes the tokenizer's BOS, else its EOS; ``none`` takes nothing; else a token of the
            vocabulary, such as ``<|endoftext|>``.

    Raises ``UserError`` where there is neither BOS nor EOS, or ``wanted`` is not one token.
    """
    own = tokenizer("a")["input_ids"][:1]
    if wanted == "none":
        puts = own == [tokenizer.bos_token_id]
        note = f"bos=none: nothing is put before a sequence{', where this tokenizer puts BOS' * puts}"
        return Opening(None, "nothing (bos=none)", note)
    if wanted != "auto":
        if wanted not in tokenizer.get_vocab():
            given = tokenizer.bos_token or tokenizer.eos_token
            hint = f", such as {given}" if given else ""
            raise UserError(
                f"bos={wanted}: no token of this model's vocabulary. Give auto, none, or one of its tokens{hint}."
            )
        return Opening(tokenizer.get_vocab()[wanted], wanted, f"{wanted} was put before each sequence (`bos`)")
    if tokenizer.bos_token_id is not None:
        if tokenizer.bos_token_id in own:
            return Opening(tokenizer.bos_token_id, tokenizer.bos_token, None)
        note = f"this tokenizer adds no BOS of its own: {tokenizer.bos_token} was put before each sequence"
        return Opening(tokenizer.bos_token_id, tokenizer.bos_token, note)
    if tokenizer.eos_token_id is not None:
        note = f"this tokenizer has no BOS: its end-of-text token {tokenizer.eos_token} was put before each sequence"
        return Opening(tokenizer.eos_token_id, tokenizer.eos_token, note)
    raise UserError(
        "name: its tokenizer has neither a BOS nor an EOS token to open a sequence with. Set bos=none, or name "
        "one in the model's tokenizer_config.json (bos_token)."
    )


class ChatFrame(NamedTuple):
    """A tokenizer's chat template around one user turn, up to where the model would answer.

    Attributes:
        before, after: what it puts around the text.
        opens_with: how many BOS in a row it begins with.
        strips: whether it takes blanks off the ends of the text.
    """

    before: str
    after: str
    opens_with: int
    strips: bool

    def around(self, text: str) -> str:
        """The text as the model would be given it."""
        return self.before + (text.strip() if self.strips else text) + self.after


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> ChatFrame | None:
    """The frame of a tokenizer's chat template; None where it has none.

    Raises ``UserError`` for a template that cannot be filled with one user turn, or does more to the text than strip
    it.
    """
    if tokenizer.chat_template is None:
        return None

    def filled(text: str) -> str:
        turn = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    try:
        plain, padded = filled(_TEXT), filled(f" {_TEXT} \n")
    except Exception as error:  # whatever a template's author raises in it, and Jinja's own
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"chat_template=user: this tokenizer's template does not take one user turn alone "
            f"({type(error).__name__}: {said}). Use chat_template=none."
        ) from error
    before, found, after = plain.partition(_TEXT)
    strips = padded == plain
    if not found or _TEXT in after or (not strips and padded != f"{before} {_TEXT} \n{after}"):
        raise UserError(
            "chat_template=user: this tokenizer's template does not put the text into a fixed frame, so which "
            "tokens are the text's cannot be told. Use chat_template=none."
        )
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    opens_with = 0
    while tokenizer.bos_token_id is not None and ids[opens_with : opens_with + 1] == [tokenizer.bos_token_id]:
        opens_with += 1
    return ChatFrame(before, after, opens_with, strips)


def refuse_two_bos(tokenizer: PreTrainedTokenizerBase, frame: ChatFrame) -> None:
    """Raise ``UserError`` for a template that begins with BOS more than once."""
    if frame.opens_with > 1:
        raise UserError(
            f"chat_template=user: this tokenizer's template begins with {frame.opens_with} {tokenizer.bos_token} "
            "in a row, and a model has seen one. Mend chat_template in its tokenizer_config.json, or use "
            "chat_template=none."
        )
