"""What removing these units rather than those changes, if damage adds up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from secateur.allocate.step_function import StepFunction
from secateur.formatting import MINUS, number, share


def exchange(
    protection: Mapping[str, NDArray[np.float64]],
    steps: Mapping[str, StepFunction],
    ours: Mapping[str, int],
    theirs: Mapping[str, int],
) -> dict[str, JsonValue]:
    """Compares two removals that take units of each group in the same order, under an additive loss.

    Assumption, the additive model: the damage of a removal is the sum of the protection scores of the
    removed units, so protection scores of different groups are in one unit. To first order that is so for
    `taylor`, a bound on the change of the loss.

    Both removals take the first units of one order, so in each group one contains the other. Theirs
    becomes ours by exchanging units: where we take more, the further ones go (*taken*), where we take
    fewer, the last ones of theirs stay (*spared*). So

        loss(ours) = loss(theirs) + taken - spared,

    with taken and spared summed over all groups. It is an identity, whatever the scores; ours is the
    better removal, under the assumption, if and only if what is spared outweighs what is taken.

    Args:
        protection: Per group, higher is worth more. [group.size]
        steps: Per group the order in which units go.
        ours: Per group the number of units that go.
        theirs: The same for what it is compared with.

    Returns:
        ``loss``, ``other_loss``, ``taken`` and ``spared`` as shares of the sum of all protection scores,
        and per group the same; None where shares have no meaning: a score is negative, or all are zero.
        Per group also ``other_removed``, in units.
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
    """The comparison with `Uniform`, and what it assumes; nothing where no shares are known.

    Args:
        found: What `exchange` returned, with ``macs`` of both.
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
    """What `Uniform` removes from one layer, and what the difference does to the additive loss."""
    removed = f"{found['other_removed']:,}"
    if found["taken"] is None:
        return removed, "–"
    change = 100 * (found["taken"] - found["spared"])
    sign = "+" if change > 0 else MINUS if change < 0 else "±"
    return removed, f"{sign}{abs(change):.2f}"
