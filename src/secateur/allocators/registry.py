"""The allocators by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from secateur.allocators.base import Allocator
from secateur.allocators.budget import Budget
from secateur.allocators.description import Description, listed
from secateur.allocators.emp import EMP
from secateur.allocators.erk import ERK
from secateur.allocators.global_ranking import Global
from secateur.allocators.lamp import LAMP
from secateur.allocators.limits import Limits
from secateur.allocators.owl import OWL
from secateur.allocators.ratios import Ratios
from secateur.allocators.repair_aware import RepairAware
from secateur.allocators.repairability import Repairability
from secateur.allocators.signals import ScoreTable
from secateur.allocators.tod import ToD
from secateur.allocators.uniform import Uniform
from secateur.errors import SettingError
from secateur.signals.scores import Scores
from secateur.signals.units.combination import SignalLike

if TYPE_CHECKING:
    from secateur.graph.graph import Graph
    from secateur.plan import Plan


@runtime_checkable
class Allocates(Protocol):
    """The interface of an allocator. `Allocator` has it, and a user's own class can have it too."""

    @property
    def signals(self) -> tuple[SignalLike, ...]:
        """The signals whose scores the allocator needs."""

    def allocate(
        self,
        graph: Graph,
        scores: Scores | ScoreTable,
        budget: Budget | None = None,
        limits: Limits | None = None,
        seed: int = 0,
    ) -> Plan:
        """Decide which units are removed."""


RULES: Mapping[str, Allocator] = MappingProxyType(
    {
        "tod": ToD(),
        "emp": EMP(),
        "uniform": Uniform(),
        "global": Global(),
        "flap": Global(normalise="zscore", removal="fluctuation"),
        "erk": ERK(),
        "lamp": LAMP(),
        "owl": OWL(),
        "repairability": Repairability(),
        "repair_aware": RepairAware(),
        "ratios": Ratios(),
        "random": Uniform(removal="random"),
    }
)
"""All allocators by name, with default settings. A new allocator is one file and one line here."""


def names() -> tuple[str, ...]:
    """The names that `resolve` knows."""
    return tuple(sorted(RULES))


def resolve(allocator: str | Allocates, also: tuple[str, ...] = ()) -> Allocates:
    """Return the allocator with this name and its default settings; return an allocator unchanged.

    Args:
        allocator: A name, or an object with `signals` and `allocate`.
        also: Other names that the caller accepts, for the error message.

    Raises:
        SettingError: The name is unknown, or the object is no allocator.

    Example:
        >>> resolve("tod")
        ToD(tolerance=0.1, removal='wasserstein', protection='taylor')
    """
    known = ", ".join(repr(name) for name in sorted((*names(), *also)))
    if isinstance(allocator, str):
        if allocator not in RULES:
            raise SettingError(f"allocator: expected one of {known}, got {allocator!r}. Name one of these.")
        return RULES[allocator]
    if isinstance(allocator, type) or not isinstance(allocator, Allocates):
        raise SettingError(
            f"allocator: expected a name ({known}) or an object with signals and allocate(graph, scores, "
            f"...), got {allocator!r}. Pass an instance, ToD(tolerance=0.1) for example."
        )
    return allocator


def describe(name: str, certificates: Mapping[str, Any], rule: object = None) -> Description:
    """Describe an allocator's decision for a report.

    Args:
        name: The allocator's name in the plan.
        certificates: The plan's certificates.
        rule: The allocator itself, if known. Otherwise the one with this name describes the decision. If the
            name is unknown, the certificates are only listed.
    """
    known = rule if isinstance(rule, Allocator) else RULES.get(name)
    if known is not None:
        return known.describe(certificates)
    return Description(certificate=listed(certificates) if certificates else None)
