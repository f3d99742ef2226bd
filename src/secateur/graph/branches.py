"""Captures of a model whose code has conditions on values of tensors, such as ``if mask.any():``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from secateur.errors import CaptureError
from secateur.graph.capture import Capture, capture, depends_on_data
from secateur.graph.symbolic import Answers

LINES = 3
"""The most lines whose conditions are answered apart from the others, at the traced sizes."""


def capture_branches(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any
) -> list[Capture]:
    """Capture a model. If its code has conditions on values of tensors, capture it with other answers too.

    All conditions are true in one capture and false in another. In further ones, those of one line have the
    other answer. Together the captures hold the branches, but not all their combinations.

    Args:
        model: The model; it is left as it was.
        args: Positional arguments.
        kwargs: Keyword arguments.
        options: As for `capture`.

    Returns:
        The captures. The first gives what the model gives on these arguments.

    Raises:
        CaptureError: The model cannot be captured, or no capture gives what it gives.
    """
    try:
        return [capture(model, args, kwargs, **options)]
    except CaptureError as error:
        if not depends_on_data(error.__cause__):
            raise
        refused = error
    pair = Answers(True), Answers(False)
    try:
        found = [capture(model, args, kwargs, answers=answers, **options) for answers in pair]
    except CaptureError as error:
        raise refused from error
    lines = sorted(pair[0].asked | pair[1].asked)
    for line, answers in itertools.product(
        lines[:LINES] if lines[1:] and not options.get("exact") else [], pair
    ):
        if line in answers.asked:
            other = Answers(answers.usual, frozenset({line}))
            with suppress(CaptureError):
                found.append(capture(model, args, kwargs, answers=other, **options))
    if not any(one.agrees for one in found):
        raise refused
    return sorted(found, key=lambda one: not one.agrees)
