"""Which groups a smaller module can express, and which need the captured program."""

from __future__ import annotations

import itertools
import re
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from secateur.apply.attributes import follows
from secateur.apply.compare import relative_difference, run
from secateur.apply.metadata import new_metadata
from secateur.apply.module import smaller_module
from secateur.apply.program import smaller_program
from secateur.apply.record import Record, attach
from secateur.apply.regions import Regions
from secateur.apply.sizes import Sizes, set_sizes
from secateur.errors import ApplyError
from secateur.graph.graph import Graph
from secateur.plan import Plan

SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Relative difference below which two forms count as equal; they may sum in another order."""


def proven_module(
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """The smaller module, once a forward pass has shown that it computes what the sliced program does.

    Size attributes are tried alone first. Where none of their readings gives such a module, the submodules
    whose code stands in the way run as captured.

    Raises:
        ApplyError: If there is no such module.
    """
    program, changes = smaller_program(model, graph, plan)
    trial = _Trial(model, graph, plan, run(program, args, kwargs), args, kwargs)
    regions = _regions(model, graph, args, kwargs)
    guesses = list(changes.guesses(model))
    owners = frozenset(path for path in changes.owners if not follows(model.get_submodule(path)))
    nothing: frozenset[str] = frozenset()
    attempts = [(guesses, nothing, False)]
    if owners:
        attempts += [([*guesses, {}], owners, wider) for wider in (False, True)]
    first: ApplyError | None = None
    for readings, capturable, wider in attempts:
        for sizes in readings:
            try:
                small, captured = trial.module(sizes, regions, capturable, wider=wider)
            except ApplyError as error:
                first = first or error
            else:
                metadata = new_metadata(model, small, graph, graph.keep_slots(plan.keep))
                set_sizes(model, small, metadata)
                sizes = {**sizes, **metadata}
                return attach(small, Record(plan, "module", _note(captured), sizes=sizes, captured=captured))
    raise first or ApplyError("apply: expected a reading of the size attributes, got none.")


_REGIONS: WeakKeyDictionary[Graph, Regions] = WeakKeyDictionary()
"""What was captured for a trace serves every further plan, as long as the trace lives."""


def _regions(model: nn.Module, graph: Graph, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Regions:
    found = _REGIONS.get(graph)
    if found is None or found.model is not model:
        found = _REGIONS[graph] = Regions(model, args, kwargs)
    return found


def _note(captured: tuple[str, ...]) -> str:
    if not captured:
        return ""
    alike = Counter(re.sub(r"\d+", "*", path) for path in captured)
    names = (name if count == 1 else f"{name} ({count})" for name, count in alike.items())
    return f"submodules that run as captured, because their code holds a size: {', '.join(names)}."


@dataclass(frozen=True, eq=False)
class _Trial:
    """Builds smaller modules and compares them with what the sliced program computes."""

    model: nn.Module
    graph: Graph
    plan: Plan
    expected: list[torch.Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def module(
        self, sizes: Sizes, regions: Regions, owners: frozenset[str], *, wider: bool
    ) -> tuple[nn.Module, tuple[str, ...]]:
        """The smaller module with these size attributes; of `owners` those in the way run as captured.

        The one that fails is captured along with all of its class in which a constant changes. Where
        nothing fails but the numbers differ, all in which a constant changes are. If that is not enough,
        and `wider` is true, so are those around them.
        """
        captured: frozenset[str] = frozenset()
        while True:
            small = smaller_module(self.model, self.plan, sizes)
            regions.put(small, captured, self.graph, self.plan)
            try:
                _prove(small, self.expected, self.args, self.kwargs)
            except ApplyError as error:
                found = self._to_capture(small, error, owners - captured)
                if not found and wider:
                    found = frozenset(path.rpartition(".")[0] for path in captured) - {""}
                more = _outermost(captured | found)
                if more == captured:
                    raise
                captured = more
            else:
                return small, tuple(sorted(captured))

    def _to_capture(self, small: nn.Module, error: ApplyError, left: frozenset[str]) -> frozenset[str]:
        running = _running(small, error.__cause__)
        blamed = next((path for path in reversed(running) if path in left), None)
        if blamed is None:
            return left
        kind = type(self.model.get_submodule(blamed))
        return frozenset(path for path in left if type(self.model.get_submodule(path)) is kind)


def _outermost(paths: frozenset[str]) -> frozenset[str]:
    """Without those inside another one."""
    return frozenset(p for p in paths if not any(p.startswith(f"{other}.") for other in paths))


def _running(small: nn.Module, error: BaseException | None) -> list[str]:
    """Paths of the submodules whose code was running when an error occurred, outermost first."""
    paths = {id(module): path for path, module in small.named_modules()}
    frames = traceback.walk_tb(error.__traceback__ if error is not None else None)
    running = (frame.f_locals.get("self") for frame, _ in frames)
    return [paths[id(module)] for module in running if id(module) in paths]


def _prove(
    small: nn.Module, expected: list[torch.Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise ApplyError unless the module gives the expected outputs."""
    try:
        got = run(small, args, kwargs)
    except Exception as error:  # the user's forward may fail in any way once shapes have changed
        raise ApplyError(
            f"apply: the smaller module's forward pass failed ({type(error).__name__}: {error}), "
            f"most likely because the code holds a size that does not follow its tensors. Use form='graph', "
            f"or leave the group alone."
        ) from error
    tolerance = max((SAME.get(t.dtype, 1e-3) for t in expected), default=0.0)
    difference = relative_difference(got, expected)
    if not difference <= tolerance:
        raise ApplyError(
            f"apply: expected the smaller module to compute what the sliced program computes, got a relative "
            f"difference of {difference:.2g}. Its code uses a size that has changed. Use form='graph'."
        )


def unrealisable(
    model: nn.Module, graph: Graph, plan: Plan, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """The pruned groups of a plan that a smaller module cannot express, by halving the set of groups."""
    pruned = [g.name for g in plan.groups if g.removed]

    def works(names: list[str]) -> bool:
        try:
            proven_module(model, graph, restricted(plan, graph, names), args, kwargs)
        except ApplyError:
            return False
        return True

    failed = _failing(pruned, works)
    return tuple(name for name in pruned if name in failed)


def restricted(plan: Plan, graph: Graph, names: list[str]) -> Plan:
    """The same plan with all groups but these left whole."""
    return Plan.build(
        graph,
        {g.name: g.keep for g in plan.groups if g.name in names},
        allocator=plan.allocator,
        settings=plan.settings,
        seed=plan.seed,
        budget=plan.budget,
        certificates=plan.certificates,
    )


def _failing(names: list[str], works: Callable[[list[str]], bool]) -> list[str]:
    """Members without which `works` is true, by halving; each is judged in the company of its half."""
    if not names or works(names):
        return []
    if len(names) == 1:
        return names
    parts = 2 if len(names) > 4 else len(names)
    cuts = [len(names) * k // parts for k in range(parts + 1)]
    failed = [n for a, b in itertools.pairwise(cuts) for n in _failing(names[a:b], works)]
    left = [name for name in names if name not in failed]
    # Two halves may work alone and fail together.
    return failed if works(left) else failed + left
