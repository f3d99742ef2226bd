"""What is put aside in files comes back as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur.stream.dense import Values
from secateur.stream.pending import _ValuesFile


def test_values_come_back_with_their_layout_and_what_they_share(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    dense: dict[Any, Any] = {
        "base": base,
        "view": base[1:, ::2],
        "transposed": base.T,
        "half": torch.randn(3, dtype=torch.bfloat16),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "mask": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "nested": [(torch.arange(3), 5), {"a": torch.tensor(2)}],
        "number": 7,
    }
    small: dict[Any, Any] = {"base": base, "ids": torch.arange(4)}
    file = _ValuesFile.write(tmp_path / "values", Values(dense, small, 3))
    kept = {name: value.clone() for name, value in dense.items() if isinstance(value, torch.Tensor)}
    base.zero_()  # the file has what was there
    found = file.read()
    assert found.position == 3
    for name, value in kept.items():
        assert found.dense[name].dtype == value.dtype
        assert torch.equal(found.dense[name], value), name
    for name in ("view", "transposed"):
        assert found.dense[name].stride() == dense[name].stride()
    (first, number), by_name = found.dense["nested"]
    assert torch.equal(first, torch.arange(3))
    assert (number, int(by_name["a"]), found.dense["number"]) == (5, 2, 7)
    # Tensors that shared their memory share it again, in both programs, and with nothing else.
    found.small["base"].fill_(1)
    assert bool((found.dense["view"] == 1).all())
    assert not base.any()
    again = file.read()
    assert torch.equal(again.dense["base"], kept["base"])
