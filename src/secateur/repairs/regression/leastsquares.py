"""Ridge regression from sums: weights that stay near where they were unless the data say otherwise.

Of the data only sums of products are kept, in float64, or the rows themselves while they are fewer than
the columns: memory grows with the square of the number of columns, not with the data. They are kept in a
few parts, so that the damping can be chosen by how well what one part teaches predicts the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DAMPINGS = (1e-12, 1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates, relative to the mean of the diagonal of the columns' scatter matrix."""

NARROW = 192
"""Up to so many columns, all products at once; beyond, mirrored ones are not computed twice."""

JUDGED = 128
"""The damping is chosen by the errors of at most this many outputs, spread evenly over all of them."""

DEFAULT_DAMPING = 1e-2
"""Where the data are a single part, so that nothing can be held out."""


@dataclass(frozen=True)
class Sums:
    """Sums over positions of columns x and targets y, for each group.

    Attributes:
        count: Number of positions.
        x: [groups, columns]
        y: [groups, outputs]
        yy: Squares. [groups, outputs]
        rows: The positions themselves, where they are no more than the columns: x [groups, count, columns]
            and y [groups, count, outputs]; else None.
        products: Otherwise: x with x [groups, columns, columns] and x with y [groups, columns, outputs].
    """

    count: int
    x: Tensor
    y: Tensor
    yy: Tensor
    rows: tuple[Tensor, Tensor] | None
    products: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Sums:
        """The sums of x [groups, positions, columns] and y [groups, positions, outputs], in float64.

        Products of a piece are taken in float32 if that is what it is in: they are as exact as the values.
        """
        few = x.shape[1] <= x.shape[2]
        if few or x.dtype != torch.float32 or y.dtype != torch.float32:
            x, y = x.double(), y.double()
        # PyTorch adds in pairs, so sums are as exact as the values in float32 too.
        sx, sy, syy = (v.sum(1).double() for v in (x, y, y.square()))
        if few:
            return cls(x.shape[1], sx, sy, syy, (x, y), None)
        xx, xy = _products(x, y)
        return cls(x.shape[1], sx, sy, syy, None, (xx.double(), xy.double()))

    def __add__(self, other: Sums) -> Sums:
        """Sums over both."""
        count = self.count + other.count
        rows = products = None
        if self.rows and other.rows and count <= self.x.shape[1]:
            rows = (torch.cat([self.rows[0], other.rows[0]], 1), torch.cat([self.rows[1], other.rows[1]], 1))
        else:
            mine, theirs = self.multiplied(), other.multiplied()
            products = (mine[0] + theirs[0], mine[1] + theirs[1])
        return Sums(count, self.x + other.x, self.y + other.y, self.yy + other.yy, rows, products)

    def multiplied(self) -> tuple[Tensor, Tensor]:
        """The products, made from the rows where there are only those."""
        return self.products or _products(*(self.rows or (self.x[:, None], self.y[:, None])))

    def state(self) -> dict[str, Tensor]:
        """All sums by name, on the CPU: to be sent to another process."""
        pairs = {"rows": self.rows, "products": self.products}
        found = {"count": torch.tensor(self.count), "x": self.x, "y": self.y, "yy": self.yy}
        found |= {f"{name}.{k}": t for name, pair in pairs.items() for k, t in enumerate(pair or ())}
        return {name: tensor.cpu() for name, tensor in found.items()}

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], device: torch.device) -> Sums:
        """The inverse of `state`."""
        found = {name: tensor.to(device) for name, tensor in state.items()}
        rows, products = (
            (found[f"{name}.0"], found[f"{name}.1"]) if f"{name}.0" in found else None
            for name in ("rows", "products")
        )
        return cls(int(found["count"]), found["x"], found["y"], found["yy"], rows, products)

    def of_outputs(self, outputs: Tensor) -> Sums:
        """The same sums for some of the outputs. [some outputs]"""
        rows, products = (
            None if pair is None else (pair[0], pair[1][:, :, outputs]) for pair in (self.rows, self.products)
        )
        return Sums(self.count, self.x, self.y[:, outputs], self.yy[:, outputs], rows, products)

    def finite(self) -> bool:
        """Whether every sum is a number."""
        kept = self.rows or self.products or ()
        return all(bool(torch.isfinite(t).all()) for t in (self.x, self.y, self.yy, *kept))

    def scatter(self, intercept: bool) -> float:
        """Sum of squares of the targets about their mean, or about zero if there is no intercept."""
        around = self.yy - self.y.square() / self.count if intercept else self.yy
        return float(around.clamp_min(0).sum())

    def intercept(self, weight: Tensor) -> Tensor:
        """The best intercept of a weight [groups, columns, outputs]. [groups, outputs]"""
        return (self.y - (weight.transpose(1, 2) @ self.x[:, :, None])[..., 0]) / self.count

    def loss(self, weight: Tensor, bias: Tensor | None) -> float:
        """Sum of squares of what weight [groups, columns, outputs] and bias [groups, outputs] leave."""
        if self.rows:
            left = self.rows[0] @ weight - self.rows[1]
            return float((left if bias is None else left + bias[:, None]).square().sum())
        xx, xy = self.multiplied()
        total = self.yy.sum() - 2 * (weight * xy).sum() + (weight * (xx @ weight)).sum()
        if bias is not None:
            at_mean = (weight.transpose(1, 2) @ self.x[:, :, None])[..., 0] - self.y
            total = total + (2 * bias * at_mean + self.count * bias.square()).sum()
        return max(float(total), 0.0)

    def centred(self, intercept: bool) -> tuple[Tensor, Tensor]:
        """Scatter about the mean, or about zero if there is no intercept: of x, and of x with y."""
        xx, xy = self.multiplied()
        if not intercept:
            return xx, xy
        mean = self.x[:, :, None] / self.count
        return xx - mean * self.x[:, None], xy - mean * self.y[:, None]


