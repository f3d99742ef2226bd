"""Work with several processes: each reads a share of the data, and all get the same result.

Under ``torchrun`` (or in any process group that exists) batch i goes to the process of rank i mod N.
Processes do not communicate while they read, so shares may differ in length or be empty. Afterwards the first
process receives what the others accumulated, in the order of their ranks, and sends the scores back. All
that travels are small objects and CPU tensors, by gloo, whatever the default backend is.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data.distributed import DistributedSampler

from secateur.calibration import Calibration
from secateur.errors import CalibrationError, ScoreError, SecateurError
from secateur.signals.identity import difference

_PATIENCE = timedelta(days=1)
"""How long a process waits for the others: shares of long runs differ by much."""

T = TypeVar("T")


class OtherProcessError(ScoreError):
    """Another process has raised an error that is not one of ours. Nothing can go on without it."""


@dataclass(frozen=True, eq=False)
class Team:
    """The processes that work together. For a single process all methods do nothing.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        group: Their process group in torch.distributed.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def takes(self, index: int) -> bool:
        """Whether a batch is in this process's share."""
        return index % self.size == self.rank

    def everyone(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks.

        Raises:
            ScoreError: A process has ended.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _answered(self.rank, self.size):
            dist.all_gather_object(found, value, self.group)
        return found

    def from_first(self, value: T) -> T:
        """Return the value of the first process, on every process."""
        if self.size == 1:
            return value
        box = [value]
        with _answered(self.rank, self.size):
            dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def tensor_from_first(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor, on every process; the given one has its shape and dtype."""
        if self.size == 1:
            return tensor
        there = tensor.detach().cpu().contiguous().clone()
        if there.numel():
            with _answered(self.rank, self.size):
                dist.broadcast(there.view(-1).view(torch.uint8), 0, self.group)
        return there.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of the tensors of all processes, the same in each of them."""
        if self.size == 1:
            return tensor
        there = tensor.detach().cpu().contiguous().clone()
        with _answered(self.rank, self.size):
            dist.all_reduce(there, group=self.group)
        return (there / self.size).to(tensor.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that fails on all processes if it fails on one.

        Raises:
            Exception: What this process raised; if it raised nothing but another did, a ScoreError (a
                CalibrationError if that one was) that names the other and says what it said.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        own = None if error is None else (type(error).__name__, str(error), isinstance(error, SecateurError))
        failures = self.everyone(own)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                kind, message, known = failure
                same = CalibrationError if kind == CalibrationError.__name__ else ScoreError
                raise (same if known else OtherProcessError)(
                    f"process {rank} of {self.size}: expected it to do its share, got {kind}: {message}"
                )

    def check_same(self, about: dict[str, str]) -> None:
        """Raise ScoreError unless all processes work on the same run."""
        for rank, other in enumerate(self.everyone(about)):
            differs = difference(about, other)
            if differs is not None:
                raise ScoreError(
                    f"score, processes {self.rank} and {rank}: expected the same {differs}. "
                    "Call score with the same model, data and settings in every process."
                )

    def to_first(self, state: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Send tensors to the first process, which returns those of all by rank; others return nothing."""
        layouts = self.everyone([(name, tensor.dtype, tensor.shape) for name, tensor in state.items()])
        if self.rank > 0:
            for tensor in state.values():
                if tensor.numel():
                    with _answered(self.rank, self.size):
                        dist.send(tensor.contiguous().reshape(-1).view(torch.uint8), 0, self.group)
            return []
        states = [state]
        for rank, layout in enumerate(layouts[1:], start=1):
            received = {name: torch.empty(shape, dtype=dtype) for name, dtype, shape in layout}
            for tensor in received.values():
                if tensor.numel():
                    with _answered(self.rank, self.size):
                        dist.recv(tensor.view(-1).view(torch.uint8), rank, self.group)
            states.append(received)
        return states


@contextmanager
def _answered(rank: int, size: int) -> Iterator[None]:
    """Raise ScoreError if another process ends while this one talks to it."""
    try:
        yield
    except RuntimeError as error:
        raise ScoreError(
            f"process {rank} of {size}: expected the others to answer, got {error}. Look "
            "for the one that ended first."
        ) from error


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The team of this process: all of the process group, if there is one or ``torchrun`` asks for one.

    Where torchrun started the process and nobody has initialised torch.distributed, it is initialised: with
    gloo for the CPU and, for a model on a GPU, NCCL beside it. A group that exists is left as it is.
    """
    if not _several(device):
        yield Team()
        return
    with _answered(dist.get_rank(), dist.get_world_size()):
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)


def _several(device: torch.device) -> bool:
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        asked = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        if not asked or int(os.environ["WORLD_SIZE"]) < 2:
            return False
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return dist.get_world_size() > 1


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def check_whole(calibration: Calibration) -> None:
    """Raise CalibrationError for a loader that already gives each process its own share."""
    source: Any = calibration.source
    while hasattr(source, "parent"):  # a part of other calibration data
        source = source.parent.source
    if isinstance(getattr(source, "sampler", None), DistributedSampler):
        raise CalibrationError(
            "score: expected the same data in every process, got a loader with a DistributedSampler. "
            "Give a plain loader: score shares the batches out itself."
        )
