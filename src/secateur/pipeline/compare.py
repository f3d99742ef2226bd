"""`sc.compare`: compare several rules at equal budgets on the user's own model and data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

from pydantic import JsonValue
from torch import nn

from secateur.allocators import Budget, Limits
from secateur.allocators.registry import Allocates
from secateur.calibration import Calibration, Forward, View, Views
from secateur.calibration.workers import living_workers
from secateur.common.models import unwrap
from secateur.common.precision import full_precision
from secateur.common.progress import steps
from secateur.common.seeds import seed_of
from secateur.config.names import Granularity
from secateur.errors import SettingError, UnreachableBudgetError
from secateur.measure.evaluate import Evaluation, evaluate
from secateur.pipeline.auto.choose import checked
from secateur.pipeline.auto.chooser import Chooser
from secateur.pipeline.auto.choosers import chooser_of
from secateur.pipeline.bounds.meet import candidates_budget, meet
from secateur.pipeline.options import check_bounds, check_options, target_class
from secateur.pipeline.targets.target import Target, Task
from secateur.plan import CostRecord
from secateur.repairs.methods import Methods
from secateur.signals.loss import LossFn
from secateur.targets.granularity import UNITS, named
from secateur.targets.units.record import record_of
from secateur.targets.units.spread import gathered


@dataclass(frozen=True)
class Outcome:
    """One rule at one budget.

    Attributes:
        rule: The name that is shown for the rule.
        budget: The bounds of the budget.
        cost: The cost of the pruned model.
        pruned: The quality of the pruned model before repair.
        repaired: Its quality after repair; equal to `pruned` if no repair helped.
        repair: Names of the repairs that were kept; empty if none.
    """

    rule: str
    budget: Mapping[str, JsonValue]
    cost: CostRecord
    pruned: Evaluation
    repaired: Evaluation
    repair: str


@dataclass(frozen=True)
class Missed:
    """A rule that does not reach a budget.

    Attributes:
        rule: The name that is shown for the rule.
        budget: The bounds of the budget.
        smallest: The smallest cost that the rule reaches, in the unit of the budget.
    """

    rule: str
    budget: Mapping[str, JsonValue]
    smallest: float


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        model: Name of the dense model's class.
        dense: The quality of the dense model.
        cost: The cost of the dense model.
        outcomes: One entry for each budget and each rule that reaches it, budget by budget.
        missed: One entry for each budget and each rule that does not reach it.
        granularity: The granularity of what was removed.
    """

    model: str
    dense: Evaluation
    cost: CostRecord
    outcomes: tuple[Outcome, ...]
    missed: tuple[Missed, ...]
    granularity: str = "unit"

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules, in the order they were given."""
        return tuple(dict.fromkeys([o.rule for o in self.outcomes] + [m.rule for m in self.missed]))

    @property
    def budgets(self) -> tuple[Mapping[str, JsonValue], ...]:
        """The budgets, in the order they were given."""
        given = [o.budget for o in self.outcomes] + [m.budget for m in self.missed]
        return tuple({_named(budget): budget for budget in given}.values())

    @property
    def by_accuracy(self) -> bool:
        """Whether accuracy is defined on the data. If so, outcomes are ranked by accuracy, else by loss."""
        return self.dense.accuracy is not None

    def best(self, budget: Mapping[str, JsonValue]) -> Outcome | None:
        """The outcome that is best after repair at a budget: by accuracy, then by loss."""
        at = [each for each in self.outcomes if each.budget == budget]
        return min(at, key=lambda each: _rank(each.repaired), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {
            "model": self.model,
            "granularity": self.granularity,
            "dense": {**asdict(self.dense), **self.cost.model_dump()},
            "outcomes": [
                {**asdict(each), "budget": dict(each.budget), "cost": each.cost.model_dump()}
                for each in self.outcomes
            ],
            "missed": [{**asdict(each), "budget": dict(each.budget)} for each in self.missed],
        }

    def __str__(self) -> str:
        """Return a table with one row for each budget and rule."""
        from secateur.common.formatting import number, percent

        def shown(found: Evaluation) -> str:
            return f"{found.loss:.4g}" if found.accuracy is None else percent(found.accuracy, 1)

        measure = "top-1" if self.by_accuracy else self.dense.measure
        lines = [
            f"{self.model}: {number(self.cost.params)} parameters, "
            f"{number(self.cost.macs)} MACs for one sample; dense: {measure} "
            f"{shown(self.dense)} on {self.dense.samples:,} samples",
            "",
        ]
        wide = max(len(name) for name in (*self.rules, "rule"))
        line = f"{{:10}}  {{:{wide}}}  {{:>7}}  {{:>10}}  {{:>9}}  {{:>9}}   {{}}"
        lines.append(line.format("budget", "rule", "MACs", "parameters", "pruned", "repaired", "repair"))
        for budget in self.budgets:
            name = _named(budget)
            best = self.best(budget)
            for each in (o for o in self.outcomes if o.budget == budget):
                cost = [
                    percent(getattr(each.cost, what), getattr(self.cost, what)) for what in ("macs", "params")
                ]
                repaired = shown(each.repaired) + (" *" if each is best else "  ")
                cells = (
                    name,
                    each.rule,
                    *cost,
                    shown(each.pruned),
                    repaired,
                    each.repair or "nothing helped",
                )
                lines.append(line.format(*cells))
            for missed in (m for m in self.missed if m.budget == budget):
                lines.append(
                    f"{name:10}  {missed.rule:{wide}}  not reached; the least is {missed.smallest:g}"
                )
        lines += ["", f"pruned, repaired: {measure}. *: the best at its budget."]
        return "\n".join(text.rstrip() for text in lines)


@living_workers()
@full_precision()
def compare(
    model: nn.Module,
    calibration: Any,
    rules: Sequence[str] | Mapping[str, str | Allocates | Chooser] | None = None,
    budgets: Sequence[Budget] | None = None,
    repair: Methods = "auto",
    *,
    granularity: Granularity | Sequence[Granularity] = "unit",
    limits: Limits | None = None,
    form: Literal["auto", "module", "graph", "masked"] = "auto",
    evaluation: Any = None,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    views: int | Views | View | None = None,
    allow_inexact: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Score once, prune with each rule at each budget, repair all models in the same way, and measure them.

    Each model is verified as in `prune`, and is what `prune` returns for this rule, budget and seed.
    A rule that does not reach a budget is listed as missed, and the comparison goes on.

    Args:
        model: Any module that `torch.export` can capture; it is left as it was.
        calibration: As for `prune`.
        rules: Names of rules; or a mapping from the name to show to a rule or its name. None: the usual rules
            of the granularity.
        budgets: The budgets. None: for units 80, 60 and 40 % of the MACs, for single weights a sparsity of
            50, 70 and 90 %, for experts and for blocks 75 and 50 % of their number.
        repair: As for `prune`, the same for all models.
        granularity: What is removed, as for `prune`.
        limits: Limits on what may be removed.
        form: As for `apply`.
        evaluation: Data to measure on. Default: the held-out fifth of the calibration data.
        loss_fn: As for `prune`.
        forward: As for `prune`.
        views: As for `prune`.
        allow_inexact: As for `trace`.
        seed: Seed for all random choices.
        progress: Show bars on a terminal.

    Returns:
        The comparison; ``print`` shows it as a table, and `draw` as a plot.

    Raises:
        SettingError: There is no rule or no budget, a name is unknown, or the granularity does not support an
            option.
        SecateurError: One of its kinds; see each step of `prune`.
    """
    what = named("compare", granularity)
    kind = target_class("compare", what)
    check_options("compare", what, form, allow_inexact=allow_inexact)
    budgets = kind.budgets if budgets is None else budgets
    chosen = _chosen(kind, what, kind.compared if rules is None else rules, budgets)
    for budget in budgets:
        checked("compare", budget)
        check_bounds("compare", what, budget)
    kind.check_repair(repair)
    seed = seed_of(seed)
    model = unwrap(model)
    if what != "weight":
        model = gathered(model)

    def read(given: Any, views: int | Views | View | None = None) -> Calibration:
        return Calibration.of(given, seed=seed, forward=forward, model=model, views=views)

    task = Task(
        model,
        read(calibration, views),
        limits,
        repair,
        form,
        allow_inexact=allow_inexact,
        loss_fn=loss_fn,
        seed=seed,
        progress=progress,
    )
    target = kind(task)
    quiet = kind(replace(target.task, progress=False), target.graph)  # within the bar below
    judged = task.held if evaluation is None else read(evaluation)
    plain = {name: rule for name, rule in chosen.items() if not isinstance(rule, Chooser)}
    scores = target.score(plain.values())
    curved = {name: target.with_measurements(rule, task.fit, scores) for name, rule in plain.items()}
    known = {
        name: target.score_candidates(rule.candidates_for(target).values())
        for name, rule in chosen.items()
        if isinstance(rule, Chooser)
    }

    def pruned(name: str, budget: Budget) -> tuple[nn.Module, Any]:
        rule, own = curved.get(name), scores
        if isinstance(chooser := chosen[name], Chooser):
            shared_budget = candidates_budget(
                quiet, budget, known[name], chooser.candidates_for(quiet).values(), None
            )
            choice = chooser.choose(quiet, shared_budget, known[name])
            rule, own = choice.rule, choice.scores
        met = meet(quiet, rule, own, budget)
        return met.small, met.plan

    def measured(candidate: nn.Module) -> Evaluation:
        return evaluate(candidate, judged, dense=model, loss_fn=loss_fn)

    def outcome(name: str, budget: Budget, small: nn.Module, plan: Any) -> Outcome:
        target.verify(small, plan)
        before = measured(small)
        repaired = quiet.repaired(small, plan)
        kept = " + ".join(each["method"] for each in record_of(repaired).repairs if each["kept"])
        after = measured(repaired) if kept else before
        cost = CostRecord.of(target.costs(plan)[1])
        return Outcome(name, budget.as_settings(), cost, before, after, kept)

    outcomes: list[Outcome] = []
    missed: list[Missed] = []
    with steps(len(chosen) * len(budgets), progress) as step:
        for budget in budgets:
            for name in chosen:
                step(f"{name} at {_named(budget.as_settings())}")
                try:
                    small, plan = pruned(name, budget)
                except UnreachableBudgetError as error:
                    missed.append(Missed(name, budget.as_settings(), error.smallest))
                else:
                    outcomes.append(outcome(name, budget, small, plan))
    dense = measured(model)
    cost = CostRecord.of(target.graph.cost())
    return Comparison(type(model).__name__, dense, cost, tuple(outcomes), tuple(missed), what)


