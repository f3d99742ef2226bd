"""Architectures written here in PyTorch alone: what no library of image or language models holds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.entry import Entry, Example, images

CLASSES = 5


class UNet(nn.Module):
    """Down and up again, each level joined to its counterpart."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._block(3, 12), self._block(12, 20), self._block(20, 28)])
        self.bottom = self._block(28, 36)
        self.rise = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in ((36, 28), (28, 20), (20, 12)))
        self.up = nn.ModuleList([self._block(56, 28), self._block(40, 20), self._block(24, 12)])
        self.head = nn.Conv2d(12, CLASSES, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for size in (inputs, outputs):
            layers += [nn.Conv2d(size, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for block in self.down:
            x = block(x)
            levels.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for rise, block, level in zip(self.rise, self.up, reversed(levels), strict=True):
            x = block(torch.cat([level, rise(x)], dim=1))
        return self.head(x)


class _TimedBlock(nn.Module):
    """A residual block whose middle is shifted and scaled by what the time step says."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, 2 * outputs)
        self.norm2, self.conv2 = nn.GroupNorm(4, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return y + self.skip(x)


class _PixelAttention(nn.Module):
    """Attention between the pixels of a map, with 1 x 1 convolutions for queries, keys and values."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.GroupNorm(4, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, -1, h * w)
        q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]
        weights = torch.softmax(torch.einsum("bhci,bhcj->bhij", q, k) / math.sqrt(q.shape[2]), dim=-1)
        y = torch.einsum("bhij,bhcj->bhci", weights, v).reshape(b, -1, h, w)
        return x + self.out(y)


class DiffusionUNet(nn.Module):
    """A denoiser: time embedding, group norms, attention at the lowest resolution."""

    def __init__(self, time: int = 24) -> None:
        super().__init__()
        self.frequencies = 8
        self.embed = nn.Sequential(nn.Linear(16, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down1, self.pool1 = _TimedBlock(16, 16, time), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.down2, self.attention = _TimedBlock(16, 24, time), _PixelAttention(24, 3)
        self.middle = _TimedBlock(24, 24, time)
        self.up2, self.up1 = _TimedBlock(48, 24, time), _TimedBlock(40, 16, time)
        self.rise = nn.Conv2d(24, 24, 3, padding=1)
        self.norm, self.out = nn.GroupNorm(4, 16), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        rates = torch.exp(-torch.arange(self.frequencies, device=x.device, dtype=x.dtype))
        angles = step[:, None] * rates
        time = self.embed(torch.cat([angles.sin(), angles.cos()], dim=-1))
        high = self.down1(self.stem(x), time)
        low = self.attention(self.down2(self.pool1(high), time))
        y = self.up2(torch.cat([self.middle(low, time), low], dim=1), time)
        y = self.rise(F.interpolate(y, scale_factor=2.0, mode="nearest"))
        y = self.up1(torch.cat([y, high], dim=1), time)
        return self.out(F.silu(self.norm(y)))


class Tagger(nn.Module):
    """A label for every word, from a recurrent network in both directions."""

    def __init__(self, kind: type[nn.RNNBase], **options: int) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 20)
        self.cells = kind(20, 24, num_layers=2, bidirectional=True, batch_first=True, **options)
        width = 2 * options.get("proj_size", 24)
        self.hidden, self.head = nn.Linear(width, 18), nn.Linear(18, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.cells(self.words(words))
        return self.head(torch.tanh(self.hidden(states)))


class PointNet(nn.Module):
    """A function of a set of points: shared layers, a learnt transform, and a maximum over points."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.Conv1d(16, 24, 1), nn.ReLU())
        self.matrix = nn.Linear(24, 9)
        self.points = nn.Sequential(
            nn.Conv1d(3, 20, 1),
            nn.BatchNorm1d(20),
            nn.ReLU(),
            nn.Conv1d(20, 32, 1),
            nn.BatchNorm1d(32),
            nn.ReLU(),
        )
        self.deep = nn.Sequential(nn.Conv1d(32, 48, 1), nn.BatchNorm1d(48))
        self.head = nn.Sequential(nn.Linear(48, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, CLASSES))
        self.segment = nn.Sequential(nn.Conv1d(80, 16, 1), nn.ReLU(), nn.Conv1d(16, CLASSES, 1))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix(self.transform(points).amax(dim=2)).view(-1, 3, 3)
        local = self.points(torch.bmm(points.transpose(1, 2), matrix).transpose(1, 2))
        whole = torch.max(self.deep(local), 2)[0]
        everywhere = whole.unsqueeze(2).expand(-1, -1, points.shape[2])
        return self.head(whole), self.segment(torch.cat([local, everywhere], dim=1))


class MessagePassing(nn.Module):
    """A graph network: messages are gathered along edges and added up at their targets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 20)
        self.message = nn.ModuleList(
            nn.Sequential(nn.Linear(43, 28), nn.ReLU(), nn.Linear(28, 20)) for _ in range(2)
        )
        self.update = nn.ModuleList(nn.GRUCell(20, 20) if i else nn.Linear(40, 20) for i in range(2))
        self.head = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, nodes: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        source, target = edges[:, 0], edges[:, 1]
        x = F.relu(self.embed(nodes))
        for message, update in zip(self.message, self.update, strict=True):
            sent = message(torch.cat([x[source], x.index_select(0, target), features], dim=1))
            summed = torch.zeros_like(x).index_add(0, target, sent)
            x = update(summed, x) if isinstance(update, nn.GRUCell) else update(torch.cat([x, summed], dim=1))
        return self.head(x)


class TwoInputs(nn.Module):
    """An image and numbers in, a mapping out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 20, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.numbers = nn.Sequential(nn.Linear(7, 16), nn.GELU(), nn.Linear(16, 80))
        self.gate, self.joint = nn.Linear(80, 80), nn.Linear(160, 32)
        self.heads = nn.ModuleDict({"kind": nn.Linear(32, CLASSES), "size": nn.Linear(32, 1)})

    def forward(self, image: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        a, b = self.image(image), self.numbers(numbers)
        joint = F.relu(self.joint(torch.cat([a * torch.sigmoid(self.gate(b)), b], dim=1)))
        return {name: head(joint) for name, head in self.heads.items()}


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a class token."""

    def __init__(self, *, first: bool) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(10, 32), nn.Parameter(torch.zeros(1, 13, 32))
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=first, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], dim=1) + self.position
        return self.head(self.layers(x)[:, 0])


class Translator(nn.Module):
    """`nn.Transformer`: an encoder, and a decoder that may not look ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 32)
        self.transformer = nn.Transformer(32, 4, 1, 2, 48, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(9))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        y = self.transformer(self.words(source), self.words(target), tgt_mask=self.mask, tgt_is_causal=True)
        return y @ self.words.weight.t()


class CrossAttention(nn.Module):
    """`nn.MultiheadAttention` whose keys and values have sizes of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(6, 32)
        self.attention = nn.MultiheadAttention(32, 4, kdim=10, vdim=14, batch_first=True)
        self.inner, self.head = nn.Linear(32, 24), nn.Linear(24, CLASSES)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        y, _ = self.attention(self.query(queries), keys, values, need_weights=False)
        return self.head(F.relu(self.inner(y)))


class EinsumAttention(nn.Module):
    """Attention from weights with an axis of their own for heads, by einsum throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(4, 20, 6)) for _ in range(3))
        self.out = nn.Parameter(torch.zeros(4, 6, 20))
        self.up, self.down = nn.Parameter(torch.zeros(20, 2, 36)), nn.Parameter(torch.zeros(36, 20))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("bhte,bhse->bhts", q, k) / 6**0.5, dim=-1)
        x = x + torch.einsum("bhts,bhse,hed->btd", weights, v, self.out)
        gate, value = torch.einsum("...d,dgn->g...n", x, self.up)
        return self.head(x + torch.einsum("...n,nd->...d", F.silu(gate) * value, self.down))


class GroupedQueries(nn.Module):
    """Six heads of queries that share two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.kv = nn.RMSNorm(24), nn.Linear(24, 48), nn.Linear(24, 32)
        self.out, self.head = nn.Linear(48, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q = self.q(y).unflatten(-1, (-1, 8)).transpose(1, 2)
        k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in self.kv(y).chunk(2, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))


class StandardisedConv(nn.Conv2d):
    """A convolution with weights of mean 0 and variance 1."""

    def forward(self, x: Tensor) -> Tensor:
        spread, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt(spread + 1e-5)
        return self._conv_forward(x, weight, self.bias)


class Standardised(nn.Module):
    """Weight standardisation with group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = StandardisedConv(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.wide, self.wide_norm = StandardisedConv(16, 24, 3), nn.GroupNorm(24, 24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(self.wide_norm(self.wide(x))).mean(dim=(2, 3)))


class SuperResolution(nn.Module):
    """Twice the resolution by pixel shuffle, twice, around a residual trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 5, padding=2)
        self.trunk = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 20, 3, padding=1), nn.PReLU(20), nn.Conv2d(20, 16, 3, padding=1))
            for _ in range(2)
        )
        self.rise = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()) for _ in range(2)
        )
        self.out = nn.Conv2d(16, 3, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for block in self.trunk:
            y = y + block(y)
        for rise in self.rise:
            y = rise(y)
        return self.out(y) + F.interpolate(x, scale_factor=4.0, mode="bilinear", align_corners=False)


def _noise(*shapes: tuple[int, ...]) -> Example:
    return lambda batch, generator: tuple(torch.randn(batch, *s, generator=generator) for s in shapes)


def _words(*lengths: int, words: int = 40) -> Example:
    return lambda batch, generator: tuple(
        torch.randint(0, words, (batch, n), generator=generator) for n in lengths
    )


def _noisy(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    return torch.randn(batch, 3, 16, 16, generator=generator), torch.rand(batch, generator=generator) * 50


def _graph(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    nodes, edges = 5 * batch, 12 * batch
    return (
        torch.randn(nodes, 6, generator=generator),
        torch.randint(0, nodes, (edges, 2), generator=generator),
        torch.randn(edges, 3, generator=generator),
    )


MODELS: tuple[Entry, ...] = (
    Entry("unet", "plain", UNet, images(32)),
    Entry("diffusion_unet", "plain", DiffusionUNet, _noisy),
    Entry("lstm_tagger", "plain", lambda: Tagger(nn.LSTM), _words(9)),
    Entry("projected_lstm_tagger", "plain", lambda: Tagger(nn.LSTM, proj_size=16), _words(9)),
    Entry("gru_tagger", "plain", lambda: Tagger(nn.GRU), _words(9)),
    Entry("pointnet", "plain", PointNet, _noise((3, 30))),
    Entry("message_passing", "plain", MessagePassing, _graph),
    Entry("two_inputs", "plain", TwoInputs, _noise((3, 16, 16), (7,))),
    Entry("transformer_encoder", "plain", lambda: Encoder(first=True), _noise((12, 10))),
    Entry("transformer_encoder_post_norm", "plain", lambda: Encoder(first=False), _noise((12, 10))),
    Entry("translator", "plain", Translator, _words(7, 9)),
    Entry("cross_attention", "plain", CrossAttention, _noise((5, 6), (8, 10), (8, 14))),
    Entry("einsum_attention", "plain", EinsumAttention, _noise((7, 20))),
    Entry("grouped_queries", "plain", GroupedQueries, _noise((7, 24))),
    Entry("standardised", "plain", Standardised, images(16)),
    Entry("super_resolution", "plain", SuperResolution, images(12)),
)
