"""A small Qwen2-MoE, trained on single characters of `tinyshakespeare.txt`, for the benchmarks.

    python -m benchmarks.moe_language_model [--steps N]

trains it if there are no weights yet, and prints its perplexity. Weights lie in `benchmarks/cache`, which git
ignores. Training that is stopped goes on from its last checkpoint, and gives what it would have given. A CUDA
device is used where there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.characters import CACHE, LENGTH, perplexity, text, train, windows
from tests.zoo.importing import import_transformers

BATCH, STEPS, RATE = 32, 2000, 1e-3


def library() -> Any:
    """Transformers; ends the program where it is not installed."""
    found = import_transformers()
    if found is None or not hasattr(found, "Qwen2MoeConfig"):
        print("Skipped: transformers with Qwen2-MoE is not installed.")
        raise SystemExit(0)
    return found


def build(words: int) -> nn.Module:
    """4 layers of 16 experts, of which a character uses 4, and a shared one; 2.1 million parameters."""
    found = library()
    config = found.Qwen2MoeConfig(
        vocab_size=words,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        intermediate_size=256,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=False,
        max_position_embeddings=LENGTH,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
    )
    model: nn.Module = found.AutoModelForCausalLM.from_config(config)
    return model


def batches(numbers: Tensor, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Random batches with labels, as Transformers takes them."""
    drawn = [windows(numbers, BATCH, seed * 10_000 + i) for i in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def trained(steps: int = STEPS) -> nn.Module:
    """The model with its weights, trained first where there are none; from then on without router loss."""
    numbers, _, words = text()
    torch.manual_seed(0)
    model = build(words)
    file = CACHE / f"qwen2_moe_{steps}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
    else:
        train(model, numbers, BATCH, RATE, steps, file)
    model.config.output_router_logits = False
    return model.cpu().eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains if need be, and prints the perplexity."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args(arguments)
    print(
        f"perplexity a character, on the tenth of the text that was held back: "
        f"{perplexity(trained(asked.steps), text()[1], 200):.3f}"
    )


if __name__ == "__main__":
    main()
