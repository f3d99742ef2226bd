"""The example at the top of the README: a trained network of timm, pruned in a few lines, and its report.

    python -m benchmarks.front_page

Writes ``results/front_page.txt``, which the README shows. Needs what `benchmarks/imagenet.py` needs.
"""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

import secateur as sc
from benchmarks.imagenet import efficientnet_lite0, load
from benchmarks.results import FOLDER

CALIBRATION = 350
MACS = 0.8


def main() -> None:
    """Prunes, prints the report and writes it."""
    torch.manual_seed(0)
    model = efficientnet_lite0()
    calibration = DataLoader(TensorDataset(*load(CALIBRATION)), batch_size=25)
    test = DataLoader(TensorDataset(*load(start=CALIBRATION)), batch_size=25)

    result = sc.prune(model, calibration, budget=sc.Budget(macs=MACS), evaluation=test)

    (FOLDER / "front_page.txt").write_text(f"{result.report}\n")
    print(result.report)


if __name__ == "__main__":
    main()
