"""What Taylor scores say a removal does to the loss, beside what it did."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from secateur.errors import ScoreError
from secateur.measure.evaluate import evaluate
from secateur.signals.loss import LossFn


@dataclass(frozen=True)
class LossChange:
    """The mean loss before and after a removal, and what was expected.

    Attributes:
        bound: To first order the loss changes by no more than this, up or down.
        before: Of the dense model.
        after: Of the pruned one.
    """

    bound: float
    before: float
    after: float

    @property
    def measured(self) -> float:
        """What the loss rose by; negative if it fell."""
        return self.after - self.before


def first_order_bound(
    scores: Mapping[str, NDArray[np.float64]], keep: Mapping[str, NDArray[np.bool_]]
) -> float:
    r"""The most that a removal changes the loss by, to first order: the sum of the removed Taylor scores.

    Unit j's score is \|δ_j\|, with δ_j the first-order change of the mean loss as its weights go to zero. Of
    the removed units R the changes add up, and ``|∑_R δ_j| <= ∑_R |δ_j|``. So a rule that retains the share ρ
    of all scores, `EMP` for one, changes the loss to first order by at most 1 − ρ of their sum.

    Args:
        scores: Of the signal ``taylor``, by group. [group.size]
        keep: By group, True for what stays, as ``plan.keep``. [group.size]

    Raises:
        ScoreError: A group was not scored, or is of another size.

    Example:
        >>> first_order_bound({"fc": np.array([0.5, 0.25, 4.0])}, {"fc": np.array([False, False, True])})
        0.75
    """
    lost: list[float] = []
    for name, mask in keep.items():
        if name not in scores or np.shape(scores[name]) != np.shape(mask):
            raise ScoreError(
                f"first_order_bound: expected a score for each unit of {name!r}, got "
                f"{np.shape(scores[name]) if name in scores else 'none'}. Score the model that was pruned."
            )
        lost.append(float(np.abs(np.asarray(scores[name])[~np.asarray(mask)]).sum()))
    return math.fsum(lost)


def loss_change(
    model: nn.Module,
    small: nn.Module,
    data: Any,
    scores: Mapping[str, NDArray[np.float64]],
    keep: Mapping[str, NDArray[np.bool_]],
    *,
    loss_fn: LossFn | None = None,
) -> LossChange:
    """The first-order bound of a removal beside the change of the loss that was measured.

    The bound is that of zeroing weights, and of the first order alone: far from the dense model, as after
    most prunings, the measured change can be larger. Where a normalisation follows a layer, removing one of
    its units takes the normalisation's shift too, which the scores do not see. Weights that are zeroed one by
    one have no such gap: there the bound holds up to terms of the second order in what was removed.

    Args:
        model: The dense model.
        small: The pruned one.
        data: What `Calibration.of` takes, with labels: the data that the scores were made from, if the two
            are to be compared.
        scores: Of the signal ``taylor``, by group.
        keep: As ``plan.keep``.
        loss_fn: As for `score`.

    Raises:
        ScoreError: The scores do not fit.
        CalibrationError: The data holds no labels, and no `loss_fn` is given.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> data = [(torch.randn(20, 4), torch.arange(20) % 2) for _ in range(3)]
        >>> scores = sc.score(graph, data, "taylor", progress=False)
        >>> plan = sc.Uniform(ratio=0.25, removal="taylor").allocate(graph, scores)
        >>> change = sc.loss_change(net, sc.apply(net, plan), data, scores["taylor"], plan.keep)
        >>> abs(change.measured) < 2 * change.bound
        True
    """
    bound = first_order_bound(scores, keep)
    before, after = (evaluate(m, data, loss_fn=loss_fn).loss for m in (model, small))
    return LossChange(bound, before, after)
