"""An input made from its sizes."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from secateur.errors import SettingError

if TYPE_CHECKING:
    import torch


def example_of(text: str) -> torch.Tensor:
    """A tensor from ``1x3x224x224`` or ``1x16:int64``: normal floats, zero integers.

    Raises:
        SettingError: If it is not of this form.

    Example:
        >>> example_of("2x16:int64").shape
        torch.Size([2, 16])
    """
    import torch

    sizes, _, name = text.partition(":")
    dtype = getattr(torch, name or "float32", None)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or not isinstance(dtype, torch.dtype):
        raise SettingError(
            f"--input {text}: expected sizes and, if not float32, a dtype, got something else. "
            "Write 1x3x224x224 or 1x16:int64, for example."
        )
    shape = [int(size) for size in sizes.split("x")]
    if math.prod(shape) > 2**31:
        raise SettingError(f"--input {text}: expected an input that fits into memory. Give a smaller one.")
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
