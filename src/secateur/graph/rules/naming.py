"""Names of operators."""

from __future__ import annotations

import torch
from torch import fx

NORMS = frozenset(
    f"aten.{name}.default" for name in ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
)
"""Operators that normalise."""

ACTIVATIONS = frozenset(
    f"aten.{name}{inplace}.default"
    for name in (
        "relu", "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "selu", "celu",
        "tanh", "sigmoid", "mish", "softplus", "relu6", "prelu", "log_sigmoid",
    )
    for inplace in ("", "_")
)  # fmt: skip
"""Operators that are an activation function."""


def operator_name(node: fx.Node) -> str:
    """``aten.conv2d.default``, or ``operator.getitem`` for a Python function."""
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator):
        return str(node.target)
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}".lstrip(
        "_"
    )
