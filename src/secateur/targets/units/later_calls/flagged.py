"""Flags that a user sets on a pruned module after the trace: where the module would be wrong, it refuses."""

from __future__ import annotations

import contextlib
import functools
import itertools
import traceback
from collections.abc import Iterator, Sequence
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
class Occasion:
    """One way to run a model.

    Attributes:
        arguments: The arguments of the call.
        training: Whether it runs in training mode.
        answer: What conditions on values of tensors are answered with; None leaves them as they are.
    """

    arguments: Arguments
    training: bool = False
    answer: bool | None = None

    def run(self, model: nn.Module, args: Any, kwargs: Any, draws: Draws | None = None) -> list[Tensor]:
        """Run a model and return its output tensors."""
        with seeded(0):
            return run(model, args, kwargs, draws, Way(self.training, answer=self.answer))


@dataclass(frozen=True)
class Switch:
    """Values that the code names for flags, one or two of them, and what the dense model does with them.

    Attributes:
        flags: The flags with their values.
        occasions: Where the model then makes other calls. Empty if nowhere, or if it fails.
        line: The first line of code that only then runs, in words; empty if the same lines do.
    """

    flags: tuple[Flag, ...]
    occasions: tuple[Occasion, ...] = ()
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
    """A flag that has to keep a known value, because the pruned module would be wrong with others.

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


def switches(model: nn.Module, graph: Graph) -> list[Switch]:
    """Run the dense model with each value that its code names for a flag; it is left as it was.

    Flags that the same module reads are also tried in pairs. Each is tried on the traced inputs, on other
    sizes and kinds of inputs that the trace found, where comparisons of sizes have another outcome, with
    either answer to conditions on values, and in training mode.
    """
    args, kwargs = given = graph.captured_inputs()
    known = [
        *(Occasion(given, training) for training in (False, True)),
        *map(Occasion, _elsewhere(graph, given)),
    ]
    before = _paths(model, known)
    watched = functools.partial(known[0].run, model, args, kwargs)
    flags = flags_of(model, watched) if before[0] is not None else []
    found = []
    single: list[tuple[Flag, ...]] = [(flag,) for flag in flags]
    for one in [*single, *_pairs(flags)]:
        with Switch(one).on(model):
            asked = _asked_for(model, graph, given)
            paths = _paths(model, [*known, *asked])
        usual = [*before, *_paths(model, asked)]
        differing = [
            (occasion, path, was)
            for occasion, path, was in zip([*known, *asked], paths, usual, strict=True)
            if path is not None and was is not None and path.calls != was.calls
        ]
        new = (
            call[1] for _, path, was in differing for call, _ in path.calls if call not in was.distinct_calls
        )
        lines = (line_of(traceback.FrameSummary(file, number, "")) for file, number in new)
        occasions = tuple(occasion for occasion, *_ in differing)
        found.append(Switch(one, occasions, next(filter(None, lines), "")))
    return found


def _paths(model: nn.Module, occasions: Sequence[Occasion]) -> list[ExecutionPath | None]:
    """Return which calls a model makes on each occasion; None where it fails, or cannot be watched."""
    passes: dict[int, Passes] = {}
    for occasion in occasions:
        if id(occasion.arguments) not in passes:
            passes[id(occasion.arguments)] = Passes(model, occasion.arguments)
    return [
        passes[id(o.arguments)].path_of(o.arguments, training=o.training, answer=o.answer) for o in occasions
    ]


def _elsewhere(graph: Graph, given: Arguments) -> list[Arguments]:
    """Return the arguments of the trace's other captures in PyTorch's usual mode, and of other sizes."""
    found = [
        view.arguments
        for view in graph.views
        if not (view.training or view.method or view.other_answer) and view.mode == PLAIN
    ]
    # Not each of these sizes has a capture.
    found += [resized(graph.inputs, given, sizes) for _, sizes in graph.inputs.other_path_sizes()]
    apart = {repr(InputSpec.of(*arguments)): arguments for arguments in reversed(found)}
    return [*reversed(apart.values())][:VIEWS]


def _pairs(flags: Sequence[Flag]) -> list[tuple[Flag, ...]]:
    """Return pairs of different flags that one module reads."""
    found: list[tuple[Flag, ...]] = [
        (first, second)
        for first, second in itertools.combinations(flags, 2)
        if first.readers[0].path == second.readers[0].path and first.readers != second.readers
    ]
    return found[:PAIRS]


def _asked_for(model: nn.Module, graph: Graph, given: Arguments) -> list[Occasion]:
    """Return answers to conditions on values, and sizes at which comparisons have other outcomes."""

    def arguments(sizes: Sizes) -> Arguments:
        return resized(graph.inputs, given, graph.inputs.at(sizes))

    passes = Passes(model, given)
    path = passes.path_of(given)
    if path is None:
        return []
    answers = [Occasion(given, answer=answer) for answer in (True, False) if "bool" in path.questions]
    if not path.compared:
        return answers
    search = PathSearch(graph.inputs.open, path, lambda sizes: passes.path_of(arguments(sizes)))
    search.follow_comparisons()
    return [*answers, *(Occasion(arguments(sizes)) for sizes in search.found[:SIZES])]


def tried(
    reference: nn.Module, small: nn.Module, known: Sequence[Switch]
) -> tuple[tuple[Refused, ...], tuple[Any, ...]]:
    """Find the flags with which a smaller module does not compute what the masked dense model does.

    Returns:
        These flags; and the values of flags, one or two at once, with which it does, each with its name.
    """
    right: dict[Any, list[str]] = {}
    wrong: dict[Any, str] = {}
    for switch in known:
        flag = switch.flags[-1]  # of a pair of which each alone is right, the second is refused
        if any(repr(one.value) not in right.get(r, ()) for one in switch.flags[:-1] for r in one.readers):
            continue
        differs = any(_differs(reference, small, switch, occasion) for occasion in switch.occasions)
        for reader, now in zip(flag.readers, flag.now, strict=True):
            values = right.setdefault(reader, [repr(now)])
            value = repr(flag.value)
            if differs:
                wrong.setdefault(reader, switch.line)
                values[:] = [v for v in values if v != value]
            elif value not in values and len(switch.flags) == 1:
                values.append(value)
    found = tuple(Refused(r.path, r.chain, tuple(right[r]), line) for r, line in wrong.items())
    return found, tuple(
        tuple((str(reader), flag.value) for flag in switch.flags for reader in flag.readers)
        for switch in known
        if switch.occasions  # else nothing was compared
        and all(repr(flag.value) in right.get(r, ()) for flag in switch.flags for r in flag.readers)
    )


def _differs(reference: nn.Module, small: nn.Module, switch: Switch, occasion: Occasion) -> bool:
    with switch.on(reference, small):
        try:
            occasion.run(reference, *occasion.arguments)
        except Exception:  # where the dense model fails, the smaller one may fail too
            return False
        ours, theirs = (functools.partial(occasion.run, model) for model in (small, reference))
        try:
            got, wanted = run_both(ours, theirs, *occasion.arguments, Draws())
        except Exception:
            return True
    tolerance = rounding_of(wanted)
    return not relative_difference(got, wanted) <= tolerance


def require_as_traced(model: nn.Module, graph: Graph) -> None:
    """Refuse a model of which an attribute was set after the trace, so that it makes other calls.

    Raises:
        ApplyError: Its trace is about other code.
    """
    others = changed(model, graph.attributes)
    if not others:
        return
    given = graph.captured_inputs()
    now = Passes(model, given).path_of(given)
    with contextlib.ExitStack() as stack:
        for flag in others:
            stack.enter_context(flag.on(model))
        before = Passes(model, given).path_of(given)
    if now is not None and before is not None and now.calls != before.calls:
        names = "; ".join(f"{flag.readers[0]} = {flag.now[0]!r}, then {flag.value!r}" for flag in others[:3])
        raise ApplyError(
            f"apply: expected the model as it was when it was traced, got one with which the forward pass "
            f"makes other calls: {names}. Trace it again, or set it back."
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
                    f"goes another way{f' ({flag.line})' if flag.line else ''}, which needs units that were "
                    f"removed. Set it before sc.trace and prune again, or set it back."
                )


def guard(small: nn.Module, flags: Sequence[Refused]) -> None:
    """Let a module, and each in it that reads one of these flags, check them before each forward pass."""
    paths = dict.fromkeys(["", *(flag.path for flag in flags)]) if flags else {}
    for path in paths:
        inside = [flag for flag in flags if not path or flag.path == path]
        small.get_submodule(path).register_forward_pre_hook(Guard(inside, path))


def in_words(flags: Sequence[Refused]) -> str:
    """Write a sentence on the flags that are refused; empty if there are none."""
    names = list(dict.fromkeys(map(str, flags)))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"refused at the call, as it needs removed units: {'; '.join(names[:3])}{more}." if names else ""
