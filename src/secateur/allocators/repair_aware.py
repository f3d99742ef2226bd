"""An allocator that removes units where repair can compensate for them best."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.decision import Decision
from secateur.allocators.description import Certificate
from secateur.allocators.hull import slopes
from secateur.allocators.limits import Limits
from secateur.allocators.ranking import ascending
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction
from secateur.common.formatting import share
from secateur.errors import SettingError
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph

Per = Literal["macs", "params"]

ROUNDS = 40
"""How often the costs of units are computed again between the dense network and an empty one."""


@dataclass(frozen=True)
class RepairAware(Allocator):
    r"""Removes the units that add the smallest error after repair for the cost that they save.

    .. math:: \min_k \sum_g E_g(k_g) \quad\text{for given}\quad C(k_1, k_2, \dots)

    E_g(k) is the error of group g after its k most replaceable units are removed and the layers that read it
    are refitted, relative to the values that their outputs are added to. The ``reconstruction`` signal
    measures it. C is the cost of the network.

    The problem is solved greedily, from the dense network down. Each step removes the unit that adds the
    least error for the cost it saves, on the lower convex hulls of the error curves. The cost of a unit
    depends on how many units the neighbouring layers keep. So costs are computed again each time a fortieth
    of the network is removed. All budgets lie on one path: a smaller budget removes the same units and more.
    If costs did not depend on each other, each point of the path would be the exact minimum for its cost.

    Assumption: the errors of groups add up. No labels are needed. Repair with ``reconstruct`` afterwards.

    Source: ours. The elimination in the signal is that of Hassibi and Stork (1993).

    Attributes:
        error: Remove units up to this sum of the groups' errors, each times its factor. None if a budget
            decides.
        removal: The signal. Its scores must be errors, in one unit for all groups.
        per: The cost that a removed unit saves: ``macs`` or ``params``. None: ``params`` where the budget
            bounds parameters and not MACs, else ``macs``.
        factors: What the errors of a group are multiplied by, above 0, by the group's name; 1 for the others.
            A group with a higher factor keeps more. `secateur.Search` looks for good ones.
        parts: In how many parts of the network, one after another, `sc.prune` measures how much the errors of
            its groups change the outputs; each costs one repair. Factors come from this, so `allocate` alone
            refuses it. 0: factors stay as they are.

    Raises:
        SettingError: A setting is out of range. On `allocate`: both or neither of error and budget are given.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> error = np.array([0.0, 0.001, 0.002, 0.004, 0.1, 0.2, 0.4, 1.0])  # after so many are gone
        >>> plan = sc.RepairAware(error=0.01).allocate(graph, {"reconstruction": {"0": error}})
        >>> plan.groups[0].removed, plan.certificates["sum"]
        ((0, 1, 2, 3), 0.004)
    """

    error: float | None = None
    removal: SignalLike = "reconstruction"
    per: Per | None = None
    factors: Mapping[str, float] = field(default_factory=dict)
    parts: int = 0
    name: ClassVar[str] = "repair_aware"
    solved: ClassVar[str] = "error"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.error is not None and not self.error > 0:
            raise SettingError(f"RepairAware: expected an error above 0, got {self.error!r}. Try 0.1.")
        if self.per not in (None, *get_args(Per)):
            raise SettingError(
                f"RepairAware: expected per to be 'macs' or 'params', got {self.per!r}. Name one of these, "
                "or leave it out."
            )
        if type(self.parts) is not int or self.parts < 0 or self.parts == 1:
            raise SettingError(
                f"RepairAware: expected parts to be 0, or a number of at least 2, got {self.parts!r}. Try 4."
            )
        factors = {name: float(factor) for name, factor in dict(self.factors).items()}
        for name, factor in factors.items():
            if not 0 < factor < math.inf:
                raise SettingError(
                    f"RepairAware: expected factors above 0, got {factor!r} for group {name!r}. Write 2.0 "
                    "for a group that should keep more, 0.5 for one that should keep less."
                )
        object.__setattr__(self, "factors", MappingProxyType(factors))

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """The largest allowed sum of errors."""
        if (self.error is None) == (budget is None):
            got = "neither" if budget is None else "both"
            raise SettingError(
                f"RepairAware: expected either an error or a budget, got {got}. "
                "Write RepairAware(error=0.1), or RepairAware() with a budget."
            )
        return self.error

    def for_budget(self, budget: Budget | None) -> RepairAware:
        """The rule that saves what the budget bounds."""
        return replace(self, per=self.per or ("macs" if budget is None else budget.weighs))

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The error that was used, the signal and the cost."""
        error = None if knob is None else float(knob)
        found: dict[str, JsonValue] = {"error": error, "removal": name_of(self.removal), "per": self.per}
        return found | ({"factors": dict(self.factors)} if self.factors else {})

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The knob is the sum of all groups' errors. Each unit is removed at the sum after its removal."""
        if self.parts:
            raise SettingError(
                f"RepairAware: expected factors that were measured, got parts={self.parts}. Pass the rule to "
                "sc.prune or sc.compare, which measure them."
            )
        unknown = sorted(self.factors.keys() - {group.name for group in graph.groups})
        if unknown:
            raise SettingError(
                f"RepairAware: expected factors of groups, got one of {unknown[0]!r}, which is no group. "
                "Name groups as graph.groups does."
            )
        groups = limits.considered(graph.groups)
        orders, errors = [], []
        for group in groups:
            values = vector(scores, self.removal, group)
            orders.append(ascending(values))
            values = values * self.factors.get(group.name, 1.0)
            # Drop the last value, because one unit must stay: a group without units would cut the network.
            errors.append(np.concatenate([np.zeros(1), values[orders[-1]][:-1]]))
        path = _greedy_path(graph, [g.name for g in groups], orders, errors, self.per or "macs")
        gone = np.zeros(len(groups), dtype=np.int64)
        total = 0.0
        sums: list[list[float]] = [[] for _ in groups]
        for g in path:
            total += errors[g][gone[g] + 1] - errors[g][gone[g]]
            gone[g] += 1
            sums[g].append(total)
        return {
            group.name: StepFunction.of(order, np.maximum.accumulate(np.array(at, dtype=np.float64)))
            for group, order, at in zip(groups, orders, sums, strict=True)
        }

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """The predicted error of each group that loses units, and their sum."""
        found: dict[str, JsonValue] = {}
        total = 0.0
        for group in limits.considered(graph.groups):
            removed = decision.removed[group.name]
            if removed:
                values = np.sort(vector(scores, self.removal, group))
                found[group.name] = float(values[removed - 1])
                total += float(values[removed - 1])
        return {"error": found, "sum": total}

    def certificate(self, found: Mapping[str, Any]) -> Certificate:
        """Say which error is predicted to remain after refitting."""
        if not {"error", "sum"} <= found.keys():
            return super().certificate(found)
        errors = found["error"]
        if not errors:
            return Certificate(sentences=("Nothing had to go, so there is nothing to predict.",))
        worst = max(errors, key=errors.__getitem__)
        return Certificate(
            sentences=(
                f"Units went from {len(errors):,} {'layer' if len(errors) == 1 else 'layers'}. After "
                "refitting the layers that read them, the predicted errors add up to "
                f"{share(found['sum'])}; {worst} has the largest, {share(errors[worst])}.",
                "The prediction takes each layer on its own and adds the errors up. How they act together "
                "is what the measured accuracy shows.",
            ),
            note="Error is what is lost of the outputs of all layers that read these units, as a share of "
            "what those outputs go into, when only this layer loses units and its readers are refitted.",
            titles=("layer", "predicted error"),
            rows=tuple((layer, f"{100 * value:.3g} %") for layer, value in errors.items()),
        )


