"""What PyTorch's operators consist of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import decomposition_table


def made_of(target: torch._ops.OpOverload) -> tuple[Callable[..., Any] | None, bool]:
    """Return a function that computes what an operator does by other operators, and whether it is composite.

    A composite operator has no kernel: it always runs others. For the rest the function is one of PyTorch's
    own decompositions, or None if there is none.

    Example:
        >>> made_of(torch.ops.aten.inner.default)[1], made_of(torch.ops.aten.conv2d.default)[1]
        (True, True)
        >>> made_of(torch.ops.aten.mm.default)
        (None, False)
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd"):
        return target.decompose, True
    return decomposition_table.get(target), False
