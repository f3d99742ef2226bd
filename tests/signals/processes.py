"""Runs a function in several processes that can talk to each other, and collects what each returns."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

_LIMIT = 100.0
"""Seconds after which processes that wait for each other in vain are ended, and the test fails."""


def in_processes(task: Callable[..., Any], size: int, *args: Any, allow: bool = False) -> list[Any]:
    """What ``task(*args)`` returns in each of `size` processes, which find each other as under torchrun.

    None for a process that was killed; with `allow`, also for the second one, which is not waited for.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tests.signals.warm"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        own = {k: v for k, v in os.environ.items() if k.startswith("SECATEUR_")}  # the server's are older
        own |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = context.Process(target=_member, args=(theirs, task, own, args))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        found = []
        for rank, pipe in enumerate(pipes):
            if allow and rank == 1:
                found.append((False, None))
                continue
            if not pipe.poll(_LIMIT):
                raise TimeoutError(f"process {rank} of {size} said nothing")
            try:
                found.append(pipe.recv())
            except EOFError:
                found.append((False, None))
    finally:
        for process in processes:
            process.join(1)
            process.kill()
            process.join()
    for failed, value in found:
        if failed:
            raise RuntimeError(value)
    return [value for _, value in found]


def _member(
    pipe: Connection, task: Callable[..., Any], environment: dict[str, str], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment
    try:
        pipe.send((False, task(*args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))
    sys.stdout.flush()
    pipe.close()
