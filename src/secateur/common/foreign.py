"""Explain exceptions of the user's code and of other libraries, for our error messages."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from secateur.errors import SecateurError

_PATHS = sysconfig.get_paths()
_MATHS = tuple(str(Path(_PATHS["purelib"], name)) for name in ("einops", "numpy", "scipy", "sympy"))
_NO_MODELS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),
    *_MATHS,
    "<string>",
    "<eval_with",
)
"""Folders of code that is neither the user's nor a library of models."""

_CAPTURES = tuple(str(Path(_NO_MODELS[0], part)) for part in ("_dynamo", "_subclasses", "export", "fx"))
"""Folders of PyTorch's capture."""

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
"""Beginnings of sentences that are for developers of PyTorch, and are left out."""

_KINDS = (
    (
        "_detect_is_causal_mask",
        "the layer looks at the values of its mask to find out whether it is causal. Pass is_causal=True, or "
        "False, there",
    ),
    (
        "pack_padded_sequence|pad_packed_sequence|h_zeros|forward hx = torch.zeros",
        "sequences are packed by lengths that are neither an integer input nor computed from integers. Pass "
        "the lengths as a tensor of integers, or prune the parts before and after as separate models",
    ),
    (
        r"data-dependent|Could not extract specialized integer|unbacked|SymFloat|\.item\(\)",
        "the code there depends on the values of a tensor, and a capture must be valid for all values. "
        "{remedy}",
    ),
    (
        r"numpy\(\)|__array__|tolist\(\)|converted to numpy",
        "values leave PyTorch there, and a capture has no values. Compute with tensors only",
    ),
    (
        "unhashable type: .*Sym",
        "a size is the key of a dictionary or of a cached function there. Compute the value each time",
    ),
    (
        "DataDependentOutput",
        "the function there reads the values of a tensor, and a capture must be valid for all values. "
        "{remedy}, or compute it with other functions",
    ),
    (
        r"fake tensor in the exported program constant|lift_constants_pass|grad_impl\(|grad_and_value_impl",
        "a capture loses track of a tensor, most likely because the forward pass takes a derivative "
        "(torch.autograd.grad, backward() or torch.func.grad). Prune the network that it differentiates as a "
        "separate model, and put the result in its place. If it uses .data, write .detach()",
    ),
    (
        "no fake impl|[Mm]eta kernel|abstract impl|register_fake",
        "PyTorch does not know what the custom operator there returns. Use torch.library.register_fake",
    ),
    (
        "SymInt|FakeTensor|FunctionalTensor|ProxyTensor",
        "the function there needs values of tensors, or sizes as plain numbers, and a capture has none. "
        "Compute with PyTorch's own functions",
    ),
)
"""Patterns in an error's text or stack; and for each, what the error means and what to do."""


def source_line(error: BaseException) -> str:
    """Return the innermost line of the user's code, or of a library of models, that was running.

    For example ``net.py:12: x = x.reshape(4, -1)``; empty if there is none.
    """
    return next((line for frame in reversed(_frames(error)) if (line := line_of(frame))), "")


def line_of(frame: Any) -> str:
    """Return the `source_line` of one frame of a traceback; empty if the code is not the user's."""
    if not isinstance(frame, traceback.FrameSummary) or not _holds_models(frame.filename):
        return ""
    code = frame.line or linecache.getline(frame.filename, frame.lineno or 0)
    return f"{Path(frame.filename).name}:{frame.lineno}: {_cut(' '.join(code.split()).rstrip(':'), 100)}"


def running_line(frame: FrameType | None) -> str:
    """Return the `source_line` of what is running now in a frame or its callers; empty if there is none."""
    while frame is not None:
        code = frame.f_code
        if line := line_of(traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name)):
            return line
        frame = frame.f_back
    return ""


def error_text(error: BaseException, *, capturing: bool = False, where: bool = True) -> str:
    """Return the place and the message of an error, in at most 400 characters, without a full stop.

    Args:
        error: An error of the user's code or of another library.
        capturing: Whether it stopped a capture. Then known errors are explained in our own words.
        where: Whether to include the place.

    Example:
        >>> error_text(ValueError("expected 3 channels, got 4. Please file an issue."))
        'ValueError: expected 3 channels, got 4'
    """
    if isinstance(error, SecateurError):  # its message has the place and what to do
        return str(error).rstrip(".")
    messages = (f"{type(each).__name__}: {each}" for each in _chain(error))
    text = "\n".join([*messages, *(f"{f.name} {f.line}" for f in _frames(error))])
    kinds = _KINDS if capturing else ()
    known = next((meaning for pattern, meaning in kinds if re.search(pattern, text)), "")
    first = _first_sentence(error)
    line = source_line(error) if where else ""
    known = known.replace("{remedy}", _remedy(error))
    plain = type(error).__name__ + (f": {first}" if first else "")
    if capturing and not known and _is_of_capture(error):
        known = f"PyTorch's capture itself fails there ({plain}). Compute it with other functions"
    return (f"{line}: " if line else "") + (known or plain)


def _is_of_capture(error: BaseException) -> bool:
    """Whether an error is a bug in PyTorch's capture, not a message about the user's code."""
    frames = _frames(error)
    slip = isinstance(error, AttributeError | AssertionError | IndexError | KeyError | NotImplementedError)
    return slip and bool(frames) and frames[-1].filename.startswith(_CAPTURES)


def _remedy(error: BaseException) -> str:
    """Advise what to write instead of code that depends on values, by the expression that was running."""
    frame = next((f for f in reversed(_frames(error)) if line_of(f)), None)
    code = linecache.getline(frame.filename, frame.lineno or 0).rstrip() if frame is not None else ""
    start = getattr(frame, "colno", None) or 0  # the expression within the line; from Python 3.11 on
    end = getattr(frame, "end_colno", None) or len(code)
    before, running, after = code[:start].rpartition(";")[2], code[start:end], code[end:].partition(";")[0]
    statement = before + running + after
    entry_of_list = before.endswith("[") and after.startswith("]")
    if entry_of_list or re.search(r"\brange\(", statement):
        return "Decide it before the model is called, and pass a number"
    if re.search(r"\b(if|elif|while|assert|and|or|not)\b", statement):
        return "Use torch.where, or decide before the model is called"
    if re.search(r"\bint\(", running):
        return "Write .long().item() in place of int(), or decide before the model is called"
    return "Decide it before the model is called"


def details(error: BaseException) -> str:
    """Return the traceback that Python would print, for `SecateurError.details`."""
    return "".join(traceback.format_exception(error))


def _first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error that is meant for users, without a full stop."""
    sentences = re.split(r"\n|(?<=[.!?])\s+(?=[A-Z(])", str(error))
    told = [" ".join(s.split()) for s in sentences if s.strip() and not s.strip().lower().startswith(_ADVICE)]
    return _cut(told[0].rstrip(" .:"), 160) if told else ""


def _chain(error: BaseException) -> list[BaseException]:
    """Return an error and its causes, the first cause first."""
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
