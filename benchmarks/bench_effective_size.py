"""Effective Model Pruning of fully connected networks: what β = 1 keeps, and what that costs.

    python -m benchmarks.bench_effective_size [--seeds N] [--quick]

Networks with 2, 5 and 12 layers, trained here on handwritten digits (scikit-learn's) and on CIFAR-10 in grey
at 16 x 16 pixels (skipped without the data of `benchmarks/cifar.py`): top-1 of the dense network, of EMP at
β = 1 for each layer by magnitude, and of uniform magnitude at the sparsity that EMP chose. No repair, no
training after. Beside them what EMP keeps of the same network with its initial weights, which are uniform:
three quarters. Every run and the medians go to `benchmarks/results/effective_size.json`.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from benchmarks import cifar, results
from secateur.allocators import EMP, Budget, Uniform
from secateur.targets import weights as masks

DEPTHS = (2, 5, 12)
WIDTH, BATCH, RATE = 256, 128, 1e-3
GREY = torch.tensor([0.299, 0.587, 0.114])
"""Weights of red, green and blue (ITU-R BT.601)."""

Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images and labels to train on, and to measure on; images [samples, pixels]."""


def digits(images: int) -> Data:
    """1,797 handwritten digits of 8 x 8 pixels, the last 500 held out."""
    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 8 - 1, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:-500][:images], y[:-500][:images], x[-500:], y[-500:]


def grey(images: int) -> Data:
    """CIFAR-10 without its colours, four pixels to one."""

    def load(split: Any, count: int) -> tuple[Tensor, Tensor]:
        x, y = cifar.load(split, count)
        return F.avg_pool2d(torch.einsum("ncij,c->nij", x, GREY)[:, None], 2).flatten(1), y

    return (*load("train", images), *load("test", 2000))


DATA = {"digits": digits, "cifar grey": grey}


def network(depth: int, pixels: int) -> nn.Sequential:
    """Linear layers with ReLU between; from five on normalised, without which twelve do not train."""
    sizes = [pixels, *[WIDTH] * (depth - 1), 10]
    layers: list[nn.Module] = []
    for k, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs))
        if k < depth - 1:
            layers += [*([nn.BatchNorm1d(outputs)] if depth > 2 else []), nn.ReLU()]
    return nn.Sequential(*layers)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    """Adam with a falling rate."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for k in torch.randperm(len(x), generator=generator)[: len(x) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[k]), y[k]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def run(name: str, depth: int, data: Data, epochs: int, seed: int) -> dict[str, Any]:
    """One network."""
    x, y, held, labels = data
    torch.manual_seed(seed)
    model = network(depth, x.shape[1])
    initial = kept(model)[0]
    train(model, x, y, epochs, seed)
    effective, plan = kept(model)
    sparsity = plan.sparsity
    weights = sc.trace(model, granularity="weight")
    uniform = Uniform().allocate(weights, sc.score(weights), Budget(sparsity=sparsity))
    top = [top1(m, held, labels) for m in (model, sc.apply(model, plan), sc.apply(model, uniform))]
    return {
        "data": name,
        "depth": depth,
        "seed": seed,
        "initial_kept": initial,
        "kept": effective,
        "dense": top[0],
        "emp": top[1],
        "uniform": top[2],
        "layers": {n: 1 - s for n, s in plan.sparsities.items()},
    }


def kept(model: nn.Module) -> tuple[float, masks.MaskPlan]:
    """The share of the weights that β = 1 keeps, and the masks."""
    weights = sc.trace(model, granularity="weight")
    plan = EMP().allocate(weights, sc.score(weights))
    return 1 - plan.sparsity, plan


def top1(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    return 100 * float(sc.evaluate(model, [(x, y)]).accuracy or 0.0)


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=tuple(DATA), default=list(DATA))
    parser.add_argument("--depths", nargs="+", type=int, default=list(DEPTHS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=8000, help="training images")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--dry", action="store_true", help="write no result file")
    parser.add_argument("--quick", action="store_true", help="one seed, few images and epochs; dry")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.images, given.epochs, given.dry = 1, 1000, 5, True
    runs = []
    for name in given.data:
        if name != "digits" and cifar.data_directory() is None:
            print(f"Skipped {name}: no data folder; see benchmarks/cifar.py.")
            continue
        data = DATA[name](given.images)
        for depth in given.depths:
            runs += [run(name, depth, data, given.epochs, seed) for seed in range(given.seeds)]
    rows, medians = [], []
    for name, depth in dict.fromkeys((r["data"], r["depth"]) for r in runs):
        same = [r for r in runs if (r["data"], r["depth"]) == (name, depth)]
        numbers = ("initial_kept", "kept", "dense", "emp", "uniform")
        middle = {k: statistics.median(r[k] for r in same) for k in numbers}
        medians.append({"data": name, "depth": depth, **middle})
        shares = [f"{100 * middle[k]:.1f}" for k in numbers[:2]]
        rows.append([name, f"FC-{depth}", *shares, *(f"{middle[k]:.1f}" for k in numbers[2:])])
    heads = ["data", "network", "initial kept %", "kept %", "dense", "EMP, β = 1", "uniform, as many"]
    print(results.table(heads, rows))
    if not given.dry:
        results.write("effective_size", {"arguments": vars(given), "medians": medians, "runs": runs})


if __name__ == "__main__":
    main()
