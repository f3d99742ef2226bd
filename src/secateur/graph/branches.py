"""Captures of a model whose code has conditions on values of tensors, such as ``if mask.any():``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError
from secateur.graph.capture import Capture, capture, depends_on_data
from secateur.graph.knownvalues import KnownValues, is_countable
from secateur.graph.symbolic import Answers

LINES = 3
"""The most lines whose conditions are answered apart from the others, at the traced sizes."""


def capture_branches(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any
) -> list[Capture]:
    """Capture a model. If its code has conditions on values of tensors, capture it with other answers too.

    All conditions are true in one capture and false in another. In further ones, those of one line have the
    other answer. Together the captures hold the branches, but not all their combinations. If sizes depend on
    values of integer inputs too, such as lengths, the model is captured for these values alone.

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
        refused = error
    if not depends_on_data(refused.__cause__):
        return _captures_of_values(model, args, kwargs, refused, **options)
    pair = Answers(True), Answers(False)
    try:
        found = [capture(model, args, kwargs, answers=answers, **options) for answers in pair]
    except CaptureError:
        return _captures_of_values(model, args, kwargs, refused, **options)
    if not any(answers.numbers for answers in pair):
        found = [one._replace(answer=a.usual) for one, a in zip(found, pair, strict=True)]
    lines = sorted(pair[0].asked | pair[1].asked)
    for line, answers in itertools.product(
        lines[:LINES] if lines[1:] and not options.get("exact") else [], pair
    ):
        if line in answers.asked:
            other = Answers(answers.usual, frozenset({line}))
            with suppress(CaptureError):
                found.append(capture(model, args, kwargs, answers=other, **options))
    if not any(one.agrees for one in found):
        return _captures_of_values(model, args, kwargs, refused, **options)
    return sorted(found, key=lambda one: not one.agrees)


def _captures_of_values(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], refused: CaptureError, **options: Any
) -> list[Capture]:
    """Capture a model for the values of its integer inputs, or raise what a capture for all raised.

    Further captures have the other outcome of what the code of one line asks about such values.
    """
    if not any(map(is_countable, pytree.tree_leaves((args, dict(kwargs))))):
        raise refused
    known = KnownValues()
    try:
        found = [capture(model, args, kwargs, known=known, **options)]
    except CaptureError:
        raise refused from None
    if not found[0].agrees or not found[0].values:
        raise refused
    for line in sorted(known.asked)[:LINES]:
        with suppress(CaptureError):
            other = KnownValues(frozenset({line}))
            found.append(capture(model, args, kwargs, known=other, **options))
    return found
