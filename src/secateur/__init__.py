"""secateur: decide how much of each layer to prune, remove it, repair it, and prove it.

The pipeline, left to right: `trace`, `score`, an allocator's ``allocate``, `apply`, `repair`, `verify`,
`save`. `prune` makes these calls in one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur import errors as errors
    from secateur import signals as signals
    from secateur.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """A public name or module, imported when it is first asked for: most of them import torch."""
    if name == "__all__":
        return import_module("secateur.api").__all__
    if not name.startswith("_"):
        elsewhere = import_module("secateur.elsewhere")
        if name in elsewhere.MODULES:
            return import_module(f"secateur.{name}")
        for module, names in elsewhere.NAMES.items():
            if name in names:
                return getattr(import_module(module), name)
        api = import_module("secateur.api")
        if name in api.__all__:
            return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    modules = import_module("secateur.elsewhere").MODULES
    return sorted({*globals(), *modules, *import_module("secateur.api").__all__})
