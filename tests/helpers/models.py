"""Small networks, one for each way in which layers can depend on each other.

Each is a few thousand parameters and runs in float64 as well as in float32. Widths differ from layer to
layer where they can, so that a mix-up of axes shows. `build` makes one that is ready for comparisons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

CLASSES = 5


class ConvBlock(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Head(nn.Sequential):
    """Global pooling and a classifier."""

    def __init__(self, inputs: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class Plain(nn.Sequential):
    """A chain of convolutions, with and without bias and batch norm."""

    def __init__(self) -> None:
        super().__init__(
            ConvBlock(3, 7), nn.MaxPool2d(2), nn.Conv2d(7, 9, 3), nn.GELU(), ConvBlock(9, 6), Head(6)
        )


class Residual(nn.Module):
    """A block with an identity shortcut, then one with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBlock(3, 8)
        self.inner1, self.outer1, self.norm1 = (
            ConvBlock(8, 5),
            nn.Conv2d(5, 8, 3, padding=1),
            nn.BatchNorm2d(8),
        )
        self.inner2, self.outer2 = ConvBlock(8, 6, stride=2), nn.Conv2d(6, 10, 3, padding=1)
        self.norm2, self.project = nn.BatchNorm2d(10), nn.Conv2d(8, 10, 1, stride=2)
        self.head = Head(10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.norm1(self.outer1(self.inner1(x))) + x)
        x = F.relu(self.norm2(self.outer2(self.inner2(x))) + self.project(x))
        return self.head(x)


class PaddedShortcut(nn.Module):
    """A residual block that widens by padding its shortcut with zero channels on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = ConvBlock(3, 6), ConvBlock(6, 7, stride=2)
        self.outer, self.after, self.head = nn.Conv2d(7, 12, 3, padding=1), ConvBlock(12, 5), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        return self.head(self.after(F.relu(self.outer(self.inner(x)) + shortcut)))


class Concat(nn.Module):
    """Dense connections: each layer reads everything before it, through a batch norm of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(10), nn.BatchNorm2d(14)])
        self.layers = nn.ModuleList([nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(10, 4, 3, padding=1)])
        self.head = Head(14)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        return self.head(F.relu(self.norms[-1](torch.cat(features, 1))))


class Separable(nn.Sequential):
    """Depthwise then pointwise convolutions, one depthwise layer with two outputs a channel."""

    def __init__(self) -> None:
        super().__init__(
            ConvBlock(3, 6),
            ConvBlock(6, 6, groups=6),
            ConvBlock(6, 9, kernel=1),
            nn.Conv2d(9, 18, 3, padding=1, groups=9),
            nn.Hardswish(),
            ConvBlock(18, 5, kernel=1),
            Head(5),
        )


class Grouped(nn.Sequential):
    """Grouped convolutions with different numbers of groups, one after another."""

    def __init__(self) -> None:
        super().__init__(
            ConvBlock(3, 12),
            ConvBlock(12, 8, groups=4),
            ConvBlock(8, 10, groups=2),
            ConvBlock(10, 6),
            Head(6),
        )


class SharedInput(nn.Module):
    """Two branches read one tensor, and one layer is used in both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = ConvBlock(3, 7), ConvBlock(7, 8), ConvBlock(7, 8, kernel=1)
        self.shared, self.head = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branches = [self.shared(self.left(x)), self.shared(self.right(x))]
        return self.head(torch.cat([F.relu(b).mean((2, 3)) for b in branches], 1))


class FlattenToLinear(nn.Sequential):
    """Each channel becomes many features of a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.Tanh(),
            nn.Flatten(), nn.Linear(5 * 2 * 2, 11), nn.ReLU(), nn.Linear(11, CLASSES),
        )  # fmt: skip


class Conv1d(nn.Sequential):
    """A sequence network: strided, dilated, then flattened."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(4, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 3, dilation=2),
            nn.LeakyReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(24, 9), nn.BatchNorm1d(9), nn.ReLU(),
            nn.Linear(9, CLASSES),
        )  # fmt: skip


class Conv3d(nn.Sequential):
    """A volume network."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(6, 7, 3), nn.ELU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(7, CLASSES),
        )  # fmt: skip


