"""Every phase of a small network, run: seconds of processor time and most bytes held.

    python -m benchmarks.scale.measuring NAME

measures in this process and prints JSON; `measured` does so in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from benchmarks.scale.networks import SMALL
from benchmarks.scale.rates import calibrate
from benchmarks.scale.subject import Subject
from secateur.calibration import Calibration
from secateur.graph.trace import trace
from secateur.repairs.batchnorm import batch_norms, reestimate
from secateur.repairs.regression import leastsquares
from secateur.repairs.sweep import sweep
from secateur.targets.units.copying import duplicate
from secateur.targets.units.record import attach, record_of
from secateur.targets.weights.apply import apply as apply_masks
from secateur.targets.weights.surgeon import surgeon

_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
"""So that what is freed goes back to the system, and what is held shows."""


def measured(name: str) -> dict[str, Any]:
    """What `measure` finds in a process of its own, on one thread."""
    environment = os.environ | _RETURNED | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.scale.measuring", name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str) -> dict[str, Any]:
    """Rates of the moment, and by phase ``seconds`` and ``peak_bytes`` of its second run."""
    torch.manual_seed(0)
    subject = SMALL[name]()
    runs = {"moe": _mixture}.get(name, _units)(subject)
    if name == "llama":
        runs |= _weights(subject)
    rates = calibrate()
    tried: list[int] = []
    with _counting(tried):
        phases = {phase: _measured(run) for phase, run in runs.items()}
    return {"rates": rates, "phases": phases, "dampings_tried": tried}


def data_of(subject: Subject) -> list[Any]:
    """Random batches; images with labels."""
    found: list[Any] = []
    for start in range(0, subject.samples, subject.batch):
        given = subject.inputs(subject.batch)
        labels = torch.arange(start, start + subject.batch) % max(1, subject.classes)
        found.append(given if isinstance(given, dict) else (given, labels))
    return found


def _units(subject: Subject) -> dict[str, Callable[[], Any]]:
    model, data, graph, plan = subject.model, data_of(subject), subject.graph, subject.plan
    example = data[0] if isinstance(data[0], dict) else data[0][0]
    few = {k: v[:8] for k, v in example.items()} if isinstance(example, dict) else example[:8]
    small = subject.small

    def scoring(signal: str) -> Callable[[], Any]:
        return lambda: sc.score(graph, data, signal, progress=False)

    def repairing(method: str) -> Callable[[], Any]:
        def run() -> Any:
            copy = attach(duplicate(small), record_of(small))
            return sweep(method, copy, graph, Calibration.of(data))

        return run

    proven = sc.apply(model, plan, graph=graph, example_inputs=example)
    found = {"trace": lambda: trace(model, example), "score: taylor": scoring("taylor")}
    if subject.classes:
        found["score: wasserstein"] = scoring("wasserstein")
    found |= {
        "score: reconstruction": scoring("reconstruction"),
        "apply": lambda: sc.apply(model, plan, graph=graph, example_inputs=example),
        "verify": lambda: sc.verify(model, proven, plan, few),
    }
    if batch_norms(proven):
        found["repair: batchnorm"] = lambda: reestimate(duplicate(proven), Calibration.of(data))
    return found | {
        "repair: variance": repairing("variance"),
        "repair: reconstruct": repairing("reconstruct"),
    }


def _weights(subject: Subject) -> dict[str, Callable[[], Any]]:
    model, data, graph = subject.model, data_of(subject), subject.graph
    weights = sc.trace(model, granularity="weight")
    scores = sc.score(weights, None, "random")
    plan = sc.Uniform(removal="random").allocate(weights, scores, sc.Budget(sparsity=0.5))

    def update() -> Any:
        return surgeon(apply_masks(model, plan, graph), model, plan, data)

    return {
        "weights: wanda": lambda: sc.score(weights, data, "wanda", by_block=True, progress=False),
        "weights: surgeon": update,
    }


def _mixture(subject: Subject) -> dict[str, Callable[[], Any]]:
    model, data = subject.model, data_of(subject)
    graph = sc.trace(model, data[0], granularity="expert")
    scores = sc.score(graph, None, "random", progress=False)
    plan = sc.Uniform(removal="random").allocate(graph, scores, sc.Budget(experts=0.5))
    small = sc.apply(model, plan, graph=graph)
    return {
        "experts: score": lambda: sc.score(graph, data, ("reap", "expert_taylor"), progress=False),
        "experts: repair": lambda: sc.repair(small, model, data, graph=graph, progress=False),
    }


def _measured(run: Callable[[], Any]) -> dict[str, float]:
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _memory("VmRSS"), time.process_time()
    run()
    seconds = time.process_time() - start
    return {"seconds": seconds, "peak_bytes": _memory("VmHWM") - before}


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class _counting:
    """Inside, how many dampings each fit tries is noted."""

    def __init__(self, into: list[int]) -> None:
        self._into, self._original = into, leastsquares.descend

    def __enter__(self) -> None:
        def descend(error: Any, *rest: Any) -> Any:
            seen: set[float] = set()

            def counted(damping: float) -> float:
                seen.add(damping)
                return float(error(damping))

            found = self._original(counted, *rest)
            self._into.append(len(seen))
            return found

        leastsquares.descend = descend

    def __exit__(self, *_: object) -> None:
        leastsquares.descend = self._original


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1])))
