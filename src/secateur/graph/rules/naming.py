"""What operators are called."""

from __future__ import annotations

import torch
from torch import fx


def operator_name(node: fx.Node) -> str:
    """``aten.conv2d.default``, or ``operator.getitem`` for a Python function."""
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(node.target)
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}".lstrip(
        "_"
    )
