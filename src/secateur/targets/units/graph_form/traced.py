"""A dense model with its trace, and what further captures of it show."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.export import ExportedProgram

from secateur.calibration.randomness import seeded
from secateur.graph.graph import Graph
from secateur.graph.kept import Kept, Labelled, Removed
from secateur.targets.units.compare import run
from secateur.targets.units.copying import duplicate
from secateur.targets.units.graph_form.accepts import Accepts
from secateur.targets.units.graph_form.narrowing import reach, refusal
from secateur.targets.units.graph_form.opened import open_program
from secateur.targets.units.graph_form.variants import Facts, find_facts
from secateur.targets.units.later_calls.flagged import FlagValues, flag_values
from secateur.targets.units.module_form.reading import Builds
from secateur.targets.units.rebinding import ReadsOf


@dataclass(frozen=True)
class Captured:
    """The program that serves every plan of a model.

    Attributes:
        program: The captured program. As many axes of its inputs are open as can be.
        kept: Says which positions of its tensors stay.
        facts: What its arguments follow.
        accepts: Which inputs it takes.
    """

    program: ExportedProgram
    kept: Callable[[Removed], Kept]
    facts: Facts
    accepts: Accepts


class Traced:
    """A dense model with its trace. What is learnt beyond the trace is learnt once, when first needed.

    Args:
        model: The dense model. It must not change while this object is in use.
        graph: Its trace.
    """

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.model, self.graph = model, graph

    @cached_property
    def builds(self) -> Builds:
        """The model's class, and the shapes that it has with other numbers in its configuration."""
        return Builds(type(self.model), self.model.config)

    @cached_property
    def flag_values(self) -> list[FlagValues]:
        """The values that the code names for its flags, and what the dense model does with each."""
        return flag_values(self.model, self.graph)

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """The tensors of the model that its copies read too, since something outside refers to them."""
        args, kwargs = self.graph.captured_inputs()
        copy = duplicate(self.model)
        # What fails here is reported later.
        with ReadsOf(self.model) as reads, seeded(0), suppress(Exception):
            run(copy, args, kwargs)
        return tuple(reads.names)

    @cached_property
    def captured(self) -> Captured:
        """The program that serves every plan. The model is captured several times to find it.

        Raises:
            ApplyError: If the forward pass draws random numbers that are not PyTorch's.
        """
        model, graph = self.model, self.graph
        narrow = Accepts.of(model, graph.program, graph, {})
        opened = open_program(model, graph)
        if opened is not None:
            # This comes before anything else asks about sizes, since each question becomes a condition.
            # Two axes that have to be equal are worth less than one that is free.
            wide = Accepts.of(model, opened.program, graph, opened.lines)
            worse = bool(refusal(wide, graph.inputs, {})) > bool(refusal(narrow, graph.inputs, {}))
            if not worse and reach(wide, graph.inputs) >= reach(narrow, graph.inputs):
                facts = find_facts(model, graph, opened)
                kept = Labelled.of(opened.program, head_sizes=graph.inputs.head_sizes).kept
                return Captured(opened.program, kept, facts, wide.with_facts(facts))
        facts = find_facts(model, graph)
        return Captured(graph.program, graph.kept, facts, narrow.with_facts(facts))