def _chosen(
    kind: type[Target],
    granularity: str,
    rules: Sequence[str] | Mapping[str, str | Allocates | Chooser],
    budgets: Sequence[Budget],
) -> dict[str, Any]:
    """Return the rules by the name that is shown for each."""
    if isinstance(budgets, Budget):
        raise SettingError("compare: expected a list of budgets, got a single one. Write [Budget(...)].")
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise SettingError(
            f"compare: expected names of rules, or a mapping from names to rules, got {short(rules)}. Write "
            "['tod'], for example; budgets= takes the budgets."
        )
    if not isinstance(rules, Mapping) and not all(isinstance(name, str) for name in rules):
        raise SettingError(
            "compare: expected names of rules, or a mapping from names to rules, got a list of other "
            "things. Write {'mine': RepairAware(parts=4), 'tod': 'tod'}, for example."
        )
    named = dict(rules) if isinstance(rules, Mapping) else {name: name for name in rules}
    if not named or not budgets:
        raise SettingError(
            f"compare: expected rules and budgets, got {len(named)} and {len(budgets)}. Give at least one "
            "of each."
        )
    found = {name: chooser_of(rule) or kind.rule(rule) for name, rule in named.items()}
    for rule in found.values():
        if isinstance(rule, Chooser):
            rule.check("compare", granularity)
    return found


