"""Tensors inside the function transforms of `torch.func`: `vmap`, `grad` and those made of them."""

from __future__ import annotations

import torch


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for many, or is followed by a derivative, inside a transform of `torch.func`.

    Example:
        >>> found = []
        >>> _ = torch.vmap(lambda x: found.append(is_transformed(x)) or x)(torch.ones(2))
        >>> found, is_transformed(torch.ones(2))
        ([True], False)
    """
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
