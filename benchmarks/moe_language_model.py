"""A small Qwen2-MoE, trained on single characters of `tinyshakespeare.txt`, for the benchmarks.

    python -m benchmarks.moe_language_model [--steps N]

trains it if there are no weights yet, and prints its perplexity. Weights lie in `benchmarks/cache`, which git
ignores. Training that is stopped goes on from its last checkpoint, and gives what it would have given. A CUDA
device is used where there is one.
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

from benchmarks import cifar
from tests.zoo.importing import import_transformers

CACHE = Path(__file__).parent / "cache"
LENGTH, BATCH, STEPS, RATE = 128, 32, 2000, 1e-3
EVERY = 50
"""Steps from one checkpoint to the next."""
SHARE = 0.9
"""Of the text that is trained on; the rest is for testing."""


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


def text() -> tuple[Tensor, Tensor, int]:
    """Characters as numbers: to train on, to test on, and how many there are."""
    raw = (cifar.require("tinyshakespeare.txt") / "tinyshakespeare.txt").read_text(encoding="utf-8")
    letters = {letter: number for number, letter in enumerate(sorted(set(raw)))}
    numbers = torch.tensor([letters[letter] for letter in raw])
    cut = int(SHARE * len(numbers))
    return numbers[:cut], numbers[cut:], len(letters)


def windows(numbers: Tensor, count: int, seed: int) -> Tensor:
    """Random stretches of the text. [count, length]"""
    starts = torch.randint(len(numbers) - LENGTH, (count,), generator=torch.Generator().manual_seed(seed))
    return numbers[starts[:, None] + torch.arange(LENGTH)]


def batches(numbers: Tensor, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Random batches with labels, as Transformers takes them."""
    drawn = [windows(numbers, BATCH, seed * 10_000 + i) for i in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


@torch.no_grad()
def perplexity(model: nn.Module, numbers: Tensor, stretches: int) -> float:
    """The exponential of the mean loss a character, over the first stretches of the text."""
    model.eval()
    device = next(model.parameters()).device
    ids = numbers[: stretches * LENGTH].reshape(-1, LENGTH).to(device)
    losses = []
    for part in ids.split(BATCH):
        logits = model(input_ids=part, output_router_logits=False).logits[:, :-1]
        losses.append(
            nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        )
    return math.exp(float(torch.cat(losses).mean()))


def trained(steps: int = STEPS) -> nn.Module:
    """The model with its weights, trained first where there are none; from then on without router loss."""
    train, _, words = text()
    torch.manual_seed(0)
    model = build(words)
    file = CACHE / f"qwen2_moe_{steps}.safetensors"
    if file.is_file():
        model.load_state_dict(load_file(file))
    else:
        _train(model, train, steps, file)
    model.config.output_router_logits = False
    return model.cpu().eval()


def _train(model: nn.Module, numbers: Tensor, steps: int, weights: Path) -> None:
    """Trains from the last checkpoint on, and writes the weights."""
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.1)
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    checkpoint = weights.with_suffix(".checkpoint")
    start = 0
    if checkpoint.is_file():
        found = torch.load(checkpoint, weights_only=True, map_location=device)
        start = found.pop("step")
        for name, part in parts.items():
            part.load_state_dict(found[name])
    for step in range(start, steps):
        ids = windows(numbers, BATCH, step).to(device)  # by the step's number, also when resumed
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
            _replace(checkpoint, {**{n: p.state_dict() for n, p in parts.items()}, "step": step + 1})
    beside = weights.with_suffix(".new")
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, beside)
    os.replace(beside, weights)
    checkpoint.unlink(missing_ok=True)


def _replace(file: Path, content: dict[str, Any]) -> None:
    """Written beside it first: a file that is there is whole."""
    beside = file.with_suffix(".new")
    torch.save(content, beside)
    os.replace(beside, file)


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
