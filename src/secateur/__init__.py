"""secateur: decide how much of each layer to prune, remove it, repair it, and prove it.

The pipeline, left to right: `trace`, `score`, an allocator's ``allocate``, `apply`, `repair`, `verify`,
`save`. `prune` walks it in one call.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A public name, read from `secateur.api` when it is first asked for: that imports torch."""
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    api = import_module("secateur.api")
    if name != "__all__" and name not in api.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("secateur.api").__all__})
