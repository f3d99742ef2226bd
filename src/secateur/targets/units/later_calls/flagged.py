"""Flags that a user may set on a pruned module: calls are refused with values for which it would be wrong."""

from __future__ import annotations

import contextlib
import functools
import itertools
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.calibration.randomness import seeded
from secateur.common.foreign import line_of
from secateur.errors import ApplyError, InputError
from secateur.graph.executionpath import ExecutionPath
from secateur.graph.flags import Chain, Flag, Reader, changed, flags_of, value_of
from secateur.graph.graph import Graph
from secateur.graph.inputs import Arguments, InputSpec, resized
from secateur.graph.modes import PLAIN
from secateur.graph.passes import Passes
from secateur.graph.pathsearch import PathSearch, Sizes
from secateur.targets.units.compare import Way, relative_difference, rounding_of, run, run_both
from secateur.targets.units.draws import Draws

PAIRS = 12
"""The most pairs of flags that are tried together."""
VIEWS = 6
"""At how many of the trace's other sizes and kinds of inputs each flag is tried."""
SIZES = 4
"""The most sizes at which comparisons in the code suggest to try a flag."""


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments and a mode for one run of a model.

    Attributes:
        arguments: The arguments of the call.
        training: Whether it runs in training mode.
        answer: The outcome of all conditions on values of tensors; None: what the values say.
    """

    arguments: Arguments
    training: bool = False
    answer: bool | None = None

    def run(self, model: nn.Module, args: Any, kwargs: Any, draws: Draws | None = None) -> list[Tensor]:
        """Run a model and return its output tensors."""
        with seeded(0):
            return run(model, args, kwargs, draws, Way(self.training, answer=self.answer))


@dataclass(frozen=True)
class FlagValues:
    """Values that the code names for flags, one or two of them, and what the dense model does with them.

    Attributes:
        flags: The flags with their values.
        cases: The runs in which the model then makes other calls. Empty if there are none, or if it fails.
        line: The first line of code that runs only then, in words; empty if the same lines run.
    """

    flags: tuple[Flag, ...]
    cases: tuple[Case, ...] = ()
    line: str = ""

    @contextlib.contextmanager
    def on(self, *models: nn.Module) -> Iterator[None]:
        """Inside, the flags have these values in the models."""
        with contextlib.ExitStack() as stack:
            for flag, model in itertools.product(self.flags, models):
                stack.enter_context(flag.on(model))
            yield


@dataclass(frozen=True)
class Refused:
    """A flag that has to keep a known value: with others, the pruned module would be wrong.

    Attributes:
        path: The module that reads it.
        chain: The names that lead from the module to the flag.
        known: Its value when the model was traced, and others that are right, as Python writes them.
        line: The line of code behind the flag, in words; may be empty.
    """

    path: str
    chain: Chain
    known: tuple[str, ...]
    line: str = ""

    def __str__(self) -> str:
        """Name the flag from the model on, and its values: ``model.pooled other than False``."""
        return f"{Reader(self.path, self.chain)} other than {' or '.join(self.known)}"


def flag_values(model: nn.Module, graph: Graph) -> list[FlagValues]:
    """Run the dense model with each value that its code names for a flag; it is left as it was.

    Flags that the same module reads are also tried in pairs. Each is tried on the traced inputs, on other
    sizes and kinds of inputs that the trace found, at sizes where comparisons have another outcome, with
    either answer to conditions on values, and in training mode. The sizes at which the comparisons of the
    usual path have another outcome are searched once, and not again for each flag.
    """
    args, kwargs = given = graph.captured_inputs()
    usually = Passes(model, given, modes=False)
    plain = usually.path_of(given)
    search = _search(usually, graph, given)
    traced = [
        *(Case(given, training) for training in (False, True)),
        *map(Case, _other_arguments(graph, given, search.with_new_outcomes if search else ())),
    ]
    before = _paths(usually, traced)
    watched = functools.partial(traced[0].run, model, args, kwargs)
    flags = flags_of(model, watched) if before[0] is not None else []
    found = []
    single: list[tuple[Flag, ...]] = [(flag,) for flag in flags]
    for one in [*single, *_pairs(flags)]:
        with FlagValues(one).on(model):
            passes = Passes(model, given, modes=False)
            asked = _asked_for(passes, graph, given, plain)
            paths = _paths(passes, [*traced, *asked])
        usual = [*before, *_paths(usually, asked)]
        differing = [
            (case, path, was)
            for case, path, was in zip([*traced, *asked], paths, usual, strict=True)
            if path is not None and was is not None and path.calls != was.calls
        ]
        new = (
            call[1] for _, path, was in differing for call, _ in path.calls if call not in was.distinct_calls
        )
        lines = (line_of(traceback.FrameSummary(file, number, "")) for file, number in new)
        cases = tuple(case for case, *_ in differing)
        found.append(FlagValues(one, cases, next(filter(None, lines), "")))
    return found


def _paths(traced: Passes, cases: Sequence[Case]) -> list[ExecutionPath | None]:
    """Return the execution path of a model in each case; None where it fails, or cannot be watched.

    Args:
        traced: Passes of the model on the traced arguments.
        cases: The cases. Each has its own passes, since arguments of equal shapes may differ otherwise.
    """
    passes = {id(traced.given): traced}
    for case in cases:
        if id(case.arguments) not in passes:
            passes[id(case.arguments)] = traced.on_others(case.arguments)
    return [passes[id(o.arguments)].path_of(o.arguments, training=o.training, answer=o.answer) for o in cases]


def _other_arguments(graph: Graph, given: Arguments, flipped: Iterable[Sizes]) -> list[Arguments]:
    """Return the arguments of the trace's other captures in PyTorch's usual mode, and of other sizes.

    Args:
        graph: The trace.
        given: The traced arguments.
        flipped: Sizes at which comparisons in the code have another outcome. None of them is left out.
    """
    found = [
        view.arguments
        for view in graph.views
        if not (view.training or view.method or view.other_answer) and view.mode == PLAIN
    ]
    # Not each of these sizes has a capture.
    found += [resized(graph.inputs, given, sizes) for _, sizes in graph.inputs.other_path_sizes()]
    distinct = {repr(InputSpec.of(*arguments)): arguments for arguments in reversed(found)}
    first = dict([*reversed(distinct.items())][:VIEWS])
    for sizes in flipped:
        arguments = resized(graph.inputs, given, graph.inputs.at(sizes))
        first.setdefault(repr(InputSpec.of(*arguments)), arguments)
    return [*first.values()]


def _pairs(flags: Sequence[Flag]) -> list[tuple[Flag, ...]]:
    """Return pairs of different flags that one module reads."""
    found: list[tuple[Flag, ...]] = [
        (first, second)
        for first, second in itertools.combinations(flags, 2)
        if first.readers[0].path == second.readers[0].path and first.readers != second.readers
    ]
    return found[:PAIRS]


def _search(
    passes: Passes, graph: Graph, given: Arguments, known: ExecutionPath | None = None
) -> PathSearch | None:
    """Search sizes at which comparisons have another outcome, but for those that the path `known` has too."""
    path = passes.path_of(given)
    before = known.compared if known is not None else {}
    if path is None:
        return None
    same = frozenset(place for place, found in path.compared.items() if before.get(place) == found)
    if len(same) == len(path.compared):
        return None

    def path_at(sizes: Sizes) -> ExecutionPath | None:
        return passes.path_of(resized(graph.inputs, given, graph.inputs.at(sizes)))

    search = PathSearch(graph.inputs.open, path, path_at)
    search.follow_comparisons(except_at=same)
    return search


def _asked_for(passes: Passes, graph: Graph, given: Arguments, plain: ExecutionPath | None) -> list[Case]:
    """Return cases that the code asks about: answers to conditions on values, and sizes that it compares.

    Args:
        passes: Those of the dense model with flags set, on the traced arguments.
        graph: The trace.
        given: The traced arguments.
        plain: The path without these flags. Its comparisons are searched already.
    """
    path = passes.path_of(given)
    if path is None:
        return []
    answers = [Case(given, answer=answer) for answer in (True, False) if "bool" in path.questions]
    search = _search(passes, graph, given, plain)
    found = search.found[:SIZES] if search else []
    return [*answers, *(Case(resized(graph.inputs, given, graph.inputs.at(sizes))) for sizes in found)]


def try_flags(
    reference: nn.Module, small: nn.Module, candidates: Sequence[FlagValues]
) -> tuple[tuple[Refused, ...], tuple[Any, ...]]:
    """Find the flags with which a smaller module does not compute what the masked dense model does.

    Args:
        reference: The masked dense model.
        small: The smaller module.
        candidates: The values to try.

    Returns:
        These flags; and the values of flags, one or two at once, with which it does, each with its name.
    """
    right: dict[Any, list[str]] = {}  # by reader: the values that are right
    wrong: dict[Any, str] = {}  # by reader: the line of code behind a value that is wrong
    for candidate in candidates:
        flag = candidate.flags[-1]  # of a pair of which each alone is right, the second is refused
        if any(repr(one.value) not in right.get(r, ()) for one in candidate.flags[:-1] for r in one.readers):
            continue
        differs = any(_differs(reference, small, candidate, case) for case in candidate.cases)
        for reader, now in zip(flag.readers, flag.now, strict=True):
            values = right.setdefault(reader, [repr(now)])
            value = repr(flag.value)
            if differs:
                wrong.setdefault(reader, candidate.line)
                values[:] = [v for v in values if v != value]
            elif value not in values and len(candidate.flags) == 1:
                values.append(value)
    found = tuple(Refused(r.path, r.chain, tuple(right[r]), line) for r, line in wrong.items())
    return found, tuple(
        tuple((str(reader), flag.value) for flag in candidate.flags for reader in flag.readers)
        for candidate in candidates
        if candidate.cases  # else nothing was compared
        and all(repr(flag.value) in right.get(r, ()) for flag in candidate.flags for r in flag.readers)
    )


def _differs(reference: nn.Module, small: nn.Module, candidate: FlagValues, case: Case) -> bool:
    with candidate.on(reference, small):
        try:
            case.run(reference, *case.arguments)
        except Exception:  # where the dense model fails, the smaller one may fail too
            return False
        pruned, dense = (functools.partial(case.run, model) for model in (small, reference))
        try:
            got, wanted = run_both(pruned, dense, *case.arguments, Draws())
        except Exception:
            return True
    tolerance = rounding_of(wanted)
    return not relative_difference(got, wanted) <= tolerance


def require_as_traced(model: nn.Module, graph: Graph) -> None:
    """Refuse a model that makes other calls than at the trace, since an attribute of it was set.

    Raises:
        ApplyError: The model makes other calls.
    """
    others = changed(model, graph.attributes)
    if not others:
        return
    given = graph.captured_inputs()
    now = Passes(model, given, modes=False).path_of(given)
    with contextlib.ExitStack() as stack:
        for flag in others:
            stack.enter_context(flag.on(model))
        before = Passes(model, given, modes=False).path_of(given)
    if now is not None and before is not None and now.calls != before.calls:
        names = "; ".join(f"{flag.readers[0]} = {flag.now[0]!r}, then {flag.value!r}" for flag in others[:3])
        raise ApplyError(
            f"apply: expected the model as it was when it was traced, got attributes with which the forward "
            f"pass makes other calls: {names}. Trace the model again, or set them back."
        )


class Guard:
    """A hook that refuses to run a module with a value of a flag that is not known to be right."""

    def __init__(self, flags: Sequence[Refused], path: str) -> None:
        self.flags, self.path = tuple(flags), path

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Check the flags that this module, or one inside it, reads."""
        for flag in self.flags:
            inside = flag.path.removeprefix(self.path).removeprefix(".")
            value = value_of(module.get_submodule(inside), flag.chain)
            if repr(value) not in flag.known:
                name = ".".join(flag.chain)
                raise InputError(
                    f"{type(module).__name__}: expected {name} of module {flag.path or 'model'!r} to be "
                    f"{' or '.join(flag.known)}, as when it was traced, got {value!r}: with that, the code "
                    f"does something else{f' ({flag.line})' if flag.line else ''}, for which it needs units "
                    f"that were removed. Set it before sc.trace and prune again, or set it back."
                )


def guard(small: nn.Module, flags: Sequence[Refused]) -> None:
    """Let a module, and each submodule that reads one of these flags, check them before each forward pass."""
    paths = dict.fromkeys(["", *(flag.path for flag in flags)]) if flags else {}
    for path in paths:
        inside = [flag for flag in flags if not path or flag.path == path]
        small.get_submodule(path).register_forward_pre_hook(Guard(inside, path))


def flags_in_words(flags: Sequence[Refused]) -> str:
    """Write a sentence on the flags that are refused; empty if there are none."""
    names = list(dict.fromkeys(map(str, flags)))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"refused at the call, as it needs removed units: {'; '.join(names[:3])}{more}." if names else ""