def _products(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    xx = x.new_zeros(len(x), x.shape[2], x.shape[2])
    add_products(xx, x)
    return xx, x.transpose(1, 2) @ y


def add_products(total: Tensor, x: Tensor) -> None:
    """Add the products of the columns of x with each other, ``X^T X``, to a total, in place.

    Args:
        total: [groups, columns, columns]
        x: [groups, positions, columns]
    """
    columns = x.shape[2]
    if columns <= NARROW:
        total += x.transpose(1, 2) @ x
        return
    half = -(-columns // 2)
    left, right = x[..., :half], x[..., half:]
    both = left.transpose(1, 2) @ right
    total[:, :half, half:] += both
    total[:, half:, :half] += both.transpose(1, 2)
    add_products(total[:, :half, :half], left)
    add_products(total[:, half:, half:], right)


def damped_solution(matrix: Tensor, right: Tensor, ridge: Tensor | float) -> Tensor | None:
    """The solution S of ``(matrix + ridge I) S = right``; None where that is not positive definite.

    Args:
        matrix: [groups, n, n]
        right: [groups, n, outputs]
        ridge: What is added to the diagonal: one number, or one for each group [groups, 1].
    """
    damped = matrix.clone()
    damped.diagonal(dim1=1, dim2=2).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(damped)
    return None if bool(failed.any()) else torch.cholesky_solve(right, factor)


def total(parts: Sequence[Sums]) -> Sums:
    """The sums over all parts."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


class Problem:
    """A ridge regression that can be solved for one damping after another.

    It is solved for the change of the weight: in the space of the columns, by ``X^T X + damping``, or where
    the positions are fewer in theirs, by ``X X^T + damping``; the solution is the same.
    """

    def __init__(self, sums: Sums, weight: Tensor, intercept: bool, free: Tensor | None = None) -> None:
        """Prepare.

        Args:
            sums: Of the data.
            weight: Where the weight is drawn to. [groups, columns, outputs]
            intercept: Whether there may be a bias.
            free: True for entries that may change; the others keep their value.
        """
        self._weight, self._dual = weight, sums.rows is not None
        if sums.rows is not None:
            x, y = sums.rows
            if intercept:
                x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
            self._left, self._right = x, y - x @ weight
            scale = x.square().sum((1, 2)) / x.shape[2]
        else:
            xx, xy = sums.centred(intercept)
            self._left, self._right = xx, xy - xx @ weight
            scale = xx.diagonal(dim1=1, dim2=2).mean(1)
        self._scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self._blocks = None if free is None or bool(free.all()) else _blocks(free)
        self._matrix = self._square(self._left)

    def solve(self, damping: float) -> Tensor | None:
        """The minimiser; None where the damped matrix is not positive definite.

        Args:
            damping: Relative to the mean diagonal of the scatter of X; infinite: the weight stays.
        """
        if damping == float("inf"):
            return self._weight
        ridge = (damping * self._scale)[:, None]
        if self._blocks is None:
            step = self._step(self._matrix, self._left, self._right, ridge)
            return None if step is None else self._weight + step
        found = self._weight.clone()
        for group, columns, outputs in self._blocks:
            left, right = self._left[group][:, columns], self._right[group][:, outputs]
            if not self._dual:
                left, right = left[columns], right[columns]
            step = self._step(self._square(left[None]), left[None], right[None], ridge[group : group + 1])
            if step is None:
                return None
            found[group, columns[:, None], outputs] += step[0]
        return found

    def _square(self, left: Tensor) -> Tensor:
        return left @ left.transpose(1, 2) if self._dual else left

    def _step(self, matrix: Tensor, left: Tensor, right: Tensor, ridge: Tensor) -> Tensor | None:
        solved = damped_solution(matrix, right, ridge)
        return left.transpose(1, 2) @ solved if self._dual and solved is not None else solved


def _blocks(free: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Outputs with the same free columns: (group, columns, outputs)."""
    found = []
    for group in range(len(free)):
        patterns, which = free[group].t().unique(dim=0, return_inverse=True)
        for k, pattern in enumerate(patterns):
            if bool(pattern.any()):
                found.append((group, pattern.nonzero()[:, 0], (which == k).nonzero()[:, 0]))
    return found


@dataclass(frozen=True)
class Fit:
    """What a regression found.

    Attributes:
        weight: [groups, columns, outputs]
        bias: [groups, outputs]; None without an intercept.
        damping: Relative to the mean of the scatter's diagonal; infinite where the weight stays.
        before: Error of the weight and bias that came in, relative to the targets' scatter.
        after: Error of the result on data that it was not fitted to, relative to the same.
    """

    weight: Tensor
    bias: Tensor | None
    damping: float
    before: float
    after: float


def fit(
    parts: Sequence[Sums],
    weight: Tensor,
    bias: Tensor | None,
    intercept: bool,
    free: Tensor | None = None,
    dampings: Sequence[float] = DAMPINGS,
    near: float | None = None,
) -> Fit:
    """The weight W and bias b that minimise ``||X W + b - Y||^2 + damping ||W - weight||^2``.

    The damping is relative to the mean diagonal of the scatter of X. Candidates are judged by
    cross-validation, from `near` downhill: fitted to all parts but one, each has to predict that one.
    Keeping the weight, with the intercept that suits it, and changing nothing at all are candidates too. So
    data that are few or degenerate lead to less change.

    Args:
        parts: Sums of the data, in one or more parts.
        weight: [groups, columns, outputs]
        bias: The bias so far. [groups, outputs]
        intercept: Whether there may be a bias.
        free: True for entries of the weight that may change. [groups, columns, outputs]
        dampings: The candidates, ascending.
        near: The candidate to begin with; the middle one if not given.
    """
    loss = sum(part.loss(weight, bias) for part in parts)
    whole = total(parts)
    target = whole.scatter(intercept) or 1.0
    damping, error = DEFAULT_DAMPING, 0.0
    if len(parts) > 1:
        rests = [total([*parts[:k], *parts[k + 1 :]]) for k in range(len(parts))]
        everything = _Validation(parts, rests, weight, bias, intercept, free)
        some = everything.of_few_outputs()
        damping, error = descend(some, dampings, near)
        stays = some(float("inf")) if intercept else float("inf")
        if stays < error:
            damping, error = float("inf"), stays
        if some is not everything:
            error = everything(damping)
    found = Problem(whole, weight, intercept, free).solve(damping)
    if found is None or not error < loss:
        return Fit(weight, bias, float("inf"), loss / target, loss / target)
    new = _bias(whole, found, bias, intercept)
    after = error if len(parts) > 1 else whole.loss(found, new)
    return Fit(found, new, damping, loss / target, after / target)


class _Validation:
    """Cross-validation: fitted to all parts but one, the weight has to predict that one."""

    def __init__(
        self,
        parts: Sequence[Sums],
        rests: Sequence[Sums],
        weight: Tensor,
        bias: Tensor | None,
        intercept: bool,
        free: Tensor | None,
    ) -> None:
        """As for `fit`; ``rests[k]`` is the sum of all parts but the k-th."""
        self._parts, self._rests = parts, rests
        self._weight, self._bias, self._intercept, self._free = weight, bias, intercept, free

    @cached_property
    def _problems(self) -> list[Problem]:
        return [Problem(rest, self._weight, self._intercept, self._free) for rest in self._rests]

    def __call__(self, damping: float) -> float:
        """Return the squared error for a damping; infinite where there is no solution."""
        errors = 0.0
        for part, rest, problem in zip(self._parts, self._rests, self._problems, strict=True):
            found = problem.solve(damping)
            if found is None:
                return float("inf")
            errors += part.loss(found, _bias(rest, found, self._bias, self._intercept))
        return errors

    def of_few_outputs(self) -> _Validation:
        """Return the same for `JUDGED` outputs; itself, where there are no more than twice as many."""
        outputs = self._weight.shape[2]
        if outputs <= 2 * JUDGED:
            return self
        some = torch.linspace(0, outputs - 1, JUDGED, device=self._weight.device).long()
        return _Validation(
            [part.of_outputs(some) for part in self._parts],
            [rest.of_outputs(some) for rest in self._rests],
            self._weight[:, :, some],
            None if self._bias is None else self._bias[:, some],
            self._intercept,
            None if self._free is None else self._free[:, :, some],
        )


def descend(
    error: Callable[[float], float], candidates: Sequence[float], near: float | None = None
) -> tuple[float, float]:
    """From one of the candidates downhill, in steps of one: where the error is lowest, and what it is.

    It begins with `near`, or the middle one. Where there is no solution the error counts as infinite.
    """
    errors: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in errors:
            found = error(candidates[k]) if 0 <= k < len(candidates) else float("inf")
            errors[k] = found if found < float("inf") else float("inf")  # no number, from a part without data
        return errors[k]

    best = candidates.index(near) if near in candidates else len(candidates) // 2
    while True:
        lowest = min((best + 1, best, best - 1), key=at)
        if at(lowest) == at(best):
            if at(best) < float("inf") or best == len(candidates) - 1:
                return candidates[best], at(best)
            lowest = best + 1  # no solution here: more damping has one sooner
        best = lowest


def _bias(sums: Sums, weight: Tensor, bias: Tensor | None, intercept: bool) -> Tensor | None:
    return sums.intercept(weight) if intercept else bias
