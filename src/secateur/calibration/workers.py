"""What the end of a loader's worker means to the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from secateur.errors import CalibrationError


@contextmanager
def living_workers(batch: int | None = None) -> Iterator[None]:
    """Say in words that a worker process of a loader was killed.

    torch raises that in whatever the main process is doing when it hears of it: a backward pass, for
    example. So it is not enough to look while batches are read. Also a decorator.

    Args:
        batch: Position of the calibration batch that is read. None while other things are done too.

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
                f"{where}: expected the workers of the loader to go on, but one was killed. "
                "Give them more memory, or pass num_workers=0."
            ) from error
        raise  # the user's own
