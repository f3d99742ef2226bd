"""How fast a machine does each kind of work, measured in about two seconds on one thread.

    python -m benchmarks.scale.rates [--device cuda] [--out FILE]

prints the rates and writes them, for ``python -m benchmarks.scale --rates FILE``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.environment import environment
from benchmarks.scale.simulation import Meter
from benchmarks.scale.work import KINDS
from secateur.graph.trace import trace
from secateur.signals.program import CapturedModel


def calibrate(device: str = "cpu") -> dict[str, float]:
    """Amount of each kind a second of processor time; of elapsed time for a GPU."""
    torch.manual_seed(0)
    found = {f"matmul {name}": _matmul(kind, device) for name, kind in _TYPES.items()}
    for name in ("float32", "float64"):
        found[f"convolution {name}"] = _convolution(_TYPES[name], device)
    found["factor float64"] = _factor(device)
    found["bytes"] = _bytes(device)
    found["filed"] = _filed()
    found["sorted"] = _sorted(device)
    found["differences"] = _differences(device)
    found["calls"], found["nodes"] = _calls(device), _nodes()
    return {kind: found[kind] for kind in KINDS}


_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def _a_second(amount: float, run: Callable[[], Any], device: str, least: float = 0.1) -> float:
    """The median of three."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    run()
    found = []
    for _ in range(3):
        times, start = 0, clock()
        while clock() - start < least:
            run()
            times += 1
            if device != "cpu":
                torch.cuda.synchronize()
        found.append(amount * times / (clock() - start))
    return statistics.median(found)


def _matmul(kind: torch.dtype, device: str) -> float:
    n = 512 if device == "cpu" else 8192
    a = torch.randn(n, n, dtype=kind, device=device)
    return _a_second(n**3, lambda: a @ a, device)


def _convolution(kind: torch.dtype, device: str) -> float:
    batch, width, side = (16, 64, 16) if device == "cpu" else (256, 256, 28)
    x = torch.randn(batch, width, side, side, dtype=kind, device=device)
    layer = nn.Conv2d(width, width, 3, padding=1, bias=False).to(device, kind)
    with torch.no_grad():
        return _a_second(batch * side**2 * 9 * width**2, lambda: layer(x), device)


def _factor(device: str) -> float:
    n = 512 if device == "cpu" else 8192
    a = torch.randn(n, n, dtype=torch.float64, device=device)
    a = a @ a.T + n * torch.eye(n, dtype=torch.float64, device=device)

    def run() -> None:
        torch.linalg.inv(a)
        torch.linalg.cholesky_ex(a)

    return _a_second(n**3 * (1 + 1 / 6), run, device)


def _bytes(device: str) -> float:
    a = torch.randn(2**22 if device == "cpu" else 2**28, device=device)
    return _a_second(3 * a.nbytes, lambda: a + a, device)


def _filed() -> float:
    a = torch.randn(2**23)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "values.pt"

        def run() -> None:
            torch.save(a, path)
            torch.load(path, weights_only=True)

        return _a_second(2 * a.nbytes, run, "cpu")


def _sorted(device: str) -> float:
    x = torch.randn(2**13, 32, device=device)
    if device == "cpu":
        values = x.numpy()
        return _a_second(x.numel(), lambda: np.sort(values, axis=-1), device)
    return _a_second(x.numel(), lambda: x.sort(dim=-1), device)


def _differences(device: str) -> float:
    x = torch.randn(8, 64, 256, dtype=torch.float64, device=device)
    return _a_second(8 * 64 * 64 * 256, lambda: torch.cdist(x, x, p=1.0), device)


class _Chain(nn.Module):
    """Layers so small that calling them is all they cost."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for _ in range(20))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return self.layers(x)


def _calls(device: str) -> float:
    model, x = _Chain().eval().to(device), torch.zeros(2, 4, 2, 2, device=device)
    run = CapturedModel(trace(model, x).program)
    with torch.no_grad():
        with Meter() as meter:
            run(x)
        return _a_second(meter.work().amounts["calls"], lambda: run(x), device)


def _nodes() -> float:
    model, x = _Chain().eval(), torch.zeros(2, 4, 2, 2)
    amount = len(list(trace(model, x).program.graph.nodes))
    return _a_second(amount, lambda: trace(model, x), "cpu")


def median(several: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each kind."""
    return {kind: statistics.median(each[kind] for each in several) for kind in KINDS}


def load(file: Path) -> dict[str, float]:
    """Rates from a file that this module or the benchmark wrote.

    Raises:
        SystemExit: A kind is missing, or is no positive number.
    """
    content = json.loads(file.read_text())
    rates = content.get("rates", content)
    wrong = [kind for kind in KINDS if not rates.get(kind, 0) > 0]
    if wrong:
        raise SystemExit(f"{file}: expected a positive rate for {', '.join(wrong)}. Write it with rates.py.")
    return {kind: float(rates[kind]) for kind in KINDS}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rates = calibrate(asked.device)
    for kind, rate in rates.items():
        print(f"{kind:20} {rate:.3g} a second")
    if asked.out:
        content = {"environment": environment(), "device": asked.device, "rates": rates}
        asked.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
