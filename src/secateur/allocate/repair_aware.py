"""The rule that knows what repair can undo."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocate.base import Allocator
from secateur.allocate.budget import Budget
from secateur.allocate.decision import Decision
from secateur.allocate.description import Certificate
from secateur.allocate.hull import slopes
from secateur.allocate.limits import Limits
from secateur.allocate.ranking import ascending
from secateur.allocate.signals import ScoreTable, vector
from secateur.allocate.step_function import StepFunction
from secateur.errors import SettingError
from secateur.formatting import share
from secateur.score.combination import Asked, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph

Per = Literal["macs", "params"]

ROUNDS = 40
"""How often, on the way to nothing, the units' costs are taken anew."""


@dataclass(frozen=True)
class RepairAware(Allocator):
    r"""Removes where the error that refitting leaves is smallest for what the removal saves.

    .. math:: \min_k \sum_g E_g(k_g) \quad\text{for given}\quad C(k_1, k_2, \dots)

    E_g(k) is what the ``reconstruction`` signal says of group g without its k most replaceable units: how
    much of what the group's consumers compute is lost for good, however they are refitted, relative to what
    their outputs go into. C is the cost of the network, in which each group's units cost the more, the
    more units their neighbours keep. The programme is followed from the dense network down: always the unit
    goes that adds the least error for the cost it saves, on the lower convex hulls of the curves, with costs
    that are taken anew each time a fortieth of the network is gone. So every budget is a prefix of one path.
    Were costs independent of each other, each point of it would be the exact minimum for its cost. That
    errors of groups add up is the assumption. No labels are needed. Repair with ``reconstruct`` afterwards.

    Source: ours; the elimination behind the signal is Hassibi and Stork's (1993).

    Attributes:
        error: The sum of the groups' errors to stop before. None if a budget decides.
        removal: The signal whose scores are errors, in one unit for all groups.
        per: What a unit costs: ``macs`` or ``params``.

    Raises:
        SettingError: A setting is none of these; on `allocate`, both or neither of error and budget is given.

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
    removal: Asked = "reconstruction"
    per: Per = "macs"
    name: ClassVar[str] = "repair_aware"
    solved: ClassVar[str] = "error"

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.error is not None and not self.error > 0:
            raise SettingError(f"RepairAware: expected an error above 0, got {self.error!r}. Give 0.1, say.")
        if self.per not in get_args(Per):
            raise SettingError(
                f"RepairAware: expected per to be 'macs' or 'params', got {self.per!r}. Name one of these."
            )

    @property
    def signals(self) -> tuple[Asked, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """The error."""
        if (self.error is None) == (budget is None):
            got = "neither" if budget is None else "both"
            raise SettingError(
                f"RepairAware: expected either an error or a budget, got {got}. "
                "Write RepairAware(error=0.1), or RepairAware() with a budget."
            )
        return self.error

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The error that decided, the signal and the cost."""
        error = None if knob is None else float(knob)
        return {"error": error, "removal": name_of(self.removal), "per": self.per}

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """Each unit goes when the sum of all groups' errors reaches what it is with this unit gone."""
        groups = limits.considered(graph.groups)
        orders, errors = [], []
        for group in groups:
            values = vector(scores, self.removal, group)
            orders.append(ascending(values))
            # One unit stays: a group without any would cut the network.
            errors.append(np.concatenate([np.zeros(1), values[orders[-1]][:-1]]))
        path = _path(graph, [g.name for g in groups], orders, errors, self.per)
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
        """The error that refitting is predicted to leave."""
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


def _path(
    graph: Graph,
    names: Sequence[str],
    orders: Sequence[NDArray[np.int64]],
    errors: Sequence[NDArray[np.float64]],
    per: Per,
) -> list[int]:
    """The groups in the order in which they lose units, until each has one.

    Args:
        graph: What the costs are of.
        names: Of the groups.
        orders: The units of each group in the order in which they go. [group.size]
        errors: Of each group after 0, 1, … units are gone. [group.size]
        per: The cost.
    """
    steps = [slopes(curve) for curve in errors]
    keep = {name: np.ones(len(order), dtype=np.bool_) for name, order in zip(names, orders, strict=True)}
    gone = [0] * len(names)
    path: list[int] = []
    interval = getattr(graph.cost(), per) / ROUNDS
    while True:
        now = getattr(graph.cost(keep), per)
        saves: dict[int, float] = {}
        for g, (name, order) in enumerate(zip(names, orders, strict=True)):
            if gone[g] < len(steps[g]):
                unit = order[gone[g]]
                keep[name][unit] = False
                saves[g] = max(now - getattr(graph.cost(keep), per), 1e-9 * interval)
                keep[name][unit] = True
        if not saves:
            return path
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
