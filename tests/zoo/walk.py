"""The whole way of one architecture: trace, plan, apply, verify, other sizes, half, train, save, load."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as pytree

import secateur as sc
from secateur.graph.inputs import Arguments, resized
from secateur.targets.units.compare import relative_difference, run, run_in_double
from tests.zoo.entry import Entry
from tests.zoo.weights import Inputs

RATIO = 0.3
TOLERANCE = 1e-9


@dataclass
class Walked:
    """What became of one architecture.

    Attributes:
        name: The architecture.
        family: The library that defines it.
        groups: Prunable groups.
        units: Units of these groups together.
        macs_share: Share of the MACs in layers with prunable units.
        macs: MACs after pruning, as a fraction of before.
        form: What form ``auto`` became.
        note: Why that is not ``module``, if so.
        needs_graph: Share of the prunable MACs' saving that a module cannot express, in [0, 1].
        frozen: Operators that froze something for want of a rule, with how many tensor axes each.
        proof_graph: Relative difference of form ``graph`` to the masked dense model, in float64; infinite if
            that form was not asked for.
        proof_auto: The same for form ``auto``.
        open: The axes that may vary, each with the sizes that were tried.
        fixed: How many axes of inputs may not.
        elsewhere: The largest relative difference to the masked dense model with open axes at their other
            sizes, in float64; for inexact plans, which have no such reference, 0 if the model runs there.
        half: In half precision: ``runs``, or ``dense does not``.
        training: A step in training mode: ``runs``, or ``dense does not``.
        seconds: By step.
    """

    name: str
    family: str
    groups: int = 0
    units: int = 0
    macs_share: float = 0.0
    macs: float = 1.0
    form: str = ""
    note: str = ""
    needs_graph: float = 0.0
    frozen: dict[str, int] = field(default_factory=dict)
    proof_graph: float = math.inf
    proof_auto: float = math.inf
    open: list[str] = field(default_factory=list)
    fixed: int = 0
    elsewhere: float = math.inf
    half: str = ""
    training: str = ""
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Records how long the block takes."""
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start


def random_keep(graph: sc.Graph, seed: int = 0) -> dict[str, NDArray[np.bool_]]:
    """Masks that remove floor(`RATIO` x size) units of every group, at least one."""
    rng = np.random.default_rng(seed)
    masks = {}
    for group in graph.groups:
        mask = np.ones(group.size, dtype=bool)
        mask[rng.choice(group.size, max(1, int(RATIO * group.size)), replace=False)] = False
        masks[group.name] = mask
    return masks


def varies(outputs: list[torch.Tensor]) -> bool:
    """Whether every output has finite values that differ, so that comparing it means something."""
    for output in outputs:
        values = output[torch.isfinite(output)] if output.is_floating_point() else output
        if values.numel() < 2 or not bool((values != values.flatten()[0]).any()):
            return False
    return True


