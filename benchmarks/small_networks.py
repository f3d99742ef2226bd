"""Networks of well-known shapes, small enough to train on two cores, and their training on CIFAR-10.

    python -m benchmarks.small_networks [name ...] [--epochs N]

trains what has no weights yet, resumes what was interrupted, and prints the dense accuracy. Weights and
checkpoints lie in `benchmarks/cache`, which git ignores. The same network, epochs and machine give the
same weights; a CUDA device is used where there is one, which gives others.

Sources of the shapes: Simonyan and Zisserman 2015 (VGG-16, with batch norm), He et al. 2016 (ResNet-18, its
basic blocks and shortcuts by projection), Sandler et al. 2018 (MobileNetV2, table 2), Huang et al. 2017
(DenseNet-BC), Liu et al. 2022 (ConvNeXt), Touvron et al. 2021 (DeiT, without its teacher: the distillation
token learns from the labels).
"""

from __future__ import annotations

import argparse
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import cifar, results
from benchmarks.resnet20 import top1
from benchmarks.resnet20 import trained as trained_resnet20

CACHE = Path(__file__).parent / "cache"
IMAGES = 48_000
BATCH = 128
SMOOTHING = 0.1


def vgg16(classes: int = 10) -> nn.Module:
    """Thirteen 3×3 convolutions with batch norm, a quarter of the paper's widths, and one linear layer."""
    layers: list[nn.Module] = []
    width = 3
    for block in ((16, 16), (32, 32), (64, 64, 64), (128, 128, 128), (128, 128, 128)):
        for outputs in block:
            layers += [nn.Conv2d(width, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            width = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, classes))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm; the shortcut projects where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, h, w] to [batch, outputs, h / stride, w / stride]."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18(classes: int = 10, widths: Sequence[int] = (16, 32, 64, 128)) -> nn.Module:
    """Four stages of two basic blocks, a quarter of the paper's widths; the pooled stem leaves 16×16 maps."""
    width = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
    layers += [nn.ReLU(), nn.MaxPool2d(2)]
    for stage, outputs in enumerate(widths):
        layers += [BasicBlock(width, outputs, 1 if stage == 0 else 2), BasicBlock(outputs, outputs, 1)]
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class InvertedResidual(nn.Module):
    """1×1 to a wider layer, depthwise 3×3, 1×1 back without an activation; a shortcut where it fits."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * inputs
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        depthwise = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        layers += [depthwise, nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, h, w] to [batch, outputs, h / stride, w / stride]."""
        return x + self.layers(x) if self.residual else self.layers(x)


MOBILE_STAGES = (
    (1, 8, 1, 1),
    (6, 12, 2, 2),
    (6, 16, 3, 1),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 1),
    (6, 160, 1, 1),
)
"""Expansion, width, blocks and first stride of every stage of the MobileNetV2 below."""


def mobilenet_v2(classes: int = 10) -> nn.Module:
    """The paper's 17 blocks at half its widths; two of its five halvings are left out, for 32×32 images."""
    width, last = 16, 320
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU6()]
    for expansion, outputs, blocks, stride in MOBILE_STAGES:
        for block in range(blocks):
            layers.append(InvertedResidual(width, outputs, stride if block == 0 else 1, expansion))
            width = outputs
    layers += [nn.Conv2d(width, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes))


class DenseLayer(nn.Module):
    """Batch norm, ReLU, 1×1 convolution, the same with 3×3; its output is appended to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, h, w] to [batch, inputs + growth, h, w]."""
        return torch.cat([x, self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))], 1)


def densenet(classes: int = 10, growth: int = 12, depth: int = 4) -> nn.Module:
    """Three dense blocks with halving transitions between them, on 16×16 maps."""
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)]
    for block in range(3):
        for _ in range(depth):
            layers.append(DenseLayer(width, growth))
            width += growth
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        if block < 2:
            layers += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [batch, channels, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, layer norm, a hidden layer of four times the width, layer scale, shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, h, w] to the same."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.shrink(F.gelu(self.grow(y)))).permute(0, 3, 1, 2)


def convnext(classes: int = 10, widths: Sequence[int] = (32, 64, 128)) -> nn.Module:
    """Patches of 2×2, then three stages of two blocks."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 2, stride=2), ChannelNorm(widths[0])]
    for before, width in zip((None, *widths), widths, strict=False):
        if before is not None:
            layers += [ChannelNorm(before), nn.Conv2d(before, width, 2, stride=2)]
        layers += [ConvNeXtBlock(width), ConvNeXtBlock(width)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)]
    return nn.Sequential(*layers, *head)


class DeiTBlock(nn.Module):
    """Attention and a hidden layer of four times the width, each behind a layer norm, with shortcuts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.project(mixed)
        return x + self.shrink(F.gelu(self.grow(self.norm2(x))))


