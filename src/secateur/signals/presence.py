"""Which processes are there, and which of them still work: told in a store of torch.distributed.

Collective operations wait for a process that hangs, and say nothing of the one that never came. So before
each of them a process writes into the store that it has arrived, and waits until all others have. Meanwhile
a thread of each process says now and then that its process works: that its main thread moves on, or computes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from secateur.errors import ScoreError, SettingError

VARIABLE = "SECATEUR_TIMEOUT"
"""The environment variable with the seconds that processes wait for one that gives no sign of life."""

PATIENCE = 50.0
"""The seconds without it."""

_BUSY = 30
"""How many times as long a process may compute without getting to another line of code or another batch."""

_PAUSE, _LONGEST_PAUSE, _FAREWELL = 0.0005, 0.05, 2.0
_CURE = f"Look at that process; if it only needs longer, set {VARIABLE} to more seconds."


def patience() -> float:
    """The seconds that processes wait for one that gives no sign of life.

    Raises:
        SettingError: The environment variable holds something else than a positive number.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        seconds = float(text) if text else PATIENCE
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise SettingError(
            f"{VARIABLE}: expected seconds above 0, got {text[:40]!r}. Write 600, for instance."
        )
    return seconds


class OtherProcessError(ScoreError):
    """Another process has not come, has ended or hangs, or has raised what is no error of ours.

    Nothing can go on without it.
    """


class Presence:
    """What this process says of itself to the others, and hears of them."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """Prepare; `come` begins.

        Args:
            store: A store of torch.distributed, for this run alone.
            rank: Number of this process.
            size: Number of processes.
        """
        self._store, self._rank, self._size = store, rank, size
        self._patience = patience()
        self._number = self._batches = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(threading.get_ident(),), daemon=True)

    def come(self) -> None:
        """Say that this process is there, and wait until all are.

        Raises:
            ScoreError: One has not come in time; the message names it.
        """
        with self._answered():
            self._set("beat", "0")
            self._set("process", _identity(os.getpid()))
            self._set("at", "0")
            end, pause = time.monotonic() + self._patience, _PAUSE
            while missing := [r for r in self._others() if not self._store.check([f"at/{r}"])]:
                if time.monotonic() > end:
                    raise OtherProcessError(
                        f"process {self._rank} of {self._size}: expected all {self._size} processes within "
                        f"{self._patience:g} s, but process {', '.join(map(str, missing))} has not come. "
                        f"Every process has to make this call. {_CURE}"
                    )
                for rank in {*self._others()}.difference(missing):
                    self._has_arrived(rank)  # or has left
                pause = _paused(pause)
        self._thread.start()

    def meet(self) -> None:
        """Wait until all processes have got as far as this one.

        Raises:
            ScoreError: One has left, or gives no sign of life; the message names it.
        """
        self._number += 1
        heard: dict[int, tuple[str, float]] = {}
        pause = _PAUSE
        with self._answered():
            self._set("at", str(self._number))
            while late := [r for r in self._others() if not self._has_arrived(r)]:
                now = time.monotonic()
                for rank in late:
                    if _is_dead(self._get("process", rank)):
                        raise OtherProcessError(
                            f"process {self._rank} of {self._size}: expected process {rank} to go on, but it "
                            "has ended without a word. Look for what killed it, such as too little memory."
                        )
                    beat, _, where = self._get("beat", rank).partition("|")
                    if rank not in heard or heard[rank][0] != beat:
                        heard[rank] = beat, now
                    elif now - heard[rank][1] > self._patience:
                        raise OtherProcessError(
                            f"process {self._rank} of {self._size}: expected a sign of life from process "
                            f"{rank} within {self._patience:g} s, got none: it has ended, or hangs"
                            f"{f' (last seen at {where})' if where else ''}. {_CURE}"
                        )
                pause = _paused(pause)

    def work(self) -> None:
        """Count a batch that was read."""
        self._batches += 1

    def go(self, error: BaseException | None) -> None:
        """Say that this process leaves, with the error for which it does; without one, once all have come."""
        try:
            if error is None:
                with contextlib.suppress(ScoreError):  # all that was to be done is done
                    self.meet()
            said = "it is done" if error is None else f"{type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):
                self._set("at", f"{self._number}|{said[:400]}")
                if error is not None and self._rank == 0:
                    self._linger()
        finally:
            self._stop.set()
            if self._thread.is_alive():
                self._thread.join()

    def _linger(self) -> None:
        """Keep the store, which may end with this process, until the others have read why it leaves."""
        end = time.monotonic() + _FAREWELL
        while time.monotonic() < end and not all(
            "|" in self._get("at", rank) for rank in self._others() if self._store.check([f"at/{rank}"])
        ):
            time.sleep(_LONGEST_PAUSE)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._size) if rank != self._rank]

    def _has_arrived(self, rank: int) -> bool:
        number, _, left = self._get("at", rank).partition("|")
        if left and (int(number) < self._number or not self._number):
            raise OtherProcessError(
                f"process {rank} of {self._size}: expected it to go on with the others, but it left: {left}"
            )
        return int(number) >= self._number

    def _set(self, what: str, value: str) -> None:
        self._store.set(f"{what}/{self._rank}", value)

    def _get(self, what: str, rank: int) -> str:
        return bytes(self._store.get(f"{what}/{rank}")).decode("utf-8", "replace")

    @contextmanager
    def _answered(self) -> Iterator[None]:
        try:
            yield
        except ScoreError:
            raise
        except RuntimeError as error:
            raise OtherProcessError(
                f"process {self._rank} of {self._size}: expected the store of process 0 to answer, got "
                f"{str(error)[:200]}. Look at the process that ended first."
            ) from error

    def _beat(self, thread: int) -> None:
        """Say now and then that the process works, until it leaves."""
        every = min(1.0, self._patience / 10)
        seen: object = None
        count, moved, computed = 0, time.monotonic(), time.process_time()
        while not self._stop.wait(every):
            frame = sys._current_frames().get(thread)
            now, spent, here = time.monotonic(), time.process_time(), (self._batches, *_lines(frame))
            if here != seen:
                seen, moved = here, now
            computes = spent - computed > every / 10 and now - moved < _BUSY * self._patience
            computed = spent
            if moved == now or computes:
                count += 1
                try:
                    self._set("beat", f"{count}|{_place(frame)}")
                except RuntimeError:  # the store is gone; whoever needs it next says so
                    return


def _identity(pid: int) -> str:
    """A process of this machine, so that no other one has the same name; empty where it cannot be told."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{machine} {space} {pid} {'ended' if state in 'ZX' else rest[18]}"


def _is_dead(identity: str) -> bool:
    """Whether a process has ended; False for one of another machine."""
    own = _identity(os.getpid()).split()
    other = identity.split()
    return bool(own and other) and own[:2] == other[:2] and _identity(int(other[2])) != identity


def _paused(seconds: float) -> float:
    time.sleep(seconds)
    return min(1.5 * seconds, _LONGEST_PAUSE)


def _lines(frame: FrameType | None) -> list[tuple[int, int]]:
    """Where a thread is: the instruction of each function on its stack."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return found


def _place(frame: FrameType | None) -> str:
    """The innermost line of the user's own code."""
    while frame is not None and _FOREIGN & set(Path(frame.f_code.co_filename).parts):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


_FOREIGN = {"site-packages", "secateur", Path(os.__file__).parent.name, "<frozen importlib._bootstrap>"}
"""Folders of code that is not the user's."""
