"""What repairs fit on and are judged on."""

from __future__ import annotations

from dataclasses import replace

from secateur.calibration import Calibration

FEW = 50
"""Up to this many samples, a fifth of them says too little: every fifth judges in turn."""

FOLDS = 5


def folds_of(data: Calibration) -> list[tuple[Calibration, Calibration]]:
    """Pairs of data to fit on and held-out data; the last is ``data.split()``, and mostly the only one.

    Raises:
        CalibrationError: If the data is empty, or too little to hold some out.
    """
    last = data.split(FOLDS)
    batches = []
    samples = 0
    for batch in data.batches():
        batches.append(batch)
        samples += batch.size
        if samples > FEW:
            return [last]
    count = -(-FOLDS // len(batches))
    pieces = [piece.raw for batch in batches for piece in (batch.cut(count) if count > 1 else [batch])]
    if len(pieces) < FOLDS:
        return [last]

    def part(fold: int, held: bool) -> Calibration:
        chosen = [raw for k, raw in enumerate(pieces) if (k % FOLDS == fold) == held]
        return replace(data, source=chosen, _start=())

    return [*((part(k, held=False), part(k, held=True)) for k in range(FOLDS - 1)), last]
