"""Gradual pruning in a loop that Accelerate runs: any number of processes, mixed precision.

    python examples/accelerate_loop.py
    torchrun --nproc-per-node=2 examples/accelerate_loop.py

A small network learns handwritten digits, and in four rounds on the way loses two thirds of its MACs. The run
is cut in the middle, and goes on from what ``save_state`` wrote, as after a crash.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import gettempdir

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from secateur.demo.digits import Digits, load_digits
from secateur.demo.network import make_model
from secateur.integrations import GradualPruner, Schedule, read_shape, reshape, write_shape


def train(
    accelerator: Accelerator, digits: Digits, folder: Path, steps: int, first: int, last: int
) -> nn.Module:
    """Train from step `first` to `last` of `steps`, and leave a checkpoint in the folder."""
    model = make_model().train()
    if first:
        reshape(model, read_shape(folder))  # before prepare, and before tensors are loaded
    loader = DataLoader(TensorDataset(digits.images, digits.labels), batch_size=64, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 2e-3), loader)
    if first:
        accelerator.load_state(str(folder))

    # Every process is given all of the calibration data; they share the scoring, and agree on the plan.
    schedule = Schedule(sc.Budget(macs=0.33), start=0.2, end=0.7, rounds=4)
    pruner = GradualPruner(schedule, digits.calibration, allocator="tod")

    step = first
    while step < last:
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            done = pruner.advance(model, optimizer, step=step, total=steps)
            if done:
                accelerator.print(done)
            if step == last:
                break
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        write_shape(model, folder)
    accelerator.wait_for_everyone()
    return accelerator.unwrap_model(model)


def main() -> None:
    """Train, be interrupted, go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path(gettempdir()) / "secateur-accelerate")
    parser.add_argument("--cpu", action="store_true")
    asked = parser.parse_args()
    half = asked.steps // 2

    torch.manual_seed(0)
    digits = load_digits()
    accelerator = Accelerator(cpu=asked.cpu)
    train(accelerator, digits, asked.folder, asked.steps, 0, half)
    accelerator.print(f"interrupted after step {half}; going on")
    accelerator.free_memory()
    model = train(accelerator, digits, asked.folder, asked.steps, half, asked.steps)
    plan = sc.record_of(model).plan
    found = sc.evaluate(model, digits.test)
    accelerator.print(
        f"{plan.predicted.macs / plan.dense.macs:.0%} of the MACs, accuracy {found.accuracy:.1%}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
