"""Chains of alike blocks: language models of Transformers, and lists that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.importing import import_transformers

WORDS, LENGTH, DEPTH = 13, 7, 4


class Block(nn.Module):
    """A residual block that scales what it adds."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, scale: float, x: Tensor, *, shift: Tensor) -> tuple[Tensor, None]:
        """[batch, width] and a shift of it."""
        return x + scale * self.down(torch.tanh(self.up(x + shift))), None


class Plain(nn.Module):
    """A list of blocks with layers before and behind, none of them named as language models name theirs."""

    def __init__(self, *, between: bool = False, kept: bool = False) -> None:
        super().__init__()
        self.into = nn.Linear(5, 8)
        self.chain = nn.ModuleList(Block() for _ in range(DEPTH))
        self.out = nn.Linear(8, 3)
        self.between, self.kept = between, kept

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 5] to [batch, 3]."""
        x = shift = self.into(x)
        states = []
        for k, block in enumerate(self.chain):
            x, _ = block(0.5 + k, x, shift=0.1 * (k + 1) * shift)
            if self.between:
                x = 2 * x
            if self.kept:
                states.append(x)
        return self.out(x + sum(states))


def language_model(kind: str, **settings: Any) -> nn.Module:
    """A tiny causal one in float64, that keeps key-value caches unless told not to."""
    library: Any = import_transformers()
    if library is None:
        pytest.skip("transformers is not installed")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "llama": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "gpt2": {"n_embd": 16, "n_layer": DEPTH, "n_head": 4},
        "gpt_neox": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
        },
        "opt": {
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 16,
        },
    }[kind]
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = library.AutoConfig.for_model(
        kind, vocab_size=WORDS, use_cache=True, tie_word_embeddings=False, **sizes | special | settings
    )
    model: nn.Module = library.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():  # large enough that attention is not uniform
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def texts(batches: int = 3, samples: int = 2) -> list[dict[str, Tensor]]:
    """Batches of token numbers, with labels."""
    generator = torch.Generator().manual_seed(1)
    found = (torch.randint(WORDS, (samples, LENGTH), generator=generator) for _ in range(batches))
    return [{"input_ids": ids, "labels": ids} for ids in found]


def vectors(batches: int = 3, samples: int = 6) -> list[Tensor]:
    """What `Plain` reads."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(samples, 5, generator=generator, dtype=torch.float64) for _ in range(batches)]
