"""Transformers: models that generate, detect, segment, hear and see."""

from __future__ import annotations

import tempfile
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tests.libraries.case import Case

WIDTH, HEADS, LAYERS, WORDS = 48, 6, 2, 100
BODY = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
TEXT = {
    **BODY,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {**BODY, "image_size": 32, "patch_size": 8}
IMAGE = 99
"""The id that stands for a place of a picture among words."""


def config(name: str, **options: Any) -> Any:
    """A configuration of the library."""
    return getattr(import_module("transformers"), name)(**options)


def _make(kind: str, settings: str, options: Any) -> Any:
    def make() -> nn.Module:
        made = config(settings, **(options() if callable(options) else options))
        made.use_cache = False
        model: nn.Module = getattr(import_module("transformers"), kind)(made)
        return model

    return make


def _words(batch: int, length: int, highest: int = 98) -> Tensor:
    return torch.randint(3, highest, (batch, length))


def _ids(batch: int, length: Any) -> dict[str, Tensor]:
    return {"input_ids": _words(batch, length)}


def _padded(batch: int, length: Any) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -3:] = 0
    return {"input_ids": _words(batch, length), "attention_mask": mask}


def _both(batch: int, size: Any) -> dict[str, Tensor]:
    return {"input_ids": _words(batch, size[0]), "decoder_input_ids": _words(batch, size[1])}


def _speech(batch: int, length: Any) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 80, 100), "decoder_input_ids": _words(batch, length)}


def _sound(batch: int, length: Any) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, length)}


def _pixels(batch: int, size: Any) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, *size)}


def _points(batch: int, points: Any) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(batch, 3, 64, 64),
        "input_points": torch.rand(batch, 1, points, 2) * 64,
        "input_labels": torch.ones(batch, 1, points, dtype=torch.long),
    }


def _pictured(places: int, **more: Any) -> Any:
    def inputs(batch: int, length: Any) -> dict[str, Any]:
        ids = _words(batch, length)
        ids[:, 1 : 1 + places] = IMAGE
        return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 32, 32), **more}

    return inputs


def _qwen_vl(batch: int, size: Any) -> dict[str, Any]:
    rows, columns, length = size  # of patches; 2 x 2 patches become one place among the words
    places = rows * columns // 4
    ids = _words(batch, length, 90)
    ids[:, 1] = 95
    ids[:, 2 : 2 + places] = IMAGE
    ids[:, 2 + places] = 96
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch * rows * columns, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * batch),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def _series(batch: int, length: Any) -> dict[str, Tensor]:
    return {"past_values": torch.randn(batch, length, 3)}


def _decisions(batch: int, length: Any) -> dict[str, Tensor]:
    return {
        "states": torch.randn(batch, length, 5),
        "actions": torch.randn(batch, length, 2),
        "rewards": torch.randn(batch, length, 1),
        "returns_to_go": torch.randn(batch, length, 1),
        "timesteps": torch.arange(length).expand(batch, length).contiguous(),
        "attention_mask": torch.ones(batch, length, dtype=torch.long),
    }


def _pairs(batch: int, length: Any) -> dict[str, Tensor]:
    ids = _words(batch, length)
    ids[:, -1] = 2
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 32, 32)}


def generate(inputs: Any, size: Any) -> Any:
    """Greedy generation from these inputs, with the cache that the library uses."""

    def use(model: Any) -> Tensor:
        given = {k: v for k, v in inputs(2, size).items() if not k.startswith("decoder_")}
        return model.generate(**given, max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)

    return use


def save_pretrained(model: Any) -> list[Tensor]:
    """What the model's own `save_pretrained` writes holds as many numbers as the model."""
    files: Any = import_module("safetensors.torch")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        held = files.load_file(f"{folder}/model.safetensors")
    tensors = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if sum(tensor.numel() for tensor in held.values()) != sum(tensors.values()):
        raise AssertionError("expected the file to hold the model's tensors.")
    return []


def _case(
    name: str,
    kind: str,
    settings: str,
    inputs: Any,
    sizes: tuple[Any, ...],
    options: Any,
    *,
    writes: Any = None,
    **more: Any,
) -> Case:
    uses = {"save_pretrained": save_pretrained}
    if writes is not None:
        uses["generate"] = generate(inputs, writes)
    return Case(name, "transformers", _make(kind, settings, options), inputs, sizes, uses=uses, **more)


SEQUENCES = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
BART = {
    **SEQUENCES,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "forced_eos_token_id": None,
}
DETECTOR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 7,
    "num_labels": 4,
}


