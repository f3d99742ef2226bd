"""network-pruner, the package of FAIR-Pruner's authors, scoring ResNet-20; prints one line of JSON.

    python -m benchmarks.peer_network_pruner IMAGES PER_CLASS

Its public `get_metrics` computes both signals for every layer and removes nothing, with its own default of
128 projections. It runs in a process of its own, on a model of its own, because it changes what it scores.
Installed by hand: `pip install --no-deps network-pruner==2.16`; it has no licence, so nothing of it is here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import cifar
from benchmarks.resnet20 import trained

LIMIT_SECONDS = 1800
BATCH = 100


class Images(Dataset[tuple[Tensor, Tensor]]):
    """The first training images, with the attribute by which the peer learns the number of classes."""

    classes = tuple(range(10))

    def __init__(self, count: int) -> None:
        self._images, self._labels = cifar.load("train", count)

    def __len__(self) -> int:
        """How many images."""
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its label."""
        return self._images[index], self._labels[index]


def measured(images: int, per_class: int) -> dict[str, Any]:
    """Seconds of the peer's scoring and its scores by layer, or under ``error`` why there are none."""
    command = [sys.executable, "-m", "benchmarks.peer_network_pruner", str(images), str(per_class)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {LIMIT_SECONDS} s"}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        return {"error": (ran.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    """Runs the peer once."""
    from Network_Pruner import FAIR_Pruner

    images, per_class = int(sys.argv[1]), int(sys.argv[2])
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = DataLoader(Images(images), batch_size=BATCH)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        found = FAIR_Pruner.get_metrics(
            model,
            loader,
            device=torch.device("cpu"),
            the_samplesize_for_compute_distance=per_class,
            class_num_for_distance=len(Images.classes),
            results_save_path=str(Path(folder) / "results"),
        )
        seconds = time.perf_counter() - start
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)][:-1]
    changed = [n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])]
    print(
        json.dumps(
            {
                "version": metadata.version("network-pruner"),
                "seconds": seconds,
                "threads": torch.get_num_threads(),
                "tensors_changed": len(changed),
                "distance": {name: found[f"D_{k}"].tolist() for k, name in enumerate(layers)},
                "sensitivity": {name: found[f"RE_{k}_hat"].tolist() for k, name in enumerate(layers)},
            }
        )
    )


if __name__ == "__main__":
    main()
