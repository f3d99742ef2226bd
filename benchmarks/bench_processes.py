"""Score and plan with one process and with two that share the data, and compare.

    python -m benchmarks.bench_processes resnet20
    python -m benchmarks.bench_processes smollm2

``resnet20``: trained weights, 1,000 images of CIFAR-10, signals ``wasserstein`` and ``taylor``, rule ``tod``,
0.5 of the MACs; needs what `benchmarks/cifar.py` needs. ``smollm2``: trained weights, 16 texts of 128 tokens,
signal ``reconstruction``, rule ``repair_aware``, 0.8 of the parameters; needs `benchmarks/smollm2.py`.
Prints the largest difference of two scores, relative to the larger one, whether the plan files are equal, and
the processor time of scoring in each process. Writes ``results/processes_<case>.json``.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import secateur as sc
from benchmarks.results import write
from tests.zoo.importing import import_torchvision


def resnet20_case() -> tuple[Any, list[Any], tuple[str, ...], Any, sc.Budget]:
    """The model, the data, the signals, the rule and the budget."""
    from benchmarks.cifar import load
    from benchmarks.resnet20 import trained

    images, labels = load("train", 1000)
    data = list(zip(images.split(50), labels.split(50), strict=True))
    return trained(), data, ("wasserstein", "taylor"), sc.ToD(), sc.Budget(macs=0.5)


def smollm2_case() -> tuple[Any, list[Any], tuple[str, ...], Any, sc.Budget]:
    """The same for the language model."""
    from benchmarks.smollm2 import smollm2, windows

    model, tokenizer = smollm2()
    texts = windows(tokenizer, 128)[:16].contiguous()
    data = [{"input_ids": each} for each in texts.split(2)]
    return model, data, ("reconstruction",), sc.RepairAware(), sc.Budget(params=0.8)


CASES = {"resnet20": resnet20_case, "smollm2": smollm2_case}


def work(case: str, out: Path) -> None:
    """Score and plan in this process; the first one writes what it found."""
    torch.set_num_threads(1)
    model, data, signals, rule, budget = CASES[case]()
    first = data[0] if isinstance(data[0], dict) else data[0][0]
    graph = sc.trace(model, first)
    start = time.process_time()
    scores = sc.score(graph, data, signals, progress=False)
    seconds = time.process_time() - start
    plan = rule.allocate(graph, scores, budget)
    rank = os.environ.get("RANK", "0")
    (out / f"seconds{rank}").write_text(f"{seconds:.2f}")
    plan.to_json(out / f"plan{rank}.json")
    if rank == "0":
        scores.save(out / "scores")


def run(case: str, size: int, out: Path) -> dict[str, Any]:
    """Run `work` in this many processes; return the scores, the plans and the seconds."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "SECATEUR_TIMEOUT": "600",
    }
    children = []
    for rank in range(size):
        own = {**shared, "RANK": str(rank)} if size > 1 else {}
        command = [sys.executable, "-m", "benchmarks.bench_processes", case, "--out", str(out)]
        children.append(subprocess.Popen(command, env={**os.environ, **own}))
    if any(child.wait() for child in children):
        raise SystemExit("a process failed")
    if not (out / "scores").exists():
        raise SystemExit(0)  # skipped: the child has said why
    return {
        "scores": sc.Scores.load(out / "scores"),
        "plans": {(out / f"plan{rank}.json").read_text() for rank in range(size)},
        "seconds": [float((out / f"seconds{rank}").read_text()) for rank in range(size)],
    }


def main() -> None:
    """Runs a case and writes what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import_torchvision()
    if chosen.out is not None:
        work(chosen.case, chosen.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        one, two = (run(chosen.case, size, Path(folder) / str(size)) for size in (1, 2))
    apart = 0.0
    for signal, by_group in one["scores"].values.items():
        for group, vector in by_group.items():
            other = two["scores"][signal][group]
            scale = np.maximum(np.abs(vector), np.abs(other))
            apart = max(apart, float((np.abs(vector - other) / np.where(scale > 0, scale, 1)).max()))
    found = {
        "case": chosen.case,
        "scores_apart": apart,
        "plans_equal": len(one["plans"] | two["plans"]) == 1,
        "seconds_one": one["seconds"],
        "seconds_two": two["seconds"],
        "share": round(max(two["seconds"]) / one["seconds"][0], 3),
    }
    print(found)
    write(f"processes_{chosen.case}", found)


if __name__ == "__main__":
    main()
