"""The arguments of an operator's call by the names in its schema, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def given_by_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a call passes, by name. `target` is an operator with a schema."""
    names = (argument.name for argument in target._schema.arguments)
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def all_by_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that an operator sees, by name: what the call passes, and the defaults of the rest.

    Example:
        >>> import torch
        >>> all_by_name(torch.ops.aten.softmax.int, ("x", 1), {})
        {'dtype': None, 'self': 'x', 'dim': 1}
    """
    schema = target._schema.arguments
    return {a.name: a.default_value for a in schema if a.has_default_value()} | given_by_name(
        target, args, kwargs
    )


def bound(target: Any, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments for an operator, from arguments by name. Some may be left out.

    Example:
        >>> import torch
        >>> bound(torch.ops.aten.softmax.int, {"self": "x", "dim": 1})
        (('x', 1), {})
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    positional = True  # until an argument is left out
    for argument in target._schema.arguments:
        if argument.name not in arguments:
            positional = False
        elif positional and not argument.kwarg_only:
            args.append(arguments[argument.name])
        else:
            kwargs[argument.name] = arguments[argument.name]
    return tuple(args), kwargs