def draw(found: Comparison, path: Path) -> None:
    """Draw accuracy (or the loss, without accuracy) against MACs, with one line for each rule.

    If single weights or experts were removed, it is drawn against the parameters: MACs hardly change then.
    The same comparison gives the same bytes.

    Args:
        found: The comparison.
        path: The file to write. Its suffix decides the format.

    Raises:
        SettingError: See `secateur.report.plot.check`.
    """
    from secateur.report.plot import check, save_figure

    check(path)
    from matplotlib.figure import Figure

    def height(each: Evaluation) -> float:
        return each.loss if each.accuracy is None else 100 * each.accuracy

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    what = "macs" if found.granularity in {*UNITS, "block"} else "params"
    whole = max(getattr(found.cost, what), 1)
    for rule in found.rules:
        points = sorted((o for o in found.outcomes if o.rule == rule), key=lambda o: getattr(o.cost, what))
        across = [100 * getattr(each.cost, what) / whole for each in points]
        (line,) = axes.plot(
            across, [height(o.repaired) for o in points], marker="o", markersize=4, label=rule
        )
        axes.plot(
            across, [height(o.pruned) for o in points], linestyle=":", linewidth=0.8, color=line.get_color()
        )
    axes.plot([100], [height(found.dense)], marker="D", color="black", linestyle="none", label="dense")
    axes.set(
        xlabel="% of dense MACs" if what == "macs" else "% of dense parameters",
        ylabel="top-1 %" if found.by_accuracy else found.dense.measure,
        title=f"{found.model}: repaired, and dotted as pruned",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def _rank(found: Evaluation) -> tuple[float, float]:
    return (0.0 if found.accuracy is None else -found.accuracy, found.loss)


def _named(budget: Mapping[str, JsonValue]) -> str:
    return ", ".join(f"{name} {value}" for name, value in budget.items())
