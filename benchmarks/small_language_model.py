"""A small Llama, trained on single characters of `tinyshakespeare.txt`, for the benchmarks.

    python -m benchmarks.small_language_model [--steps N]

trains it if there are no weights yet, resumes what was interrupted, and prints its perplexity. Weights and
checkpoints lie in `benchmarks/cache`, which git ignores. The same steps and machine give the same weights; a
CUDA device is used where there is one, which gives others.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.moe_language_model import CACHE, LENGTH, text, windows
from tests.zoo.importing import import_transformers

BATCH, STEPS = 16, 1500
RATE = 3e-3
EVERY = 100
"""Steps between checkpoints."""


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


@torch.no_grad()
def perplexity(model: nn.Module, numbers: Tensor, stretches: int) -> float:
    """The exponential of the mean loss a character, over the first stretches of the text."""
    losses = []
    for ids in numbers[: stretches * LENGTH].reshape(-1, LENGTH).split(64):
        logits = model(input_ids=ids).logits[:, :-1]
        losses.append(
            nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        )
    return math.exp(float(torch.cat(losses).mean()))


def weights_of(steps: int = STEPS) -> Path:
    """The file of the weights, which need not exist."""
    return CACHE / f"llama-{steps}.safetensors"


def trained(steps: int = STEPS) -> nn.Module:
    """The model with its weights, in eval mode, on the CPU; trained now if they are not in the cache."""
    train, _, words = text()
    weights = weights_of(steps)
    if not weights.is_file():
        _train(train, words, steps, weights)
    model = build(words)
    model.load_state_dict(load_file(weights))
    return model.eval()


def _train(numbers: Tensor, words: int, steps: int, weights: Path) -> None:
    """Trains from the last checkpoint on, and writes the weights."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = build(words).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    checkpoint = weights.with_suffix(".checkpoint")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    start = 0
    if checkpoint.is_file():
        found = torch.load(checkpoint, weights_only=True, map_location=device)
        start = found.pop("step")
        for name, state in found.items():
            parts[name].load_state_dict(state)
    for step in range(start, steps):
        ids = windows(numbers, BATCH, step).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % EVERY == 0:
            print(f"llama: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}", flush=True)
            beside = checkpoint.with_suffix(".new")
            torch.save({"step": step + 1, **{k: v.state_dict() for k, v in parts.items()}}, beside)
            os.replace(beside, checkpoint)
    beside = weights.with_suffix(".new")
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, beside)
    os.replace(beside, weights)
    checkpoint.unlink(missing_ok=True)


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
