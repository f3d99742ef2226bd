"""Compare two removals of units, under the assumption that the damage of removed units adds up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocators.step_function import StepFunction
from secateur.common.formatting import MINUS, number, share


def exchange(
    protection: Mapping[str, NDArray[np.float64]],
    steps: Mapping[str, StepFunction],
    ours: Mapping[str, int],
    theirs: Mapping[str, int],
) -> dict[str, JsonValue]:
    """Compare two removals that remove the units of each group in the same order.

    Assumption (the additive model): the damage of a removal is the sum of the protection scores of its units.
        So
    protection scores of different groups must have the same unit. To first order this is true for `taylor`,
    which bounds the change of the loss.

    Both removals take the first units of the same order, so in each group one removal contains the other. In
    a group where `ours` removes more units, the additional ones are *taken*. In a group where it removes
    fewer, the difference is *spared*. Summed over all groups,

        loss(ours) = loss(theirs) + taken - spared.

    This holds for any scores. Under the assumption, `ours` is better exactly if `spared` is larger than
    `taken`.

    Args:
        protection: Protection scores of each group, higher is worth more. [group.size]
        steps: Step function of each group, for the order of removal.
        ours: Number of units that the first removal takes from each group.
        theirs: Number of units that the second removal takes from each group.

    Returns:
        ``loss``, ``other_loss``, ``taken`` and ``spared``, as shares of the sum of all protection scores, in
        total and for each of ``groups``. They are None if a score is negative or all scores are zero, because
        shares have no meaning then. For each group also ``other_removed``, a number of units.
    """
    top = max((float(values.max()) for values in protection.values()), default=0.0)
    known = top > 0 and all(values.min() >= 0 for values in protection.values())
    total = math.fsum(v / top for values in protection.values() for v in values) if known else 1.0

    def share(name: str, start: int, stop: int) -> float | None:
        units = steps[name].order[start:stop]
        return math.fsum(protection[name][units] / top) / total if known else None

    groups: dict[str, dict[str, JsonValue]] = {}
    for name in steps:
        a, b = ours[name], theirs[name]
        groups[name] = {
            "other_removed": b,
            "loss": share(name, 0, a),
            "other_loss": share(name, 0, b),
            "taken": share(name, b, a),
            "spared": share(name, a, b),
        }

    def whole(key: str) -> float | None:
        return math.fsum(g[key] for g in groups.values()) if known else None  # type: ignore[misc]  # floats, if known

    totals: dict[str, JsonValue] = {key: whole(key) for key in ("loss", "other_loss", "taken", "spared")}
    return totals | {"groups": {name: dict(found) for name, found in groups.items()}}


def sentences(found: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences for a report: the comparison with `Uniform`, and its assumption. Empty if shares are None.

    Args:
        found: The result of `exchange`, with ``macs``: the MACs of both plans.
    """
    if found.get("loss") is None:
        return ()
    own, other = found["macs"]
    loss, before = found["loss"], found["other_loss"]
    outcome = "lowers" if loss < before else "raises" if loss > before else "leaves"
    return (
        f"Uniform pruning by the same removal signal within the same budget leaves {number(other)} MACs "
        f"({number(own)} here). Against it, this plan removes units that hold {share(found['taken'])} of "
        f"the network's protection score, and keeps units that hold {share(found['spared'])}. That exchange "
        f"{outcome} the protection score removed "
        + (f"from {share(before)} to {share(loss)}." if outcome != "leaves" else f"at {share(loss)}."),
        "This speaks of damage as far as damage adds up over the removed units and protection scores "
        "measure it on one scale in all layers: no interplay between units, no repair. Measured accuracy "
        "decides.",
    )


def cells(found: Mapping[str, Any]) -> tuple[str, str]:
    """Two table cells for a layer: units that `Uniform` removes, and the change of the loss in %."""
    removed = f"{found['other_removed']:,}"
    if found["taken"] is None:
        return removed, "–"
    change = 100 * (found["taken"] - found["spared"])
    sign = "+" if change > 0 else MINUS if change < 0 else "±"
    return removed, f"{sign}{abs(change):.2f}"