class UNet(nn.Module):
    """Down, up by transposed convolution, and a skip that is concatenated; the output is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = ConvBlock(3, 6), ConvBlock(6, 10, stride=2)
        self.up, self.norm = nn.ConvTranspose2d(10, 7, 2, stride=2), nn.BatchNorm2d(7)
        self.join, self.out = ConvBlock(13, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        up = F.relu(self.norm(self.up(self.down2(skip))))
        return self.out(self.join(torch.cat([skip, up], 1)))


class GroupedTransposed(nn.Sequential):
    """A grouped and a depthwise transposed convolution."""

    def __init__(self) -> None:
        super().__init__(
            ConvBlock(3, 8), nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.ReLU(),
            nn.ConvTranspose2d(6, 6, 2, groups=6), nn.SiLU(), nn.Conv2d(6, 7, 3), nn.ReLU(), Head(7),
        )  # fmt: skip


class SqueezeExcite(nn.Module):
    """A map scaled, channel by channel, by what a small network makes of its means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.reduce, self.expand = ConvBlock(3, 8), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)
        self.after, self.head = ConvBlock(8, 6), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        scale = F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.after(x * scale))


class ChannelShuffle(nn.Module):
    """ShuffleNet's block: half the channels pass by, then the halves are interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBlock(3, 12)
        self.branches = nn.ModuleList([self._branch(), self._branch()])
        self.after, self.head = ConvBlock(12, 7, kernel=1), Head(7)

    @staticmethod
    def _branch() -> nn.Module:
        return nn.Sequential(ConvBlock(6, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), ConvBlock(6, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            still, moved = x.chunk(2, dim=1)
            x = torch.cat([still, branch(moved)], 1)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.after(x))


class PixelShuffle(nn.Module):
    """Channels become pixels, four by four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = ConvBlock(3, 6), nn.Conv2d(6, 20, 3, padding=1)
        self.after, self.head = ConvBlock(5, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.after(F.pixel_shuffle(self.up(self.stem(x)), 2)))


class Gated(nn.Module):
    """One layer gives values and gates, taken apart by `chunk` and by `glu`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(8, 14), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, dim=-1)
        return self.head(F.glu(self.second(value * F.silu(gate)), dim=-1))


class Mlp(nn.Sequential):
    """Linear layers, with dropout and a batch norm between them."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Tanh(),
            nn.Linear(9, 7, bias=False), nn.Softplus(), nn.Linear(7, CLASSES),
        )  # fmt: skip


class Tagger(nn.Module):
    """A recurrent network that gives every token a tag."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1, bidirectional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.recurrent = kind(6, 7, num_layers=layers, bidirectional=bidirectional, batch_first=True)
        self.hidden = nn.Linear(14 if bidirectional else 7, 9)
        self.tags = nn.Linear(9, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.tags(F.relu(self.hidden(self.recurrent(self.embedding(words))[0])))


class LastState(nn.Module):
    """A recurrent network of which the last hidden state is read, not the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.recurrent(x)
        return self.head(hidden[-1])


