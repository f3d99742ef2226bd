"""Processor time of `trace`, `apply` and `verify`, and the ratio to another version of secateur.

    python -m benchmarks.bench_trace OTHER

OTHER is the folder ``src`` of another checkout. Each model is measured in two processes of its own, one a
version, on one thread. They take turns call by call, so that other work on the machine slows both alike; the
smallest time of several counts. Most models are the tiny ones of the zoo, of which fixed costs are most of
the time; `LARGER` has one in which the layers themselves are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import results
from tests.zoo.importing import import_transformers
from tests.zoo.models import ZOO

LARGER = {"llama_12_layers": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 12,
                              "num_attention_heads": 8, "num_key_value_heads": 4,
                              "vocab_size": 2000}}  # fmt: skip
"""Llamas with random weights, by name: arguments of their configuration. They read two texts of 64 tokens."""
SUBJECTS = ("resnet18", "mobilenet_v2", "densenet121", "vit_tiny_patch16_224", "convnext_tiny", "bert",
            "llama", *LARGER, "t5", "lstm_tagger", "unet")  # fmt: skip
IMAGES = {"resnet18": 224, "mobilenet_v2": 224}
"""Side of the images for those that take any; the others get what the zoo gives them. [pixels]"""
ROUNDS = {"trace": 3, "apply": 2, "verify": 10}
RATIO = 0.3
TARGETS = {"trace": 2.0, "verify": 3.0}
_MARK = "seconds:"
_ROOT = Path(__file__).resolve().parents[1]


def subject(name: str) -> tuple[nn.Module, Any]:
    """A model in evaluation mode, and its example inputs."""
    if name in LARGER:
        transformers = import_transformers()
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LARGER[name])).eval()
        return model, {"input_ids": torch.randint(3, LARGER[name]["vocab_size"], (2, 64))}
    entry = next(e for e in ZOO if e.name == name)
    side = IMAGES.get(name)
    return entry.make(), entry.inputs() if side is None else (torch.randn(2, 3, side, side),)


def answer(name: str) -> None:
    """For each step that is named on standard input, print the processor time of one call in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, inputs = subject(name)
    sc.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(2, 3))  # imports the exporter
    graph = sc.trace(model, inputs)
    plan = sc.Uniform(ratio=RATIO).allocate(graph, sc.score(graph, None, "magnitude", progress=False))
    small = sc.apply(model, plan, graph=graph, example_inputs=inputs)
    steps = {
        "trace": lambda: sc.trace(model, inputs),
        "apply": lambda: sc.apply(model, plan, graph=graph, example_inputs=inputs),
        "verify": lambda: sc.verify(model, small, plan, inputs),
    }
    for line in sys.stdin:
        start = time.process_time()
        steps[line.strip()]()
        print(_MARK, time.process_time() - start, flush=True)


class Version:
    """A process that measures one model with the version in a folder."""

    def __init__(self, name: str, source: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(source), str(_ROOT)]),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "benchmarks.bench_trace", "--answer", name]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def seconds(self, step: str) -> float:
        """The processor time of one call. [s]"""
        reads, writes = self._process.stdout, self._process.stdin
        if reads is None or writes is None:
            raise RuntimeError("the process has no pipes")
        writes.write(f"{step}\n")
        writes.flush()
        for line in reads:
            if line.startswith(_MARK):
                return float(line.split()[1])
        raise RuntimeError(f"the process ended with {self._process.wait()}")

    def end(self) -> None:
        """Let the process end."""
        self._process.communicate()


def measured(name: str, other: Path) -> dict[str, dict[str, float]]:
    """The fastest times of one model with both versions: ``before`` and ``now``, each by step. [s]"""
    versions = {"before": Version(name, other), "now": Version(name, _ROOT / "src")}
    found: dict[str, dict[str, float]] = {when: {} for when in versions}
    for step, rounds in ROUNDS.items():
        for version in versions.values():
            version.seconds(step)  # the first call is not counted
        times = [{when: v.seconds(step) for when, v in versions.items()} for _ in range(rounds)]
        for when, best in found.items():
            best[step] = min(each[when] for each in times)
    for version in versions.values():
        version.end()
    return found


def main() -> None:
    """Measures both versions in turn, prints the table and writes the result file."""
    if sys.argv[1] == "--answer":
        answer(sys.argv[2])
        return
    other = Path(sys.argv[1]).resolve()
    rows, found = [], {}
    for name in sys.argv[2:] or SUBJECTS:
        found[name] = measured(name, other)
        before, now = found[name]["before"], found[name]["now"]
        cells = [f"{v:.2f}" for step in ROUNDS for v in (before[step], now[step], now[step] / before[step])]
        rows.append((name, *cells))
        print(*rows[-1], file=sys.stderr)
    print("Processor time in seconds on one thread; the ratio should be at most 2 (trace) and 3 (verify)")
    titles = ("model", *(title for step in ROUNDS for title in (f"{step} before", "now", "ratio")))
    print(results.table(titles, rows))
    if not sys.argv[2:]:
        results.write("trace", {"targets": TARGETS, "rounds": ROUNDS, "models": found})


if __name__ == "__main__":
    main()
