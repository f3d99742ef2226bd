"""What an allocator vouches for, in words: each kind of certificate is known by what it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.report.words import MINUS, number, shorten

if TYPE_CHECKING:
    from secateur.report.data import Facts


@dataclass(frozen=True)
class Certificate:
    """What the allocator vouches for.

    Attributes:
        words: What it says, a sentence each.
        note: What the table's columns mean.
        titles: Columns of the table.
        rows: Per layer, a cell for each column.
        raw: JSON, where the certificate is of an unknown kind; then there are no words.
    """

    words: tuple[str, ...] = ()
    note: str = ""
    titles: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    raw: str = ""


def certificate(report: Facts) -> Certificate | None:
    """The certificates of the plan in words; None if there are none."""
    found: Mapping[str, Any] = report.certificates
    if not found:
        return None
    for keys, of_group, said in _KINDS:
        groups = found.get("groups", {})
        if keys <= set(found) and all(isinstance(g, Mapping) and of_group <= set(g) for g in groups.values()):
            return said(found)
    return Certificate(raw=json.dumps(found, indent=1, ensure_ascii=False))


def _tolerance(found: Mapping[str, Any]) -> Certificate:
    """Of `ToD`."""
    groups = found["groups"]
    if found["tolerance"] is None:
        return Certificate(words=("Nothing had to go, so there is nothing to vouch for.",))
    tolerance = float(found["tolerance"])
    removed = sum(g["removed"] for g in groups.values())
    overlap = sum(g["overlap"] for g in groups.values())
    bound = sum(g["overlap_bound"] for g in groups.values())
    words = (
        f"Tolerance of Difference {tolerance:.4g}: of the k units that a layer lost, at most "
        f"{100 * tolerance:.3g} % are among the k of that layer that the protection signal values most.",
        f"Over all layers {removed:,} units went; {overlap:,} of them were among those, and "
        f"{bound:,} was the limit.",
    )
    exchange = found.get("exchange")
    compared = exchange["groups"] if isinstance(exchange, Mapping) else {}
    return Certificate(
        words=(*words, *_given_back(groups), *_exchange(exchange), *_constant(found.get("constant"))),
        note=(
            "Score gone and at most are shares of a layer's whole protection score: what went with the "
            "removed units, and the most that this tolerance lets go."
            + (
                " Uniform removes so many units; exchange is what the difference adds to or takes off the "
                "additive loss, in % of the whole network's protection score."
                if compared
                else ""
            )
        ),
        titles=("layer", "removed", "most protected", "limit", "score gone", "at most")
        + (("uniform removes", "exchange") if compared else ()),
        rows=tuple(
            (
                name,
                f"{g['removed']:,}",
                f"{g['overlap']:,}",
                f"{g['overlap_bound']:,}",
                _share(g["mass"]),
                _share(g["mass_bound"]),
                *_exchanged(compared.get(name)),
            )
            for name, g in groups.items()
        ),
    )


def _effective(found: Mapping[str, Any]) -> Certificate:
    """Of `EMP`: the share of the scores that stays, and the least that it could have been."""
    beta, groups, whole = found["beta"], found["groups"], found["whole"]
    if beta is None:
        return Certificate(words=("Nothing had to go, so there is nothing to vouch for.",))
    name = {"model": "the whole model", "row": "each row of each layer"}.get(found["scope"], "each layer")
    words = [
        f"Of {name}, β = {beta:.4g} times the effective number of its scores stays at least.",
        f"In all {whole['kept']:,} of {whole['units']:,} stay, which hold {_share(whole['mass'])} of the "
        "scores"
        + (
            f"; whatever the scores with this effective number ({whole['effective']:,.1f}), "
            f"they had to hold {_share(whole['bound'])}."
            if "bound" in whole
            else "."
        ),
    ]
    own = all("bound" in g for g in groups.values())
    return Certificate(
        words=tuple(words),
        note="Score kept is the share of a layer's scores that stays."
        + (
            " At least is the least that it can be for any scores of the same effective number, of which β "
            "allowed so many to stay; limits and a budget only add to them."
            if own
            else ""
        ),
        titles=("layer", "kept", "of", "score kept")
        + (("effective number", "allowed", "at least") if own else ()),
        rows=tuple(
            (
                layer,
                f"{g['kept']:,}",
                f"{g['units']:,}",
                _share(g["mass"]),
                *((f"{g['effective']:,.1f}", f"{g['allowed']:,}", _share(g["bound"])) if own else ()),
            )
            for layer, g in groups.items()
        ),
    )


def _residual(found: Mapping[str, Any]) -> Certificate:
    """Of `Repairability`: what repair is predicted to leave."""
    residual = found["residual"]
    if not residual:
        return Certificate(words=("Nothing had to go, so there is nothing to predict.",))
    worst = max(residual, key=residual.__getitem__)
    return Certificate(
        words=(
            f"{len(residual):,} {'layer was' if len(residual) == 1 else 'layers were'} each pruned alone, "
            "to several sparsities, and repaired. At what this plan takes, repair is predicted to leave "
            f"{_share(found['sum'] / len(residual))} distortion in the mean, and {_share(residual[worst])} "
            f"in {worst}, the most.",
            "This speaks of each layer on its own. How distortions act together, measured accuracy says.",
        ),
        note="Left after repair is the squared error of the layer's output as a share of its squared size, "
        "with this layer alone pruned.",
        titles=("layer", "left after repair"),
        rows=tuple((layer, _share(value)) for layer, value in residual.items()),
    )


_KINDS: tuple[tuple[set[str], set[str], Callable[[Mapping[str, Any]], Certificate]], ...] = (
    ({"tolerance", "groups"}, {"removed", "overlap", "overlap_bound", "mass", "mass_bound"}, _tolerance),
    ({"beta", "scope", "whole", "groups"}, {"units", "kept", "mass"}, _effective),
    ({"residual", "sum"}, set(), _residual),
)
"""What the certificate has to hold, what each of its groups has to, and what puts it in words."""


def _given_back(groups: Mapping[str, Any]) -> tuple[str, ...]:
    """Units that stay although the tolerance lets them go."""
    kept = sum(g.get("allowed", g["removed"]) - g["removed"] for g in groups.values())
    if not kept:
        return ()
    return (
        f"{kept:,} {'unit' if kept == 1 else 'units'} that this tolerance lets go stayed, to spend the "
        "budget. k counts them too: the limits are those of the tolerance, and fewer units went.",
    )


def _exchange(found: Any) -> tuple[str, ...]:
    """The comparison with uniform, and what it assumes."""
    if not isinstance(found, Mapping) or found.get("loss") is None:
        return ()
    own, other = found["macs"]
    loss, before = found["loss"], found["other_loss"]
    outcome = "lowers" if loss < before else "raises" if loss > before else "leaves"
    return (
        f"Uniform pruning by the same removal signal within the same budget leaves {number(other)} MACs "
        f"({number(own)} here). Against it, this plan removes units that hold {_share(found['taken'])} of "
        f"the network's protection score, and keeps units that hold {_share(found['spared'])}. That exchange "
        f"{outcome} the protection score removed "
        + (f"from {_share(before)} to {_share(loss)}." if outcome != "leaves" else f"at {_share(loss)}."),
        "This speaks of damage as far as damage adds up over the removed units and protection scores "
        "measure it on one scale in all layers: no interplay between units, no repair. Measured accuracy "
        "decides.",
    )


def _exchanged(found: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The cells of one layer: what uniform removes, and what the difference does to the additive loss."""
    if found is None:
        return ()
    removed = f"{found['other_removed']:,}"
    if found["taken"] is None:
        return removed, "–"
    change = 100 * (found["taken"] - found["spared"])
    sign = "+" if change > 0 else MINUS if change < 0 else "±"
    return removed, f"{sign}{abs(change):.2f}"


def _constant(found: Any) -> tuple[str, ...]:
    """Layers whose units a signal cannot tell apart."""
    if not found:
        return ()
    signals = sorted({signal for flat in found.values() for signal in flat})
    return (
        f"In {shorten(found)} every unit has the same score from {' and '.join(signals)}: how many units "
        "went there follows from their position, not from what they are worth.",
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
