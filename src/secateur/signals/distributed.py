"""Work with several processes: each reads a share of the data, and all get the same result.

Under ``torchrun`` (or in any process group that exists) batch i goes to the process of rank i mod N.
Processes do not communicate while they read, so shares may differ in length or be empty. If one is missing,
ends or hangs, all others raise an error (`secateur.signals.liveness`). Afterwards the first process receives
what the others accumulated, in the order of their ranks, and sends the scores back. Only small objects and
CPU tensors are sent, by gloo, whatever the default backend is.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from secateur.calibration import Calibration
from secateur.errors import ArtefactError, CalibrationError, ScoreError, SecateurError, SettingError
from secateur.signals.identity import difference, of_run
from secateur.signals.liveness import VARIABLE, Liveness, OtherProcessError, patience

_TRANSFERS = 10
"""A transfer may take this many times `patience`. All processes have arrived when it begins."""

OF_THE_RUN = (OtherProcessError, ArtefactError)
"""Errors of the whole run, such as a missing process, a damaged file or a full disk. They must not be taken
for a failure of the candidate or repair that was being tried: leaving that out would change the result."""

T = TypeVar("T")

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Team:
    """The processes that work together. With a single process, all methods do nothing.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        group: Their process group in torch.distributed.
        liveness: Finds out if one of them has ended or hangs.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    liveness: Liveness | None = None

    def takes(self, index: int) -> bool:
        """Whether a batch is in this process's share."""
        if self.liveness is not None:
            self.liveness.count_batch()
        return index % self.size == self.rank

    def everyone(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks.

        Raises:
            ScoreError: A process has ended.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._collective():
            dist.all_gather_object(found, value, self.group)
        return found

    def from_first(self, value: T) -> T:
        """Return the value of the first process, on every process."""
        if self.size == 1:
            return value
        box = [value]
        with self._collective():
            dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def tensor_from_first(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor, on every process. All have the same shape and dtype."""
        if self.size == 1:
            return tensor
        there = tensor.detach().cpu().contiguous().clone()
        if there.numel():
            with self._collective():
                dist.broadcast(there.view(-1).view(torch.uint8), 0, self.group)
        return there.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of the tensors of all processes, the same in each of them."""
        if self.size == 1:
            return tensor
        there = tensor.detach().cpu().contiguous().clone()
        with self._collective():
            dist.all_reduce(there, group=self.group)
        return (there / self.size).to(tensor.device)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Wait for all processes, and then run a collective operation inside the block."""
        if self.liveness is not None:
            self.liveness.wait_for_all()
        with _answered(self.rank, self.size):
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block. If it fails in one process, it fails in all.

        Raises:
            Exception: The error of this process, if it has one. Otherwise a ScoreError (or CalibrationError)
                with the rank and the message of the process that has one.
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

    def check_same(self, about: dict[str, str], call: str = "score") -> None:
        """Raise ScoreError unless all processes work on the same run; the message names what differs."""
        for rank, other in enumerate(self.everyone(about)):
            differs = difference(about, other)
            if differs is not None:
                raise ScoreError(
                    f"{call}, processes {self.rank} and {rank}: expected the same {differs}. "
                    f"Call {call} with the same model, data and settings in every process."
                )

    def agree(self, call: str, model: nn.Module, data: Calibration, **settings: object) -> None:
        """Check that all processes have the same model, data and settings.

        Args:
            call: The public function, for messages.
            model: The dense model.
            data: What all processes read.
            settings: The settings of the call.

        Raises:
            ScoreError: They differ. The message says where.
        """
        if self.size > 1:
            with self.together():
                check_whole(data, call)
                about = of_run(model, data, **settings)
            self.check_same(about, call)

    def to_first(self, state: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Send tensors to the first process. It returns those of all processes by rank, the others []."""
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
    """Raise OtherProcessError if another process ends while this one communicates with it."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessError(
            f"process {rank} of {size}: expected the others to answer, got {error}. Look "
            "for the process that ended first."
        ) from error


_current: ContextVar[Team | None] = ContextVar("team", default=None)
_calls = itertools.count()


@contextmanager
def team_of_processes(device: torch.device) -> Iterator[Team]:
    """Work with all processes of the process group inside the block; alone, if there is no group.

    If torchrun started the process and torch.distributed is not initialised, it is initialised here: with
    gloo for the CPU, and also with NCCL for a model on a GPU. An existing group is not changed. Nested blocks
    get the same `Team`. If a process leaves the block with an error, the others notice at once.

    Raises:
        ScoreError: A process is missing, ends, or hangs.
    """
    team = _current.get()
    if team is not None:
        yield team
        return
    if not _are_several():
        yield Team()
        return
    token, error, group = None, None, None
    rank, size = _rank_and_size()
    store = _default_store() if dist.is_initialized() else _new_store(rank, size)
    liveness = None if store is None else Liveness(PrefixStore(f"call/{next(_calls)}", store), rank, size)
    try:
        if liveness is not None:
            liveness.start()
        with _answered(rank, size):
            if not dist.is_initialized():
                _initialise(device, store, rank, size)
            waits = timedelta(seconds=_TRANSFERS * patience())
            group = dist.new_group(backend="gloo", timeout=waits)
        team = Team(rank, size, group, liveness)
        token = _current.set(team)
        yield team
    except BaseException as caught:
        error = caught
        raise
    finally:
        if token is not None:
            _current.reset(token)
        if liveness is not None:
            liveness.leave(error)
        if group is not None:
            dist.destroy_process_group(group)


def _are_several() -> bool:
    """Whether there are several processes."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    by_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return by_torchrun and _number("WORLD_SIZE") > 1


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdecimal():
        raise SettingError(f"{variable}: expected a whole number, got {text[:40]!r}. Start with torchrun.")
    return int(text)


def _rank_and_size() -> tuple[int, int]:
    """Return rank and number of processes, whether torch.distributed is initialised or not."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return _number("RANK"), _number("WORLD_SIZE")


def _default_store() -> Store | None:
    """Return the store of the default process group; None if this version of torch has no access to it."""
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if find is None else find()


def _new_store(rank: int, size: int) -> Store:
    """Connect to the store of torchrun or of process 0. Other processes are not waited for.

    Raises:
        ScoreError: The store does not answer.
    """
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    waits = timedelta(seconds=patience())
    try:
        is_first = rank == 0 and not agent
        store = TCPStore(host, port, size, is_first, waits, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        whom = "torchrun" if agent else "process 0"
        raise ScoreError(
            f"process {rank} of {size}: expected {whom} to answer at {host}:{port} within {patience():g} s, "
            f"got {str(error)[:200]}. Check that it was started; {VARIABLE} sets the seconds."
        ) from error
    return PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _initialise(device: torch.device, store: Store | None, rank: int, size: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    atexit.register(_leave)


def _leave() -> None:
    """Leave the default process group. The store stays open until the others have left, too."""
    if not dist.is_initialized():
        return
    (rank, size), store = _rank_and_size(), _default_store()
    dist.destroy_process_group()
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set(f"left/{rank}", "")
            if rank == 0:
                store.wait([f"left/{other}" for other in range(size)], timedelta(seconds=5))


def check_whole(calibration: Calibration, call: str = "score") -> None:
    """Raise CalibrationError if the loader already gives each process its own share."""
    source: Any = calibration.source
    while hasattr(source, "parent"):  # a part of other calibration data
        source = source.parent.source
    if isinstance(getattr(source, "sampler", None), DistributedSampler):
        raise CalibrationError(
            f"{call}: expected the same data in every process, got a loader with a DistributedSampler. "
            f"Pass a plain loader: {call} divides the batches itself."
        )
