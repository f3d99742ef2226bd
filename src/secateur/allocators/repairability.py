"""Relative repairability: layers lose more if repair can compensate for the removal.

Source: Relative Repairability, arXiv 2605.25508. We know only its abstract, which defines the ratio. The way
    from
the ratio to densities is ours; see `Repairability`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.decision import Decision
from secateur.allocators.description import Certificate
from secateur.allocators.distortion import Distortion
from secateur.allocators.limits import Limits
from secateur.allocators.naming import matching, shorten
from secateur.allocators.ranking import ascending
from secateur.allocators.signals import ScoreTable, vector
from secateur.allocators.step_function import StepFunction
from secateur.common.formatting import share
from secateur.errors import SettingError
from secateur.graph.groups import Group, WeightGroup
from secateur.signals.units.combination import SignalLike, name_of

if TYPE_CHECKING:
    from secateur.graph.graph import Graph


Per = Literal["unit", "macs", "params"]


@dataclass(frozen=True)
class Repairability(Allocator):
    r"""Prunes each layer up to the sparsity where one more weight would cost the same error in every layer.

    .. math:: \min_s \sum_l \frac{D_{rep,l}(s_l)}{V_l}
              \quad\text{for given}\quad \sum_l N_l c_l s_l

    D_rep,l(s) is the error of layer l's outputs at sparsity s after repair. Its slope is the price of
    sparsity. λ is solved for the budget. Layer l with N_l weights loses weights as long as
    ``D_rep,l'(s) / (V_l · N_l · c_l) <= λ``. Since D_rep = RR · D_raw, of two layers with the same error
    before repair (D_raw) the one that repair helps less (higher RR) keeps more. V_l is the variance of the
    layer's outputs, D_rep(1). Dividing by it counts a fully lost layer as 1, however large the mean of its
    outputs is. In each layer the lowest scores are removed. Assumption: the errors of layers, measured one
    layer at a time, add up.

    For units (channels, neurons, heads), the outputs are those of all layers that read the group, and each
    layer
    counts: a unit that ten layers read is missing in ten. c_l is the cost of one unit while everything else
        stays. A
    single weight costs 1.

    Source: RR is from Relative Repairability, arXiv 2605.25508; the rest is ours. The curve is replaced by
        its lower
    convex hull; otherwise the sparsity of a layer would jump.

    Attributes:
        curves: `Distortion` of each weight tensor or group of units, by name. None: `sc.prune` measures them.
        removal: Signal whose lowest scores are removed first. The curves must be measured with the same
            signal.
        dense: Layers that are not pruned, as shell patterns, for example ``("*downsample*",)``, or the result
            of `secateur.targets.weights.projections`.
        along: Layers that lose the same share as all other layers together, as shell patterns. They need no
            curves.
        per: The cost c_l of a unit: its ``macs``, its ``params``, or 1 for each ``unit``. None: ``params``
            where the budget bounds parameters and not MACs, else ``macs``.

    Raises:
        SettingError: `per` is none of these. On `allocate`: there is no budget, a layer has no curve, or a
            pattern matches nothing.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> from secateur.targets import weights as masks
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> weights = sc.trace(net, granularity="weight")
        >>> scores = sc.score(weights)
        >>> data = [torch.randn(20, 4) for _ in range(5)]
        >>> curves = masks.distortions(net, data, scores["magnitude"], progress=False)
        >>> plan = sc.Repairability(curves).allocate(weights, scores, sc.Budget(sparsity=0.5))
        >>> sorted(plan.certificates["residual"])
        ['0.weight', '2.weight']
    """

    curves: Mapping[str, Distortion] | None = None
    removal: SignalLike = "magnitude"
    dense: tuple[str, ...] = ()
    along: tuple[str, ...] = ()
    per: Per | None = None
    name: ClassVar[str] = "repairability"
    solved: ClassVar[str] = "price"

    def __post_init__(self) -> None:
        """Check the values."""
        if self.per not in (None, *get_args(Per)):
            raise SettingError(
                f"Repairability: expected per to be 'unit', 'macs' or 'params', got {self.per!r}. "
                "Name one of these, or leave it out."
            )

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The removal signal."""
        return (self.removal,)

    def knob(self, budget: Budget | None) -> float | None:
        """None: only a budget can decide."""
        if budget is None:
            raise SettingError(
                "Repairability: expected a budget, got none. Write Budget(sparsity=0.9), for example."
            )
        return None

    def for_budget(self, budget: Budget | None) -> Repairability:
        """The rule that saves what the budget bounds."""
        return replace(self, per=self.per or ("macs" if budget is None else budget.weighs))

    def settings(self, knob: float | None) -> dict[str, JsonValue]:
        """The price λ that was used, and the allocator's own settings."""
        return {
            "price": None if knob is None else float(knob),
            "removal": name_of(self.removal),
            "dense": list(self.dense),
            "along": list(self.along),
            "per": self.per,
        }

    def steps(self, graph: Graph, scores: ScoreTable, limits: Limits) -> Mapping[str, StepFunction]:
        """Unit i of N in the removal order goes from λ = price(at sparsity (i + 1) / N) / (N · cost) on."""
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
        """The cost that removing one unit of a group saves while everything else stays; above 0."""
        if self.per == "unit" or isinstance(group, WeightGroup):
            return 1.0
        dense, fewer = graph.cost(), graph.cost({group.name: np.arange(group.size) > 0})
        per = self.per or "macs"
        return float(max(1, getattr(dense, per) - getattr(fewer, per)))

    def certificates(
        self, graph: Graph, scores: ScoreTable, limits: Limits, decision: Decision
    ) -> dict[str, JsonValue]:
        """The predicted error after repair, D_rep, of each layer that loses weights, and the sum of these."""
        residual = {
            name: self._distortion(name).residual(decision.removed[name] / len(function.order))
            for name, function in decision.steps.items()
            if decision.removed[name] and self.curves is not None and name in self.curves
        }
        return {"residual": dict(residual), "sum": sum(residual.values())}

    def certificate(self, found: Mapping[str, Any]) -> Certificate:
        """Say which error is predicted to remain after repair."""
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
                "secateur.targets.weights.distortions, or of units secateur.allocators.unit_distortions; "
                "what no layer reads has none: ignore it by Limits(ignore=...)."
            )
        return self.curves[name]


def _along(others: Sequence[StepFunction], order: NDArray[np.int64]) -> StepFunction:
    """Step function of a group that loses the same share, rounded down, as several others together.

    Args:
        others: Step functions of the other groups.
        order: Units of this group in their order of removal. [group.size]
    """
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
