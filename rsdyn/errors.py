"""The errors a user can cause. Scripts print the message alone and leave with ``exit_code``."""


class UserError(ValueError):
    """A mistake that the person at the keyboard can mend: a message in one or two sentences, no traceback.

    The message names the key or argument, the value it got, what is allowed, and the cure.
    """

    exit_code = 2


class UnfitModelError(UserError):
    """The language model cannot be recorded as it is: its architecture, its weights, or an identity that fails."""


class NonFiniteError(UserError):
    """NaN or Inf where a number must be: the data or the model is at fault, not the command line."""

    exit_code = 3
