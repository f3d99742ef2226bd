"""Compare in words what was asked for with what was achieved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.allocators.budget import CONDITIONS, QUALITY
from secateur.common.formatting import MINUS, milliseconds, number, percent, plain
from secateur.report.sentences import rule

if TYPE_CHECKING:
    from secateur.report.data import Facts


@dataclass(frozen=True)
class Outcome:
    """One thing that was asked for, and what was achieved.

    Attributes:
        what: Its name, for example ``MACs``.
        asked: What was asked for, in words.
        achieved: What was achieved, in words.
    """

    what: str
    asked: str
    achieved: str


def outcomes(report: Facts) -> tuple[Outcome, ...]:
    """Return what was asked for and what was achieved: budget, allocator, repair and form."""
    budget = report.asked.get("budget")
    found = []
    if isinstance(budget, Mapping):
        found = [
            Outcome(_display_name(name), _bound(name, value), _achieved(name, report))
            for name, value in _bounds(budget)
        ]
    if not found:
        found = [Outcome("budget", "none, the allocator decides", f"MACs {_achieved('macs', report)}")]
    asked_for = str(report.asked.get("allocator"))
    chosen = report.selection.candidates[0].name if report.selection else report.rule or asked_for
    setting = rule(report).setting
    parts = [chosen] if report.selection or setting not in report.settings else []
    if setting in report.settings:
        parts.append(f"{setting} {_setting(report.settings[setting], solved=bool(budget))}")
    found.append(Outcome("allocator", asked_for, ", ".join(parts)))
    kept = [str(entry["method"]) for entry in report.repairs if entry["kept"]]
    found.append(Outcome("repair", _repair(report), ", ".join(kept) or "nothing kept"))
    if "form" in report.asked:
        found.append(Outcome("form", str(report.asked["form"]), report.form))
    return tuple(found)


_NAMES = {
    "macs": "MACs",
    "params": "parameters",
    "accuracy_drop": "drop of the accuracy",
    "loss_rise": "rise of the loss",
    "perplexity_rise": "rise of the perplexity",
}


def _display_name(name: str) -> str:
    return _NAMES.get(name, name)


def _bounds(budget: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The bounds of a budget, without what says how they are met."""
    return [(name, value) for name, value in budget.items() if name != "spend" and name not in CONDITIONS]


def _bound(name: str, value: Any) -> str:
    """Say in words what a budget demands of one quantity."""
    if name == "sparsity":
        return f"at least {100 * value:g} % of the weights of linear layers and convolutions zero"
    if name in QUALITY:
        allowed = f"{100 * value:g} {'points' if name == 'accuracy_drop' else '%'}"
        return f"at most {allowed} {_display_name(name)}"
    if isinstance(value, str):
        return f"at most {value} {_display_name(name)}"
    amount = f"{value:,}" if isinstance(value, int) else f"{100 * value:g} % of the"
    if name == "memory" and isinstance(value, int):
        amount += " bytes of"
    return f"at most {amount} {_display_name(name)}"


def _achieved(name: str, report: Facts) -> str:
    dense, best = report.figures[0], report.figures[-1]
    kept, total = (sum(getattr(layer, which) for layer in report.layers) for which in ("kept", "total"))
    if name == "macs":
        return f"{number(best.macs)} of {number(dense.macs)}, {percent(best.macs, dense.macs)}"
    if name == "params":
        return f"{number(best.params)} of {number(dense.params)}, {percent(best.params, dense.params)}"
    if name == "sparsity":
        share = percent(dense.params - best.params, dense.params)
        return f"{percent(total - kept, total)} of these weights zero, {share} of all parameters"
    if name in ("experts", "blocks"):
        return f"{number(kept)} of {number(total)}, {percent(kept, total)}"
    met = report.settings.get("met")
    reading = met.get(name) if isinstance(met, Mapping) else None
    if isinstance(reading, Mapping) and "shown" in reading:
        return str(reading["shown"])
    if isinstance(reading, Mapping) and "at_most" in reading:
        value, most = (_damage(name, reading.get(key)) for key in ("value", "at_most"))
        return f"{value} measured, at most {most} ({_sure(report)})"
    if name == "latency" and dense.latency is not None and best.latency is not None:
        share = percent(best.latency, dense.latency)
        return f"{milliseconds(best.latency)} of {milliseconds(dense.latency)}, {share}"
    return "–"


def _met(report: Facts) -> list[tuple[str, str]]:
    """The conditions of measured bounds, and what met them."""
    budget, met = report.asked.get("budget"), report.settings.get("met")
    found = (
        [(n, plain(v)) for n, v in budget.items() if n in CONDITIONS] if isinstance(budget, Mapping) else []
    )
    if isinstance(met, Mapping):
        found += [(n.replace("_", " "), plain(v)) for n, v in met.items() if not isinstance(v, Mapping)]
    return found


def _damage(name: str, value: Any) -> str:
    size = f"{100 * value:.2f}" if isinstance(value, int | float) else "not finite"
    return f"{size} {'points' if name == 'accuracy_drop' else '%'}".replace("-", MINUS)


def _sure(report: Facts) -> str:
    budget = report.asked.get("budget")
    asked = budget.get("confidence") if isinstance(budget, Mapping) else None
    return f"{100 * (asked if isinstance(asked, float) else 0.95):g} %"


def settings(report: Facts) -> tuple[tuple[str, str], ...]:
    """Return name and value of all settings: those that were given, and those that were solved for."""
    budget = report.asked.get("budget")
    found = [("allocator", str(report.asked.get("allocator"))), ("budget", _budget(budget))]
    if report.selection:
        found.insert(1, ("chosen", report.selection.candidates[0].name))
    solved = rule(report).setting if budget else ""
    for name, value in report.settings.items():
        if name not in ("limits", "met"):
            found.append((name, _setting(value, solved=name == solved)))
    found += _met(report)
    limits = report.settings.get("limits")
    if isinstance(limits, Mapping):
        found += [(name, _setting(value)) for name, value in limits.items() if value not in ([], None)]
    others = {
        name: value for name, value in report.asked.items() if name not in ("allocator", "budget", "seed")
    }
    found += [(name, _setting(value)) for name, value in others.items()]
    found += [(f"{name} scored", f"{count:,}") for name, count in report.calibration.items()]
    found.append(("seed", str(report.asked.get("seed"))))
    return tuple(found)


def asked(report: Facts) -> str:
    """Return budget, allocator and repair as one phrase."""
    budget = report.asked.get("budget")
    wanted = _budget(budget) if budget else "no budget"
    return f"{wanted}, allocator {report.asked.get('allocator')}, repair {_repair(report)}"


def _repair(report: Facts) -> str:
    repair = report.asked.get("repair")
    if repair is None:
        return "none"
    return ", ".join(map(str, repair)) if isinstance(repair, list) else str(repair)


def _budget(budget: Any) -> str:
    if not isinstance(budget, Mapping) or not budget:
        return "none, the allocator decided"
    return " and ".join(_bound(name, value) for name, value in _bounds(budget)) + (
        ", as far as the rule's knob alone goes" if budget.get("spend") is False else ""
    )


def _setting(value: Any, *, solved: bool = False) -> str:
    if value is None and solved:
        return "not needed, nothing had to go"
    return f"{plain(value)}, solved for the budget" if solved else plain(value)
