"""The effective number of scores, and the number of scores to keep that follows from it.

Source: Effective Model Pruning, arXiv 2509.25606.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from secateur.errors import ScoreError, SettingError

SLACK = 1e-12
"""Relative tolerance for rounding errors: a product this close below an integer counts as the integer. For
example, of 100 equal scores ``beta = 0.29`` keeps 29, although 0.29 * 100 is slightly below 29 as a float."""


@overload
def effective_number(scores: Tensor, dim: int | None = None) -> Tensor: ...
@overload
def effective_number(scores: ArrayLike, dim: int | None = None) -> NDArray[np.float64]: ...


def effective_number(scores: Any, dim: int | None = None) -> Any:
    r"""The effective number of scores, between 1 and their number N.

    .. math:: N_{eff} = \frac{1}{\sum_i \omega_i^2} = \frac{(\sum_i |s_i|)^2}{\sum_i s_i^2},
              \qquad \omega_i = |s_i| / \sum_j |s_j|

    It is N if all scores are equal, also if all are zero. It is 1 if only one score is not zero. Order and
    scale do not change it. For N Gaussian numbers it is about 2 N / π.

    Args:
        scores: Finite numbers of any shape, as an array, a tensor or nested lists. Negative scores count by
            their absolute value.
        dim: The axis along which to compute it. None: all scores together.

    Returns:
        float64, in the shape of `scores` without `dim`. If `scores` is a tensor: a tensor on the same device.

    Raises:
        ScoreError: There are no scores along `dim`, there is no axis `dim`, or a score is not a finite real
            number.

    Example:
        >>> float(effective_number([2.0, 2.0, 0.0, 0.0]))
        2.0
    """
    values = _checked(scores, dim)
    values = values.reshape(-1) if dim is None else values
    axis = -1 if dim is None else dim
    if isinstance(values, Tensor):
        top = values.amax(axis, keepdim=True)
        values = torch.where(top > 0, values / torch.where(top > 0, top, 1), 1)
        found: Any = values.sum(axis)
        return (found / values.square().sum(axis)) * found
    top = values.max(axis, keepdims=True)
    values = np.where(top > 0, values / np.where(top > 0, top, 1), 1)  # so that no square overflows
    found = values.sum(axis)
    return (found / np.square(values).sum(axis)) * found


@overload
def effective_size(scores: Tensor, beta: float = 1.0, dim: None = None) -> int: ...
@overload
def effective_size(scores: Tensor, beta: float = 1.0, *, dim: int) -> Tensor: ...
@overload
def effective_size(scores: ArrayLike, beta: float = 1.0, dim: None = None) -> int: ...
@overload
def effective_size(scores: ArrayLike, beta: float = 1.0, *, dim: int) -> NDArray[np.int64]: ...


def effective_size(scores: Any, beta: float = 1.0, dim: int | None = None) -> Any:
    r"""The number of scores to keep: :math:`\lfloor \beta N_{eff} \rfloor`, at least 1 and at most all.

    Keep this many scores, those with the largest absolute values. The scores can be of anything: weights,
    channels, heads, experts, attention scores, nodes of a graph, image features. N_eff is `effective_number`.

    Source: Effective Model Pruning, arXiv 2509.25606.

    Args:
        scores: Finite numbers of any shape, as an array, a tensor or nested lists. Negative scores count by
            their absolute value.
        beta: β, above 0. A larger β keeps more.
        dim: The axis along which to compute it. None: all scores together.

    Returns:
        Without `dim`: an int. With `dim`: int64, in the shape of `scores` without `dim`, a tensor if `scores`
        is one, else an array.

    Raises:
        ScoreError: There are no scores along `dim`, there is no axis `dim`, or a score is not a finite real
            number.
        SettingError: `beta` is not a finite number above 0.

    Example:
        >>> effective_size([9.0, 1.0, 0.5, 0.5])
        1
        >>> effective_size([[1.0, 1.0, 1.0], [5.0, 4.0, 0.1]], dim=1)
        array([3, 2])
        >>> effective_size(torch.ones(100), beta=0.29)
        29
    """
    beta = checked_beta("effective_size", beta)
    number = effective_number(scores, dim)
    if isinstance(scores, Tensor):
        size = scores.numel() if dim is None else scores.shape[dim]
        kept: Any = (number * beta * (1 + SLACK)).floor().clamp(1, size).long()
    else:
        shape = np.shape(scores)
        size = math.prod(shape) if dim is None else shape[dim]
        kept = sizes(number, beta, size)
    return int(kept) if dim is None else kept


def sizes(effective: ArrayLike, beta: ArrayLike, size: ArrayLike) -> NDArray[np.int64]:
    """Number of scores to keep of `size` scores with effective number `effective`. Arguments broadcast."""
    wanted = np.floor(np.multiply(effective, beta) * (1 + SLACK))
    return np.clip(wanted, 1, size).astype(np.int64)


def checked_beta(where: str, beta: object) -> float:
    """Return `beta` as a float. `where` starts the error message.

    Raises:
        SettingError: `beta` is not a finite number above 0.
    """
    if not isinstance(beta, bool) and isinstance(beta, Real) and 0 < float(beta) < math.inf:
        return float(beta)
    raise SettingError(f"{where}: expected beta to be a number above 0, got {beta!r}. Write beta=1.0.")


def _checked(scores: Any, dim: int | None) -> Any:
    """Check the scores, and return their absolute values in float64."""
    values = _tensor(scores) if isinstance(scores, Tensor) else _array(scores)
    shape = tuple(values.shape)
    if dim is not None and not -len(shape) <= dim < len(shape):
        raise ScoreError(
            f"effective_size: expected dim to be an axis of shape {shape}, got {dim}. Name one of them."
        )
    if not (math.prod(shape) if dim is None else shape[dim]):
        raise ScoreError(f"effective_size: expected at least one score, got shape {shape}. Give some.")
    return values


def _tensor(scores: Tensor) -> Tensor:
    if scores.is_complex():
        raise _complex(scores.dtype)
    values = scores.detach().double().abs()
    if not bool(torch.isfinite(values).all()):
        raise _infinite()
    return values


def _array(scores: Any) -> NDArray[np.float64]:
    try:
        given = np.asarray(scores)
    except ValueError as error:  # ragged lists
        raise ScoreError(
            f"effective_size: expected an array of numbers, got {error}. Give equal rows."
        ) from error
    if given.dtype.kind not in "biuf":
        raise _complex(given.dtype)
    values = np.abs(given.astype(np.float64))
    if not np.isfinite(values).all():
        raise _infinite()
    return values


def _complex(got: object) -> ScoreError:
    return ScoreError(f"effective_size: expected real numbers, got {got}. Take their absolute value.")


def _infinite() -> ScoreError:
    return ScoreError(
        "effective_size: expected finite scores, got NaN or infinity. Check where they come from."
    )
