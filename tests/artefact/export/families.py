"""Families of Transformers in tiny configurations, and what their configuration says after pruning."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph.graph import Graph
from tests.targets.units.plans import plan_of
from tests.zoo.importing import import_transformers

WIDTH, HEADS, NEURONS, WORDS, LENGTH = 32, 4, 48, 60, 9
_BODY = {
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
_TEXT = {**_BODY, "vocab_size": WORDS, "max_position_embeddings": 32}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_WINDOWED = {**_GROUPED, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
_IMAGE = {"image_size": 16, "patch_size": 8}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        config: Name of the configuration's class.
        model: Name of the model's class.
        options: Of the configuration.
        inputs: ``text``, ``image``, ``sound`` or ``both`` (an encoder's and a decoder's text).
        neurons: What the configuration says once half of the neurons are gone.
        heads: What it says once half of the heads are gone; None where it cannot say that.
    """

    config: str
    model: str
    options: Mapping[str, Any]
    inputs: str
    neurons: Mapping[str, float]
    heads: Mapping[str, float] | None = None

    def make(self) -> nn.Module:
        """A model with random weights."""
        library: Any = import_transformers()
        torch.manual_seed(0)
        config = getattr(library, self.config)(**self.options)
        config.use_cache = False
        made: nn.Module = getattr(library, self.model)(config).eval()
        for weight in made.parameters():  # those of a fresh model hardly attend
            if weight.ndim > 1:
                weight.data.mul_(5)
        return made

    def example(self, batch: int, length: int, seed: int) -> dict[str, Tensor]:
        """Inputs of any batch size and length, with padding; the last sample has most of it."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, WORDS, (batch, length), generator=generator)
        if self.inputs == "image":
            return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
        if self.inputs == "sound":
            sound = torch.randn(batch, 8, 24, generator=generator)
            return {"input_features": sound, "decoder_input_ids": ids}
        mask = torch.ones_like(ids)
        mask[-1, length // 2 :] = 0
        more = {"decoder_input_ids": ids.flip(0)} if self.inputs == "both" else {}
        return {"input_ids": ids, "attention_mask": mask, **more}


_TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
_HALF = {"intermediate_size": NEURONS // 2}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", _GROUPED, "text", _HALF, _TWO_HEADS),
    "mistral": Family(
        "MistralConfig", "MistralForCausalLM", {**_GROUPED, "sliding_window": 4}, "text", _HALF, _TWO_HEADS
    ),
    "gemma2": Family("Gemma2Config", "Gemma2ForCausalLM", _WINDOWED, "text", _HALF, _TWO_HEADS),
    "gemma3": Family("Gemma3TextConfig", "Gemma3ForCausalLM", _WINDOWED, "text", _HALF, _TWO_HEADS),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", _GROUPED, "text", _HALF, _TWO_HEADS),
    "qwen3": Family(
        "Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 8}, "text", _HALF, _TWO_HEADS
    ),
    "phi3": Family("Phi3Config", "Phi3ForCausalLM", {**_GROUPED, **_SPECIAL}, "text", _HALF, _TWO_HEADS),
    "gpt2": Family(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 32, **_SPECIAL},
        "text",
        {"n_inner": 2 * WIDTH},
    ),
    "opt": Family(
        "OPTConfig",
        "OPTForCausalLM",
        {**_TEXT, "ffn_dim": NEURONS, "word_embed_proj_dim": WIDTH},
        "text",
        {"ffn_dim": NEURONS // 2},
    ),
    "neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", _TEXT, "text", _HALF),
    "bert": Family("BertConfig", "BertForSequenceClassification", _TEXT, "text", _HALF),
    "roberta": Family("RobertaConfig", "RobertaForMaskedLM", _TEXT, "text", _HALF),
    "modernbert": Family(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {**_TEXT, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
        "text",
        _HALF,
    ),
    "vit": Family(
        "ViTConfig",
        "ViTForImageClassification",
        {**_BODY, **_IMAGE},
        "image",
        _HALF,
        {"num_attention_heads": 2, "head_dim": 8},
    ),
    "dinov2": Family(
        "Dinov2Config",
        "Dinov2Model",
        {**_BODY, **_IMAGE, "mlp_ratio": 2, "use_mask_token": False},
        "image",
        {"mlp_ratio": 1},
        {"num_attention_heads": 2, "head_dim": 8},
    ),
    "whisper": Family(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": NEURONS,
            "decoder_ffn_dim": 40,
            "max_source_positions": 12,
            "max_target_positions": 20,
            "num_mel_bins": 8,
            **_SPECIAL,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
        },
        "sound",
        {"encoder_ffn_dim": NEURONS // 2, "decoder_ffn_dim": 20},
    ),
    "t5": Family(
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": NEURONS,
            "num_layers": 2,
            "num_heads": HEADS,
            "decoder_start_token_id": 0,
        },
        "both",
        {"d_ff": NEURONS // 2},
        {"num_heads": 2, "d_kv": 8},
    ),
}
FAST = ("llama", "vit", "gpt2")
"""Those that the quick tests look at."""


@functools.cache
def traced(name: str) -> tuple[nn.Module, Graph]:
    """A family's model, traced once; the lengths that it may have are known from two batches."""
    family = FAMILIES[name]
    model = family.make()
    others = [family.example(3, LENGTH - 1, 1)]
    return model, sc.trace(model, family.example(2, LENGTH, 0), more_inputs=others)


def pruned(name: str, gone: Mapping[str, float | tuple[float, ...]]) -> Any:
    """A family's model without a share of its ``neurons``, ``heads`` or both.

    Args:
        name: The family.
        gone: ``neurons`` or ``heads`` -> the share that goes, of all layers or of each group in turn.
    """
    model, graph = traced(name)
    keep = {}
    for kind, shares in gone.items():
        apart = ("conv", "pooler")
        groups = [g for g in graph.groups if (g.size <= HEADS) == (kind == "heads")]
        groups = [g for g in groups if not any(word in g.name for word in apart)]
        assert groups
        for k, group in enumerate(groups):
            share = shares[k % len(shares)] if isinstance(shares, tuple) else shares
            keep[group.name] = np.arange(group.size) >= round(share * group.size)
    inputs = FAMILIES[name].example(2, LENGTH, 0)
    return sc.apply(model, plan_of(graph, keep), graph=graph, example_inputs=inputs)