class DeiT(nn.Module):
    """Patches of 4×4, a class and a distillation token, each with its head; the answer is their mean."""

    def __init__(self, classes: int = 10, width: int = 96, depth: int = 4, heads: int = 6) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.tokens = nn.Parameter(0.02 * torch.randn(1, 2, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 66, width))
        self.blocks = nn.Sequential(*(DeiTBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head, self.distilled = nn.Linear(width, classes), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [batch, 3, 32, 32] to logits [batch, classes]."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = self.norm(self.blocks(x))
        return (self.head(x[:, 0]) + self.distilled(x[:, 1])) / 2


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: one rise and fall of the rate, crops and flips, smoothed labels.

    Attributes:
        make: Makes it.
        epochs: Passes over the training images: what takes a few minutes on two cores; 10 at most.
        rate: Highest learning rate.
        decay: Weight decay.
        adaptive: AdamW rather than SGD with momentum.
    """

    make: Callable[[], nn.Module]
    epochs: int
    rate: float
    decay: float
    adaptive: bool


RECIPES = {
    "vgg16_bn": Recipe(vgg16, 4, 0.1, 5e-4, adaptive=False),
    "resnet18": Recipe(resnet18, 7, 0.1, 5e-4, adaptive=False),
    "mobilenet_v2": Recipe(mobilenet_v2, 6, 0.1, 5e-4, adaptive=False),
    "densenet": Recipe(densenet, 3, 0.1, 5e-4, adaptive=False),
    "convnext": Recipe(convnext, 4, 4e-3, 0.05, adaptive=True),
    "deit": Recipe(DeiT, 5, 2e-3, 0.05, adaptive=True),
}
NAMES = ("resnet20", *RECIPES)
"""Every network that the comparisons can run on."""


def network(name: str) -> nn.Module:
    """The trained network of this name, in eval mode, on the CPU; trains it if it has no weights yet.

    Raises:
        KeyError: The name is unknown.
        SystemExit: With status 0, where the data is absent.
    """
    return trained_resnet20() if name == "resnet20" else trained(name)


def trained(name: str, epochs: int | None = None, images: int = IMAGES) -> nn.Module:
    """A network of `RECIPES` with its weights, trained now if they are not in the cache."""
    recipe = RECIPES[name]
    epochs = epochs or recipe.epochs
    weights = weights_of(name, epochs, images)
    if not weights.is_file():
        _train(name, recipe, epochs, images, weights)
    model = recipe.make()
    model.load_state_dict(load_file(weights))
    return model.eval()


def weights_of(name: str, epochs: int | None = None, images: int = IMAGES) -> Path:
    """The file of a network's weights, which need not exist; without `epochs` those of its recipe."""
    return CACHE / f"{name}-{epochs or RECIPES[name].epochs}-{images}.safetensors"


def _train(name: str, recipe: Recipe, epochs: int, images: int, weights: Path) -> None:
    """Trains from the last finished epoch on, and writes the weights."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random.seed(0)
    torch.manual_seed(0)
    model = recipe.make().to(device)
    settings = {"lr": recipe.rate, "weight_decay": recipe.decay}
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(model.parameters(), **settings)
        if recipe.adaptive
        else torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **settings)
    )
    steps = images // BATCH
    checkpoint = weights.with_suffix(".checkpoint")
    start = 0
    if checkpoint.is_file():
        found = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        start = found["epoch"]
    x, y = cifar.load("train", images)
    for epoch in range(start, epochs):
        # All that an epoch draws follows from its number, so that a resumed run draws the same.
        generator = torch.Generator().manual_seed(epoch)
        total = 0.0
        model.train()
        for step, chosen in enumerate(
            torch.randperm(images, generator=generator)[: steps * BATCH].split(BATCH)
        ):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * _rise_and_fall((epoch * steps + step + 1) / (epochs * steps))
            inputs = _augmented(x[chosen], generator).to(device)
            loss = F.cross_entropy(model(inputs), y[chosen].to(device), label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            total += float(loss.detach())
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {total / steps:.3f}", flush=True)
        beside = checkpoint.with_suffix(".new")
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, beside
        )
        os.replace(beside, checkpoint)
    beside = weights.with_suffix(".new")
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, beside)
    os.replace(beside, weights)
    checkpoint.unlink(missing_ok=True)


def _rise_and_fall(done: float) -> float:
    """The learning rate relative to its highest: up over the first fifth, then down along a cosine to 0."""
    return done / 0.2 if done < 0.2 else 0.5 + 0.5 * math.cos(math.pi * (done - 0.2) / 0.8)


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 4 pixels either way, and mirrored with probability 1/2."""
    count, _, height, width = images.shape
    dy, dx = torch.randint(0, 9, (2, count, 1), generator=generator)
    rows, columns = torch.arange(height) + dy, torch.arange(width) + dx
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    padded = F.pad(images, (4, 4, 4, 4))
    every = torch.arange(count)[:, None, None]
    return padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def main() -> None:
    """Trains the networks named on the command line, or all, and prints their accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(RECIPES))
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--images", type=int, default=IMAGES, help="training images")
    asked = parser.parse_args()
    test_images, test_labels = cifar.load("test")
    rows = []
    for name in asked.names or RECIPES:
        model = trained(name, asked.epochs, asked.images)
        size = sum(p.numel() for p in model.parameters())
        rows.append(
            (name, asked.epochs or RECIPES[name].epochs, size, f"{top1(model, test_images, test_labels):.4f}")
        )
    print(results.table(("network", "epochs", "parameters", "dense top-1"), rows))


if __name__ == "__main__":
    main()
