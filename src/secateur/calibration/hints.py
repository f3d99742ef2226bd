"""For batches of an unknown form: suggest a `forward` function that the user can copy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Held = tuple[str, Any]
"""Python code that reads a part of a batch, such as ``batch['x']``, and the value of that part."""

Call = tuple[list[Held], dict[str, Held]]
"""Positional and keyword arguments of a possible call of the model."""


def forward_hint(
    raw: Any,
    required: Collection[str],
    names: Collection[str],
    labels: Collection[str],
    works: Callable[..., bool],
) -> str:
    """Suggest a `forward` for batches like `raw`, as Python code.

    Several likely calls are tried: arguments by name, the whole batch, tensors in order, the first tensor.
    The result is the first call that works. If none works, it is the most likely one.

    Args:
        raw: A batch of the loader.
        required: Parameters of the model's forward that have no default, in order.
        names: All named parameters of the model's forward.
        labels: Keys that usually hold labels.
        works: Function (positional arguments, keyword arguments) -> whether the model accepts them.

    Example:
        >>> batch = {"picture": Tensor()}
        >>> forward_hint(batch, ["x"], ["x"], [], lambda args, kwargs: isinstance(args[0], Tensor))
        "lambda model, batch: model(batch['picture'])"
    """
    inputs: Held = ("batch", raw)
    if isinstance(raw, list | tuple) and len(raw) in (1, 2):
        inputs = ("batch[0]", raw[0])
    parts = _stacked(raw) or _parts(*inputs, names)
    held = {k: v for k, v in parts.items() if k not in labels or k in required}
    known = {name: held[name] for name in names if name in held}
    tensors = [h for h in held.values() if any(isinstance(v, Tensor) for v in pytree.tree_leaves(h[1]))]
    by_name: Call = ([], known)
    by_order: Call = (tensors[: max(len(required), 1)], {})
    calls = [by_name, ([inputs], {}), by_order, (tensors[:1], {})]
    usable = [call for call in calls if any(call)]
    fits = by_name if known and set(required) <= known.keys() else by_order
    call = next((c for c in usable if works(*_values(c))), fits if any(fits) else ([inputs], {}))
    given = [code for code, _ in call[0]] + [f"{name}={code}" for name, (code, _) in call[1].items()]
    return f"lambda model, batch: model({', '.join(given)})"


def _stacked(raw: Any) -> dict[str, Held]:
    """Stack a batch that is a list of samples, each a mapping with the same keys; empty for other batches."""
    if not isinstance(raw, list) or len(raw) < 2 or not all(isinstance(sample, Mapping) for sample in raw):
        return {}
    found = {}
    for key in raw[0] if all(sample.keys() == raw[0].keys() for sample in raw) else ():
        values = [sample[key] for sample in raw]
        if all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values):
            found[str(key)] = f"torch.stack([one[{key!r}] for one in batch])", torch.stack(values)
    return found


def _parts(code: str, value: Any, names: Collection[str]) -> dict[str, Held]:
    """Split a batch into its parts, by key, position or attribute."""
    if isinstance(value, Mapping):
        return {str(k): (f"{code}[{k!r}]", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return {str(k): (f"{code}[{k}]", v) for k, v in enumerate(value)}
    return {name: (f"{code}.{name}", getattr(value, name)) for name in names if hasattr(value, name)}


def _values(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(v for _, v in call[0]), {name: v for name, (_, v) in call[1].items()}
