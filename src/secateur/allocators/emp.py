"""Effective Model Pruning: keep a number of units that is in proportion to their effective number.

Source: Effective Model Pruning, arXiv 2509.25606.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.decision import Decision
from secateur.allocators.description import Certificate
from secateur.allocators.effective_size import SLACK, checked_beta, effective_number, sizes
from secateur.allocators.limits import Limits
from secateur.allocators.ranking import ranks
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction, split, step_function
from secateur.common.formatting import share
from secateur.errors import SettingError
from secateur.graph.groups import Group, WeightGroup
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph

Scope = Literal["model", "layer", "row"]


def retained_bound(size: ArrayLike, effective: ArrayLike, kept: ArrayLike) -> NDArray[np.float64]:
    r"""Lower bound on the share of the total score that the `kept` largest scores hold.

    Let N scores have the effective number M. Divide them by their sum: this gives a nonnegative vector ω with
    sum 1 and sum of squares 1/M. Let T be the sum of its k largest entries. The bound is the minimum of T
    over all such ω.

    Derivation. Consider the vector with 1/m in its first m entries and 0 elsewhere. It has T = f(m) = min(1,
    k/m). These vectors, for m = 1 ... N, are the corners of the set of all sorted ω. On this set T is linear
    and the sum of squares is convex. So the minimum lies on an edge between two corners m <= M <= n, where

    .. math:: T_{m,n} = f(n) + \sqrt{\frac{1/M - 1/n}{1/m - 1/n}} \, (f(m) - f(n)).

    Only three edges can hold the minimum: (1, N), (1, ⌈M⌉) and (⌊M⌋, ⌈M⌉). Reasons: for fixed n, T falls with
    m as long as k <= m, so m is 1, or ⌊M⌋ if k <= ⌊M⌋. For m = 1 every stationary point in n is a maximum, so
    n is N or ⌈M⌉. For m = ⌊M⌋, T falls as n falls, so n is ⌈M⌉. The bound is reached by a vector with at most
    two different nonzero values.

    Args:
        size: N, the number of scores.
        effective: M, their effective number, in [1, N].
        kept: k, the number of scores that are kept, in [1, N].

    Returns:
        The bound in [0, 1], float64, in the shape to which the arguments broadcast.

    Example:
        >>> float(retained_bound(4, 4, 3)), float(retained_bound(100, 1, 1))  # all equal; one alone
        (0.75, 1.0)
    """
    n, k = np.asarray(size, dtype=np.float64), np.asarray(kept, dtype=np.float64)
    m = np.clip(np.asarray(effective, dtype=np.float64), 1, n)
    one, above, below = np.ones_like(m), np.ceil(m), np.floor(m)
    edges = [_top_share_on_edge(a, b, m, k) for a, b in ((one, n), (one, above), (below, above))]
    found: NDArray[np.float64] = np.minimum(np.minimum(*edges[:2]), edges[2])
    return found


def _top_share_on_edge(
    m: NDArray[np.float64], n: NDArray[np.float64], effective: NDArray[np.float64], k: NDArray[np.float64]
) -> NDArray[np.float64]:
    """T_{m,n} of `retained_bound`: the share of the k largest scores on the edge between corners m and n."""
    least, most = np.minimum(1, k / n), np.minimum(1, k / m)
    width = np.where(m < n, 1 / m - 1 / n, 1)
    share = np.where(m < n, np.sqrt(np.clip((1 / effective - 1 / n) / width, 0, 1)), 0)
    found: NDArray[np.float64] = least + share * (most - least)
    return found


@dataclass(frozen=True)
class EMP(Allocator):
    """Keeps the floor(β·N_eff) units with the highest scores, at least one. See `sc.effective_size`.

    A layer keeps few units if its scores are concentrated on few of them. If its scores are equal, it keeps
    all. β is the same for all layers. With a budget, β is solved and `beta` is not used; each layer then
    keeps a number in proportion to its effective number.

    Negative scores count by their absolute value. If all scores are zero, they are equal, so all units stay.

    Source: Effective Model Pruning, arXiv 2509.25606.

    Attributes:
        beta: β, above 0.
        scope: The units that are ranked together: those of the whole ``model`` (for scores that can be
            compared between layers), of each ``layer``, or, for single weights only, of each ``row`` (one
            output).
        removal: Signal whose highest scores stay: a name such as ``"l1*wasserstein"``, or an instance.

    Raises:
        SettingError: A setting is out of range; on `allocate`, scope ``row`` without single weights.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> scores = {"magnitude": {"0": np.array([9.0, 9, 9, 0.1, 0.1, 0.1, 0.1, 0.1])}}
        >>> sc.EMP().allocate(graph, scores).groups[0].kept
        3
        >>> sc.EMP(beta=1.5).allocate(graph, scores).groups[0].kept
        4
    """

    beta: float = 1.0
    scope: Scope = "layer"
    removal: SignalLike = "magnitude"
    name: ClassVar[str] = "emp"
    solved: ClassVar[str] = "beta"
    knob_name: ClassVar[str] = "−β"

    def __post_init__(self) -> None:
        """Check the values."""
        object.__setattr__(self, "beta", checked_beta("EMP", self.beta))
        if self.scope not in get_args(Scope):
            raise SettingError(
                f"EMP: expected scope to be 'model', 'layer' or 'row', got {self.scope!r}. Name one of these."
            )

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """−β, because a higher knob must remove more."""
        return -self.beta

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The β that was used, the scope and the signal."""
        return {
            "beta": None if knob is None else -float(knob),
            "scope": self.scope,
            "removal": name_of(self.removal),
        }

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """A unit with descending rank j in its scope goes when at most j units are kept; rank 0 never."""
        groups = limits.considered(graph.groups)
        values = {g.name: np.abs(vector(scores, self.removal, g)) for g in groups}
        if self.scope == "model":
            whole = np.concatenate(list(values.values()))
            parts = split(_removal_points(whole[None]), groups)
        else:
            parts = {g.name: _removal_points(self._rows(g, values[g.name])) for g in groups}
        return {name: step_function(points) for name, points in parts.items()}

    def _rows(self, group: Group, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Arrange a group's scores so that the scores that are ranked together form a row. [rows, members]"""
        if self.scope != "row":
            return values[None]
        if not isinstance(group, WeightGroup):
            raise SettingError(
                f"EMP: expected single weights for scope 'row', got the units of {group.name!r}. "
                "Use scope 'layer', or granularity 'weight'."
            )
        return values.reshape(group.rows)

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """The share of the scores that is kept, and its lower bound by `retained_bound`.

        The bound is that of the units which β keeps. Limits and spending a budget can only keep more units,
        so the bound is also valid for the final plan.

        Returns:
            ``beta`` and ``scope``. Then, for each of ``groups`` and for the ``whole``: ``units``; ``kept``;
            ``mass``, the share of the scores that is kept. Where β·N_eff is computed (for the whole in scope
            ``model``, else for each group, summed over rows), also: ``effective``, the effective number;
            ``allowed``, the number that β keeps; ``bound``, the lower bound of ``mass``. ``mass`` and
            ``bound`` are None if all scores are 0.
        """
        beta = None if decision.knob is None else -float(decision.knob)
        keep = decision.keep
        values = {g.name: np.abs(vector(scores, self.removal, g)) for g in limits.considered(graph.groups)}
        whole = np.concatenate(list(values.values()))
        kept = np.concatenate([keep[name] for name in values])
        by_model = self.scope == "model"
        return {
            "beta": beta,
            "scope": self.scope,
            "whole": _retained(whole, kept, whole[None] if by_model else None, beta),
            "groups": {
                g.name: _retained(
                    values[g.name], keep[g.name], None if by_model else self._rows(g, values[g.name]), beta
                )
                for g in limits.considered(graph.groups)
            },
        }

    def certificate(self, found: Mapping[str, Any]) -> Certificate:
        """Say which share of the scores is kept, and its lower bound."""
        if not {"beta", "scope", "whole", "groups"} <= found.keys():
            return super().certificate(found)
        beta, groups, whole = found["beta"], found["groups"], found["whole"]
        if beta is None:
            return Certificate(sentences=("Nothing had to go, so nothing is guaranteed.",))
        name = {"model": "the whole model", "row": "each row of each layer"}.get(found["scope"], "each layer")
        bound = (
            f"; whatever the scores with this effective number ({whole['effective']:,.1f}), they had to hold "
            f"{share(whole['bound'])}."
            if "bound" in whole
            else "."
        )
        by_layer = all("bound" in g for g in groups.values())
        return Certificate(
            sentences=(
                f"Of {name}, β = {beta:.4g} times the effective number of its scores stays at least.",
                f"In all {whole['kept']:,} of {whole['units']:,} stay, which hold {share(whole['mass'])} of "
                f"the scores{bound}",
            ),
            note="Score kept is the share of a layer's scores that stays."
            + (
                " At least is the least that it can be for any scores of the same effective number, of which "
                "β allowed so many to stay; limits and a budget only add to them."
                if by_layer
                else ""
            ),
            titles=("layer", "kept", "of", "score kept")
            + (("effective number", "allowed", "at least") if by_layer else ()),
            rows=tuple(
                (
                    layer,
                    f"{g['kept']:,}",
                    f"{g['units']:,}",
                    share(g["mass"]),
                    *((f"{g['effective']:,.1f}", f"{g['allowed']:,}", share(g["bound"])) if by_layer else ()),
                )
                for layer, g in groups.items()
            ),
        )


def _removal_points(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Value of the knob, −β, from which each score is removed. Infinity for the largest of a row.

    β is the largest float at which `sizes` does not keep the score.

    Args:
        values: Nonnegative scores. [rows, members]

    Returns:
        [rows * members]
    """
    members = values.shape[1]
    # Descending ranks. Of equal scores, the lowest index is removed last.
    place = members - 1 - np.stack([ranks(row) for row in values])
    effective = effective_number(values, 1)[:, None]
    points = np.full(place.shape, np.inf)
    others = place > 0
    points[others] = -_largest_beta(place[others], np.broadcast_to(effective, place.shape)[others])
    return points.reshape(-1)


def _largest_beta(place: NDArray[np.int64], effective: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest float β at which `sizes` keeps at most `place` scores, where `place` is at least 1."""
    # The rounding error is below four units in the last place. Start that far above, and go down float by
    # float.
    beta = (place + 1) / (effective * (1 + SLACK)) * (1 + 9e-16)
    over = np.arange(len(beta))
    while (over := over[sizes(effective[over], beta[over], np.inf) > place[over]]).size:
        beta[over] = np.nextafter(beta[over], 0)
    return beta


def _retained(
    values: NDArray[np.float64],
    keep: NDArray[np.bool_],
    rows: NDArray[np.float64] | None,
    beta: float | None,
) -> dict[str, JsonValue]:
    """Certificate data of some scores: the kept share, and its lower bound if `rows` is given.

    Args:
        values: Nonnegative scores. [units]
        keep: True for units that stay. [units]
        rows: The same scores, in rows that are ranked together. [rows, members]
        beta: β; None: everything is kept.
    """
    top = float(values.max())
    scaled = values / (top or 1.0)  # so that no sum overflows
    total = float(scaled.sum())
    found: dict[str, JsonValue] = {
        "units": len(values),
        "kept": int(keep.sum()),
        "mass": float(scaled[keep].sum()) / total if top else None,
    }
    if rows is None:
        return found
    effective = effective_number(rows, 1)
    members = rows.shape[1]
    allowed = np.full(len(rows), members) if beta is None else sizes(effective, beta, members)
    share = (rows / (top or 1.0)).sum(1) / (total or 1.0)
    bound = float((retained_bound(members, effective, allowed) * share).sum())
    return found | {
        "effective": float(effective.sum()),
        "allowed": int(allowed.sum()),
        "bound": bound if top else None,
    }
