"""The papers' experiments, for whoever has their data: published rows beside ours.

    python -m benchmarks.papers fair --data DIR [--weights FILE] [--epochs 200] [--tune 100] [--device cuda]

`DIR` holds CIFAR-10 as its archive unpacks (`cifar-10-batches-py` or `cifar-10-batches-bin`). Without trained
weights in `FILE`, ResNet-56 is trained first, as in He et al. 2016, section 4.2, and kept there: that is for
an accelerator. It is pruned to the MACs of the published row, by the paper's rule and by ours: as pruned,
repaired without labels, and fine-tuned. `--json FILE` keeps all numbers.

Published: FAIR-Pruner (arXiv 2508.02291), ResNet-56 on CIFAR-10 with fine-tuning; and, for the step before
it, Torch-Pruning's global L1 without fine-tuning.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from benchmarks.environment import environment
from benchmarks.resnet20 import ResNet56, top1
from benchmarks.results import table
from secateur.cli.loading.archives import LAYOUTS, Archive

KEPT = 57.8 / 125
"""The share of the MACs in the published row."""

CALIBRATION = 1_000
BATCH = 128


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        who: ``published`` or ``ours``.
        what: The rule, and what was done after it.
        macs: The share of the MACs that is left.
        dense: Top-1 before, in percent.
        pruned: Top-1 after, in percent.
    """

    who: str
    what: str
    macs: float
    dense: float
    pruned: float


PUBLISHED = (
    Row("published", "FAIR-Pruner, fine-tuned", KEPT, 93.93, 93.64),
    Row("published", "Torch-Pruning, global L1, as pruned", 1 / 2.12, 93.53, 28.08),
)


def load(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images, normalised, float32 [N, 3, 32, 32], and labels [N]; `part` is ``cifar10`` or ``cifar10-test``.

    Raises:
        CalibrationError: The files are not there, or damaged.
    """
    known = Archive.of("--data", f"{part}:{folder}")
    assert known is not None
    pixels, labels = known.read()
    mean, std = (
        torch.tensor(v).reshape(1, 3, 1, 1) for v in (LAYOUTS["cifar10"].mean, LAYOUTS["cifar10"].std)
    )
    return (torch.from_numpy(pixels).float() / 255 - mean) / std, torch.from_numpy(labels)


def epoch(images: Tensor, labels: Tensor, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a new order, mirrored by chance and cropped from a border of 4 zeros."""
    for rows in torch.randperm(len(images)).split(BATCH):
        x = images[rows]
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
        top, left = (int(v) for v in torch.randint(0, 9, (2,)))
        yield (
            F.pad(x, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32].to(device),
            labels[rows].to(device),
        )


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float, device: str) -> None:
    """Train in place: SGD with momentum 0.9, weight decay 1e-4, and a rate that falls as a cosine to 0."""
    if epochs == 0:
        return
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for x, y in epoch(images, labels, device):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        falling.step()
    model.eval()


def dense(weights: Path | None, images: Tensor, labels: Tensor, epochs: int, device: str) -> nn.Module:
    """The trained network, from the file if there is one; else it is trained, and kept in the file."""
    model = ResNet56().to(device)
    if weights is not None and weights.is_file():
        model.load_state_dict(load_file(weights))
        return model.eval()
    train(model, images, labels, epochs, 0.1, device)
    if weights is not None:
        save_file(model.state_dict(), weights)
    return model.eval()


def fair(arguments: argparse.Namespace) -> list[Row]:
    """The rows of FAIR-Pruner's experiment: published, then ours."""
    torch.manual_seed(arguments.seed)
    device = arguments.device
    images, labels = load(arguments.data, "cifar10")
    seen, wanted = (t.to(device) for t in load(arguments.data, "cifar10-test"))
    model = dense(arguments.weights, images, labels, arguments.epochs, device)
    before = 100 * top1(model, seen, wanted)
    drawn = torch.randperm(len(images))[:CALIBRATION]
    data = list(zip(images[drawn].to(device).split(50), labels[drawn].to(device).split(50), strict=True))
    rows = [*PUBLISHED]
    for rule in ("tod", "repair_aware"):
        plain = sc.prune(
            model, data, sc.Budget(macs=KEPT), rule, repair=None, measure_latency=False, progress=False
        )
        kept = plain.plan.predicted.macs / plain.plan.dense.macs
        rows.append(Row("ours", f"{rule}, as pruned", kept, before, 100 * top1(plain.model, seen, wanted)))
        repaired = sc.repair(plain.model, model, data, progress=False)
        rows.append(Row("ours", f"{rule}, repaired", kept, before, 100 * top1(repaired, seen, wanted)))
        train(repaired, images, labels, arguments.tune, 0.01, device)
        if arguments.tune:
            rows.append(Row("ours", f"{rule}, fine-tuned", kept, before, 100 * top1(repaired, seen, wanted)))
    return rows


def shown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    cells = [
        (
            r.who,
            r.what,
            f"{100 * r.macs:.1f}",
            f"{r.dense:.2f}",
            f"{r.pruned:.2f}",
            f"{r.pruned - r.dense:+.2f}",
        )
        for r in rows
    ]
    return table(("who", "what", "% of the MACs", "dense", "pruned", "change"), cells)


def main(given: Sequence[str] | None = None) -> list[Row]:
    """Run one paper's experiment and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("paper", choices=["fair"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--tune", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(given)
    rows = fair(arguments)
    print(shown(rows))
    if arguments.json is not None:
        content: dict[str, Any] = {"environment": environment(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
