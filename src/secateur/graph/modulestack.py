"""Calls of submodules that raise in a capture, and that the model's own code catches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn


@contextmanager
def failed_calls_left() -> Iterator[None]:
    """Inside, capture leaves a submodule whose call raises, as Python does.

    ``try: layer(x, lengths)``, ``except TypeError: layer(x)``: PyTorch would go on as if the first call still
    ran, and stop at its end.
    """
    original = fx.Tracer.call_module

    def call_module(
        self: fx.Tracer, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        depth = len(self.module_stack)
        try:
            return original(self, m, forward, args, kwargs)
        except BaseException:
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            raise

    fx.Tracer.call_module = call_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        fx.Tracer.call_module = original  # type: ignore[method-assign]
