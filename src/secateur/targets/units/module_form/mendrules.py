"""Find the calls whose sizes the user's code fixes, and make a rule for each.

Such calls are *mended*: as they run, they get other sizes than the code passes (`mended`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from secateur.errors import ApplyError
from secateur.graph.binding import given_by_name
from secateur.graph.nodes import hint, is_open
from secateur.targets.units.graph_form.constants import Constants, rewrite_of
from secateur.targets.units.graph_form.rewrites import Scaled
from secateur.targets.units.module_form import calls
from secateur.targets.units.module_form.attention import head_size
from secateur.targets.units.module_form.mended import Rule, line_of, mended, passed_numbers
from secateur.targets.units.module_form.needs import Factor, Heads, Need, Number, Parts, Positions, Sizes
from secateur.targets.units.module_form.recording import Recorded


def need_of(constants: Constants, node: fx.Node) -> Need | None:
    """Return what the call behind an operator has to pass in the smaller model; None if it stays as it is."""
    family = calls.FAMILIES[str(node.target).split(".")[1]]
    if family in ("shape", "expand", "fill", "repeat") and rewrite_of(node) is not None:
        # Also where nothing is removed: code may read a size from another tensor, which has shrunk.
        masks = constants.kept(node)
        axes = [(k, len(m), int(m.sum())) for k, m in enumerate(masks)]
        if family == "repeat":
            source = constants.kept(node.all_input_nodes[0])
            new = len(masks) - len(source)
            axes = [a for a in axes if a[0] < new or len(source[a[0] - new]) == 1]
        return Sizes(tuple(axes))
    call = constants.follow(node)
    if call is None:
        return None
    if family == "split":
        parts = call.arguments.get("split_sizes")
        if parts is None or any(isinstance(part, fx.Node) for part in parts):  # computed from data
            return None
        return Parts(int(call.arguments.get("dim", 0)), tuple(parts))
    if family == "take":
        source = constants.kept(node.all_input_nodes[0])
        whole = "indices" not in call.arguments and source[call.integer("dim") % len(source)].all()
        return None if whole else _positions(call.arguments, str(call.target))
    word = {"conv": "groups"}.get(family) or next(
        w for w in ("num_groups", "normalized_shape", "pad", "shifts") if w in call.arguments
    )
    return _number(call.arguments.get(word, 1), _argument(node, word, 1))


def stays(constants: Constants, node: fx.Node) -> bool:
    """Whether a call has to pass the same as in the dense model, because it names nothing that is removed.

    This matters where the code reads a size from another tensor, which has shrunk. Numbers that depend on the
    size of the input do not count.
    """
    if not all(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes):
        return False
    family = calls.FAMILIES[str(node.target).split(".")[1]]
    if family == "range":
        return all(mask.all() for mask in constants.kept(node))
    if family not in ("split", "take") or len(node.all_input_nodes) != 1:
        return False
    source = node.all_input_nodes[0]
    dim = int(_argument(node, "dim", 0)) % max(len(constants.kept(source)), 1)
    return bool(constants.kept(source)[dim].all()) and not is_open(source.meta["val"].shape[dim])


def _argument(node: fx.Node, word: str, default: Any) -> Any:
    return given_by_name(node.target, node.args, node.kwargs).get(word, default)


def _number(new: Any, old: Any) -> Number | None:
    if isinstance(new, Scaled):  # as the traced sizes have it
        return Number(new.of(hint(new.size.meta["val"])))
    if not isinstance(new, list | tuple):
        return None if new == old else Number(int(new))
    values = tuple(None if a is b or a == b else int(a) for a, b in zip(new, old, strict=True))
    return None if all(v is None for v in values) else Number(values)


def _positions(arguments: Mapping[str, Any], target: str) -> Positions | None:
    if "indices" in arguments:
        changed = [v for v in arguments["indices"] if isinstance(v, torch.Tensor)]
        return Positions(0, 0, tuple(changed[0].tolist())) if changed else None
    if "index" in arguments and isinstance(arguments["index"], torch.Tensor):
        return Positions(0, 0, tuple(arguments["index"].tolist()))
    if target.startswith("aten.select"):
        return Positions(int(arguments["index"]), int(arguments["index"]) + 1, single=True)
    if "end" in arguments and isinstance(arguments["start"], int) and isinstance(arguments["end"], int):
        return Positions(arguments["start"], arguments["end"])
    return None


Needs = Mapping[int, Need]
"""Number of a step -> what it needs."""


@dataclass(frozen=True)
class Run:
    """A call with sizes in the smaller model.

    Attributes:
        call: The call.
        needs: What its steps need.
        fitting: Whether the code itself passes what they need.
        known: Whether the captured program has the call. It has no call whose result nothing reads.
    """

    call: Recorded
    needs: Needs
    fitting: bool
    known: bool = True


@dataclass
class Mender:
    """Compares each call of a smaller model with the dense model's, and finds the calls to be mended.

    Attributes:
        dense: The dense model's calls, with the operators that they became.
        needs: Returns what the call behind an operator needs.
        stays: Says whether the call has to pass the same as in the dense model.
        runs: The calls of the smaller model, as far as they ran.
        other_code: The first line that the smaller model runs and the dense one does not; empty if none.
    """

    dense: list[Recorded]
    needs: Callable[[fx.Node], Need | None]
    stays: Callable[[fx.Node], bool]
    runs: list[Run] = field(default_factory=list)
    other_code: str = ""
    _number: int = 0

    def change(self, call: Recorded, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of the smaller model with what it needs, and record it.

        A call that the dense model does not make runs as it is: code may run other calls where sizes differ,
        as attention does if queries and values no longer have the same size.
        """
        dense = self._next(call)
        if dense is None:
            self.other_code = self.other_code or line_of(call.place)
            self.runs.append(Run(call, {}, fitting=True, known=False))
            return func(*args, **kwargs)
        every = {k: self._need(dense, k, node) for k, node in enumerate(dense.nodes) if node is not None}
        if call.steps[0].family == "attention":  # becomes many operators, none of which has its sizes
            every = {0: Heads(head_size(dense.args, dense.kwargs))}
        if call.steps[0].family == "scale":  # the factor of the dense model is right
            every = {0: Factor(calls.factor_of(dense.name, dense.args, dense.kwargs) or 0.0)}
        steps = dense.steps
        needs = {
            k: need
            for k, need in every.items()
            if need is not None
            and (changes(need) or calls.fits(call.name, steps[k], need, dense.args, dense.kwargs))
        }
        fitting = all(calls.fits(call.name, steps[k], need, args, kwargs) for k, need in needs.items())
        if not fitting:
            needs = {k: calls.observed(call.name, need, args, kwargs) for k, need in needs.items()}
        self.runs.append(Run(call, needs, fitting, known=bool(every)))
        return func(*args, **kwargs) if fitting else mended(func, call.name, steps, needs, args, kwargs)

    def _need(self, dense: Recorded, number: int, node: fx.Node) -> Need | None:
        """Return what a step of a call of the dense model needs in the smaller one."""
        need = self.needs(node)
        if need is None and self.stays(node):
            return calls.stated(dense.name, dense.steps[number], dense.args, dense.kwargs)
        return need

    def _next(self, call: Recorded) -> Recorded | None:
        """Return the dense model's next call at this place; an earlier one if a loop runs more often."""
        order = [*range(self._number, len(self.dense)), *range(self._number)]
        for number in order:
            dense: Recorded = self.dense[number]
            # `PrunedAttention` calls another function, on another line, than the layer it replaces.
            attention = bool(dense.steps) and dense.steps[0].family == "attention"
            same = (dense.name, dense.module) == (call.name, call.module)
            if dense.steps and same and (attention or dense.place == call.place):
                self._number = number + 1
                return dense
        return None


