"""What a setting is: its type, its default, its line of help and the values it takes, in one place for every check.

the wings' settings are written with :func:`setting`; the command line, the help and the errors read it back as
:class:`Option`.
"""

import difflib
import math
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rsdyn.errors import UserError


@dataclass(frozen=True)
class Rules:
    """What a key means and accepts; choices and bounds describe themselves, ``test`` comes with ``allowed``, its words.

    ``also`` holds other names that people try, so that the error names the right one. The choices of a ``Literal`` are
    its own; ``choices`` are for those of a list's items.
    """

    help: str
    choices: tuple[str, ...] = ()
    low: float | None = None  # value >= low
    above: float | None = None  # value > above
    high: int | None = None  # value <= high
    allowed: str = ""
    test: Callable[[Any], bool] | None = None
    also: tuple[str, ...] = ()


def setting(default: Any, help: str, **rules: Any) -> Any:
    """Describe one key: its default, its line of help, and what it accepts, as in :class:`Rules`.

    For a key that takes a list, choices and bounds are those of each item.
    """
    metadata = {"rules": Rules(help, **rules)}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def is_size(value: Any) -> bool:
    """Whether it is a share, or a whole number."""
    return _is_a(value, "float") and (0 < value < 1 or (value >= 1 and value == int(value)))


def is_devices(value: Any) -> bool:
    """Whether Lightning takes it for ``devices``: a number, ``auto``, or a list of numbers."""
    if isinstance(value, str):
        return value == "auto" or re.fullmatch(r"\d+(,\d+)+|\d+,", value) is not None
    return _is_a(value, "int") and value >= 1


def is_layers(value: Any) -> bool:
    """Whether it says how many widths an autoencoder has: a number, or ``paper``."""
    return value == "paper" or (_is_a(value, "int") and value >= 1)


def is_share(value: Any) -> bool:
    """Whether it lies between 0 and 1, both left out."""
    return _is_a(value, "float") and 0 < value < 1


def is_range(value: Any) -> bool:
    """Whether ``value`` is ``[min1, max1, min2, max2]``."""
    if not isinstance(value, list) or len(value) != 4 or not all(_is_a(v, "float") for v in value):
        return False
    return value[0] < value[1] and value[2] < value[3]


def is_positions(value: Any) -> bool:
    """Whether ``value`` says which tokens of a sequence are recorded: ``last``, ``all`` or ``{"sample": k}``."""
    if isinstance(value, dict):
        return set(value) == {"sample"} and _is_a(value["sample"], "int") and value["sample"] >= 1
    return isinstance(value, str) and value in ("last", "all")


SIZE = "a fraction between 0 and 1, or a whole number of sequences >= 1"
POSITIONS = "last, all or {sample: k} with k >= 1, as in data.positions='{sample: 4}'"
LAYERS = "a whole number >= 1, or paper"
SHARE = "a number above 0 and below 1"
DEVICES = "a whole number >= 1, auto, or device numbers such as 0,1"

_PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "dict": dict,
    "list": list,
    "int or str": (int, str),
}
_WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false (yes, no, 1, 0 too)",
    "dict": "a mapping",
}
_PLURALS = {"str": "texts", "int": "whole numbers", "float": "numbers"}


def _is_a(value: Any, kind: str) -> bool:
    right_type = isinstance(value, bool) == (kind == "bool") and isinstance(value, _PYTHON_TYPES[kind])
    return right_type and value != "" and (kind != "float" or math.isfinite(value))


