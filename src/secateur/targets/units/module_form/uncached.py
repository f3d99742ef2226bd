"""Running functions with a cache anew, so that they do not return remembered results."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from secateur.common.preserving import is_own

_CACHED = type(functools.cache(lambda: None))


def _anew(cached: Any) -> Callable[..., Any]:
    """Wrap a function with a cache that ends with the outermost call, so that recursion stays fast."""
    inner: list[Callable[..., Any]] = []

    @functools.wraps(cached.__wrapped__)
    def run(*args: Any, **kwargs: Any) -> Any:
        outermost = not inner
        if outermost:
            inner.append(functools.lru_cache(None)(cached.__wrapped__))
        try:
            return inner[0](*args, **kwargs)
        finally:
            if outermost:
                inner.clear()

    vars(run).update(cache_info=cached.cache_info, cache_clear=lambda: None)
    return run


@contextmanager
def uncached() -> Iterator[None]:
    """Inside, functions of the user or of libraries with `functools.lru_cache` run at each call.

    Einops, for example, remembers sizes. A tracked number equals a plain one, so the cache would return the
    plain number of an earlier run. The caches themselves do not change.
    """
    # By type: some values warn when asked for anything else.
    found = [
        (module, name, value)
        for source, module in list(sys.modules.items())
        if is_own(source)
        for name, value in list(vars(module).items())
        if type(value) is _CACHED and is_own(value.__module__)
    ]
    try:
        for module, name, value in found:
            setattr(module, name, _anew(value))
        yield
    finally:
        for module, name, value in found:
            setattr(module, name, value)
