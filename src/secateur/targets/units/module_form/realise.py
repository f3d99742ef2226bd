"""Form ``module``: the user's own classes with smaller tensors, compared with the masked dense model."""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.calibration.randomness import seeded
from secateur.common.foreign import details, error_text
from secateur.common.models import device_of, evaluating
from secateur.common.outputs import is_finite_somewhere
from secateur.errors import ApplyError
from secateur.graph.answering import answering
from secateur.graph.exporting import exporting
from secateur.graph.graph import Graph
from secateur.graph.inputs import Arguments, resized
from secateur.graph.modes import PLAIN, WITHOUT_GRADIENTS
from secateur.graph.passes import leaves_something
from secateur.graph.views import CALLS, View
from secateur.plan import Plan
from secateur.targets.units.compare import (
    ROUNDED,
    SAME,
    Way,
    relative_difference,
    rounding_of,
    run,
    run_both,
    run_in_double,
)
from secateur.targets.units.draws import Draws
from secateur.targets.units.graph_form.constants import Constants
from secateur.targets.units.graph_form.program import sliced_program
from secateur.targets.units.graph_form.traced import Traced
from secateur.targets.units.later_calls.callcheck import check_calls
from secateur.targets.units.later_calls.flagged import flags_in_words, guard, try_flags
from secateur.targets.units.masked import masked
from secateur.targets.units.module_form import calls
from secateur.targets.units.module_form.mended import Code, mend, watching
from secateur.targets.units.module_form.mendrules import Mender, Run, changes, need_of, rules_of, stays
from secateur.targets.units.module_form.metadata import folder_note, new_metadata
from secateur.targets.units.module_form.module import smaller_module
from secateur.targets.units.module_form.needs import Need
from secateur.targets.units.module_form.recording import Change, Recorded, assign_nodes, has_sizes, record
from secateur.targets.units.module_form.sizes import set_sizes
from secateur.targets.units.module_form.tracking import Equation, Tracked, Uses, solve, tracked, unnoted
from secateur.targets.units.module_form.unseen import in_words, known_code
from secateur.targets.units.record import Record, attach
from secateur.targets.units.tensors import removed_positions


def proven_module(
    traced: Traced,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    only_proof: bool = False,
) -> nn.Module:
    """Make the smaller module, and show by forward passes that it computes what the plan means.

    Attributes change if a forward pass shows that their values become a size that shrinks. Calls with sizes
    that the code itself fixes are mended: their arguments are changed as the code runs. The result is
    compared with the masked dense model, at every size that may vary. If a removed group is inexact, it is
    compared with the program with smaller tensors instead, at the traced size. Values of flags with which it
    would differ are refused from then on.

    With `only_proof`, no flags are tried, and no record is attached.

    Raises:
        ApplyError: No such module was found.
    """
    model, graph = traced.model, traced.graph
    sizes, codes, failing = find_changes(model, graph, plan)
    small = smaller_module(model, plan, sizes)
    mended = mend(small, codes)
    exact = all(g.exact or not g.removed for g in plan.groups)
    reference = masked(model, plan) if exact else sliced_program(model, graph, plan)
    without = _prove(reference, small, graph, (args, dict(kwargs)), other_sizes=exact)
    if only_proof:
        return small
    flags, right = try_flags(reference, small, traced.flag_values) if exact else ((), ())
    guard(small, flags)
    metadata = new_metadata(traced, small, graph.kept(removed_positions(plan)))
    set_sizes(model, small, metadata)
    check_calls(small, plan, right)
    sizes = {**sizes, **metadata}
    sentences = (
        _note(mended, without, failing),
        in_words(codes.values()),
        flags_in_words(flags),
        folder_note(traced, small, metadata),
    )
    note = " ".join(filter(None, sentences))
    return attach(small, Record(plan, "module", note, sizes=sizes, captured=mended, flags=flags))


