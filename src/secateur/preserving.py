"""A model that comes back as it was, whatever ran it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back, also after an exception, what the block changes in a model.

    That is every attribute of every module, what lists, dictionaries and sets among them hold, and the values
    of buffers. Parameters are not copied: no forward pass writes them.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    containers = [(v, _copied(v)) for _, held in before for v in held.values() if _is_container(v)]
    buffers = [(b, b.detach().clone(), b._version) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for module, held in before:
            vars(module).clear()
            vars(module).update(held)
        for container, held in containers:
            _refill(container, held)
        with torch.no_grad():
            for buffer, value, version in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


def _is_container(value: Any) -> bool:
    return isinstance(value, list | dict | set)


def _copied(container: Any) -> Any:
    return container.copy()


def _refill(container: Any, held: Any) -> None:
    if isinstance(container, list):
        container[:] = held
    else:
        container.clear()
        container.update(held)
