"""Small networks that take inputs of several sizes, each in its own way, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tokens(nn.Module):
    """Attention over tokens, some of which a mask may call padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.inner, self.head = nn.Linear(8, 10), nn.Linear(10, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = None if mask is None else mask == 0
        hidden = self.inner(self.block(self.embed(ids), src_key_padding_mask=padding)).relu()
        weight = torch.ones_like(ids) if mask is None else mask
        pooled: Tensor = (hidden * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True)
        out: Tensor = self.head(pooled)
        return out


class Pictures(nn.Sequential):
    """Convolutions over pictures of any height and width."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


class Windows(nn.Module):
    """Pads to whole windows, where there is something to pad; past eight positions it does one thing more."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 9), nn.Linear(9, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % 4
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        windows = self.a(x).relu().unflatten(1, (-1, 4)).mean(2)
        hidden = self.b(windows).relu()
        if windows.shape[1] > 2:
            hidden = hidden.tanh()
        out: Tensor = self.head(hidden.mean(1))
        return out


class Steps(nn.Module):
    """A loop over positions, which a capture writes out."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.inner, self.head = nn.GRUCell(4, 5), nn.Linear(5, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 5)
        for k in range(x.shape[1]):
            state = self.cell(x[:, k], state)
        out: Tensor = self.head(self.inner(state).relu())
        return out


class Nodes(nn.Module):
    """A graph network: node features, and edges as pairs of node numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def _gathered(self, hidden: Tensor, edges: Tensor) -> Tensor:
        return torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = self._gathered(self.a(x), edges).relu()
        out: Tensor = self.head(self._gathered(self.b(hidden), edges).relu())
        return out


class Language(nn.Module):
    """A language model that computes its own loss where it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (
            nn.Embedding(20, 6),
            nn.Linear(6, 12),
            nn.Linear(12, 6),
            nn.Linear(6, 20),
        )

    def forward(self, ids: Tensor, labels: Tensor | None = None, **more: Any) -> dict[str, Tensor]:
        hidden = self.embed(ids)
        logits = self.head(hidden + self.down(self.up(hidden).relu()))
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


Make = Callable[[int, torch.dtype], Any]
SIZES: dict[str, tuple[int, ...]] = {
    "tokens": (7, 5, 9, 6),
    "padded": (7, 5, 9, 6),
    "pictures": (8, 9, 11, 7),
    "windows": (8, 5, 12, 11),
    "steps": (4, 3, 5, 4),
    "nodes": (9, 7, 12, 6),
    "language": (6, 8, 5, 7),
}
"""Of each network, the sizes of its batches; it is traced at the first."""

NETS: dict[str, type[nn.Module]] = {
    "tokens": Tokens,
    "padded": Tokens,
    "pictures": Pictures,
    "windows": Windows,
    "steps": Steps,
    "nodes": Nodes,
    "language": Language,
}


def network(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One of the networks, in evaluation mode."""
    torch.manual_seed(0)
    return NETS[name]().to(dtype).eval()


def batches(name: str, samples: int = 6, dtype: torch.dtype = torch.float64) -> list[Any]:
    """A batch of each of the network's sizes, with labels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def integers(most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=generator)

    def one(size: int) -> Any:
        classes = torch.arange(samples) % 3
        if name == "tokens":
            return integers(30, samples, size), classes
        if name == "padded":
            mask = (torch.arange(size) < size - torch.arange(samples)[:, None] % 3).long()
            return (integers(30, samples, size), mask), classes
        if name == "pictures":
            return normal(samples, 2, size, size + 1), classes
        if name == "nodes":
            return (normal(size, 4), integers(size, 2, 2 * size + 1)), torch.arange(size) % 3
        if name == "language":
            ids = integers(20, samples, size)
            return {"ids": ids, "labels": ids}
        return normal(samples, size, 4), classes

    return [one(size) for size in SIZES[name]]