def _resnet(**options: Any) -> Any:
    return config(
        "ResNetConfig",
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        **options,
    )


def _deformable() -> dict[str, Any]:
    backbone = _resnet(out_features=["stage2", "stage3", "stage4"])
    return {
        **DETECTOR,
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": backbone,
        "encoder_n_points": 2,
        "decoder_n_points": 2,
        "num_feature_levels": 3,
        "disable_custom_kernels": True,
    }


def _detr() -> dict[str, Any]:
    return {
        **DETECTOR,
        "use_timm_backbone": False,
        "backbone": None,
        "use_pretrained_backbone": False,
        "backbone_config": _resnet(out_features=["stage4"]),
    }


def _rt_detr() -> dict[str, Any]:
    backbone = config(
        "RTDetrResNetConfig",
        embedding_size=16,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    return {
        **DETECTOR,
        "backbone_config": backbone,
        "encoder_hidden_dim": 32,
        "encoder_in_channels": [24, 32, 48],
        "decoder_in_channels": [32, 32, 32],
        "decoder_n_points": 2,
        "num_denoising": 0,
    }


def _sam() -> dict[str, Any]:
    return {
        "vision_config": {
            "hidden_size": 48,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "mlp_dim": 96,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "num_pos_feats": 16,
        },
        "prompt_encoder_config": {
            "hidden_size": 32,
            "image_size": 64,
            "patch_size": 8,
            "mask_input_channels": 4,
        },
        "mask_decoder_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_dim": 64,
            "iou_head_hidden_dim": 32,
        },
    }


def _llava() -> dict[str, Any]:
    return {
        "vision_config": config("CLIPVisionConfig", **VISION),
        "text_config": config("LlamaConfig", **TEXT, num_key_value_heads=3),
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": -1,
    }


