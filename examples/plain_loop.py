"""Gradual pruning in a training loop of one's own.

    python examples/plain_loop.py

A small network learns handwritten digits, and in four rounds on the way loses two thirds of its MACs. The run
is cut in the middle, and goes on from its checkpoint, as after a crash.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.demo.digits import Digits, load_digits
from secateur.demo.network import make_model
from secateur.integrations import GradualPruner, Schedule, reshape, shape_state


def train(digits: Digits, checkpoint: Path, steps: int, until: int) -> nn.Module:
    """Train to step `until` of `steps`, from the checkpoint if there is one, and leave one."""
    model = make_model().train()
    state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    if state is not None:
        reshape(model, state["shape"])  # before the optimizer is made, and before tensors are loaded
        model.load_state_dict(state["model"])
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])

    schedule = Schedule(sc.Budget(macs=0.33), start=0.2, end=0.7, rounds=4)
    pruner = GradualPruner(schedule, digits.calibration, allocator="tod")

    step = state["step"] if state is not None else 0
    loader = DataLoader(TensorDataset(digits.images, digits.labels), batch_size=64, shuffle=True)
    while step < until:
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            done = pruner.advance(model, optimizer, step=step, total=steps)
            if done:
                print(done)
            if step == until:
                break
    torch.save(
        {
            "step": step,
            "shape": shape_state(model),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
        },
        checkpoint,
    )
    return model


def main() -> None:
    """Train, be interrupted, go on; then save what came out and load it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    digits = load_digits()
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        train(digits, checkpoint, steps, until=steps // 2)
        print(f"interrupted after step {steps // 2}; going on")
        model = train(digits, checkpoint, steps, until=steps)
        sc.save(model, Path(folder) / "small")
        small = sc.load(Path(folder) / "small", make_model)
    found = sc.evaluate(small, digits.test)
    plan = sc.record_of(small).plan
    print(f"{plan.predicted.macs / plan.dense.macs:.0%} of the MACs, accuracy {found.accuracy:.1%}")


if __name__ == "__main__":
    main()