class MultiInput(nn.Module):
    """An image and a vector, each through its own layers, then added and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = ConvBlock(3, 7), nn.Linear(6, 7)
        self.side, self.head = nn.Linear(6, 5), nn.Linear(12, CLASSES)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        joined = self.image(image).mean((2, 3)) + torch.sigmoid(self.vector(vector))
        return self.head(torch.cat([joined, F.relu(self.side(vector))], 1))


class DictOutput(nn.Module):
    """Gives a mapping of two results; nothing that is handed out may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.features, self.head = ConvBlock(3, 8), ConvBlock(8, 6), Head(6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(self.stem(x))
        return {"features": features.mean((2, 3)), "logits": self.head(features)}


class TiedLinear(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, transposed, and two layers that share one."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.bias = nn.Linear(6, 9), nn.Parameter(torch.zeros(6))
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        decoded = F.linear(F.relu(self.encode(x)), self.encode.weight.t(), self.bias)
        return self.head(F.relu(self.second(F.relu(self.first(decoded)))))


class Functional(nn.Module):
    """Parameters without modules around them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 3, 3, 3) * 0.3)
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.register_buffer("mean", torch.randn(8) * 0.1)
        self.register_buffer("var", torch.rand(8) + 0.5)
        self.weight = nn.Parameter(torch.randn(8, 6) * 0.4)
        self.offset = nn.Parameter(torch.randn(6) * 0.1)
        self.out = nn.Parameter(torch.randn(CLASSES, 6) * 0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(F.conv2d(x, self.kernel, padding=1), self.mean, self.var)
        x = F.relu(x * self.scale).amax((2, 3))
        return F.linear(F.relu(torch.addmm(self.offset, x, self.weight)), self.out)


class StackUnbindRoll(nn.Module):
    """Tensors are stacked, rolled along their channels, and taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8)
        self.middle, self.head = nn.Linear(8, 7), nn.Linear(14, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        first, second = F.relu(self.middle(stacked.roll(3, dims=2))).unbind(1)
        return self.head(torch.cat([first, second.roll(-2, dims=1)], 1))


class SplitSelect(nn.Module):
    """Channels are taken by unequal split, slice, constant index and select; sizes follow the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 8)
        self.left, self.right, self.head = nn.Linear(3, 6), nn.Linear(5, 6), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x[:, [2, 0, 1, 3, 4, 8, 7, 6, 5]]))
        left, right = x.split([3, 5], dim=1)
        joined = F.relu(self.left(left) * self.right(right))
        return self.head(torch.cat([joined, x.select(1, 4).unsqueeze(1)], 1))


class Upsample(nn.Module):
    """Two resolutions, brought together by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low, self.high = ConvBlock(3, 6), ConvBlock(6, 8, stride=2), ConvBlock(6, 8)
        self.after, self.head = ConvBlock(8, 7), Head(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        low = F.interpolate(self.low(x), scale_factor=2.0, mode="bilinear", align_corners=False)
        x = F.interpolate(low + self.high(x), size=(6, 6), mode="nearest")
        return self.head(self.after(x))


class Prelu(nn.Sequential):
    """A learned slope for each channel, and one for all."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 7, 3), nn.PReLU(7), nn.Conv2d(7, 9, 3), nn.PReLU(), nn.Flatten(2),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(9, 8), nn.PReLU(8), nn.Linear(8, CLASSES),
        )  # fmt: skip


class Padded(nn.Module):
    """Maps padded by zeros, by reflection and by a constant, and channels padded by a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 7, 3), nn.Conv2d(7, 5, 3)
        self.fourth, self.head = nn.Conv2d(8, 6, 1), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.pad(x, (1, 1, 1, 1))))
        x = F.relu(self.second(F.pad(x, (1, 1, 1, 1), mode="reflect")))
        x = F.relu(self.third(F.pad(x, (0, 2, 1, 1), value=0.5)))
        x = F.pad(x, (0, 0, 0, 0, 1, 2), value=1.0)
        return self.head(F.relu(self.fourth(x)))


class HardCodedView(nn.Module):
    """Writes its own width into a reshape, which a smaller module cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 2), nn.Conv2d(6, 8, 1)
        self.hidden, self.head = nn.Linear(8 * 7 * 7, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.head(F.relu(self.hidden(x.view(-1, 8 * 7 * 7))))


class Expanded(nn.Module):
    """A vector expanded over a map, a parameter broadcast over it, and channels repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Conv2d(3, 7, 3, padding=1), nn.Linear(6, 7)
        self.offset = nn.Parameter(torch.randn(1, 7, 1, 1))
        self.conv, self.head = nn.Conv2d(14, 6, 1), Head(6)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        x = self.image(image)
        spread = self.vector(vector)[:, :, None, None].expand_as(x)
        x = F.relu(x + spread - self.offset).repeat(1, 2, 1, 1)
        return self.head(F.relu(self.conv(x)))


class ChannelsLast(nn.Module):
    """Linear layers on a permuted map, as in networks that keep channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 6, 2, stride=2), nn.Linear(6, 11), nn.Linear(11, 6)
        self.gamma, self.head = nn.Parameter(torch.rand(6) + 0.5), Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.down(F.gelu(self.up(x.permute(0, 2, 3, 1)))) * self.gamma
        return self.head(x + inner.permute(0, 3, 1, 2))


class LayerNormMlp(nn.Sequential):
    """Layer norm mixes the units before it without weights; those between the others are exact."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, CLASSES)
        )


class GroupNormConv(nn.Sequential):
    """Group norm over pairs of channels, then a plain layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), Head(6)
        )


class UnknownOperator(nn.Module):
    """A Fourier transform along the channels, which no rule describes, then plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 9), nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.fft(F.relu(self.first(x))).abs()
        return self.head(F.relu(self.second(x)))


class Topology(NamedTuple):
    """How to make a network, and example inputs for it."""

    model: Callable[[], nn.Module]
    inputs: Callable[..., tuple[Tensor, ...]]