def changes(need: Need) -> bool:
    """Whether a call needs other numbers than the dense model passes."""
    return not isinstance(need, Sizes) or any(old != new for _, old, new in need.axes)


def rules_of(runs: Iterable[Run]) -> dict[str, list[Rule]]:
    """Make the rules for calls, by module path. One line may have several, for different numbers.

    Raises:
        ApplyError: One line would need different sizes for the same numbers.
    """
    lines: dict[Any, list[Run]] = {}
    for run in runs:
        lines.setdefault((run.call.module, run.call.name, run.call.place), []).append(run)
    found: dict[str, list[Rule]] = {}
    for same in lines.values():
        rules = list(dict.fromkeys(_rule(run.call, run.needs) for run in same if not run.fitting))
        some_fit = False
        for run in same:
            differing = [rule for rule in rules if not _agree(run, rule)]
            numbers = [
                passed_numbers(run.call.name, rule, run.call.args, run.call.kwargs) for rule in differing
            ]
            if any(n == rule.passed for n, rule in zip(numbers, differing, strict=True)):
                raise _several(run)
            if run.fitting and differing:  # at all sizes, only numbers written in the code distinguish calls
                some_fit = True
                if not all(n and set(n) <= run.call.literals for n in numbers):
                    raise _several(run)
        if some_fit or not rules:
            rules.append(_rule(same[0].call, {}))
        found.setdefault(same[0].call.module, []).extend(rules)
    return found


def _rule(call: Recorded, needs: Needs) -> Rule:
    count = calls.count(call.name, call.args, call.kwargs)
    rule = Rule(call.name, call.place, tuple(call.steps), tuple(needs.items()), count=count)
    return replace(rule, passed=passed_numbers(call.name, rule, call.args, call.kwargs))


def _several(run: Run) -> ApplyError:
    return ApplyError(
        f"apply: expected one size for every run of a line in module {run.call.module or 'itself'}, got "
        f"several at {line_of(run.call.place)}. Leave the group alone (Limits(ignore=...)), or keep the size "
        f"in an attribute."
    )


def _agree(run: Run, rule: Rule) -> bool:
    """Whether a rule is right for a run: it has the same needs, or changes nothing."""
    if not run.known:
        return True
    if not run.fitting:
        return run.needs == dict(rule.needs)
    return all(_says(need, run.needs.get(k)) for k, need in rule.needs)


def _says(need: Need, other: Need | None) -> bool:
    if not isinstance(need, Sizes) or not isinstance(other, Sizes):
        return need == other
    news = {axis: new for axis, _, new in other.axes}
    return all(news.get(axis) == new for axis, _, new in need.axes)
