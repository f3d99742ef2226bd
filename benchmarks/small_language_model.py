"""A small Llama, trained on single characters of `tinyshakespeare.txt`, for the benchmarks.

    python -m benchmarks.small_language_model [--steps N]

trains it if there are no weights yet, resumes what was interrupted, and prints its perplexity. Weights and
checkpoints lie in `benchmarks/cache`, which git ignores. The same steps and machine give the same weights; a
CUDA device is used where there is one, which gives others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.characters import CACHE, LENGTH, perplexity, text, train
from tests.zoo.importing import import_transformers

BATCH, STEPS = 16, 1500
RATE = 3e-3


def build(words: int) -> nn.Module:
    """5 layers of width 128 with 8 heads and 352 gated neurons; 1.0 million parameters.

    Raises:
        SystemExit: With status 0, where Transformers is not installed.
    """
    found: Any = import_transformers()
    if found is None or not hasattr(found, "LlamaConfig"):
        print("Skipped: transformers with Llama is not installed.")
        raise SystemExit(0)
    config = found.LlamaConfig(
        vocab_size=words,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: nn.Module = found.AutoModelForCausalLM.from_config(config)
    return model


def weights_of(steps: int = STEPS) -> Path:
    """The file of the weights, which need not exist."""
    return CACHE / f"llama-{steps}.safetensors"


def trained(steps: int = STEPS) -> nn.Module:
    """The model with its weights, in eval mode, on the CPU; trained now if they are not in the cache."""
    numbers, _, words = text()
    weights = weights_of(steps)
    if not weights.is_file():
        torch.manual_seed(0)
        train(build(words), numbers, BATCH, RATE, steps, weights)
    model = build(words)
    model.load_state_dict(load_file(weights))
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains if need be, and prints the perplexity."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args(arguments)
    model = trained(asked.steps)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size} parameters; perplexity a character, on the tenth of the text that was held back: "
        f"{perplexity(model, text()[1], 400):.3f}"
    )


if __name__ == "__main__":
    main()
