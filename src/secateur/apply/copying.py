"""Copies of models."""

from __future__ import annotations

import copy
import warnings
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def duplicate(model: M) -> M:
    """A deep copy. Copying a captured program makes torch warn of its own internals; that is kept quiet."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        return copy.deepcopy(model)