def find_changes(
    model: nn.Module, graph: Graph, plan: Plan
) -> tuple[dict[str, Any], dict[str, Code], tuple[str, ...]]:
    """Find the attributes that have to change, and the calls that have to be mended.

    Returns:
        New values of attributes by path; what is known of the code of modules, by path; and the modes of
        PyTorch in which a kernel does not take the new sizes.

    Raises:
        ApplyError: One line of code would need different sizes.
    """
    views = [view for view in graph.views if not view.other_answer]
    passes = [_Pass(model, graph, plan, view) for view in (None, *views)]
    for view in graph.views:  # if all conditions have one answer, an ordinary pass can have it too
        if view.answer is not None:
            with contextlib.suppress(Exception):  # the branch may not take these values
                passes.append(_Pass(model, graph, plan, view))
    if passes[0].differs_from_program():
        with contextlib.suppress(Exception):  # some code runs like this only in a capture
            passes.append(_Pass(model, graph, plan, None, exported=True))
    equations = [p.equations() for p in passes]
    changes, stays = ([e for pair in equations for e in pair[k]] for k in (0, 1))
    while True:
        sizes = _in_lists(model, solve(changes, stays))
        small = smaller_module(model, plan, sizes)
        shown = [e for one in passes for e in one.compared(small)]
        listed = {(e.number.sources, e.wanted) for e in changes}
        if {(e.number.sources, e.wanted) for e in shown} <= listed:
            break
        changes += shown  # a run shows only the first comparison that fails
    rules = rules_of(run for one in passes for run in one.runs(small))
    codes = known_code(model, small, plan, rules)
    failing = tuple(str(one.mode) for one in passes if one.fails)
    passes = [one for one in passes if not one.fails]
    return sizes, _with_plain(small, graph, codes, passes), failing


def _with_plain(
    small: nn.Module, graph: Graph, codes: dict[str, Code], passes: Sequence[_Pass]
) -> dict[str, Code]:
    """Run the model at all sizes, and note in which modules the numbers of a call decide its rule."""
    if not mend(small, codes):
        return codes
    traced = [(one, None) for one in passes]
    others = [
        resized(graph.inputs, graph.captured_inputs(), sizes) for _, sizes in graph.inputs.other_sizes()
    ]
    with watching() as watch:
        for one, arguments in [*traced, *((passes[0], other) for other in others)]:
            watch.passed.append({})
            try:
                one.run(small, arguments)
            except Exception:  # the comparison at the end will report it
                return codes
    return {
        path: replace(code, plain=watch.plain(small.get_submodule(path), code))
        for path, code in codes.items()
    }


