"""Work with several processes: each reads a share of the data, and all get the same result.

Under ``torchrun`` (or in any process group that exists) batch i goes to the process of rank i mod N.
Processes do not communicate while they read, so shares may differ in length or be empty. One that does not
come, ends or hangs is an error in all others (`secateur.signals.presence`). Afterwards the first
process receives what the others accumulated, in the order of their ranks, and sends the scores back. All
that travels are small objects and CPU tensors, by gloo, whatever the default backend is.
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
from secateur.signals.presence import VARIABLE, OtherProcessError, Presence, patience

_TRANSFERS = 10
"""How many times `patience` one transfer may take: all processes have arrived by then."""

OF_THE_RUN = (OtherProcessError, ArtefactError)
"""Errors that say nothing of the candidate or the repair that met them: a process is gone, a file is damaged,
the disk is full. Taken for a reason to leave that one out, they would change the result."""

T = TypeVar("T")

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Team:
    """The processes that work together. For a single process all methods do nothing.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        group: Their process group in torch.distributed.
        presence: Who of them is there.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    presence: Presence | None = None

    def takes(self, index: int) -> bool:
        """Whether a batch is in this process's share."""
        if self.presence is not None:
            self.presence.work()
        return index % self.size == self.rank

    def everyone(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks.

        Raises:
            ScoreError: A process has ended.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._meeting():
            dist.all_gather_object(found, value, self.group)
        return found

    def from_first(self, value: T) -> T:
        """Return the value of the first process, on every process."""
        if self.size == 1:
            return value
        box = [value]
        with self._meeting():
            dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def tensor_from_first(self, tensor: Tensor) -> Tensor:
        """Return the first process's tensor, on every process; the given one has its shape and dtype."""
        if self.size == 1:
            return tensor
        there = tensor.detach().cpu().contiguous().clone()
        if there.numel():
            with self._meeting():
                dist.broadcast(there.view(-1).view(torch.uint8), 0, self.group)
        return there.to(tensor.device)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of the tensors of all processes, the same in each of them."""
        if self.size == 1:
            return tensor
        there = tensor.detach().cpu().contiguous().clone()
        with self._meeting():
            dist.all_reduce(there, group=self.group)
        return (there / self.size).to(tensor.device)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Run a collective operation once all processes have come to it."""
        if self.presence is not None:
            self.presence.meet()
        with _answered(self.rank, self.size):
            yield

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
        """Make sure that all processes have the same model, data and settings.

        Args:
            call: The public function, for messages.
            model: The dense model.
            data: What all processes read.
            settings: Of the call.

        Raises:
            ScoreError: They have not; the message names what differs.
        """
        if self.size > 1:
            with self.together():
                check_whole(data, call)
                about = of_run(model, data, **settings)
            self.check_same(about, call)

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
        raise OtherProcessError(
            f"process {rank} of {size}: expected the others to answer, got {error}. Look "
            "for the one that ended first."
        ) from error


_current: ContextVar[Team | None] = ContextVar("team", default=None)
_calls = itertools.count()


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """The team of this process: all of the process group, if there is one or ``torchrun`` asks for one.

    Where torchrun started the process and nobody has initialised torch.distributed, it is initialised: with
    gloo for the CPU and, for a model on a GPU, NCCL beside it. A group that exists is left as it is. Inside
    the block the same team is given again. Whoever leaves it with an error is missed by the others at once.

    Raises:
        ScoreError: A process does not come, ends, or hangs.
    """
    team = _current.get()
    if team is not None:
        yield team
        return
    if not _asked():
        yield Team()
        return
    token, error, group = None, None, None
    rank, size = _place()
    store = _default_store() if dist.is_initialized() else _new_store(rank, size)
    presence = None if store is None else Presence(PrefixStore(f"call/{next(_calls)}", store), rank, size)
    try:
        if presence is not None:
            presence.come()
        with _answered(rank, size):
            if not dist.is_initialized():
                _initialise(device, store, rank, size)
            waits = timedelta(seconds=_TRANSFERS * patience())
            group = dist.new_group(backend="gloo", timeout=waits)
        team = Team(rank, size, group, presence)
        token = _current.set(team)
        yield team
    except BaseException as caught:
        error = caught
        raise
    finally:
        if token is not None:
            _current.reset(token)
        if presence is not None:
            presence.go(error)
        if group is not None:
            dist.destroy_process_group(group)


def _asked() -> bool:
    """Whether there are several processes."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    given = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return given and _number("WORLD_SIZE") > 1


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not text.isdecimal():
        raise SettingError(f"{variable}: expected a whole number, got {text[:40]!r}. Start with torchrun.")
    return int(text)


def _place() -> tuple[int, int]:
    """Rank and number of processes, before or after torch.distributed is initialised."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return _number("RANK"), _number("WORLD_SIZE")


def _default_store() -> Store | None:
    """The store of the default group; None if this version of torch does not show it."""
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if find is None else find()


def _new_store(rank: int, size: int) -> Store:
    """The store under torchrun, or that of process 0. Nobody is waited for but that process.

    Raises:
        ScoreError: It does not answer.
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
            f"got {str(error)[:200]}. Look whether it was started; {VARIABLE} sets the seconds."
        ) from error
    return PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _initialise(device: torch.device, store: Store | None, rank: int, size: int) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    atexit.register(_leave)


def _leave() -> None:
    """Leave the default group, and keep the store open until the others have left too."""
    if not dist.is_initialized():
        return
    (rank, size), store = _place(), _default_store()
    dist.destroy_process_group()
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set(f"left/{rank}", "")
            if rank == 0:
                store.wait([f"left/{other}" for other in range(size)], timedelta(seconds=5))


def check_whole(calibration: Calibration, call: str = "score") -> None:
    """Raise CalibrationError for a loader that already gives each process its own share."""
    source: Any = calibration.source
    while hasattr(source, "parent"):  # a part of other calibration data
        source = source.parent.source
    if isinstance(getattr(source, "sampler", None), DistributedSampler):
        raise CalibrationError(
            f"{call}: expected the same data in every process, got a loader with a DistributedSampler. "
            f"Give a plain loader: {call} shares the batches out itself."
        )
