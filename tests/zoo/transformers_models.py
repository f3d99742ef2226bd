"""Architectures of Transformers, in tiny configurations of our own: nothing is downloaded."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import Entry, Example
from tests.zoo.importing import import_transformers

WIDTH, HEADS, LAYERS, WORDS, LENGTH, SIDE = 48, 6, 2, 100, 10, 32
_BODY = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
_TEXT = {**_BODY, "vocab_size": WORDS, "max_position_embeddings": 64}
_VISION = {**_BODY, "image_size": SIDE, "patch_size": 8}


def _words(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, WORDS, (batch, LENGTH), generator=generator)  # 0 to 2 mean padding and the like


def _ids(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _words(batch, generator)}


def _masked(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = _words(batch, generator)
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _both(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _words(batch, generator), "decoder_input_ids": _words(batch, generator)}


def _pixels(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, SIDE, SIDE, generator=generator)}


def _larger_pixels(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    """More than one position in the last stage: attention over one reads neither queries nor keys."""
    return {"pixel_values": torch.randn(batch, 3, 2 * SIDE, 2 * SIDE, generator=generator)}


def _pairs(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {**_ids(batch, generator), **_pixels(batch, generator)}


def _sound(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 80, 100, generator=generator)}


def _model(name: str, config: str, model: str, example: Example, **options: Any) -> Entry:
    """A model without a cache of keys and values: pruning looks at one forward pass."""

    def construct() -> nn.Module:
        library: Any = import_transformers()
        settings = getattr(library, config)(**options)
        settings.use_cache = False
        holder = library
        if not hasattr(library, model):  # encoders that are not exported on their own
            package = config.removesuffix("Config").lower()
            holder = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        made: nn.Module = getattr(holder, model)(settings)
        return made

    return Entry(name, "transformers", construct, example)


MODELS: tuple[Entry, ...] = (
    _model("bert", "BertConfig", "BertForSequenceClassification", _masked, **_TEXT),
    _model("roberta", "RobertaConfig", "RobertaForMaskedLM", _ids, **_TEXT),
    _model("distilbert", "DistilBertConfig", "DistilBertForSequenceClassification", _masked,
           vocab_size=WORDS, dim=WIDTH, hidden_dim=2 * WIDTH, n_layers=LAYERS, n_heads=HEADS),
    _model("albert", "AlbertConfig", "AlbertModel", _ids, **_TEXT, embedding_size=24),
    _model("electra", "ElectraConfig", "ElectraModel", _ids, **_TEXT, embedding_size=24),
    _model("t5", "T5Config", "T5ForConditionalGeneration", _both, vocab_size=WORDS, d_model=WIDTH, d_kv=8,
           d_ff=2 * WIDTH, num_layers=LAYERS, num_heads=HEADS, decoder_start_token_id=0),
    _model("gpt2", "GPT2Config", "GPT2LMHeadModel", _ids, vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS,
           n_head=HEADS, n_positions=64, bos_token_id=0, eos_token_id=0),
    _model("llama", "LlamaConfig", "LlamaForCausalLM", _ids, **_TEXT, num_key_value_heads=3),
    _model("mistral", "MistralConfig", "MistralForCausalLM", _ids, **_TEXT, num_key_value_heads=2),
    _model("qwen2", "Qwen2Config", "Qwen2ForCausalLM", _ids, **_TEXT, num_key_value_heads=2),
    _model("qwen3", "Qwen3Config", "Qwen3ForCausalLM", _ids, **_TEXT, num_key_value_heads=3, head_dim=8),
    _model("gemma", "GemmaConfig", "GemmaForCausalLM", _ids, **_TEXT, num_key_value_heads=1, head_dim=8),
    _model("phi", "PhiConfig", "PhiForCausalLM", _ids, **_TEXT),
    _model("phi3", "Phi3Config", "Phi3ForCausalLM", _ids, **_TEXT, num_key_value_heads=3, pad_token_id=0),
    _model("opt", "OPTConfig", "OPTForCausalLM", _masked, vocab_size=WORDS, hidden_size=WIDTH,
           ffn_dim=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, word_embed_proj_dim=WIDTH,
           max_position_embeddings=64),
    _model("bloom", "BloomConfig", "BloomForCausalLM", _ids, vocab_size=WORDS, hidden_size=WIDTH,
           n_layer=LAYERS, n_head=HEADS),
    _model("falcon", "FalconConfig", "FalconForCausalLM", _ids, vocab_size=WORDS, hidden_size=WIDTH,
           num_hidden_layers=LAYERS, num_attention_heads=HEADS),
    _model("whisper_encoder", "WhisperConfig", "WhisperEncoder", _sound, d_model=WIDTH, encoder_layers=LAYERS,
           encoder_attention_heads=HEADS, encoder_ffn_dim=2 * WIDTH, max_source_positions=50),
    _model("vit", "ViTConfig", "ViTForImageClassification", _pixels, **_VISION),
    _model("swin", "SwinConfig", "SwinModel", _pixels, image_size=SIDE, patch_size=2, embed_dim=24,
           depths=[2, 2], num_heads=[3, 6], window_size=4),
    _model("dinov2", "Dinov2Config", "Dinov2Model", _pixels, hidden_size=WIDTH, num_hidden_layers=LAYERS,
           num_attention_heads=HEADS, mlp_ratio=2, image_size=SIDE, patch_size=8),
    _model("segformer", "SegformerConfig", "SegformerForSemanticSegmentation", _larger_pixels,
           depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 48], num_attention_heads=[2, 3, 4, 6],
           decoder_hidden_size=32, sr_ratios=[4, 2, 1, 1]),
    _model("clip", "CLIPConfig", "CLIPModel", _pairs, text_config={**_TEXT, "eos_token_id": 99},
           vision_config=_VISION),
    _model("siglip", "SiglipConfig", "SiglipModel", _pairs, text_config=_TEXT, vision_config=_VISION),
)  # fmt: skip
