"""Architectures of torchvision: classification, segmentation, and backbones for detection."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from tests.zoo.entry import Entry, images
from tests.zoo.importing import import_torchvision


def _classifier(name: str, side: int = 64, settle: int | None = None, **options: Any) -> Entry:
    def construct() -> nn.Module:
        library: Any = import_torchvision()
        return library.models.get_model(name, weights=None, **options)

    return Entry(name, "torchvision", construct, images(side), images(settle) if settle else None)


def _segmentation(name: str) -> Entry:
    return _classifier(name, 64, weights_backbone=None, num_classes=5)


def _backbone(name: str, maker: str, module: str, **options: Any) -> Entry:
    def construct() -> nn.Module:
        import_torchvision()
        return getattr(importlib.import_module(f"torchvision.models.detection.{module}"), maker)(**options)

    return Entry(name, "torchvision", construct, images(96))


def _ssdlite() -> Entry:
    def construct() -> nn.Module:
        import_torchvision()
        models = importlib.import_module("torchvision.models")
        ssdlite = importlib.import_module("torchvision.models.detection.ssdlite")
        backbone = models.mobilenet_v3_large(weights=None, reduced_tail=True)
        return ssdlite._mobilenet_extractor(backbone, 6, norm_layer=nn.BatchNorm2d)

    return Entry("ssdlite_mobilenet_v3_backbone", "torchvision", construct, images(96))


def _maxvit() -> Entry:
    def construct() -> nn.Module:
        library: Any = import_torchvision()
        sizes = {"block_channels": [64, 128, 256, 512], "block_layers": [1, 1, 1, 1], "stem_channels": 64}
        return library.models.MaxVit(
            (64, 64), **sizes, head_dim=32, partition_size=2, stochastic_depth_prob=0.2
        )

    return Entry("maxvit_t", "torchvision", construct, images(64))


AT_224: tuple[Entry, ...] = tuple(
    _classifier(name, 224, 128, **options)
    for name, options in (
        ("vgg16_bn", {}),
        ("resnet18", {}),
        ("resnet50", {}),
        ("resnext50_32x4d", {}),
        ("densenet121", {}),
        ("mobilenet_v2", {}),
        ("mobilenet_v3_large", {}),
        ("efficientnet_b0", {}),
        ("regnet_y_400mf", {}),
        ("shufflenet_v2_x1_0", {}),
        ("squeezenet1_1", {}),
        # As its trained weights come: without the auxiliary heads, not drawing its own slow initial weights.
        ("googlenet", {"aux_logits": False, "init_weights": False}),
        ("mnasnet1_0", {}),
    )
)
"""Classifiers at the size they were trained for; the benchmarks time these."""

MODELS: tuple[Entry, ...] = (
    _classifier("alexnet"),
    _classifier("inception_v3", 96, aux_logits=False, init_weights=False),
    _classifier("wide_resnet50_2"),
    _classifier("mnasnet0_5"),
    _classifier("convnext_tiny"),
    _classifier("efficientnet_v2_s"),
    _classifier("regnet_x_400mf"),
    _classifier("swin_t"),
    _classifier("swin_v2_t"),
    _classifier("vit_b_16", 32, image_size=32),
    _maxvit(),
    _segmentation("fcn_resnet50"),
    _segmentation("deeplabv3_mobilenet_v3_large"),
    _segmentation("lraspp_mobilenet_v3_large"),
    _backbone("resnet50_fpn", "resnet_fpn_backbone", "backbone_utils", backbone_name="resnet50", weights=None,
              norm_layer=nn.BatchNorm2d),
    _backbone("mobilenet_v3_large_fpn", "mobilenet_backbone", "backbone_utils",
              backbone_name="mobilenet_v3_large", weights=None, fpn=True, norm_layer=nn.BatchNorm2d),
    _ssdlite(),
)  # fmt: skip
"""The others, at the smallest size they take."""
