"""What an exception of the user's code or of another library means: where, what, and what to do."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from pathlib import Path

import torch

_PATHS = sysconfig.get_paths()
_MATHS = tuple(str(Path(_PATHS["purelib"], name)) for name in ("einops", "numpy", "scipy", "sympy"))
_NO_MODELS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), *_MATHS, "<string>", "<eval_with")
"""Where files begin that are neither the user's nor of a library of models."""

_ADVICE = (
    "caused by",
    "consider using",
    "for extended logs",
    "for more info",
    "if this type holds",
    "if you",
    "please",
    "potential framework code culprit",
    "see http",
    "set torch",
    "the following call raised",
    "to debug",
    "user stack",
)
"""How sentences begin that speak to those who work on PyTorch."""

_KINDS = (
    (
        "_detect_is_causal_mask",
        "the layer looks at the values of its mask to find out whether it is causal. Pass is_causal=True, or "
        "False, there",
    ),
    (
        r"data-dependent|Could not extract specialized integer|unbacked|\.item\(\)",
        "what the forward pass does there depends on the values of a tensor, and a capture has to hold for "
        "all values. Use torch.where, or decide before the model is called",
    ),
    (
        r"numpy\(\)|__array__|tolist\(\)|converted to numpy",
        "values leave PyTorch there, and a capture has none. Compute with tensors throughout",
    ),
    (
        "unhashable type: .*Sym",
        "a size is the key of a dictionary or a cached function there. Make the table anew, or key by text",
    ),
    (
        "no fake impl|[Mm]eta kernel|abstract impl|register_fake",
        "a custom operator is called there; nothing says what it returns. Use torch.library.register_fake",
    ),
    (
        "nested.*FakeTensorMode|inside of a compiled|torch.compile",
        "code is compiled there. Call it uncompiled",
    ),
)
"""What an error's text or the names of what was running contain; and what it means, with what to do."""


def source_line(error: BaseException) -> str:
    """The innermost line of the user's code, or of a library of models, that was running.

    As ``net.py:12: x = x.reshape(4, -1)``; empty if there is none.
    """
    for frame in reversed(_frames(error)):
        if _holds_models(frame.filename):
            code = frame.line or linecache.getline(frame.filename, frame.lineno or 0).strip()
            return f"{Path(frame.filename).name}:{frame.lineno}: {_cut(code, 100)}"
    return ""


def said(error: BaseException) -> str:
    """Where an error arose and what it means, in at most 400 characters, without a full stop.

    What it means is in our words where its kind is known, and else in its own first sentence.

    Example:
        >>> said(ValueError("expected 3 channels, got 4. Please file an issue."))
        'ValueError: expected 3 channels, got 4'
    """
    text = "\n".join([*map(str, _chain(error)), *(frame.name for frame in _frames(error))])
    known = next((meaning for pattern, meaning in _KINDS if re.search(pattern, text)), "")
    line = source_line(error)
    return (f"{line}: " if line else "") + (known or f"{type(error).__name__}: {_first_sentence(error)}")


def details(error: BaseException) -> str:
    """All that Python prints of an error, for `SecateurError.details`."""
    return "".join(traceback.format_exception(error))


def _first_sentence(error: BaseException) -> str:
    """What an error says first that is meant for the user, without a full stop."""
    sentences = re.split(r"\n|(?<=[.!?])\s+(?=[A-Z(])", str(error))
    told = [" ".join(s.split()) for s in sentences if s.strip() and not s.strip().lower().startswith(_ADVICE)]
    return _cut(told[0].rstrip(" .:"), 160) if told else "without a message"


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what led to it, the cause first."""
    found = [error]
    while (before := found[0].__cause__ or found[0].__context__) is not None and before not in found:
        found.insert(0, before)
    return found


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return [frame for each in _chain(error) for frame in traceback.extract_tb(each.__traceback__)]


def _holds_models(file: str) -> bool:
    if file.startswith(_NO_MODELS):
        return False
    return file.startswith(_PATHS["purelib"]) or not file.startswith((_PATHS["stdlib"], "<frozen"))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
