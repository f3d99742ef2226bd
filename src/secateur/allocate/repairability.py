"""Relative repairability: sparsity goes to layers whose damage can be repaired.

Source: Relative Repairability, arXiv 2605.25508, known here from its abstract, which defines the diagnostic.
How it becomes densities is our own choice; see `Repairability`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocate.base import Allocator
from secateur.allocate.budget import Budget
from secateur.allocate.decision import Decision
from secateur.allocate.description import Certificate
from secateur.allocate.distortion import Distortion
from secateur.allocate.limits import Limits
from secateur.allocate.naming import matching, shorten
from secateur.allocate.ranking import ascending
from secateur.allocate.signals import ScoreTable, vector
from secateur.allocate.step_function import StepFunction
from secateur.errors import SettingError
from secateur.formatting import share
from secateur.graph.groups import Group
from secateur.graph.weight import WeightGroup
from secateur.score.combination import Asked, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


Per = Literal["unit", "macs", "params"]


@dataclass(frozen=True)
class Repairability(Allocator):
    r"""Every layer is pruned up to the sparsity at which one more weight loses the same share of the layer.

    .. math:: \min_s \sum_l \frac{D_{rep,l}(s_l)}{V_l}
              \quad\text{for given}\quad \sum_l N_l c_l s_l

    The residual that repair leaves is the price of sparsity. With λ the price, solved for the budget, layer l
    of N weights loses weights while ``D_rep,l'(s) / (V_l · N_l · c_l) <= λ``. D_rep = RR · D_raw, so of two
    layers with the same raw damage the one with the higher RR, whose damage repair leaves, is kept denser.
    V_l is the variance of the layer's outputs, D_rep(1): the share counts a layer that is lost as lost,
    however large the mean of its outputs. The curves are measured on one layer at a time; that shares of
    layers add up is the assumption. The lowest scores of each layer go.

    Of units (channels, neurons, heads) the outputs are those of the layers that read the group, each of which
    counts: a unit of a stream that ten layers read is lost to ten. c_l is what one unit costs while
    everything else stays; a single weight costs one.

    Source: the diagnostic is that of Relative Repairability, arXiv 2605.25508; the mapping is ours. The curve
    is replaced by its lower convex hull, without which layers would jump.

    Attributes:
        curves: Per weight tensor, or group of units, its `Distortion`; None: `sc.prune` measures them.
        removal: Signal whose lowest scores go first; that of the curves.
        dense: Forced out: layers whose name matches one of these shell patterns stay as they are, projections
            for instance: ``("*downsample*",)``, or what `secateur.masks.projections` finds.
        along: Forced in: layers whose name matches one of these lose the share that all others lose together,
            whatever their own curves say; they need none.
        per: What a unit costs, c_l: its ``macs``, its ``params``, or one for each ``unit``.

    Raises:
        SettingError: `per` is none of these; on `allocate`: there is no budget, a layer has no curve, or a
            pattern matches nothing.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> from secateur import masks
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> weights, scores = masks.Weights.of(net), masks.score(net)
        >>> data = [torch.randn(20, 4) for _ in range(5)]
        >>> curves = masks.distortions(net, data, scores["magnitude"], progress=False)
        >>> plan = masks.allocate(weights, scores, sc.Repairability(curves), sc.Budget(sparsity=0.5))
        >>> sorted(plan.certificates["residual"])
        ['0.weight', '2.weight']
    """

    curves: Mapping[str, Distortion] | None = None
    removal: Asked = "magnitude"
    dense: tuple[str, ...] = ()
    along: tuple[str, ...] = ()
    per: Per = "macs"
    name: ClassVar[str] = "repairability"
    solved: ClassVar[str] = "price"

    def __post_init__(self) -> None:
        """Checks the values."""
        if self.per not in get_args(Per):
            raise SettingError(
                f"Repairability: expected per to be 'unit', 'macs' or 'params', got {self.per!r}. "
                "Name one of these."
            )

    @property
    def signals(self) -> tuple[Asked, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """None: a budget decides."""
        if budget is None:
            raise SettingError(
                "Repairability: expected a budget, got none. Write Budget(sparsity=0.9), for example."
            )
        return None

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The price λ that decided, and what was set."""
        return {
            "price": None if knob is None else float(knob),
            "removal": name_of(self.removal),
            "dense": list(self.dense),
            "along": list(self.along),
            "per": self.per,
        }

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """The unit at place i of N goes from λ = price(at sparsity (i + 1) / N) / (N · cost) on."""
        groups = limits.considered(graph.groups)
        held, forced = _matching("dense", self.dense, groups), _matching("along", self.along, groups)
        found = {}
        for group in groups:
            if group.name in held | forced:
                continue
            count = np.arange(1, group.size, dtype=np.int64)
            whole = group.size * self._cost(graph, group)
            price = self._distortion(group.name).price(count / group.size) / whole
            found[group.name] = StepFunction.of(ascending(vector(scores, self.removal, group)), price)
        others = list(found.values())
        for group in groups:
            if group.name in forced - held:
                found[group.name] = _along(others, ascending(vector(scores, self.removal, group)))
        return found

    def _cost(self, graph: Graph, group: Group) -> float:
        """What one unit of a group costs while everything else stays; above 0."""
        if self.per == "unit" or isinstance(group, WeightGroup):
            return 1.0
        one = np.arange(group.size) > 0
        return float(
            max(1, getattr(graph.cost(), self.per) - getattr(graph.cost({group.name: one}), self.per))
        )

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """The predicted residual of each layer that loses weights, pruned alone: D_rep; and their sum."""
        residual = {
            name: self._distortion(name).residual(decision.removed[name] / len(function.order))
            for name, function in decision.steps.items()
            if decision.removed[name] and self.curves is not None and name in self.curves
        }
        return {"residual": dict(residual), "sum": sum(residual.values())}

    def certificate(self, found: Mapping[str, Any]) -> Certificate:
        """What repair is predicted to leave."""
        if not {"residual", "sum"} <= found.keys():
            return super().certificate(found)
        residual = found["residual"]
        if not residual:
            return Certificate(sentences=("Nothing had to go, so there is nothing to predict.",))
        worst = max(residual, key=residual.__getitem__)
        return Certificate(
            sentences=(
                f"{len(residual):,} {'layer was' if len(residual) == 1 else 'layers were'} each pruned "
                "alone, to several sparsities, and repaired. At what this plan takes, repair is predicted "
                f"to leave {share(found['sum'] / len(residual))} distortion in the mean, and "
                f"{share(residual[worst])} in {worst}, the most.",
                "This speaks of each layer on its own. How distortions act together, measured accuracy says.",
            ),
            note="Left after repair is the squared error of the layer's output as a share of its squared "
            "size, with this layer alone pruned.",
            titles=("layer", "left after repair"),
            rows=tuple((layer, share(value)) for layer, value in residual.items()),
        )

    def _distortion(self, name: str) -> Distortion:
        if self.curves is None or name not in self.curves:
            got = "none" if self.curves is None else f"only {shorten(self.curves)}"
            raise SettingError(
                f"Repairability: expected a curve of {name!r}, got {got}. Measure them with "
                "secateur.masks.distortions, or of units secateur.allocate.unit_distortions; what no layer "
                "reads has none: ignore it by Limits(ignore=...)."
            )
        return self.curves[name]


def _along(others: Sequence[StepFunction], order: NDArray[np.int64]) -> StepFunction:
    """A group that loses the share that others lose together, rounded down."""
    knob = np.concatenate([function.knob for function in others] or [np.empty(0)])
    went = np.concatenate(
        [np.diff(function.count, prepend=0) for function in others] or [np.empty(0, dtype=np.int64)]
    )
    when = np.argsort(knob, kind="stable")
    at, last = np.unique(knob[when][::-1], return_index=True)
    gone = went[when].cumsum()[::-1][last]
    count = np.minimum(gone * len(order) // max(1, sum(len(s.order) for s in others)), len(order) - 1)
    changes = np.diff(count, prepend=0) > 0
    return StepFunction(order, at[changes], count[changes])


def _matching(setting: str, patterns: Iterable[str], groups: Sequence[Group]) -> set[str]:
    where = f"Repairability: expected each pattern of {setting} to match a weight or a group"
    return {group.name for pattern in patterns for group in matching(where, pattern, groups)}
