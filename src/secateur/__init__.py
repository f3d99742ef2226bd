"""secateur: decide how much of each layer to prune, remove it, repair it, and prove it.

The pipeline, left to right: `trace`, `score`, an allocator's ``allocate``, `apply`, `repair`, `verify`,
`save`. `prune` walks it in one call.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.api import *  # noqa: F403


class _Package(ModuleType):
    """Reads the public names from `secateur.api` when they are first asked for: that imports torch.

    So ``secateur --help`` comes at once. Some functions share their module's name (`prune` in prune.py),
    and importing a module puts it on the package; here it never takes a function's place.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        api = import_module("secateur.api")
        if name != "__all__" and name not in api.__all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(api, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (isinstance(value, ModuleType) and name in _SHADOWED):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *import_module("secateur.api").__all__})


_SHADOWED = frozenset(
    {
        "apply",
        "compare",
        "evaluate",
        "export",
        "latency",
        "prune",
        "recover",
        "repair",
        "save",
        "score",
        "verify",
    }
)

sys.modules[__name__].__class__ = _Package
