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
"""The most lines whose conditions are answered differently from the others, at the traced sizes."""


def capture_branches(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any
) -> list[Capture]:
    """Capture a model. If its code has conditions on values of tensors, capture it once for each branch.

    All conditions are true in one capture and false in another. In further captures, the conditions of one
    line have the other answer. So each branch is captured, but not every combination of branches. If sizes
    depend on values of integer inputs too, such as lengths, the model is captured for these values alone.

    Args:
        model: The model; it is left as it was.
        args: Positional arguments.
        kwargs: Keyword arguments.
        options: As for `capture`.

    Returns:
        The captures. The first gives what the model gives on these arguments.

    Raises:
        CaptureError: The model cannot be captured, or no capture gives what the model gives.
    """
    try:
        return [capture(model, args, kwargs, **options)]
    except CaptureError as error:
        failed = error
    if not depends_on_data(failed.__cause__):
        return _captures_of_values(model, args, kwargs, failed, **options)
    pair = Answers(True), Answers(False)
    try:
        found = [capture(model, args, kwargs, answers=answers, **options) for answers in pair]
    except CaptureError:
        return _captures_of_values(model, args, kwargs, failed, **options)
    if not any(answers.numbers for answers in pair):
        found = [one._replace(answer=a.default) for one, a in zip(found, pair, strict=True)]
    lines = sorted(pair[0].asked | pair[1].asked)
    for line, answers in itertools.product(
        lines[:LINES] if lines[1:] and not options.get("exact") else [], pair
    ):
        if line in answers.asked:
            other = Answers(answers.default, frozenset({line}))
            with suppress(CaptureError):
                found.append(capture(model, args, kwargs, answers=other, **options))
    if not any(one.agrees for one in found):
        return _captures_of_values(model, args, kwargs, failed, **options)
    return sorted(found, key=lambda one: not one.agrees)


def _captures_of_values(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], failed: CaptureError, **options: Any
) -> list[Capture]:
    """Capture a model for the values of its integer inputs; raise `failed` if that does not work either.

    In further captures, comparisons of such values in one line have the other outcome.
    """
    if not any(map(is_countable, pytree.tree_leaves((args, dict(kwargs))))):
        raise failed
    known_values = KnownValues()
    try:
        found = [capture(model, args, kwargs, known_values=known_values, **options)]
    except CaptureError:
        raise failed from None
    if not found[0].agrees or not found[0].values:
        raise failed
    for line in sorted(known_values.asked)[:LINES]:
        with suppress(CaptureError):
            other = KnownValues(frozenset({line}))
            found.append(capture(model, args, kwargs, known_values=other, **options))
    return found
