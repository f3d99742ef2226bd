"""Language models by single characters of `tinyshakespeare.txt`: text, training, perplexity."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import cifar

CACHE = Path(__file__).parent / "cache"
LENGTH = 128
SHARE = 0.9
"""Of the text that is trained on; the rest is for testing."""

EVERY = 50
"""Steps from one checkpoint to the next."""


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


@torch.no_grad()
def perplexity(model: nn.Module, numbers: Tensor, stretches: int) -> float:
    """The exponential of the mean loss a character, over the first stretches of the text."""
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for ids in numbers[: stretches * LENGTH].reshape(-1, LENGTH).to(device).split(64):
        logits = model(input_ids=ids).logits[:, :-1]
        losses.append(
            nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        )
    return math.exp(float(torch.cat(losses).mean()))


def train(model: nn.Module, numbers: Tensor, batch: int, rate: float, steps: int, weights: Path) -> None:
    """Trains from the last checkpoint on, and writes the weights.

    What a step draws follows from its number, so that a resumed run gives what it would have given.

    Args:
        model: In its first state; a CUDA device is used where there is one.
        numbers: The text.
        batch: Stretches a step.
        rate: The highest learning rate.
        steps: In all.
        weights: The file to write; the checkpoint lies beside it.
    """
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoint = weights.with_suffix(".checkpoint")
    start = 0
    if checkpoint.is_file():
        found = torch.load(checkpoint, weights_only=True, map_location=device)
        start = found.pop("step")
        for name, state in found.items():
            parts[name].load_state_dict(state)
    for step in range(start, steps):
        ids = windows(numbers, batch, step).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % EVERY == 0:
            print(f"{weights.stem}: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}", flush=True)
            beside = checkpoint.with_suffix(".new")
            torch.save({"step": step + 1, **{k: v.state_dict() for k, v in parts.items()}}, beside)
            os.replace(beside, checkpoint)
    beside = weights.with_suffix(".new")
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, beside)
    os.replace(beside, weights)
    checkpoint.unlink(missing_ok=True)
