"""What all are measured on: one network, its calibration images by seed, its test images, its costs.

Seven small networks on CIFAR-10, which share their test images; and EfficientNet-Lite0 on 500 pictures of
ImageNet, of which each seed calibrates with some and measures on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from benchmarks import cifar, imagenet
from benchmarks.resnet20 import top1
from benchmarks.small_networks import network
from secateur.graph.groups import Group

IMAGES, POOL = 1000, 5000
"""Calibration images of CIFAR-10, and training images that they are drawn from."""

BATCH = 100

PICTURES, PICTURES_BATCH = 350, 50
"""Pictures of ImageNet that calibrate, of 500, and how many are read at a time."""

EFFICIENTNET = "efficientnet"


def macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-accumulates of one image, of any module: what its convolutions and matrix products do.

    Args:
        model: Is run once.
        images: At least two, since a captured program may not take one alone. [batch, 3, height, width]
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention would count as nothing
        model(images)
    return int(counter.get_total_flops()) // (2 * len(images))


def params(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Draw:
    """The calibration images of one seed, in batches.

    Attributes:
        seed: Chooses them.
        labelled: Images and labels.
        unlabelled: The same images alone.
    """

    seed: int
    labelled: list[tuple[Tensor, Tensor]]

    @property
    def unlabelled(self) -> list[tuple[Tensor]]:
        """The same images in the same batches."""
        return [(images,) for images, _ in self.labelled]


class Workload:
    """A trained network, and how anything made of it is measured.

    Args:
        name: Of the network.
        model: The network.
        pool: Images and labels that calibration images are drawn from.
        test: Images and labels to measure on.
        images: Calibration images a seed.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        pool: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        images: int,
    ) -> None:
        self.name = name
        self.images = images
        self.model = model
        self.test = test
        self._pool = pool
        self.example = pool[0][:2]
        self.graph = sc.trace(self.model, self.example)
        self.dense_macs, self.dense_params = macs(self.model, self.example), params(self.model)
        self._known: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()

    @classmethod
    def of(cls, name: str, images: int | None = None, test_images: int | None = None) -> Workload:
        """One of `benchmarks.small_networks.NAMES`, or `EFFICIENTNET`.

        Args:
            name: The network's name.
            images: Calibration images a seed. Default: 1,000 of CIFAR-10, 350 of ImageNet.
            test_images: How many of CIFAR-10's test images; None for all.
        """
        if name == EFFICIENTNET:
            return Pictures(images or PICTURES)
        pool, test = cifar.load("train", POOL), cifar.load("test", test_images)
        return cls(name, network(name), pool, test, images or IMAGES)

    @property
    def test_images(self) -> int:
        """Number of images that a draw measures on."""
        return len(self.test[1])

    def makers(self, group: Group) -> dict[str, int]:
        """The layers that compute a group's units, and how many channels each gives it.

        A depthwise or grouped convolution does not count where another layer does: it passes channels on.
        """
        found = {
            piece.tensor.rpartition(".")[0]: len(piece.position)
            for piece in group.of_role("produce")
            if piece.tensor.endswith(".weight")
        }
        mixing = {name: count for name, count in found.items() if not self._passes(name)}
        return mixing or found

    def _passes(self, name: str) -> bool:
        layer = self.model.get_submodule(name)
        return isinstance(layer, nn.Conv2d) and layer.groups > 1

    @property
    def streams(self) -> tuple[str, ...]:
        """The groups that several layers add to."""
        return tuple(g.name for g in self.graph.groups if len(self.makers(g)) > 1)

    def draw(self, seed: int) -> Draw:
        """Another draw for each seed, the same for all who are measured."""
        return self._calibrating(seed, self._order(seed)[: self.images], BATCH)

    def _order(self, seed: int) -> Tensor:
        return torch.randperm(len(self._pool[1]), generator=torch.Generator().manual_seed(seed))

    def _calibrating(self, seed: int, chosen: Tensor, batch: int) -> Draw:
        images, labels = self._pool
        return Draw(seed, [(images[c], labels[c]) for c in chosen.split(batch)])

    def top1(self, model: nn.Module) -> float:
        """The fraction of test images that a model in eval mode gets right; measured once a model."""
        if model not in self._known:
            self._known[model] = top1(model, *self.test)
        return self._known[model]

    def cost(self, model: nn.Module) -> dict[str, float]:
        """MACs and parameters, as fractions of the dense network's."""
        return {
            "macs": macs(model, self.example) / self.dense_macs,
            "params": params(model) / self.dense_params,
        }


class Pictures(Workload):
    """EfficientNet-Lite0 on 500 pictures: those that a draw leaves measure, until the next one."""

    def __init__(self, images: int) -> None:
        every = imagenet.load()
        super().__init__(EFFICIENTNET, imagenet.efficientnet_lite0(), every, every, images)

    @property
    def test_images(self) -> int:
        """Number of images that a draw measures on."""
        return len(self._pool[1]) - self.images

    def draw(self, seed: int) -> Draw:
        """Another split for each seed, the same for all who are measured."""
        chosen, rest = self._order(seed).tensor_split([self.images])
        self.test = (self._pool[0][rest], self._pool[1][rest])
        self._known.clear()
        return self._calibrating(seed, chosen, PICTURES_BATCH)