class _Pass:
    """The recorded calls of the dense model in one kind of pass, and what they need in the smaller model.

    Attributes:
        mode: PyTorch's mode.
        fails: Whether the smaller model fails, because a kernel does not take its sizes in this mode.
    """

    def __init__(
        self, model: nn.Module, graph: Graph, plan: Plan, view: View | None, *, exported: bool = False
    ) -> None:
        self._exported, self._asked, self.fails = exported, set[str](), False
        self._training, self._method = (view.training, view.method) if view is not None else (False, "")
        self.mode = PLAIN if view is None else view.mode
        self._answer = None if view is None else view.answer
        asked = any(view.mode == WITHOUT_GRADIENTS for view in graph.views)  # else they only cost memory
        self.mode = self.mode._replace(gradients=self._training or (self.mode.gradients and asked))
        program = graph.program if view is None else view.program
        self._arguments = graph.captured_inputs() if view is None else view.arguments
        self._constants = Constants(graph.kept(removed_positions(plan), view))
        self._needs: dict[Any, Need | None] = {}  # by node
        self._uses = Uses()
        try:
            with tracked(model) as self._uses:
                self.dense = self._record(model)
        except Exception:  # some code takes only Python's own integers, so attributes cannot be tracked
            self.dense = self._record(model)
        assign_nodes(self.dense, program.graph, model, "model." if self._method else "")
        self._nodes = program.graph.nodes

    def differs_from_program(self) -> bool:
        """Whether the program has calls with sizes that shrink which this ordinary pass does not make.

        The code then asks whether it is exported. Other ordinary passes may make these calls too, as those
        with padding do in Transformers.
        """
        seen = {node for call in self.dense for node in call.nodes}
        others = (node for node in self._nodes if node not in seen and has_sizes(node)) if self._asked else ()
        with contextlib.suppress(ApplyError):
            return any((need := self.needs(node)) is not None and changes(need) for node in others)
        return False

    @contextlib.contextmanager
    def _on(self, model: nn.Module) -> Iterator[None]:
        """Inside, a call of the model is a pass of this kind."""
        with (
            evaluating(model, training=self._training),
            self.mode.on(model),
            seeded(0),
            answering(self._answer),
            exporting(self._exported or None, self._asked),
        ):
            yield

    def _record(self, model: nn.Module, change: Change | None = None) -> list[Recorded]:
        args, kwargs = self._arguments
        with self._on(model):
            return record(model, args, kwargs, change, method=self._method)

    def run(self, model: nn.Module, arguments: Arguments | None = None) -> None:
        """Run a model in a pass of this kind, perhaps with other arguments."""
        args, kwargs = arguments or self._arguments
        with self._on(model):
            (getattr(model, self._method) if self._method else model)(*args, **kwargs)

    def needs(self, node: Any) -> Need | None:
        """Return what the call behind an operator needs."""
        if node not in self._needs:
            self._needs[node] = need_of(self._constants, node)
        return self._needs[node]

    def _mender(self) -> Mender:
        dense = [call for call in self.dense if call.steps]
        return Mender(dense, self.needs, functools.partial(stays, self._constants))

    def equations(self) -> tuple[list[Equation], list[Equation]]:
        """Return what tracked numbers must become, and those that must stay."""
        changes, stays = _equations(self.dense, self.needs)
        return changes, [*stays, *(Equation(number, int(number)) for number in self._uses.numbers)]

    def compared(self, small: nn.Module) -> list[Equation]:
        """Return an equation from the first comparison that was true in the dense model and is false now."""
        if not any(equal for _, _, equal in self._uses.equal):
            return []
        mender = self._mender()
        change = unnoted(mender.change)
        # The run ends where an assertion of the user's fails.
        with tracked(small) as uses, contextlib.suppress(Exception):
            self._record(small, change)
        for (number, _, before), (own, other, now) in zip(self._uses.equal, uses.equal, strict=False):
            if number.sources != own.sources:
                break
            if before and not now and isinstance(other, int):
                return [Equation(number, int(other))]
        return []

    def runs(self, small: nn.Module) -> list[Run]:
        """Run the smaller model and return what its calls need."""
        mender = self._mender()
        try:
            self._record(small, mender.change)
        except ApplyError:
            raise
        except Exception as error:  # with other shapes, the user's code may fail in any way
            self.fails = _by_kernel(error) and (self.mode.autocast or self.mode.dtype is not None)
            if self.fails:
                return mender.runs
            if mender.other_code:
                raise ApplyError(
                    f"apply: expected the smaller model to run the same code as the dense one, got other "
                    f"code at {mender.other_code}, and then an error: it branches on a size that changed. "
                    f"Leave the group alone (Limits(ignore=...)).",
                    details(error),
                ) from error
            raise _failed(error, self._method or "the traced size") from error
        return mender.runs


def _equations(
    dense: list[Recorded], needs: Callable[[Any], Need | None]
) -> tuple[list[Equation], list[Equation]]:
    """Return what tracked numbers must become, and those that must stay."""
    changes: list[Equation] = []
    stays: list[Equation] = []
    for call in dense:
        moved: set[int] = set()
        for step, node in zip(call.steps, call.nodes, strict=True):
            need = None if node is None else needs(node)
            if need is None:
                continue
            for number, wanted in calls.wanted(call.name, step, need, call.args, call.kwargs):
                moved.add(id(number))
                if isinstance(number, Tracked):
                    changes.append(Equation(number, wanted))
        for number in calls.numbers(call.args, call.kwargs):
            if isinstance(number, Tracked) and id(number) not in moved:
                stays.append(Equation(number, int(number)))
    return changes, stays


def _in_lists(model: nn.Module, solved: Mapping[str, int]) -> dict[str, Any]:
    """Return new values of attributes. For an entry of a list, that is the whole list."""
    found: dict[str, Any] = {}
    for path, value in solved.items():
        attribute, _, last = path.rpartition(".")
        if last.isdigit():
            module, _, name = attribute.rpartition(".")
            old = getattr(model.get_submodule(module), name, None)
            if isinstance(old, list | tuple):
                found.setdefault(attribute, list(old))[int(last)] = value
                continue
        found[path] = value
    return found


