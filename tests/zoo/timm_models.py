"""Architectures of timm: convolutional, transformer and hybrid families, the smallest of each."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.entry import Entry, images
from tests.zoo.importing import import_timm


def _model(
    name: str, side: int = 64, settle: int | None = None, *, inexact: bool = False, **options: Any
) -> Entry:
    def construct() -> nn.Module:
        library: Any = import_timm()
        return library.create_model(name, pretrained=False, **options)

    return Entry(name, "timm", construct, images(side), images(settle) if settle else None, inexact)


def _sized(name: str, side: int, *, inexact: bool = False, **options: Any) -> Entry:
    """An architecture that has to be told the size of its images."""
    return _model(name, side, inexact=inexact, img_size=side, **options)


AT_224: tuple[Entry, ...] = tuple(
    _model(name, 224, 128) for name in ("hrnet_w18", "dpn68", "repvgg_a0", "ghostnet_100")
)
"""Architectures at the size they were trained for; the benchmarks time these."""

CONVOLUTIONAL: tuple[Entry, ...] = (
    _model("hrnet_w18_small"),
    _model("res2net50_26w_4s"),
    _model("resnest14d"),
    _model("skresnet18"),
    _model("cspresnet50"),
    _model("cspdarknet53"),
    _model("ese_vovnet19b_dw"),
    _model("dla34"),
    _model("selecsls42"),
    _model("tresnet_m"),
    _model("nf_resnet26", inexact=True),
    _model("eca_nfnet_l0", inexact=True),
    _model("seresnet18"),
    _model("efficientnet_lite0"),
    _model("efficientnet_es"),
    _model("mobilenetv4_conv_small"),
    _model("mobilenetv4_hybrid_medium"),
    _model("tinynet_e"),
    _model("lcnet_050"),
    _model("rexnet_100"),
    _model("xception41"),
    _model("convmixer_768_32"),
    _model("convnextv2_atto", inexact=True),
    _model("inception_next_atto"),
    _model("repvit_m0_9"),
    _model("hgnetv2_b0"),
    _model("gcresnet33ts"),
    _model("focalnet_tiny_srf"),
    _model("starnet_s050"),
)

TRANSFORMERS: tuple[Entry, ...] = (
    _sized("vit_tiny_patch16_224", 32),
    _sized("vit_base_patch16_reg4_gap_256", 32, embed_dim=192, depth=4, num_heads=6),
    _sized("deit_tiny_distilled_patch16_224", 32),
    _sized("deit3_small_patch16_224", 32),
    _sized("beit_base_patch16_224", 32, depth=4),
    _sized("eva02_tiny_patch14_224", 28),
    _sized("swin_tiny_patch4_window7_224", 64, window_size=2),
    _sized("swinv2_tiny_window8_256", 64, window_size=2),
    _sized("cait_xxs24_224", 32),
    _sized("xcit_nano_12_p8_224", 32),
    _sized("pit_ti_224", 64),
    _sized("levit_128s", 224),
    _sized("mixer_s32_224", 64),
    _sized("resmlp_12_224", 32),
    _sized("gmlp_ti16_224", 32, inexact=True),
    _model("pvt_v2_b0"),
    _sized("twins_svt_small", 224, depths=(1, 1, 2, 1)),
    _model("crossvit_tiny_240", 240),
    _sized("volo_d1_224", 64),
    _sized("visformer_tiny", 224),
    _sized("convit_tiny", 32),
    _sized("tnt_s_patch16_224", 32),
    _sized("nest_tiny", 64),
    _model("poolformer_s12"),
    _model("caformer_s18"),
    _model("davit_tiny"),
    _sized("mvitv2_tiny", 64),
    _sized("hiera_tiny_224", 224),
    _model("efficientvit_b0"),
)

HYBRID: tuple[Entry, ...] = (
    _sized("coatnet_nano_rw_224", 64),
    _sized("maxvit_nano_rw_256", 64),
    _model("edgenext_xx_small"),
    _model("fastvit_t8"),
    _model("mobilevit_xxs"),
    _model("mobilevitv2_050"),
    _model("efficientformer_l1", 224),
    _sized("efficientformerv2_s0", 64),
    _model("botnet26t_256", 256),
)

MODELS: tuple[Entry, ...] = (*CONVOLUTIONAL, *TRANSFORMERS, *HYBRID)