def _greedy_path(
    graph: Graph,
    names: Sequence[str],
    orders: Sequence[NDArray[np.int64]],
    errors: Sequence[NDArray[np.float64]],
    per: Per,
) -> list[int]:
    """Remove one unit after another until each group has one left.

    Args:
        graph: The traced model, for its costs.
        names: Names of the groups.
        orders: The units of each group in their order of removal. [group.size]
        errors: Error of each group after 0, 1, … units are removed. [group.size]
        per: Name of the cost.

    Returns:
        For each removed unit, the index of its group, in order of removal.
    """
    steps = [slopes(curve) for curve in errors]
    keep = {name: np.ones(len(order), dtype=np.bool_) for name, order in zip(names, orders, strict=True)}
    gone = [0] * len(names)
    path: list[int] = []
    interval = getattr(graph.cost(), per) / ROUNDS
    while True:
        now = getattr(graph.cost(keep), per)
        saves: dict[int, float] = {}  # cost that the next unit of each group saves
        for g, (name, order) in enumerate(zip(names, orders, strict=True)):
            if gone[g] < len(steps[g]):
                unit = order[gone[g]]
                keep[name][unit] = False
                saves[g] = max(now - getattr(graph.cost(keep), per), 1e-9 * interval)
                keep[name][unit] = True
        if not saves:
            return path
        # Until a fortieth of the cost is saved, assume that a unit of a group always saves the same.
        waiting = [(steps[g][gone[g]] / saved, g) for g, saved in saves.items()]
        heapq.heapify(waiting)
        saved = 0.0
        while waiting and saved < interval:
            _, g = heapq.heappop(waiting)
            keep[names[g]][orders[g][gone[g]]] = False
            gone[g] += 1
            path.append(g)
            saved += saves[g]
            if gone[g] < len(steps[g]):
                heapq.heappush(waiting, (steps[g][gone[g]] / saves[g], g))
