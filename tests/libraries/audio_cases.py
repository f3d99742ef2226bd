"""SpeechBrain, torchaudio and EnCodec: networks that hear."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tests.libraries.case import Case
from tests.libraries.vision_cases import made

LOBES = "speechbrain.lobes.models"


def _features(width: int) -> Any:
    return lambda batch, length: (torch.randn(batch, length, width),)


def _waves(channels: int = 1) -> Any:
    return lambda batch, length: (torch.randn(batch, channels, length),)


def _spoken(batch: int, size: Any) -> tuple[Tensor, ...]:
    frames, words = size
    return torch.randn(batch, frames, 20), torch.randint(1, 30, (batch, words))


def _transformer() -> nn.Module:
    module: Any = import_module("speechbrain.lobes.models.transformer.TransformerASR")
    model: nn.Module = module.TransformerASR(
        30,
        20,
        d_model=32,
        nhead=4,
        num_encoder_layers=2,
        num_decoder_layers=1,
        d_ffn=48,
        dropout=0.0,
        causal=False,
    )
    return model


def _lengths(width: int) -> Any:
    def inputs(batch: int, length: Any) -> tuple[Tensor, ...]:
        lengths = torch.full((batch,), length)
        lengths[-1] -= 2
        lengths[0] = length
        return torch.randn(batch, length, width), lengths

    return inputs


def _encodec() -> nn.Module:
    modules: Any = import_module("encodec.modules")
    sizes = {"channels": 1, "dimension": 16, "n_filters": 4, "ratios": [2, 2], "lstm": 1}
    return nn.Sequential(modules.SEANetEncoder(**sizes), modules.SEANetDecoder(**sizes))


WAV2VEC2 = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(16, 8, 4), (24, 3, 2)],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 48,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2,
    "encoder_num_heads": 6,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 96,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
    "aux_num_out": 12,
}

SPEECHBRAIN = (
    Case(
        "speechbrain ECAPA-TDNN",
        "speechbrain",
        made(
            f"{LOBES}.ECAPA_TDNN",
            "ECAPA_TDNN",
            20,
            lin_neurons=16,
            channels=[16, 16, 16, 16, 48],
            kernel_sizes=[5, 3, 3, 3, 1],
            dilations=[1, 2, 3, 4, 1],
            attention_channels=8,
            res2net_scale=4,
            se_channels=8,
        ),
        _features(20),
        (30, 45),
    ),
    Case(
        "speechbrain Xvector",
        "speechbrain",
        made(
            f"{LOBES}.Xvector",
            "Xvector",
            tdnn_blocks=3,
            tdnn_channels=[16, 16, 32],
            tdnn_kernel_sizes=[5, 3, 1],
            tdnn_dilations=[1, 2, 1],
            lin_neurons=16,
            in_channels=20,
        ),
        _features(20),
        (30, 45),
    ),
    Case(
        "speechbrain ResNet",
        "speechbrain",
        made(
            f"{LOBES}.ResNet",
            "ResNet",
            input_size=16,
            channels=[8, 8, 16, 16],
            block_sizes=[1, 1, 1, 1],
            lin_neurons=16,
        ),
        _features(16),
        (32, 48),
    ),
    Case(
        "speechbrain CRDNN",
        "speechbrain",
        made(
            f"{LOBES}.CRDNN",
            "CRDNN",
            input_shape=[None, None, 20],
            cnn_blocks=1,
            cnn_channels=[8],
            rnn_layers=1,
            rnn_neurons=16,
            rnn_bidirectional=True,
            dnn_blocks=1,
            dnn_neurons=16,
        ),
        _features(20),
        (24, 32),
    ),
    Case(
        "speechbrain ContextNet",
        "speechbrain",
        made(
            f"{LOBES}.ContextNet",
            "ContextNet",
            (None, None, 20),
            out_channels=24,
            conv_channels=[16, 16],
            strides=[1, 2],
            num_blocks=2,
            num_layers=1,
            inner_dim=8,
        ),
        _features(20),
        (24, 37),
    ),
    Case("speechbrain TransformerASR", "speechbrain", _transformer, _spoken, ((20, 6), (28, 9))),
    Case(
        "speechbrain HiFi-GAN",
        "speechbrain",
        made(
            f"{LOBES}.HifiGAN",
            "HifiganGenerator",
            in_channels=20,
            out_channels=1,
            resblock_type="1",
            resblock_dilation_sizes=[[1, 3, 5]],
            resblock_kernel_sizes=[3],
            upsample_kernel_sizes=[4, 4],
            upsample_initial_channel=32,
            upsample_factors=[2, 2],
            inference_padding=0,
        ),
        lambda batch, length: (torch.randn(batch, 20, length),),
        (12, 20),
    ),
)

TORCHAUDIO = (
    Case(
        "torchaudio Conformer",
        "torchaudio",
        made("torchaudio.models", "Conformer", 24, 4, 48, 2, 7),
        _lengths(24),
        (16, 23),
    ),
    Case(
        "torchaudio Conv-TasNet",
        "torchaudio",
        made("torchaudio.models", "ConvTasNet", 2, 8, 16, 3, 12, 24, 2, 1),
        _waves(),
        (160, 201),
    ),
    Case(
        "torchaudio Wav2Vec2",
        "torchaudio",
        made("torchaudio.models", "wav2vec2_model", **WAV2VEC2),
        lambda batch, length: (torch.randn(batch, length),),
        (400, 650),
    ),
    Case(
        "torchaudio DeepSpeech",
        "torchaudio",
        made("torchaudio.models", "DeepSpeech", 20, 32, 10, 0.0),
        lambda batch, length: (torch.randn(batch, 1, length, 20),),
        (15, 22),
    ),
    Case(
        "torchaudio HDemucs",
        "torchaudio",
        made("torchaudio.models", "HDemucs", ["a", "b"], audio_channels=2, channels=8, nfft=4096, depth=6),
        _waves(2),
        (44100, 50000),
    ),
)

CASES = (*SPEECHBRAIN, *TORCHAUDIO, Case("EnCodec", "encodec", _encodec, _waves(), (64, 100)))