def _floats(*shapes: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """A factory of normal inputs: `(batch=3, dtype=torch.float32, seed=0)` to one tensor a shape."""

    def make(batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(batch, *shape, generator=generator, dtype=dtype) for shape in shapes)

    return make


def _words(length: int, vocabulary: int) -> Callable[..., tuple[Tensor, ...]]:
    """A factory of word indices, which have no other dtype: `(batch=3, dtype=..., seed=0)`."""

    def make(batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randint(vocabulary, (batch, length), generator=generator),)

    return make


_IMAGE, _VECTOR = (3, 8, 8), (6,)

TOPOLOGIES: dict[str, Topology] = {
    "plain": Topology(Plain, _floats(_IMAGE)),
    "residual": Topology(Residual, _floats(_IMAGE)),
    "padded_shortcut": Topology(PaddedShortcut, _floats(_IMAGE)),
    "concat": Topology(Concat, _floats(_IMAGE)),
    "separable": Topology(Separable, _floats(_IMAGE)),
    "grouped": Topology(Grouped, _floats(_IMAGE)),
    "shared_input": Topology(SharedInput, _floats(_IMAGE)),
    "flatten_to_linear": Topology(FlattenToLinear, _floats(_IMAGE)),
    "conv1d": Topology(Conv1d, _floats((4, 28))),
    "conv3d": Topology(Conv3d, _floats((2, 6, 6, 6))),
    "unet": Topology(UNet, _floats(_IMAGE)),
    "grouped_transposed": Topology(GroupedTransposed, _floats(_IMAGE)),
    "squeeze_excite": Topology(SqueezeExcite, _floats(_IMAGE)),
    "channel_shuffle": Topology(ChannelShuffle, _floats(_IMAGE)),
    "pixel_shuffle": Topology(PixelShuffle, _floats(_IMAGE)),
    "gated": Topology(Gated, _floats(_VECTOR)),
    "mlp": Topology(Mlp, _floats(_VECTOR)),
    "lstm": Topology(lambda: Tagger(nn.LSTM), _words(5, 11)),
    "lstm_two_layers": Topology(lambda: Tagger(nn.LSTM, layers=2), _words(5, 11)),
    "lstm_bidirectional": Topology(lambda: Tagger(nn.LSTM, layers=2, bidirectional=True), _words(5, 11)),
    "gru": Topology(lambda: Tagger(nn.GRU), _words(5, 11)),
    "gru_bidirectional": Topology(lambda: Tagger(nn.GRU, layers=2, bidirectional=True), _words(5, 11)),
    "lstm_last_state": Topology(LastState, _floats((5, 6))),
    "multi_input": Topology(MultiInput, _floats(_IMAGE, _VECTOR)),
    "dict_output": Topology(DictOutput, _floats(_IMAGE)),
    "tied_linear": Topology(TiedLinear, _floats(_VECTOR)),
    "functional": Topology(Functional, _floats(_IMAGE)),
    "stack_unbind_roll": Topology(StackUnbindRoll, _floats(_VECTOR)),
    "split_select": Topology(SplitSelect, _floats(_VECTOR)),
    "upsample": Topology(Upsample, _floats(_IMAGE)),
    "prelu": Topology(Prelu, _floats(_IMAGE)),
    "padded": Topology(Padded, _floats(_IMAGE)),
    "hard_coded_view": Topology(HardCodedView, _floats(_IMAGE)),
    "expanded": Topology(Expanded, _floats(_IMAGE, _VECTOR)),
    "channels_last": Topology(ChannelsLast, _floats(_IMAGE)),
    "layer_norm": Topology(LayerNormMlp, _floats(_VECTOR)),
    "group_norm": Topology(GroupNormConv, _floats(_IMAGE)),
    "unknown_operator": Topology(UnknownOperator, _floats(_VECTOR)),
}

HARD_CODED = frozenset({"hard_coded_view", "split_select", "padded_shortcut", "stack_unbind_roll"})
"""Their forward holds constants that depend on widths, which a smaller module may not be able to follow."""

INEXACT = frozenset({"layer_norm", "group_norm"})
"""They have a group whose removal changes the units that stay."""


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every batch norm statistics, scales and shifts that are not 0 or 1, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(0.0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0.0, 0.3, generator=generator)
    return model


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The named topology in eval mode, deterministic; global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TOPOLOGIES[name].model()
    return randomise(model, seed).to(dtype).eval()
