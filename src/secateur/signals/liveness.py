"""Find out if another process has ended or hangs, by notes in a store of torch.distributed.

A collective operation waits for all processes, and does not say which one is missing. So before each of them,
every process writes a note that it has arrived, and waits for the notes of all others. Meanwhile a thread of
each process writes at intervals that its process is alive: that its main thread has moved on, or computes.
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
"""The environment variable that sets how many seconds to wait for a process that gives no sign of life."""

PATIENCE = 50.0
"""The default of `VARIABLE`, in seconds."""

_BUSY = 30
"""A process may compute this many times as long without reaching another line of code or another batch."""

_PAUSE, _LONGEST_PAUSE, _ERROR_IS_READ_WITHIN = 0.0005, 0.05, 2.0
_ADVICE = f"Look at that process; if it only needs longer, set {VARIABLE} to more seconds."


def patience() -> float:
    """Return how many seconds to wait for a process that gives no sign of life.

    Raises:
        SettingError: `VARIABLE` is set to something else than a positive number.
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
    """Another process is missing, has ended, hangs, or has raised an error that is no `SecateurError`.

    The run cannot continue without it.
    """


class Liveness:
    """Tells the other processes that this one is alive, and checks that they are."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        """Prepare; `start` begins.

        Args:
            store: A store of torch.distributed that only this run uses.
            rank: Number of this process.
            size: Number of processes.
        """
        self._store, self._rank, self._size = store, rank, size
        self._patience = patience()
        self._number = self._batches = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(threading.get_ident(),), daemon=True)

    def start(self) -> None:
        """Write that this process is there, and wait until all are.

        Raises:
            ScoreError: A process did not come in time. The message names it.
        """
        with self._store_errors():
            self._set("beat", "0")
            self._set("process", _identity(os.getpid()))
            self._set("at", "0")
            end, pause = time.monotonic() + self._patience, _PAUSE
            while missing := [r for r in self._others() if not self._store.check([f"at/{r}"])]:
                if time.monotonic() > end:
                    raise OtherProcessError(
                        f"process {self._rank} of {self._size}: expected all {self._size} processes within "
                        f"{self._patience:g} s, but process {', '.join(map(str, missing))} has not come. "
                        f"Make this call in every process. {_ADVICE}"
                    )
                for rank in {*self._others()}.difference(missing):
                    self._has_arrived(rank)  # raises an error if the process has left
                pause = _sleep(pause)
        self._thread.start()

    def wait_for_all(self) -> None:
        """Wait until all processes have made this call as often as this one (a barrier).

        Raises:
            ScoreError: A process has left, or gives no sign of life. The message names it.
        """
        self._number += 1
        heard: dict[int, tuple[str, float]] = {}
        pause = _PAUSE
        with self._store_errors():
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
                            f"{f' (last seen at {where})' if where else ''}. {_ADVICE}"
                        )
                pause = _sleep(pause)

    def count_batch(self) -> None:
        """Count a batch that was read, as a sign of life."""
        self._batches += 1

    def leave(self, error: BaseException | None) -> None:
        """Write that this process leaves, and why. Without an error, first wait until all have finished."""
        try:
            if error is None:
                with contextlib.suppress(ScoreError):  # this process has finished its work anyway
                    self.wait_for_all()
            reason = "it is done" if error is None else f"{type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):
                self._set("at", f"{self._number}|{reason[:400]}")
                if error is not None and self._rank == 0:
                    self._wait_until_error_is_read()
        finally:
            self._stop.set()
            if self._thread.is_alive():
                self._thread.join()

    def _wait_until_error_is_read(self) -> None:
        """Wait until the others have read why this process leaves: the store may end with it."""
        end = time.monotonic() + _ERROR_IS_READ_WITHIN
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
    def _store_errors(self) -> Iterator[None]:
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
        """Write at intervals that the process is alive, until it leaves. Runs in a thread.

        Args:
            thread: Identifier of the main thread.
        """
        every = min(1.0, self._patience / 10)
        seen: object = None
        count, moved, computed = 0, time.monotonic(), time.process_time()
        while not self._stop.wait(every):
            frame = sys._current_frames().get(thread)
            now, spent, here = time.monotonic(), time.process_time(), (self._batches, *_instructions(frame))
            if here != seen:
                seen, moved = here, now
            computes = spent - computed > every / 10 and now - moved < _BUSY * self._patience
            computed = spent
            if moved == now or computes:
                count += 1
                try:
                    self._set("beat", f"{count}|{_place(frame)}")
                except RuntimeError:  # the store is gone; the next call that needs it raises an error
                    return


def _identity(pid: int) -> str:
    """Return a text that identifies a process of this machine uniquely; empty if the system has none."""
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


def _sleep(seconds: float) -> float:
    time.sleep(seconds)
    return min(1.5 * seconds, _LONGEST_PAUSE)


def _instructions(frame: FrameType | None) -> list[tuple[int, int]]:
    """Return the current instruction of each function on a thread's stack."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return found


def _place(frame: FrameType | None) -> str:
    """Return the innermost line of the user's own code, as ``file.py:12``."""
    while frame is not None and _FOREIGN & set(Path(frame.f_code.co_filename).parts):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


_FOREIGN = {"site-packages", "secateur", Path(os.__file__).parent.name, "<frozen importlib._bootstrap>"}
"""Folders of code that is not the user's."""
