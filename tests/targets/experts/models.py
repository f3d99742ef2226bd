"""Small mixture-of-experts models with random weights: of Transformers, and a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.importing import import_transformers

WORDS, WIDTH, EXPERTS = 64, 32, 8
_BASE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2MoeConfig", dict(intermediate_size=48, moe_intermediate_size=16,
              shared_expert_intermediate_size=24, num_experts=EXPERTS, num_experts_per_tok=2)),
    "qwen3": ("Qwen3MoeConfig", dict(intermediate_size=48, moe_intermediate_size=16, num_experts=EXPERTS,
              num_experts_per_tok=3, head_dim=8, norm_topk_prob=True, mlp_only_layers=[0])),
    "mixtral": ("MixtralConfig", dict(intermediate_size=40, num_local_experts=EXPERTS,
    num_experts_per_tok=2)),
    "olmoe": ("OlmoeConfig", dict(intermediate_size=16, num_experts=EXPERTS, num_experts_per_tok=2)),
    "deepseek": ("DeepseekV3Config", dict(num_hidden_layers=3, num_key_value_heads=4, intermediate_size=48,
                 moe_intermediate_size=16, n_routed_experts=EXPERTS, num_experts_per_tok=2, n_group=2,
                 topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                 qk_nope_head_dim=8, v_head_dim=8, n_shared_experts=1)),
    "gptoss": ("GptOssConfig", dict(intermediate_size=24, num_local_experts=EXPERTS, num_experts_per_tok=2,
               head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})),
}  # fmt: skip


class Expert(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(torch.tanh(self.up(x)))
        return down


class Mixture(nn.Module):
    """A user's own block: a list of experts, a linear router, a shared expert."""

    def __init__(self, width: int = WIDTH, inner: int = 12, experts: int = 6, k: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(experts))
        self.shared = Expert(width, inner)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).topk(self.k, dim=-1)
        weights = weights.softmax(-1)
        out = self.shared(flat)
        for number, expert in enumerate(self.experts):
            tokens, slots = torch.where(chosen == number)
            out = out.index_add(0, tokens, weights[tokens, slots, None] * expert(flat[tokens]))
        return out.reshape(x.shape)


class PlainLM(nn.Module):
    """Embedding, two mixtures with residuals, a head."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Mixture(**options) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(nn.functional.layer_norm(x, x.shape[-1:]))
        logits: Tensor = self.head(x)
        return logits


def library() -> Any:
    """Transformers, with its mixtures; the test skips where it is not installed."""
    import pytest

    found = import_transformers()
    if found is None or not hasattr(found, "GptOssConfig"):
        pytest.skip("needs transformers with the mixture-of-experts models")
    return found


def make(family: str, seed: int = 0, layers: int | None = None) -> nn.Module:
    """A model of this family with random weights, in evaluation mode; `layers` in place of its own number."""
    torch.manual_seed(seed)
    if family == "plain":
        return spread(PlainLM()).eval()
    name, options = CONFIGS[family]
    found = library()
    own = {} if layers is None else {"num_hidden_layers": layers}
    config = getattr(found, name)(**{**_BASE, **options, **own})
    config.use_cache = False
    return spread(found.AutoModelForCausalLM.from_config(config)).eval()


def spread(model: nn.Module) -> nn.Module:
    """Larger weights, so that routers are decided and experts matter; corrections that are not zero."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.3)
            elif "bias" in name:
                tensor.normal_(0, 0.1)
    return model


def maker(family: str) -> Callable[[], nn.Module]:
    return lambda: make(family, seed=99)


FAMILIES = (*CONFIGS, "plain")


def words(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))
