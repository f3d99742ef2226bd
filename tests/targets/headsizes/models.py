"""Small networks with attention, each written in another way."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, SIZE = 24, 4, 6
ROWS = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    """Attention that leaves the products to a subclass."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads, self.size, self.scaling = kv_heads, SIZE, SIZE**-0.5
        self.q = nn.Linear(WIDTH, HEADS * SIZE)
        self.k = nn.Linear(WIDTH, kv_heads * SIZE)
        self.v = nn.Linear(WIDTH, kv_heads * SIZE)
        self.o = nn.Linear(HEADS * SIZE, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, rows, _ = x.shape
        q = self.q(x).view(batch, rows, -1, self.size).transpose(1, 2)
        k = self.k(x).view(batch, rows, -1, self.size).transpose(1, 2)
        v = self.v(x).view(batch, rows, -1, self.size).transpose(1, 2)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(self.attend(*self.heads(x)).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class Fused(Attention):
    """The scale follows from the size of the heads inside PyTorch."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Grouped(Attention):
    """Two heads of queries share keys and values."""

    def __init__(self) -> None:
        super().__init__(kv_heads=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scaling, enable_gqa=True)


class Eager(Attention):
    """The scale is computed from a tensor's size."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(-1) @ v


class Summed(Attention):
    """The products are einsums."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) * self.scaling).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v)


class Rotary(Eager):
    """Queries and keys are turned by their positions, dimension j together with dimension j + size / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequency", 100.0 ** -torch.arange(0, 1, 2 / SIZE))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        angle = torch.arange(q.shape[2])[:, None] * torch.cat([self.frequency, self.frequency])
        return super().attend(self.turned(q, angle), self.turned(k, angle), v)

    @staticmethod
    def turned(x: Tensor, angle: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * angle.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angle.sin()


class Normed(Eager):
    """Queries are divided by their length."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q * q.square().mean(-1, keepdim=True).rsqrt(), k, v)


class Kernel(Eager):
    """Queries and keys are positive features, so a weight of zero does not make one zero."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-2, -1)
        return weights / weights.sum(-1, keepdim=True) @ v


class Tied(nn.Module):
    """One layer makes queries, keys and values, which lie along an axis of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, width = x.shape
        qkv = self.qkv(x).reshape(batch, rows, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, rows, width)
        return x + self.o(out)


class LastRow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "fused": Fused,
    "grouped": Grouped,
    "eager": Eager,
    "summed": Summed,
    "rotary": Rotary,
    "normed": Normed,
    "kernel": Kernel,
    "tied": Tied,
}


def network(name: str, *, dtype: torch.dtype = torch.float32, classes: int = 3) -> nn.Module:
    """An embedding of rows, two attentions of one kind, and a classifier that reads the last row."""
    torch.manual_seed(0)
    make = ATTENTIONS[name]
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), make(), LastRow(), nn.Linear(WIDTH, classes))
    with torch.no_grad():
        for parameter in layers.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)  # so that attention looks at some rows more than at others
    return layers.to(dtype).eval()


class Mean(nn.Module):
    """The mean over rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def chain(classes: int = 4) -> nn.Module:
    """Three attentions, each a residual block, and a classifier."""
    return nn.Sequential(*(Fused() for _ in range(3)), Mean(), nn.Linear(WIDTH, classes))
