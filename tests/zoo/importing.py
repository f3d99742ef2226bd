"""Importing torchvision, timm and transformers where torchvision's compiled operators do not load.

torchvision is installed beside whatever build of torch there is. If its compiled library was built
for another one (a CUDA build beside a CPU-only torch), it does not load, and the import then fails
where torchvision registers shape functions for operators that do not exist. No architecture in the
zoo needs those operators, so registrations for them, and for nothing else, are skipped.

Import from here before anything else imports torchvision, timm or transformers.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch

_NAMESPACE = "torchvision::"


@contextmanager
def _without_missing_operators() -> Iterator[None]:
    """While active, `torch.library.register_fake` ignores torchvision operators that do not exist."""
    original = torch.library.register_fake

    def register_fake(op: Any, func: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        missing = (
            isinstance(op, str)
            and op.startswith(_NAMESPACE)
            and not hasattr(torch.ops.torchvision, op.removeprefix(_NAMESPACE).split(".")[0])
        )
        if missing:
            return func if func is not None else lambda function: function
        # One frame more lies between the caller, whose module torch looks at, and the original.
        options["_stacklevel"] = options.get("_stacklevel", 1) + 1
        return original(op, func, **options)

    with mock.patch.object(torch.library, "register_fake", register_fake), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        yield


def _import(name: str) -> ModuleType | None:
    if name in sys.modules:
        return sys.modules[name]
    try:
        with _without_missing_operators():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # installed, but something that it needs is not: worth knowing
            raise
        return None


def import_torchvision() -> ModuleType | None:
    """`torchvision`, or None where it is not installed."""
    return _import("torchvision")


def import_timm() -> ModuleType | None:
    """`timm`, or None where it, or torchvision, which it needs, is not installed."""
    return _import("timm") if import_torchvision() is not None else None


def import_transformers() -> ModuleType | None:
    """`transformers`, or None where it is not installed; torchvision, which it imports, comes first."""
    import_torchvision()
    return _import("transformers")
