"""Verify a language model: ``rsdyn check MODEL``, or ``python -m rsdyn check MODEL``.

Every line says what was verified on real tokens and how far it is from exact. The exit code is 0 where all holds, 3
with the first thing that does not, and 2 for a mistake in the command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rsdyn.errors import UnfitModelError, UserError
from rsdyn.lm.model import LanguageModel
from rsdyn.lm.source import LMSource, NoHeadError, find_lm
from rsdyn.lm.verification import Check, Verification, verify
from rsdyn.lm.weights import DTYPES

DOES_NOT_HOLD = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Check a model, say line by line what holds, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="rsdyn check",
        description="Open a language model and say, line by line, what was verified on real tokens.",
        epilog="Exit code: 0 where all holds, 3 with the first thing that does not, 2 for a mistake in the command.",
    )
    parser.add_argument("model", metavar="MODEL", help="a name on the Hub, a folder, a GGUF file, embedded or smollm2")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="what it computes in (float32)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    given = parser.parse_args(argv)
    quiet_transformers()
    try:
        found = check(
            given.model, dtype=given.dtype, revision=given.revision, trust_remote_code=given.trust_remote_code
        )
    except UserError as error:
        print(f"rsdyn check: error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(found.to_dict(), indent=1) if given.json else "\n".join(found.lines()))
    return 0 if found.failure is None else DOES_NOT_HOLD


def quiet_transformers() -> None:
    """Keep what transformers logs out of the lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()


def check(
    name: str, *, dtype: str = "float32", revision: str | None = None, trust_remote_code: bool = False
) -> Verification:
    """Open a model and verify it; a model that cannot be recorded is a result, a name that is not there an error.

    Raises ``UserError`` for a name, file or revision that is not there, and for a model that does not fit into memory.
    """
    try:
        source = find_lm(name, revision=revision, trust_remote_code=trust_remote_code)
    except UnfitModelError as error:
        return _refused(name, "running sum", error)
    tokenizer = source.tokenizer()
    try:
        lm = _load(source, dtype)
    except UnfitModelError as error:
        return _refused(source.label, "weights", error)
    return verify(lm, tokenizer, source=source)


def _load(source: LMSource, dtype: str) -> LanguageModel:
    try:
        return source.load(dtype=dtype, head=True)
    except NoHeadError:
        return source.load(dtype=dtype)


def _refused(name: str, what: str, error: UserError) -> Verification:
    return Verification(name, (Check(what, False, str(error), {}),))
