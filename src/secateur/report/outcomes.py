"""Compare in words what was asked for with what was achieved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.common.formatting import milliseconds, number, percent, plain
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
            for name, value in budget.items()
            if name != "spend"
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


def _display_name(name: str) -> str:
    return {"macs": "MACs", "params": "parameters"}.get(name, name)


def _bound(name: str, value: Any) -> str:
    """Say in words what a budget demands of one quantity."""
    if name == "sparsity":
        return f"at least {100 * value:g} % of the weights of linear layers and convolutions zero"
    amount = f"{value:,}" if isinstance(value, int) else f"{100 * value:g} % of the"
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
    if name == "latency" and dense.latency is not None and best.latency is not None:
        share = percent(best.latency, dense.latency)
        return f"{milliseconds(best.latency)} of {milliseconds(dense.latency)}, {share}"
    return "–"


def settings(report: Facts) -> tuple[tuple[str, str], ...]:
    """Return name and value of all settings: those that were given, and those that were solved for."""
    budget = report.asked.get("budget")
    found = [("allocator", str(report.asked.get("allocator"))), ("budget", _budget(budget))]
    if report.selection:
        found.insert(1, ("chosen", report.selection.candidates[0].name))
    solved = rule(report).setting if budget else ""
    for name, value in report.settings.items():
        if name != "limits":
            found.append((name, _setting(value, solved=name == solved)))
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
    return " and ".join(_bound(name, value) for name, value in budget.items() if name != "spend") + (
        ", as far as the rule's knob alone goes" if budget.get("spend") is False else ""
    )


def _setting(value: Any, *, solved: bool = False) -> str:
    if value is None and solved:
        return "not needed, nothing had to go"
    return f"{plain(value)}, solved for the budget" if solved else plain(value)
