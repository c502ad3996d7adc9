"""Messages of the library, whose words are arguments, in the words of whoever runs a program: the keys of settings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rsdyn.config.schema import options
from rsdyn.errors import UserError

# The section whose keys are the arguments of a package, where two sections have keys of one name.
OWN_SECTION = {
    "rsdyn.lm": "lm",
    "rsdyn.stream.text": "data",
    "rsdyn.stream": "cache",
    "rsdyn.autoencoder": "cae",
    "rsdyn.analysis": "analysis",
    "rsdyn.perturbation": "perturb",
    "rsdyn.tracking": "tracking",
}
OTHERS = ("lm", "data", "cache", "cae", "analysis", "perturb", "trainer", "run")
KNOW_KEYS = ("rsdyn.config", "rsdyn.run", "rsdyn.commands")


def in_keys(error: UserError) -> str:
    """The message of an error with the arguments of the package that raised it named as settings."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = "" if place is None else str(place.tb_frame.f_globals.get("__name__", ""))
    if module.startswith(KNOW_KEYS):
        return str(error)
    own = next((section for package, section in OWN_SECTION.items() if module.startswith(package)), None)
    return keyed([*([own] if own else []), *OTHERS], str(error))


def keyed(within: str | Sequence[str], text: str) -> str:
    """A text of the library with its arguments named as settings: ``limit=3``, ``limit:`` and `` `limit` `` alike.

    Args:
        within: the sections whose keys they are.
        text: what names arguments, which may have a section of their own, such as ``mi.estimator=kde``.
    """
    for section in [within] if isinstance(within, str) else within:
        known = [re.escape(key.removeprefix(f"{section}.")) for key in options() if key.startswith(f"{section}.")]
        names = "|".join(sorted(known, key=len, reverse=True))
        text = re.sub(rf"(?<![\w./-])({names})(?==)", rf"{section}.\1", text)
        text = re.sub(rf"^({names})(?=: )", rf"{section}.\1", text)
        text = re.sub(rf"`({names})`", rf"{section}.\1", text)
    return text
