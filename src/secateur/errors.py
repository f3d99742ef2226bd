"""The errors a user can meet, one tree under `SecateurError`, and the warnings.

Each message is one string of the form ``where: expected ..., got .... What to do.``; each class also
inherits the builtin that fits, so code that knows nothing of secateur still catches it.
"""

import re

from secateur.common.inert import inert

LONGEST = 600
"""The most characters of a message. What it has no room for is in `SecateurError.details`."""


_TWO_STOPS = re.compile(r"(?<!\.)\.\.(?=\s|$)")
"""What quoting a whole sentence of another error leaves before the next one; not three dots."""


class SecateurError(Exception):
    """Base of every error that secateur raises on purpose.

    Control and bidirectional characters of names are shown as escapes.

    Attributes:
        details: What the message leaves out: a whole table, or another library's own words. Often empty.

    Example:
        >>> error = SecateurError("found none: " + "so much to say. " * 99 + "Do this.")
        >>> len(str(error)), str(error)[-8:], len(error.details)
        (600, 'Do this.', 1604)
    """

    def __init__(self, message: str = "", details: str = "") -> None:
        message = inert(_TWO_STOPS.sub(".", message))
        short = _shortened(message)
        super().__init__(short)
        self.details = inert(details) or (message if short != message else "")


def _shortened(message: str) -> str:
    """The beginning and the end of a long message: what was wrong, and what to do."""
    if len(message) <= LONGEST:
        return message
    gap, end = " … (error.details has it all) … ", message[-LONGEST // 3 :]
    return message[: LONGEST - len(gap) - len(end)] + gap + end


class CaptureError(SecateurError, RuntimeError):
    """`torch.export` could not capture the model."""


class NothingToPruneError(SecateurError, ValueError):
    """The model has no group of units that may be removed."""


class CalibrationError(SecateurError, ValueError):
    """The calibration data cannot feed what was asked of it."""


class ScoreError(SecateurError, ValueError):
    """A signal is unknown, or gave scores that are not finite or not of the group's size."""


class SettingError(SecateurError, ValueError):
    """A tolerance, ratio, name or other setting is out of range."""


class BudgetError(SecateurError, ValueError):
    """A budget is not a valid one."""


class UnreachableBudgetError(BudgetError):
    """No value of the allocator's knob meets the budget; `smallest` is the least reachable cost."""

    def __init__(self, message: str, smallest: float) -> None:
        super().__init__(message)
        self.smallest = smallest


class PlanError(SecateurError, ValueError):
    """A plan is malformed or was made for another model."""


class ApplyError(SecateurError, RuntimeError):
    """A plan cannot be carried out in the form that was asked for."""


class InputError(SecateurError, ValueError):
    """A captured program was called with what it was not captured for: a size, a dtype, an argument."""


class VerificationError(SecateurError, AssertionError):
    """The pruned model differs from the masked dense one."""


class ArtefactError(SecateurError, ValueError):
    """A saved model, score table or checkpoint is missing, damaged, foreign, or newer than this version."""


class ExportError(SecateurError, RuntimeError):
    """A model cannot be written in a format, or what was written does not compute what the model does."""


class ConstantScoresWarning(UserWarning):
    """A signal gives every unit of a group the same score, so it cannot say which of them should go."""
