"""Functions that remember what they returned, run anew."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from secateur.common.preserving import is_own

_CACHED = type(functools.cache(lambda: None))


def _anew(cached: Any) -> Callable[..., Any]:
    """The function with a cache that lives as long as an outermost call: so a recursion stays fast."""
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
    """Inside, what the user and libraries decorate with `functools.lru_cache` runs each time.

    Einops remembers sizes that way: a number that was tracked would come back as a plain one that an earlier
    run has left, because both are equal. The caches themselves are left as they are.
    """
    # By type: some values warn when asked for anything else.
    found = [
        (module, name, value)
        for module in list(sys.modules.values())
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
