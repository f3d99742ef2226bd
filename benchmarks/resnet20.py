"""ResNet-20 for CIFAR-10 with zero-padded shortcuts, and its trained weights.

Source: He et al. 2016, Deep Residual Learning for Image Recognition, section 4.2, option A.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cifar import require

WEIGHTS = "resnet20_cifar10.safetensors"


class PaddedShortcut(nn.Module):
    """Every second row and column, and zero channels before and after: a shortcut without weights."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to [batch, channels + 2·extra, height / 2, width / 2]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = PaddedShortcut((outputs - inputs) // 2) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height / stride, width / stride]."""
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet20(nn.Module):
    """0.27 M parameters, 41 M MACs an image."""

    blocks = 3

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, stride=1)
        self.layer2 = self._stage(16, 32, stride=2)
        self.layer3 = self._stage(32, 64, stride=2)
        self.linear = nn.Linear(64, classes)

    def _stage(self, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        blocks = [BasicBlock(inputs, outputs, stride)]
        blocks += [BasicBlock(outputs, outputs, 1) for _ in range(self.blocks - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Images [batch, 3, 32, 32] to logits [batch, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ResNet56(ResNet20):
    """0.85 M parameters, 126 M MACs an image."""

    blocks = 9


def make() -> ResNet20:
    """The network in eval mode, with its initial weights."""
    return ResNet20().eval()


def trained(weights: Path | None = None) -> ResNet20:
    """The network in eval mode, with trained weights; from the data folder unless a file is given.

    Raises:
        SystemExit: With status 0, where the data is absent.
    """
    model = ResNet20()
    model.load_state_dict(load_file(weights or require(WEIGHTS) / WEIGHTS))
    return model.eval()


def top1(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 250) -> float:
    """The fraction of images whose largest logit is at their label.

    Args:
        model: Images to logits; should be in eval mode.
        images: [N, 3, height, width]
        labels: int64. [N]
        batch: How many images to run at once.
    """
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(images.split(batch), labels.split(batch), strict=True)
        )
    return right / len(labels)
