"""Explain to the user that a worker process of a loader was killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from secateur.errors import CalibrationError


@contextmanager
def living_workers(batch: int | None = None) -> Iterator[None]:
    """Raise a clear error if a worker process of a loader was killed. Also a decorator.

    torch raises its error wherever the main process is at that moment, for example in a backward pass. So it
    is not enough to catch it while batches are read.

    Args:
        batch: Index of the calibration batch that is being read. None: the block does other things, too.

    Raises:
        CalibrationError: A worker was killed.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        lost = batch is not None and isinstance(error, ConnectionError)
        if lost or "DataLoader worker (pid" in str(error):
            where = "data" if batch is None else f"calibration batch {batch}"
            raise CalibrationError(
                f"{where}: expected the workers of the loader to keep running, but one was killed. "
                "Give them more memory, or pass num_workers=0."
            ) from error
        raise  # an error of the user's code
