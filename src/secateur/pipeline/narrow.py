"""`sc.narrow`: remove units from the residual stream of a rotated model, and repair the result."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.calibration import Calibration, Forward
from secateur.common.models import device_of, unwrap
from secateur.repairs.methods import Methods
from secateur.repairs.repair import repair as repair_model
from secateur.targets.width.narrow import narrowed
from secateur.targets.width.rotate import arguments_of


def narrow(
    rotated: nn.Module,
    calibration: Any,
    width: int,
    *,
    repair: Methods = "reconstruct",
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    r"""Make a model that keeps only the first `width` units of a rotated model's residual stream.

    With k of d units, a norm takes the mean of k squares instead of d. So everything that is written to the
    stream is multiplied by :math:`\sqrt{k/d}`. Then :math:`\sum_{i \le k} x_i^2 / k` is what
    :math:`\sum_{i \le k} x_i^2 / d` was, and a norm's :math:`\epsilon` weighs the same as before. What reads
    a norm is multiplied by :math:`\sqrt{d/k}`. To 1e-9 in float64, the result equals the rotated model whose
    norms read a stream without the removed directions. This is checked on a few samples before any repair.

    Args:
        rotated: The model that `rotate` returned. It is not changed.
        calibration: Anything that `Calibration.of` accepts. Labels are not needed.
        width: Number of units to keep.
        repair: As for `secateur.repair`, with the rotated model as the reference. None: no repair.
        forward: As for `score`.
        seed: Seed for shuffling loaders.
        progress: Show progress bars on a terminal.

    Returns:
        A model of the same classes, in form ``module``, with a record. `save` accepts it; `load` needs a
        function that makes a model like `rotated`.

    Raises:
        SettingError: The model is not rotated, or `width` is not from 2 to the stream's width - 1.
        VerificationError: The result differs from that reference.
        ApplyError: The module's code cannot take a smaller width.
    """
    rotated = unwrap(rotated)
    data = Calibration.of(calibration, seed=seed, forward=forward, model=rotated).to(device_of(rotated))
    small, like = narrowed(rotated, *arguments_of(data.plain), width)
    if repair is None:
        return small
    return repair_model(small, like, data, repair, seed=seed, progress=progress)