def _qwen2_vl() -> dict[str, Any]:
    vision = {
        "depth": 2,
        "embed_dim": 48,
        "hidden_size": WIDTH,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text = {
        **TEXT,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_id": IMAGE,
        "video_token_id": 98,
        "vision_start_token_id": 95,
        "vision_end_token_id": 96,
    }


def _blip2() -> dict[str, Any]:
    return {
        "vision_config": {**VISION},
        "num_query_tokens": 4,
        "image_token_index": IMAGE,
        "qformer_config": {**TEXT, "encoder_hidden_size": WIDTH},
        "text_config": {
            "model_type": "opt",
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "word_embed_proj_dim": WIDTH,
            "max_position_embeddings": 64,
        },
    }


HEARING = {
    **BODY,
    "vocab_size": 30,
    "conv_dim": (16, 24, 32),
    "conv_stride": (4, 2, 2),
    "conv_kernel": (8, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
WHISPER = {
    **SEQUENCES,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "bos_token_id": 1,
    "max_source_positions": 50,
    "max_target_positions": 32,
    "begin_suppress_tokens": None,
}
T5 = {**SEQUENCES, "d_kv": 8, "d_ff": 96, "num_layers": LAYERS, "num_heads": HEADS}
MAMBA2 = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "vocab_size": WORDS,
    "state_size": 8,
    "num_heads": 12,
    "head_dim": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "expand": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CASES = (
    _case("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", _speech, (8, 13), WHISPER, writes=3),
    _case("T5", "T5ForConditionalGeneration", "T5Config", _both, ((10, 7), (14, 9)), T5, writes=(6, 4)),
    _case(
        "BART", "BartForConditionalGeneration", "BartConfig", _both, ((10, 7), (14, 9)), BART, writes=(6, 4)
    ),
    _case(
        "Llama",
        "LlamaForCausalLM",
        "LlamaConfig",
        _padded,
        (10, 17),
        {**TEXT, "num_key_value_heads": 3},
        writes=6,
    ),
    _case("GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", _padded, (10, 17), TEXT, writes=6),
    _case(
        "Gemma 3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _ids,
        (10, 17),
        {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
        writes=6,
    ),
    _case(
        "Qwen3-MoE",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _ids,
        (10, 17),
        {
            **TEXT,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
        },
        writes=6,
        round_to=8,  # its kernel takes no others
    ),
    _case(
        "ModernBERT",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _padded,
        (16, 25),
        {
            **TEXT,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 8,
            "reference_compile": False,
            "attn_implementation": "sdpa",
        },
    ),
    _case(
        "DeBERTa v2",
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        _padded,
        (10, 17),
        {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    _case(
        "Longformer",
        "LongformerForSequenceClassification",
        "LongformerConfig",
        _ids,
        (16, 32),
        {**TEXT, "attention_window": [8, 8]},
    ),
    _case(
        "XLNet",
        "XLNetLMHeadModel",
        "XLNetConfig",
        _ids,
        (10, 17),
        {"vocab_size": WORDS, "d_model": WIDTH, "n_layer": 2, "n_head": HEADS, "d_inner": 96},
    ),
    _case(
        "Mamba",
        "MambaForCausalLM",
        "MambaConfig",
        _ids,
        (16, 23),
        {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": WORDS, "state_size": 8},
        writes=6,
    ),
    _case("Mamba 2", "Mamba2ForCausalLM", "Mamba2Config", _ids, (16, 23), MAMBA2, writes=6),
    _case("DETR", "DetrForObjectDetection", "DetrConfig", _pixels, ((64, 64), (96, 64), (64, 128)), _detr),
    _case(
        "Deformable DETR",
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        _pixels,
        ((64, 64), (96, 64), (64, 128)),
        _deformable,
    ),
    _case(
        "RT-DETR",
        "RTDetrForObjectDetection",
        "RTDetrConfig",
        _pixels,
        ((64, 64), (96, 64), (64, 128)),
        _rt_detr,
    ),
    _case("SAM", "SamModel", "SamConfig", _points, (1, 3), _sam),
    _case("Wav2Vec2", "Wav2Vec2ForCTC", "Wav2Vec2Config", _sound, (400, 650), HEARING),
    _case("HuBERT", "HubertForCTC", "HubertConfig", _sound, (400, 650), HEARING),
    _case(
        "Audio spectrogram transformer",
        "ASTForAudioClassification",
        "ASTConfig",
        lambda batch, length: {"input_values": torch.randn(batch, length, 32)},
        (64,),
        {
            **BODY,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 64,
            "num_mel_bins": 32,
        },
    ),
    _case(
        "LLaVA", "LlavaForConditionalGeneration", "LlavaConfig", _pictured(16), (24, 31), _llava, writes=20
    ),
    _case(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        _qwen_vl,
        ((4, 4, 12), (4, 8, 17)),
        _qwen2_vl,
        writes=(4, 4, 12),
    ),
    _case("BLIP-2", "Blip2ForConditionalGeneration", "Blip2Config", _pictured(4), (12, 17), _blip2),
    _case(
        "CLIP",
        "CLIPModel",
        "CLIPConfig",
        _pairs,
        (10, 17),
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION},
    ),
    _case(
        "SegFormer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        _pixels,
        ((64, 64), (96, 64)),
        {
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [16, 24, 32, 48],
            "num_attention_heads": [2, 3, 4, 6],
            "decoder_hidden_size": 32,
            "sr_ratios": [4, 2, 1, 1],
        },
    ),
    _case(
        "DPT",
        "DPTForDepthEstimation",
        "DPTConfig",
        _pixels,
        ((32, 32),),
        {
            **VISION,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 24, 32, 48],
            "fusion_hidden_size": 24,
            "is_hybrid": False,
        },
    ),
    _case(
        "PatchTST",
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        _series,
        (32,),
        {
            "num_input_channels": 3,
            "context_length": 32,
            "patch_length": 8,
            "patch_stride": 8,
            "d_model": 48,
            "num_attention_heads": 6,
            "num_hidden_layers": 2,
            "ffn_dim": 96,
            "prediction_length": 8,
        },
    ),
    _case(
        "Decision Transformer",
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        _decisions,
        (6, 9),
        {
            "state_dim": 5,
            "act_dim": 2,
            "hidden_size": WIDTH,
            "n_layer": 2,
            "n_head": HEADS,
            "max_ep_len": 20,
            "vocab_size": 2,
        },
    ),
    _case(
        "VITS",
        "VitsModel",
        "VitsConfig",
        _ids,
        (10, 14),
        {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "ffn_dim": 48,
            "flow_size": 16,
            "spectrogram_bins": 9,
            "upsample_initial_channel": 32,
            "upsample_rates": [2, 2],
            "upsample_kernel_sizes": [4, 4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
            "prior_encoder_num_wavenet_layers": 1,
            "prior_encoder_num_flows": 2,
            "duration_predictor_num_flows": 2,
            "depth_separable_num_layers": 1,
            "layerdrop": 0.0,  # drawn by NumPy, in training
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "duration_predictor_dropout": 0.0,
        },
    ),
)