def _note(mended: tuple[str, ...], without: tuple[str, ...], failing: tuple[str, ...]) -> str:
    parts = []
    if failing:
        parts.append(
            f"it fails in {' and '.join(failing)}: there a kernel takes some sizes only. Plan with "
            "Limits(round_to=8) to use it so."
        )
    if without:
        parts.append(
            f"nothing was compared at {'; '.join(without)}: the dense model fails there on the inputs that "
            f"were tried, or returns no finite number. Pass example_inputs= that it takes."
        )
    if mended:
        parts.append(_mended_note(mended))
    return " ".join(parts)


def without_numbers(path: str) -> str:
    """Return a path with stars in place of numbers, so that those of equal layers are the same."""
    return re.sub(r"\d+", "*", path)


def _mended_note(mended: tuple[str, ...]) -> str:
    alike = Counter(without_numbers(path) or "the model itself" for path in mended)
    names = (name if count == 1 else f"{name} ({count})" for name, count in alike.items())
    return f"modules whose code holds a size as a number, which is mended at the call: {', '.join(names)}."


def _prove(
    reference: nn.Module, small: nn.Module, graph: Graph, given: Arguments, *, other_sizes: bool
) -> tuple[str, ...]:
    """Compare the module with its reference, at every size that may vary, in each branch of conditions.

    Returns:
        The sizes at which nothing was compared, because the dense model fails on all inputs that were tried,
        or gives no finite number.

    Raises:
        ApplyError: The outputs differ, or the module fails where the dense model runs.
    """
    without = []
    trials = graph.inputs.trials(given, device=device_of(small), other_sizes=other_sizes)
    answers = {v.answer for v in graph.views if not (v.training or v.method)} - {None} if other_sizes else {}
    ways = [(*one, Way()) for one in trials] + [(*trials[0], Way(answer=a)) for a in answers]
    if other_sizes and leaves_something(reference, given):
        ways.append((*trials[0], Way(calls=CALLS)))
    for title, options, way in ways:
        accepted = _first_accepted(reference, options, way)
        if accepted is None:
            without += [title] if way == Way() else []
            continue
        title += str(way)
        (args, kwargs), draws, expected = accepted
        try:
            got = run(small, args, kwargs, draws, way)
        except Exception as error:
            raise _failed(error, title) from error
        if draws.narrowed:
            expected = run(reference, args, kwargs, draws, way)
        tolerance = rounding_of(expected)
        difference = relative_difference(got, expected)
        if not difference <= tolerance and not (
            difference <= ROUNDED and _equal_in_double(small, reference, (args, kwargs), draws, way)
        ):
            raise ApplyError(
                f"apply: expected the smaller module to compute what the plan means, got a relative "
                f"difference of {difference:.2g} at {title}. Its code uses a size that has changed in a way "
                f"that no attribute and no call shows. Leave the group alone (Limits(ignore=...)), or use "
                f"form='graph'."
            )
    return tuple(without)


def _equal_in_double(
    small: nn.Module, reference: nn.Module, arguments: Arguments, draws: Draws, way: Way
) -> bool:
    """Whether two models are equal if their forward passes get float64 wherever they cast."""
    pruned, dense = (functools.partial(run_in_double, model, way=way) for model in (small, reference))
    return relative_difference(*run_both(pruned, dense, *arguments, draws)) <= SAME[torch.float64]


def _first_accepted(
    reference: nn.Module, options: list[Arguments], way: Way
) -> tuple[Arguments, Draws, list[torch.Tensor]] | None:
    """Return the first arguments on which the dense model gives finite outputs; None if there are none.

    Returns:
        The arguments, the random numbers of the pass, and its outputs.
    """
    for args, kwargs in options:
        draws = Draws()
        try:
            expected = run(reference, args, kwargs, draws, way)
        except Exception:  # where the dense model fails, the smaller one may fail too
            continue
        if is_finite_somewhere(expected):
            return (args, kwargs), draws, expected
    return None


def _failed(error: Exception, title: str = "the traced size") -> ApplyError:
    why = "most likely because its code has a size that does not follow its tensors"
    what = "Leave the group alone (Limits(ignore=...)), or use form='graph'."
    if _by_kernel(error):
        why, what = "because a kernel takes some sizes only", "Plan with Limits(round_to=8)."
    return ApplyError(
        f"apply: the smaller module's forward pass failed at {title} ({error_text(error)}), {why}. {what}",
        details(error),
    )


def _by_kernel(error: Exception) -> bool:
    return "multiple of" in str(error)