@dataclass(frozen=True)
class Option:
    """One full key of the schema with everything that is known about it."""

    key: str
    section: str  # "" at the top
    kind: str  # a key of _PYTHON_TYPES
    optional: bool
    default: Any
    rules: Rules
    item: str = ""  # for a list: the kind of its items

    def accepts(self, value: Any) -> bool:
        """Say whether ``value`` has the type of this key and is one of the values it allows."""
        if value is None:
            return self.optional
        if self.rules.test is not None:
            return self.rules.test(value)
        if self.kind == "list":
            given = value if isinstance(value, list) else []
            return len(given) > 0 and all(self._allows(v, self.item) for v in given) and len(set(given)) == len(given)
        return self._allows(value, self.kind)

    def _allows(self, value: Any, kind: str) -> bool:
        rules = self.rules
        return (
            _is_a(value, kind)
            and (not rules.choices or value in rules.choices)
            and (rules.low is None or value >= rules.low)
            and (rules.above is None or value > rules.above)
            and (rules.high is None or value <= rules.high)
        )

    def bounds(self) -> str:
        """Put the range into signs: ``>= 1``; empty without one."""
        signs = ((">=", self.rules.low), (">", self.rules.above), ("<=", self.rules.high))
        return " and ".join(f"{sign} {bound}" for sign, bound in signs if bound is not None)

    def allowed(self) -> str:
        """Put into words what this key accepts, for every error."""
        rules = self.rules
        if rules.allowed:
            words = rules.allowed
        elif self.kind == "list":
            what = ", ".join(rules.choices) if rules.choices else f"{_PLURALS[self.item]} {self.bounds()}".strip()
            words = f"a list such as [a,b], each once, out of: {what}" if rules.choices else f"a list of {what}"
        else:
            words = f"{_WORDS[self.kind]} {self.bounds()}".strip()
        if self.kind == "list":
            pass
        elif len(rules.choices) == 1:
            words = f"{rules.choices[0]} (only {rules.choices[0]} is supported so far)"
        elif rules.choices:
            words = f"one of {', '.join(rules.choices[:-1])} or {rules.choices[-1]}"
        return words + (", or null" if self.optional else "")

    def error(self, value: Any, where: str = "") -> UserError:
        """Make the one message for a value that this key does not accept; ``where`` says who gave it."""
        wrong = value
        if isinstance(value, list) and self.kind == "list":  # name the item that is wrong
            wrong = next((v for v in value if not self._allows(v, self.item)), value)
        word = str(wrong).lower()
        near = [choice for choice in self.rules.choices if word and choice.startswith(word)]
        near = near or difflib.get_close_matches(word, self.rules.choices, n=1)
        if near:
            meant = near if self.kind != "list" else [f"[{show_list(value, wrong, choice)}]" for choice in near]
            cure = f"Did you mean {' or '.join(f'{self.key}={choice}' for choice in meant)}?"
        else:
            cure = f"Give such a value, or leave {self.key} out for its default, {show(self.default)}."
        place = f" ({where})" if where else ""
        return UserError(f"{self.key}={show(value)}{place} is not allowed: it must be {self.allowed()}. {cure}")


def show_list(value: Any, wrong: Any, choice: str) -> str:
    """Write the items of a list with one of them put right."""
    return ",".join(show(choice if v == wrong else v) for v in (value if isinstance(value, list) else [wrong]))


def show(value: Any) -> str:
    """Write a value the way a user types it, cut where it is long."""
    if isinstance(value, list):
        text = f"[{','.join(show(v) for v in value)}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{name}: {show(v)}' for name, v in value.items())}}}"
    else:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def walk(cls: type, prefix: str) -> Iterator[Option]:
    """Every key of a dataclass and of the dataclasses in it, in their order."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        hint, key = hints[item.name], prefix + item.name
        if is_dataclass(hint):
            yield from walk(hint, key + ".")  # type: ignore[arg-type]
            continue
        parts = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
        listed = next((part for part in parts if get_origin(part) is list), None)
        item_kind = get_args(listed)[0].__name__ if listed else ""
        optional = type(None) in parts
        names = [get_origin(part) or part for part in parts if part is not type(None)]
        kind = " or ".join("str" if part is Literal else part.__name__ for part in names)
        rules: Rules = item.metadata["rules"]
        if names == [Literal]:
            rules = replace(rules, choices=get_args(next(part for part in parts if part is not type(None))))
        default = item.default_factory() if callable(item.default_factory) else item.default
        yield Option(key, prefix.rstrip("."), kind, optional, default, rules, item_kind)
