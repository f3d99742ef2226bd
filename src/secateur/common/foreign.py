"""What an exception of the user's code, or of another library, means to the user."""

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
"""Where files begin that are neither the user's nor of a library of models."""

_CAPTURES = tuple(str(Path(_NO_MODELS[0], part)) for part in ("_dynamo", "_subclasses", "export", "fx"))
"""Where the files of PyTorch begin that capture."""

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
        "pack_padded_sequence|pad_packed_sequence|h_zeros|forward hx = torch.zeros",
        "sequences are packed by lengths that are no integer input, nor computed from integers alone. Pass "
        "the lengths as a tensor of integers, or prune what stands before and behind as models of their own",
    ),
    (
        r"data-dependent|Could not extract specialized integer|unbacked|SymFloat|\.item\(\)",
        "what the forward pass does there depends on the values of a tensor, and a capture has to hold for "
        "all values. {remedy}",
    ),
    (
        r"numpy\(\)|__array__|tolist\(\)|converted to numpy",
        "values leave PyTorch there, and a capture has none. Compute with tensors throughout",
    ),
    (
        "unhashable type: .*Sym",
        "a size is the key of a dictionary or a cached function there. Make the table anew",
    ),
    (
        "DataDependentOutput",
        "what is called there looks at the values of a tensor, and a capture has to hold for all values. "
        "{remedy}, or compute it with other functions",
    ),
    (
        r"fake tensor in the exported program constant|lift_constants_pass|grad_impl\(|grad_and_value_impl",
        "a capture loses track of a tensor, most likely because the forward pass takes a derivative "
        "(torch.autograd.grad, backward() or torch.func.grad). Prune the network that it differentiates as a "
        "model of its own, and put the result in its place. If it uses .data, write .detach()",
    ),
    (
        "no fake impl|[Mm]eta kernel|abstract impl|register_fake",
        "nothing says what the custom operator there returns. Use torch.library.register_fake",
    ),
    (
        "SymInt|FakeTensor|FunctionalTensor|ProxyTensor",
        "what is called there needs values of tensors, or sizes that are numbers, and a capture has none. "
        "Compute with PyTorch's own functions",
    ),
)
"""What an error's text or the names of what was running contain; and what it means, with what to do."""


def source_line(error: BaseException) -> str:
    """The innermost line of the user's code, or of a library of models, that was running.

    As ``net.py:12: x = x.reshape(4, -1)``; empty if there is none.
    """
    return next((line for frame in reversed(_frames(error)) if (line := line_of(frame))), "")


def line_of(frame: Any) -> str:
    """`source_line` of what was running in a frame, from a traceback; empty if the code is not the user's."""
    if not isinstance(frame, traceback.FrameSummary) or not _holds_models(frame.filename):
        return ""
    code = frame.line or linecache.getline(frame.filename, frame.lineno or 0)
    return f"{Path(frame.filename).name}:{frame.lineno}: {_cut(' '.join(code.split()).rstrip(':'), 100)}"


def running_line(frame: FrameType | None) -> str:
    """`source_line` of what is running in a frame and those that called it."""
    while frame is not None:
        code = frame.f_code
        if line := line_of(traceback.FrameSummary(code.co_filename, frame.f_lineno, code.co_name)):
            return line
        frame = frame.f_back
    return ""


def said(error: BaseException, *, capturing: bool = False, where: bool = True) -> str:
    """Where an error arose and what it says, in at most 400 characters, without a full stop.

    Args:
        error: Of the user's code, or of another library.
        capturing: Whether it stopped a capture: then what is known to do so is said in our words.
        where: False leaves the place out.

    Example:
        >>> said(ValueError("expected 3 channels, got 4. Please file an issue."))
        'ValueError: expected 3 channels, got 4'
    """
    if isinstance(error, SecateurError):  # which says where and what to do
        return str(error).rstrip(".")
    told = (f"{type(each).__name__}: {each}" for each in _chain(error))
    text = "\n".join([*told, *(f"{f.name} {f.line}" for f in _frames(error))])
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
    """Whether an error is a slip in the code that captures, not what it says of the user's code."""
    frames = _frames(error)
    slip = isinstance(error, AttributeError | AssertionError | IndexError | KeyError | NotImplementedError)
    return slip and bool(frames) and frames[-1].filename.startswith(_CAPTURES)


def _remedy(error: BaseException) -> str:
    """What to write instead of code that depends on values: by the expression that was running."""
    frame = next((f for f in reversed(_frames(error)) if line_of(f)), None)
    code = linecache.getline(frame.filename, frame.lineno or 0).rstrip() if frame is not None else ""
    start = getattr(frame, "colno", None) or 0  # which expression of a line it is, Python 3.11 tells
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
    """All that Python prints of an error, for `SecateurError.details`."""
    return "".join(traceback.format_exception(error))


def _first_sentence(error: BaseException) -> str:
    """What an error says first that is meant for the user, without a full stop."""
    sentences = re.split(r"\n|(?<=[.!?])\s+(?=[A-Z(])", str(error))
    told = [" ".join(s.split()) for s in sentences if s.strip() and not s.strip().lower().startswith(_ADVICE)]
    return _cut(told[0].rstrip(" .:"), 160) if told else ""


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
