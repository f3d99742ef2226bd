"""Whether a module adds what it computes to its input, found in the graph that autograd records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor

_PASSES = re.compile(
    "(Add|Sub|Rsub|Mul|Div|Neg|Relu|LeakyRelu|Prelu|PreluKernel|Gelu|Silu|Mish|Elu|Celu|Softplus|Tanh|Sigmoid"
    "|Hardswish|Hardtanh|Hardsigmoid|Clamp|ClampMin|.*LayerNorm|.*BatchNorm|.*GroupNorm|.*RmsNorm|.*RMSNorm"
    "|ToCopy|View|UnsafeView|ReshapeAlias|Permute|Transpose|T|Squeeze|Unsqueeze|Clone|Alias|Slice|Roll"
    "|NativeDropout|FusedDropout|Copy(Slices|Backwards))(Backward)?[0-9]*$",
    re.IGNORECASE,
)
"""Operators that treat each position alone, or all of a sample alike: a stream may pass through these."""

WEIGHS = re.compile(
    "mm|conv|attention|attn|linear|lstm|gru|rnn|einsum|fft|matmul|embedding|softmax", re.IGNORECASE
)
"""Operators that combine positions by weights."""

_SUM = re.compile("(Add|Sub)Backward[0-9]*$")


def is_residual(output: Tensor, source: Any) -> bool:
    """Whether an output is the input, plus something that layers computed from the input.

    Between the output and the sum, and between the sum and the input, there may be norms, activations,
    factors and views, but no layer. So blocks with a norm after the sum are found too, as in BERT.

    Args:
        output: The output of a module.
        source: The autograd node of its input.
    """
    seen, pending = {output.grad_fn}, [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node is source or not _PASSES.match(_kind(node)):
            continue
        before = [*_inputs(node)]
        if _SUM.match(_kind(node)) and len(before) == 2:
            for one, other in (before, before[::-1]):
                if _reaches(one, source, weighed=False) and _reaches(other, source, weighed=True):
                    return True
        pending += [n for n in before if n not in seen]
        seen.update(before)
    return False


def _kind(node: Any) -> str:
    return type(node).__name__


def _inputs(node: Any) -> Iterator[Any]:
    for before, _ in node.next_functions:
        if before is not None:
            yield before


def _reaches(start: Any, source: Any, *, weighed: bool) -> bool:
    """Whether a path leads back to the source: through a layer if `weighed`, else through `_PASSES` only."""
    first = (start, False)
    seen, pending = {first}, [first]
    while pending:
        node, by_layer = pending.pop()
        if node is source:
            if by_layer == weighed:
                return True
            continue
        by_layer = by_layer or WEIGHS.search(_kind(node)) is not None
        if not weighed and (by_layer or not _PASSES.match(_kind(node))):
            continue
        for before in _inputs(node):
            if (before, by_layer) not in seen:
                seen.add((before, by_layer))
                pending.append((before, by_layer))
    return False
