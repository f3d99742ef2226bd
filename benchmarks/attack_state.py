"""Call every public function in every mode of PyTorch, let it fail, interrupt it, and look what is left.

``python -m benchmarks.attack_state`` compares, before and after each call: the random state of PyTorch, NumPy
and Python, all of the model, threads, temporary files, dtypes, modes and signal handlers. A call in another
mode has to give the same result, bit for bit, or a refusal.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import hashlib
import random
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import secateur as sc
from benchmarks.results import table, write
from secateur.errors import LONGEST, SecateurError

torch.set_num_threads(1)
QUIET: dict[str, Any] = {"progress": False}


class Net(nn.Module):
    """Two convolutions with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classes of pictures [B, 1, 6, 6]."""
        if self.fails:
            raise OSError("disk on fire")
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


class Data:
    """Batches that are shuffled and disturbed by the global generators, as a user's loader may do it."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        for _ in torch.randperm(6):
            noise = float(np.random.randn()) + random.random()  # noqa: NPY002 as users do
            yield (
                torch.randn(8, 1, 6, 6, dtype=torch.float32, device="cpu") + noise,
                torch.arange(8, device="cpu") % 4,
            )


class Bench:
    """What the calls work on."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.net = Net().train()
        self.net.first.weight.grad = torch.ones_like(self.net.first.weight)
        self.net.second.weight.requires_grad_(False)
        self.net.head.register_forward_hook(lambda *_: None)
        self.x, self.data, self.folder = torch.randn(4, 1, 6, 6), Data(), folder
        self.graph = sc.trace(self.net, self.x)
        self.scores = sc.score(self.graph, self.data, ("wasserstein", "taylor"), **QUIET)
        self.plan = sc.ToD().allocate(self.graph, self.scores, sc.Budget(macs=0.6))
        self.small = sc.apply(self.net, self.plan, graph=self.graph)
        sc.save(self.small, folder / "saved")

    def dense(self) -> nn.Module:
        """A model for `sc.load`."""
        return copy.deepcopy(self.net)


def _bits(value: Any) -> Any:
    """A result as something that compares by value."""
    if isinstance(value, nn.Module):
        digest = hashlib.sha256()
        for name, tensor in value.state_dict().items():
            digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
    return value


CALLS: dict[str, Callable[[Bench], Any]] = {
    "trace": lambda b: str(sc.trace(b.net, b.x)),
    "score": lambda b: {
        (s, g): v.tobytes()
        for s, by in sc.score(b.graph, b.data, ("wasserstein", "taylor"), **QUIET).values.items()
        for g, v in by.items()
    },
    "prune": lambda b: sc.prune(
        b.net, b.data, sc.Budget(macs=0.6), "tod", measure_latency=False, **QUIET
    ).plan.to_json(),
    "apply": lambda b: sc.apply(b.net, b.plan),
    "verify": lambda b: sc.verify(b.net, b.small, b.plan).proven,
    "repair": lambda b: sc.repair(b.small, b.net, b.data, "reconstruct", **QUIET),
    "polish": lambda b: sc.repair(b.small, b.net, b.data, sc.Polish(passes=1), **QUIET),
    "save": lambda b: sc.save(b.small, b.folder / "saved").name,
    "load": lambda b: sc.load(b.folder / "saved", b.dense),
    "export": lambda b: sc.export(b.small, b.folder / "net.pt2", b.x).path.name,
    "evaluate": lambda b: (found := sc.evaluate(b.net, b.data, **QUIET)) and (found.loss, found.accuracy),
    "compare": lambda b: str(
        sc.compare(b.net, b.data, rules=["tod", "uniform"], budgets=[sc.Budget(macs=0.6)], **QUIET)
    ),
    "recover": lambda b: sc.recover(b.small, b.net, b.data, epochs=1, **QUIET),
}


@contextlib.contextmanager
def _set(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


MODES: dict[str, Callable[[], Any]] = {
    "ordinary": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default float64": lambda: _set(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default device meta": lambda: torch.device("meta"),
    "default device cpu": lambda: torch.device("cpu"),
    "deterministic": lambda: _set(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "warnings are errors": _warnings_are_errors,
    "two threads": lambda: _set(torch.get_num_threads, torch.set_num_threads, 2),
}


ROUNDED = {("score", "two threads"), ("polish", "two threads"), ("recover", "two threads")}


def seen(bench: Bench, temporary: Path) -> dict[str, Any]:
    """All that a call has to leave as it is."""
    model = {
        f"{what}: {name}": value
        for what, net in (("dense", bench.net), ("pruned", bench.small))
        for name, value in {
            "tensors": _bits(net),
            "gradients": [None if p.grad is None else p.grad.sum().item() for p in net.parameters()],
            "requires_grad": [p.requires_grad for p in net.parameters()],
            "training": [m.training for m in net.modules()],
            "hooks": [
                (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
                for m in net.modules()
            ],
            "attributes": [sorted(vars(m)) for m in net.modules()],
        }.items()
    }
    numpy = np.random.get_state()  # noqa: NPY002
    return model | {
        "random state of torch": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "random state of numpy": (numpy[1].tobytes(), numpy[2:]),
        "random state of python": random.getstate(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "temporary files": sorted(path.name for path in temporary.iterdir()),
        "files": sorted(path.name for path in bench.folder.rglob("*")),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients on": torch.is_grad_enabled(),
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warning filters": len(warnings.filters),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
    }


def trial(bench: Bench, temporary: Path, call: str, mode: str, upset: Callable[[], Any]) -> tuple[str, Any]:
    """One call: how it ended, or what it left behind, and its result."""
    result: Any = None
    with MODES[mode]():
        before = seen(bench, temporary)
        try:
            with upset():
                result = _bits(CALLS[call](bench))
            ended = "gave a result"
        except SecateurError as error:
            ended = "refused" if len(str(error)) <= LONGEST else "long message"
        except (KeyboardInterrupt, OSError) as error:
            ended = type(error).__name__
        except BaseException as error:
            ended = f"raw error: {type(error).__name__}: {str(error)[:160]}"
        after = seen(bench, temporary)
    if call in ("save", "export", "load") and ended != "refused":
        before["files"] = after["files"] = []  # these write
    left = [name for name, value in before.items() if after[name] != value]
    return (f"left: {', '.join(left)}" if left else ended), result


@contextlib.contextmanager
def failing(bench: Bench) -> Iterator[None]:
    """The model fails in every forward pass."""
    bench.net.fails = True
    try:
        yield
    finally:
        bench.net.fails = False


@contextlib.contextmanager
def interrupted(after: float) -> Iterator[None]:
    """Ctrl-C after some seconds."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(interrupts: int, seed: int, calls: list[str]) -> list[dict[str, str]]:
    """All trials."""
    draws, found = random.Random(seed), []
    home = Path(tempfile.mkdtemp())
    temporary = Path(tempfile.mkdtemp())
    tempfile.tempdir = str(temporary)
    bench = Bench(home)

    def note(call: str, what: str, fate: str) -> None:
        found.append({"call": call, "what": what, "fate": fate})
        if fate.startswith(("left", "raw", "long", "another")):
            print(f"{call:9} {what:22} {fate}", flush=True)

    for call in calls:
        usual, seconds = None, 0.0
        for mode in MODES:
            begun = time.monotonic()
            fate, result = trial(bench, temporary, call, mode, contextlib.nullcontext)
            if mode == "ordinary":
                usual = result
            seconds = time.monotonic() - begun if mode in ("ordinary", "no_grad") else seconds
            if fate == "gave a result" and result != usual:
                # Sums of several threads differ in their last bits; the plan of `prune` must not.
                fate = "last bits differ" if (call, mode) in ROUNDED else "another result"
            note(call, mode, fate)
        fate, _ = trial(bench, temporary, call, "ordinary", lambda: failing(bench))
        note(call, "the model fails", fate)
        for _ in range(interrupts):
            after = max(1e-3, draws.random() * seconds)
            fate, _ = trial(bench, temporary, call, "ordinary", lambda after=after: interrupted(after))
            note(call, "Ctrl-C", fate)
    return found


def main() -> None:
    """Run the trials, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interrupts", type=int, default=10, help="per call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", nargs="*", default=[*CALLS])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = run(options.interrupts, options.seed, options.calls)
    fates = collections.Counter((each["what"], each["fate"].partition(":")[0]) for each in found)
    rows = [[what, fate, str(count)] for (what, fate), count in sorted(fates.items())]
    print(table(["what", "fate", "trials"], rows))
    bad = [e for e in found if e["fate"].startswith(("left", "raw", "long", "another"))]
    print(f"{len(found)} trials, {len(bad)} bad")
    write("attack_state", {"seed": options.seed, "trials": found, "bad": bad})


if __name__ == "__main__":
    main()
