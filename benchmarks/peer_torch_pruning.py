"""Torch-Pruning on one architecture of the zoo, in a process of its own; prints one line of JSON.

    python -m benchmarks.peer_torch_pruning NAME RATIO

The same ratio of every layer's channels is removed at random, the classifier left alone; as it comes,
with no hints about the architecture. Its memory is limited, because on some networks it takes all.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from typing import Any

LIMIT_SECONDS = 120
LIMIT_BYTES = 12 << 30


def measured(name: str, ratio: float) -> dict[str, Any]:
    """Seconds of one dependency graph and pruning step of the peer, or how it failed."""
    command = [sys.executable, "-m", "benchmarks.peer_torch_pruning", name, str(ratio)]
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
    """Runs the peer on one architecture."""
    name, ratio = sys.argv[1], float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    warnings.simplefilter("ignore")
    import torch
    import torch_pruning
    from torch import nn

    from tests.zoo.models import entry

    chosen = entry(name)
    model, (images, *_) = chosen.make(), chosen.inputs()
    with torch.no_grad():
        classes = model(images).shape[-1]
    last = [
        m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == classes
    ]
    start = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        images,
        importance=torch_pruning.importance.RandomImportance(),
        pruning_ratio=ratio,
        ignored_layers=last[-1:],
    )
    pruner.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        model(images)  # what it left must at least run
    print(json.dumps({"seconds": seconds, "version": torch_pruning.__version__}))


if __name__ == "__main__":
    main()
