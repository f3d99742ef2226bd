"""``len(tensor)`` in a capture."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch import Tensor, nn

from secateur.graph.capture import capture
from secateur.graph.lengths import lengths_open


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        names = {len([x, x]): "two"}
        return x.reshape(len(x), -1) + len(names[2]) + len(x[0, 0])


def test_the_length_of_a_tensor_fixes_no_size() -> None:
    found = capture(Flat().eval(), (torch.randn(4, 2, 3),), {})
    assert found.static is None
    x = torch.randn(7, 2, 3)
    assert torch.equal(found.program.module()(x), Flat()(x))


def test_all_other_lengths_are_pythons_own() -> None:
    own = builtins.len
    with lengths_open():
        found = [len(torch.zeros(3)), len("abc"), len({})]
        with pytest.raises(TypeError, match="no len"):
            len(5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="0-d"):
            len(torch.tensor(0))
    assert found == [3, 3, 0]
    assert builtins.len is own


def test_it_comes_back_after_an_error() -> None:
    own = builtins.len
    with pytest.raises(ValueError, match="stop"), lengths_open():
        raise ValueError("stop")
    assert builtins.len is own