def arguments(inputs: Inputs) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Positional and keyword arguments."""
    return (inputs, {}) if isinstance(inputs, tuple) else ((), dict(inputs))


def walk(entry: Entry, *, program: bool = True) -> Walked:
    """Every step for one architecture.

    Args:
        entry: The architecture.
        program: Form ``graph`` too, which takes most of the time.

    Raises:
        AssertionError: If an output is constant, a proof fails, or a loaded model computes something else.
        SecateurError: What a step refuses.
    """
    found = Walked(entry.name, entry.family)
    model, inputs = entry.make(), entry.inputs()
    args, kwargs = arguments(inputs)
    if not varies(run(model, args, kwargs)):
        raise AssertionError(f"{entry.name}: expected outputs that vary and are finite.")
    with found.timed("trace"):
        graph = sc.trace(model, inputs, allow_inexact=entry.inexact)
    with found.timed("plan"):
        plan = sc.Plan.build(graph, random_keep(graph), allocator="random", settings={"ratio": RATIO})
    with found.timed("apply"):
        chosen = sc.apply(model, plan, "auto", graph=graph, example_inputs=inputs)
    with found.timed("verify"):
        found.proof_auto = sc.verify(model, chosen, plan, inputs, tolerance=TOLERANCE).difference
    with found.timed("elsewhere"):
        found.open, found.fixed = [str(a) for a in graph.inputs.open], len(graph.inputs.fixed)
        found.elsewhere = elsewhere(model, chosen, graph, plan, (args, kwargs), exact=not entry.inexact)
        found.half = as_dense(model, chosen, lambda m: half(m, args, kwargs))
        found.training = as_dense(model, chosen, lambda m: training_step(m, args, kwargs))
    found.groups, found.units = len(graph.groups), sum(group.size for group in graph.groups)
    found.macs_share = graph.coverage().macs_share
    found.macs = plan.predicted.macs / max(plan.dense.macs, 1)
    record = sc.record_of(chosen)
    found.form, found.note = record.form, record.note
    if record.form == "graph":
        with found.timed("apply_leave"):
            rest = sc.apply(model, plan, "auto", graph=graph, example_inputs=inputs, on_unrealisable="leave")
        realised = sc.record_of(rest).plan.predicted.macs
        saved = plan.dense.macs - plan.predicted.macs
        found.needs_graph = (realised - plan.predicted.macs) / max(saved, 1)
    reasons = (f.reason for f in graph.frozen if f.reason.startswith(("no rule", "the rule")))
    found.frozen = dict(Counter(reasons))
    with found.timed("save_and_load"):
        reload(chosen, model, inputs)
    if program:
        with found.timed("graph"):
            other = sc.apply(model, plan, "graph", graph=graph, example_inputs=inputs)
            found.proof_graph = sc.verify(model, other, plan, inputs, tolerance=TOLERANCE).difference
            reload(other, model, inputs)
    return found


def elsewhere(
    model: nn.Module, small: nn.Module, graph: sc.Graph, plan: sc.Plan, given: Arguments, *, exact: bool
) -> float:
    """The largest difference to the masked dense model at the other sizes of open axes, in float64."""
    masked = sc.apply(model, plan, "masked")
    worst = 0.0
    for _, sizes in graph.inputs.other_sizes():
        args, kwargs = resized(graph.inputs, given, sizes)
        ours = run_in_double(small, args, kwargs)
        if exact:
            worst = max(worst, relative_difference(ours, run_in_double(masked, args, kwargs)))
    return worst


def as_dense(model: nn.Module, small: nn.Module, does: Callable[[nn.Module], None]) -> str:
    """``runs`` if a copy of the pruned model does something; it must wherever the dense one can."""
    try:
        does(copy.deepcopy(model))
    except Exception:  # a layer without a kernel for half precision, a loss that is no number
        return "dense does not"
    does(copy.deepcopy(small))
    return "runs"


def half(model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
    """One forward pass in half precision."""
    args, kwargs = pytree.tree_map(lambda v: v.half() if v.is_floating_point() else v, (args, kwargs))
    run(model.half(), args, kwargs)


def training_step(model: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
    """A forward and a backward pass in training mode, and a step of an optimizer."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    outputs = [v for v in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(v, torch.Tensor)]
    loss = sum(v[torch.isfinite(v)].square().mean() for v in outputs if v.requires_grad)
    loss.backward()  # type: ignore[union-attr]  # an output without gradient fails in the dense model too
    optimizer.step()
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise AssertionError("expected finite weights after a step of training.")


def reload(small: nn.Module, model: nn.Module, inputs: Inputs) -> None:
    """Save and load a pruned model; AssertionError unless the copy computes the same, bit for bit."""
    args, kwargs = arguments(inputs)
    with tempfile.TemporaryDirectory() as folder:
        sc.save(small, Path(folder))
        again = sc.load(Path(folder), lambda: copy.deepcopy(model), example_inputs=inputs)
    for ours, theirs in zip(run(again, args, kwargs), run(small, args, kwargs), strict=True):
        if not torch.equal(ours, theirs):
            raise AssertionError("expected the loaded model to compute the same, bit for bit.")
