"""Small transformers with random weights, one layer each, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.importing import import_transformers

WORDS, WIDTH = 48, 16
_BASE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_BASE, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_BASE, "tie_word_embeddings": False}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_BASE, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _BASE),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(vocab_size=WORDS, n_embd=WIDTH, n_layer=1, n_head=2,
             n_positions=32, bos_token_id=1, eos_token_id=2, use_cache=False)),
    "opt": ("OPTForCausalLM", "OPTConfig", dict(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1,
            num_attention_heads=2, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=WIDTH,
            use_cache=False)),
    "bert": ("BertForMaskedLM", "BertConfig", dict(vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=1,
             num_attention_heads=2, intermediate_size=24, max_position_embeddings=32)),
    "vit": ("ViTForImageClassification", "ViTConfig", dict(hidden_size=WIDTH, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4, num_labels=5)),
}  # fmt: skip
EXACT = ("llama", "qwen3", "gemma", "gpt2", "opt", "vit")


def make(family: str, seed: int = 0) -> nn.Module:
    """A model of this family, with factors and biases of norms that are not ones and zeros."""
    found = import_transformers()
    model, config, options = CONFIGS[family]
    if found is None or not hasattr(found, model):
        pytest.skip(f"needs transformers with {model}")
    torch.manual_seed(seed)
    made: nn.Module = getattr(found, model)(getattr(found, config)(**options))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.double().eval()


def data(family: str, count: int = 3, size: int = 8, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random batches."""
    rng = torch.Generator().manual_seed(seed)
    if family == "vit":
        return [
            {"pixel_values": torch.randn(size, 3, 8, 8, generator=rng, dtype=torch.float64)}
            for _ in range(count)
        ]
    return [{"input_ids": torch.randint(3, WORDS, (size, 10), generator=rng)} for _ in range(count)]
