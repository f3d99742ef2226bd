"""Train the demo's network from scratch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.calibration import seeded
from secateur.demo.network import DigitsNet, make_model

EPOCHS, QUICK_EPOCHS = 24, 4
_BATCH = 64


def train(
    images: Tensor, labels: Tensor, *, epochs: int = EPOCHS, seed: int = 0, progress: bool = True
) -> DigitsNet:
    """Train a new network with Adam and a one-cycle learning-rate schedule.

    Args:
        images: Training images. [N, 1, 8, 8]
        labels: Their digits. [N]
        epochs: Passes over the images.
        seed: Seed of the initial weights and the order of images. The same seed gives the same network.
        progress: Show a progress bar on stderr, if that is a terminal.

    Returns:
        The network, in evaluation mode.
    """
    with seeded(seed):
        model = make_model().train()
        steps = -(-len(labels) // _BATCH)
        optimiser = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.01, total_steps=epochs * steps)
        with _bar(progress) as bar:
            task = bar.add_task("Training", total=epochs, loss="")
            for _ in range(epochs):
                loss = torch.zeros(())
                for chosen in torch.randperm(len(labels)).split(_BATCH):
                    loss = F.cross_entropy(model(images[chosen]), labels[chosen], label_smoothing=0.05)
                    optimiser.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimiser.step()
                    schedule.step()
                bar.update(task, advance=1, loss=f"loss {loss.item():.3f}")
    return model.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside the block.

    Layers this small gain nothing from more threads. On a busy machine, threads that wait for each other
    can make them a hundred times slower. With one thread, results also do not depend on the core count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _bar(progress: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs  {task.fields[loss]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (progress and sys.stderr.isatty()),
    )
