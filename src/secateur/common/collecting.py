"""The garbage collector held back while much is made and nothing thrown away."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic garbage collection inside the block.

    Captured programs consist of millions of small objects, of which next to none are cyclic garbage;
    looking for it again and again takes up to a tenth of the time.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def old_uncollected() -> Iterator[None]:
    """Inside the block, garbage is looked for among objects made there alone.

    A process that has imported libraries of models has millions of others, which each full collection visits.
    """
    frozen = gc.get_freeze_count()
    if not frozen:  # else the objects that somebody has set apart would come back too
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
