"""Flags that a user sets on a pruned module after the trace: where the module would be wrong, it refuses."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.common.foreign import line_of
from secateur.errors import ApplyError, InputError
from secateur.graph.flags import Chain, Flag, Reader, changed, flags_of, value_of
from secateur.graph.graph import Graph
from secateur.graph.inputs import Arguments
from secateur.graph.passes import Passes
from secateur.targets.units.compare import PLAIN, SAME, Way, relative_difference, run, run_both
from secateur.targets.units.draws import Draws

_TRAINING = Way(training=True)


@dataclass(frozen=True)
class Switch:
    """A value that the code names for a flag, and what the dense model does with it.

    Attributes:
        flag: The flag with its value.
        ways: In which modes the model then makes other calls. Empty if in none, or if it fails.
        line: The first line of code that only then runs, in words; empty if the same lines do.
    """

    flag: Flag
    ways: tuple[Way, ...] = ()
    line: str = ""


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


def switches(model: nn.Module, given: Arguments) -> list[Switch]:
    """Run the dense model with each value that its code names for a flag; it is left as it was."""
    args, kwargs = given
    plain = Passes(model, given)
    before = {way: plain.course(given, training=way.training) for way in (PLAIN, _TRAINING)}
    if before[PLAIN] is None:
        return []
    found = []
    for flag in flags_of(model, functools.partial(run, model, args, kwargs)):
        ways, line = [], ""
        with flag.on(model):
            passes = Passes(model, given)
            for way, usual in before.items():
                course = passes.course(given, training=way.training)
                if usual is not None and course is not None and course.calls != usual.calls:
                    ways.append(way)
                    new = (call[1] for call, _ in course.calls if call not in usual.lines)
                    lines = (line_of(traceback.FrameSummary(file, number, "")) for file, number in new)
                    line = line or next(filter(None, lines), "")
        found.append(Switch(flag, tuple(ways), line))
    return found


def refused(
    reference: nn.Module, small: nn.Module, known: Sequence[Switch], given: Arguments
) -> tuple[Refused, ...]:
    """Find the flags with which a smaller module does not compute what the masked dense model does."""
    right: dict[Any, list[str]] = {}
    wrong: dict[Any, str] = {}
    for switch in known:
        differs = any(_differs(reference, small, switch.flag, way, given) for way in switch.ways)
        for reader, now in zip(switch.flag.readers, switch.flag.now, strict=True):
            values = right.setdefault(reader, [repr(now)])
            if differs:
                wrong.setdefault(reader, switch.line)
            else:
                values.append(repr(switch.flag.value))
    return tuple(Refused(r.path, r.chain, tuple(right[r]), line) for r, line in wrong.items())


def _differs(reference: nn.Module, small: nn.Module, flag: Flag, way: Way, given: Arguments) -> bool:
    with flag.on(reference), flag.on(small):
        try:
            run(reference, *given, way=way)
        except Exception:  # where the dense model fails, the smaller one may fail too
            return False
        ours, theirs = (functools.partial(_run, model, way) for model in (small, reference))
        try:
            got, wanted = run_both(ours, theirs, *given, Draws())
        except Exception:
            return True
    tolerance = max((SAME.get(t.dtype, 1e-3) for t in wanted), default=0.0)
    return not relative_difference(got, wanted) <= tolerance


def _run(model: nn.Module, way: Way, args: Any, kwargs: Any, draws: Draws) -> Any:
    return run(model, args, kwargs, draws, way)


def require_as_traced(model: nn.Module, graph: Graph) -> None:
    """Refuse a model of which an attribute was set after the trace, so that it makes other calls.

    Raises:
        ApplyError: Its trace is about other code.
    """
    others = changed(model, graph.attributes)
    if not others:
        return
    given = graph.captured_inputs()
    now = Passes(model, given).course(given)
    with contextlib.ExitStack() as stack:
        for flag in others:
            stack.enter_context(flag.on(model))
        before = Passes(model, given).course(given)
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
