"""States of signals in a scoring checkpoint that somebody changed: another shape is never spread out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.signals import storage
from secateur.signals.registry import SIGNALS
from tests.helpers.hostile import content_of

DATA = [(torch.randn(8, 4), torch.arange(8) % 3) for _ in range(4)]
NAMES = [name for name, signal in SIGNALS.items() if signal.needs - {"weights"}]


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()


GRAPH = sc.trace(_net(), DATA[0][0])


class _Stopped:
    """The data, which end in an interrupt before the last batch."""

    def __len__(self) -> int:
        return len(DATA)

    def __iter__(self) -> Iterator[Any]:
        yield from DATA[:3]
        raise KeyboardInterrupt


def _others(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tensors of other shapes and dtypes; some of them would be spread out to the right shape."""
    flat = tensor.reshape(-1)
    if tensor.ndim:
        yield flat[:1].clone()
        yield tensor[None].clone()
        yield tensor[..., :1].clone() if tensor.shape[-1] > 1 else torch.cat([tensor, tensor], -1)
        yield tensor.new_zeros(())
        yield tensor.to(torch.int32 if tensor.is_floating_point() else torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_states_of_another_shape(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run"
    options: dict[str, Any] = {"checkpoint": file, "checkpoint_every": 0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        sc.score(GRAPH, _Stopped(), name, **options)
    content, tensors, whole = content_of(file), load_file(file), file.read_bytes()
    tried = 0
    for key, tensor in tensors.items():
        for other in _others(tensor):
            if (other.shape, other.dtype) == (tensor.shape, tensor.dtype):
                continue
            changed, text = tensors | {key: other}, json.dumps(content)
            save_file(changed, file, metadata={"secateur": text, "sha256": storage._digest(text, changed)})
            with pytest.raises(sc.SecateurError, match=r"checkpoint .*expected the states of these signals"):
                sc.score(GRAPH, DATA, name, **options)
            tried += 1
    file.write_bytes(whole)
    assert sc.score(GRAPH, DATA, name, **options).samples == 32
    assert tried or not any(t.ndim for t in tensors.values())
