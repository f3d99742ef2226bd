"""What PyTorch's profiler saw the allocator do, event by event, which it has no public name for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.autograd.profiler import profile


def most_allocated(call: Callable[[], object]) -> int:
    """Return the most bytes that a call holds at one time on the CPU, beyond what was there before.

    That includes what operators hold inside, such as the working space of a convolution.
    """
    with _silent(), profile(profile_memory=True, use_kineto=False) as seen:
        found = call()
    del found
    results = seen.kineto_results
    events = [] if results is None else [e for e in results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the profiler from writing to stderr that it starts and stops, unless a user asks for its log."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        del os.environ[name]
