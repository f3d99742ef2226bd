"""Segmentation Models, MONAI, OpenCLIP, Kornia, vit-pytorch: networks that see."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tests.libraries.case import Case


def made(module: str, name: str, *args: Any, **options: Any) -> Any:
    """A function that makes `module.name` with these arguments."""
    return lambda: getattr(import_module(module), name)(*args, **options)


def pictures(channels: int = 3) -> Any:
    """Noise of a size that is a tuple. [batch, channels, *size]"""
    return lambda batch, size: (torch.randn(batch, channels, *size),)


SIZES = ((64, 64), (96, 64), (128, 160))


def _segmentation(
    name: str, encoder: str = "resnet18", sizes: tuple[Any, ...] = SIZES, **options: Any
) -> Case:
    make = made(
        "segmentation_models_pytorch", name, encoder_name=encoder, encoder_weights=None, classes=4, **options
    )
    return Case(f"smp {name} {encoder}", "segmentation-models-pytorch", make, pictures(), sizes)


def _monai(name: str, sizes: tuple[Any, ...], windows: bool = True, **options: Any) -> Case:
    make = made("monai.networks.nets", name, **options)
    uses = {"sliding window": _windows} if windows else {}
    return Case(f"monai {name}", "monai", make, pictures(1), sizes, uses=uses)


def _windows(model: nn.Module) -> Tensor:
    """Inference window by window over a larger volume; only for networks of one input and one output."""
    inferers: Any = import_module("monai.inferers")
    first = next(m for m in model.modules() if isinstance(m, nn.Conv3d | nn.Conv2d))
    space = 3 if isinstance(first, nn.Conv3d) else 2
    volume = torch.randn(1, first.in_channels, *(48,) * space)
    with torch.no_grad():
        return inferers.sliding_window_inference(volume, (32,) * space, 2, model, overlap=0.25)


def _diffusion(batch: int, size: Any) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 1, *size), "timesteps": torch.randint(0, 1000, (batch,))}


VOLUMES = ((32, 32, 32), (32, 32, 48), (64, 32, 32))
FLAT = ((32, 32), (48, 32), (64, 80))

SEGMENTATION = (
    _segmentation("Unet"),
    _segmentation("Unet", "timm-efficientnet-b0"),
    _segmentation("UnetPlusPlus", "mobilenet_v2"),
    _segmentation("FPN"),
    _segmentation("MAnet"),
    _segmentation("Linknet"),
    _segmentation("PSPNet"),
    _segmentation("PAN", sizes=((128, 128), (128, 192))),
    _segmentation("DeepLabV3Plus"),
    _segmentation("Segformer", "mit_b0"),
    _segmentation("UPerNet", "resnet34"),
)

MONAI = (
    _monai(
        "UNet",
        VOLUMES,
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(8, 16, 32),
        strides=(2, 2),
        num_res_units=1,
    ),
    _monai("BasicUNet", FLAT, spatial_dims=2, in_channels=1, out_channels=2, features=(8, 8, 16, 16, 32, 8)),
    _monai(
        "DynUNet",
        FLAT,
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[8, 16, 32],
    ),
    _monai(
        "SegResNet",
        FLAT,
        spatial_dims=2,
        init_filters=8,
        in_channels=1,
        out_channels=2,
        blocks_down=(1, 1),
        blocks_up=(1,),
    ),
    _monai(
        "AttentionUnet",
        FLAT,
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(8, 16, 32),
        strides=(2, 2),
    ),
    _monai("VNet", FLAT, spatial_dims=2, in_channels=1, out_channels=2),
    _monai(
        "UNETR",
        ((32, 32),),
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        img_size=(32, 32),
        feature_size=8,
        hidden_size=48,
        mlp_dim=96,
        num_heads=6,
    ),
    _monai(
        "SwinUNETR",
        ((64, 64), (64, 96), (128, 64)),
        False,
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 4, 4),
    ),
    _monai(
        "DenseNet",
        FLAT,
        False,
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        init_features=8,
        growth_rate=4,
        block_config=(2, 2),
    ),
    _monai(
        "ResNet",
        ((32, 32), (48, 64)),
        False,
        block="basic",
        layers=[1, 1, 1, 1],
        block_inplanes=[8, 16, 16, 32],
        spatial_dims=2,
        n_input_channels=1,
        num_classes=3,
    ),
    Case(
        "monai DiffusionModelUNet",
        "monai",
        made(
            "monai.networks.nets",
            "DiffusionModelUNet",
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            num_res_blocks=1,
            channels=(16, 32),
            attention_levels=(False, True),
            norm_num_groups=4,
            num_head_channels=8,
        ),
        _diffusion,
        ((16, 16), (24, 32)),
    ),
)


def _pairs(batch: int, size: Any) -> dict[str, Tensor]:
    words = torch.randint(1, 98, (batch, 12))
    words[:, -1] = 99
    return {"image": torch.randn(batch, 3, 32, 32), "text": words}


def _clip(name: str, **vision: Any) -> Case:
    make = made(
        "open_clip.model",
        "CLIP",
        embed_dim=32,
        vision_cfg={"image_size": 32, **vision},
        text_cfg={"context_length": 12, "vocab_size": 100, "width": 48, "heads": 6, "layers": 2},
        output_dict=True,
    )

    def encode(model: Any) -> list[Tensor]:
        pair = _pairs(2, None)
        with torch.no_grad():
            return [model.encode_image(pair["image"], normalize=True), model.encode_text(pair["text"])]

    return Case(f"open_clip {name}", "open-clip-torch", make, _pairs, (None,), uses={"encode": encode})


def _kornia(name: str, module: str, sizes: tuple[Any, ...], channels: int = 3, **options: Any) -> Case:
    return Case(f"kornia {name}", "kornia", made(module, name, **options), pictures(channels), sizes)


def _vit(name: str, module: str, sizes: tuple[Any, ...] = ((32, 32),), **options: Any) -> Case:
    return Case(
        f"vit-pytorch {name}",
        "vit-pytorch",
        made(f"vit_pytorch.{module}", name, **options),
        pictures(),
        sizes,
    )


PATCHES = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 48, "heads": 4, "mlp_dim": 96}

SEEING = (
    _clip("ViT", patch_size=8, width=48, head_width=12, layers=2),
    _clip("ResNet", layers=(1, 1, 1, 1), width=16, head_width=16),
    _kornia("HardNet", "kornia.feature", ((32, 32),), 1, pretrained=False),
    _kornia("SOSNet", "kornia.feature", ((32, 32),), 1, pretrained=False),
    _kornia("KeyNet", "kornia.feature.keynet", ((48, 48), (64, 96)), 1, pretrained=False),
    _kornia("DexiNed", "kornia.models.dexined", ((64, 64), (96, 128)), pretrained=False),
    _kornia(
        "TinyViT",
        "kornia.models.tiny_vit",
        ((64, 64),),
        img_size=64,
        embed_dims=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 3, 4],
        window_sizes=[4, 4, 4, 2],
        num_classes=5,
    ),
    _kornia(
        "VisionTransformer",
        "kornia.models.vit",
        ((32, 32),),
        image_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=4,
    ),
    _kornia("MobileViT", "kornia.models.vit_mobile", ((64, 64), (128, 64)), mode="xxs"),
    _vit("ViT", "vit", depth=2, **PATCHES),
    _vit("SimpleViT", "simple_vit", depth=2, **PATCHES),
    _vit("CaiT", "cait", depth=2, cls_depth=1, **PATCHES),
    _vit(
        "MobileViT",
        "mobile_vit",
        ((64, 64), (64, 128)),
        image_size=(64, 64),
        dims=[24, 32, 48],
        channels=[8, 8, 16, 16, 24, 24, 24, 24, 32, 32, 48],
        num_classes=5,
    ),
    _vit(
        "CvT",
        "cvt",
        ((64, 64), (64, 96)),
        num_classes=5,
        s1_emb_dim=16,
        s1_depth=1,
        s2_emb_dim=32,
        s2_depth=1,
        s2_heads=2,
        s3_emb_dim=48,
        s3_heads=3,
        s3_depth=1,
    ),
)

CASES = (*SEGMENTATION, *MONAI, *SEEING)
