"""Processor time of `trace` and `verify`, and the ratio to another version of secateur.

    python -m benchmarks.bench_trace OTHER

OTHER is the folder ``src`` of another checkout. Each model is measured in processes of its own, on one
thread, this version and the other in turn; the smallest time of several counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import results
from tests.zoo.models import ZOO

SUBJECTS = ("resnet18", "mobilenet_v2", "densenet121", "vit_tiny_patch16_224", "convnext_tiny", "bert",
            "llama", "t5", "lstm_tagger", "unet")  # fmt: skip
IMAGES = {"resnet18": 224, "mobilenet_v2": 224}
"""Side of the images for those that take any; the others get what the zoo gives them. [pixels]"""
ROUNDS = 3
RATIO = 0.3
TARGETS = {"trace": 2.0, "verify": 3.0}
_ROOT = Path(__file__).resolve().parents[1]


def fastest(function: Callable[[], Any]) -> float:
    """Processor time of the fastest of several calls, after one that is not counted. [s]"""
    function()
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


def measure(name: str) -> dict[str, float]:
    """The times of one model in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entry = next(e for e in ZOO if e.name == name)
    model, inputs = entry.make(), entry.inputs()
    if name in IMAGES:
        inputs = (torch.randn(2, 3, IMAGES[name], IMAGES[name]),)
    sc.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(2, 3))  # imports the exporter
    graph = sc.trace(model, inputs)
    plan = sc.Uniform(ratio=RATIO).allocate(graph, sc.score(graph, None, "magnitude", progress=False))
    small = sc.apply(model, plan, graph=graph, example_inputs=inputs)
    return {
        "trace": fastest(lambda: sc.trace(model, inputs)),
        "verify": fastest(lambda: sc.verify(model, small, plan, inputs)),
    }


def measured(name: str, source: Path) -> dict[str, float]:
    """The times of one model with the version in a folder, in a process of its own."""
    paths = os.pathsep.join([str(source), str(_ROOT)])
    command = [sys.executable, "-m", "benchmarks.bench_trace", "--measure", name]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measures both versions in turn, prints the table and writes the result file."""
    if sys.argv[1] == "--measure":
        print(json.dumps(measure(sys.argv[2])))
        return
    other = Path(sys.argv[1]).resolve()
    rows, found = [], {}
    for name in sys.argv[2:] or SUBJECTS:
        before, now = measured(name, other), measured(name, _ROOT / "src")
        found[name] = {"before": before, "now": now}
        cells = [f"{v:.2f}" for step in TARGETS for v in (before[step], now[step], now[step] / before[step])]
        rows.append((name, *cells))
        print(*rows[-1], file=sys.stderr)
    print("Processor time in seconds on one thread; the ratio should be at most 2 (trace) and 3 (verify)")
    print(results.table(("model", "trace before", "now", "ratio", "verify before", "now", "ratio"), rows))
    if not sys.argv[2:]:
        results.write("trace", {"targets": TARGETS, "models": found})


if __name__ == "__main__":
    main()
