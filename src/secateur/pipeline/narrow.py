"""`sc.narrow`: a rotated model with fewer units in its residual stream, repaired."""

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
    r"""A model whose residual stream has only the first `width` units of a rotated one.

    A norm over k of d units takes the mean of k squares, not of d. So everything that is written to the
    stream is multiplied by :math:`\sqrt{k/d}`, which makes :math:`\sum_{i \le k} x_i^2 / k` what
    :math:`\sum_{i \le k} x_i^2 / d` was, also beside a norm's :math:`\epsilon`; and what reads a norm is
    multiplied by :math:`\sqrt{d/k}`. The result is, to 1e-9 in float64, the rotated model whose norms read a
    stream without the removed directions. That is proven on a few samples before any repair.

    Args:
        rotated: What `rotate` returned; it is left as it was.
        calibration: Anything that `Calibration.of` accepts. Labels are not needed.
        width: Number of units that stay.
        repair: As for `secateur.repair`: refits layers to what those of the rotated model give. None:
            nothing.
        forward: As for `score`.
        seed: Seed for shuffling loaders.
        progress: Show progress bars on a terminal.

    Returns:
        A model of the same classes, of form ``module``, with a record: `save` takes it, and `load` with a
        function that makes a model like `rotated`.

    Raises:
        SettingError: The model is not rotated, or `width` is not from 2 to the stream's width - 1.
        VerificationError: The result is not what it should be.
        ApplyError: The module's code cannot take a smaller width.
    """
    rotated = unwrap(rotated)
    data = Calibration.of(calibration, seed=seed, forward=forward, model=rotated).to(device_of(rotated))
    small, like = narrowed(rotated, *arguments_of(data.plain), width)
    if repair is None:
        return small
    return repair_model(small, like, data, repair, seed=seed, progress=progress)
