"""The entry of the command line: Ctrl-C and SIGTERM end it in one line, also while it is imported.

Nothing is imported here that takes time: until `run` has begun, Python itself answers signals.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

INTERRUPTED = 130
LINE = "secateur: interrupted; no file was left half-written."


def run() -> None:
    """Run the command that the arguments name, and exit."""

    def command() -> None:
        from secateur.cli.main import app

        app()

    stoppable(command)


def stoppable(command: Callable[[], object]) -> None:
    """Run a command that exits. After a signal it exits with 130 (Ctrl-C) or 143 (SIGTERM), in one line.

    Both signals raise KeyboardInterrupt, so that temporary files are deleted on the way out. While a module
    is imported, the process ends at once: libraries may take an exception there for something else.
    """
    caught: list[int] = []
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker that was forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        caught.append(number)
        if _imports(frame):
            os.write(2, f"{LINE}\n".encode())
            os._exit(128 + number)
        raise KeyboardInterrupt

    before = _handle(stop)
    try:
        command()
        code: Any = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        if not caught:
            raise
        code = None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not caught:
        sys.exit(code)
    if code != INTERRUPTED:  # else the line was written where the command ended
        print(LINE, file=sys.stderr)
    sys.exit(128 + caught[0])


def _handle(stop: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle both signals, unless they are ignored. Return the handlers before; none in another thread."""
    before: dict[signal.Signals, Any] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            try:
                before[number] = signal.signal(number, stop)
            except ValueError:
                break
    return before


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
