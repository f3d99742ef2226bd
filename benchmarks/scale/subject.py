"""A model to be costed: its trace, its data's sizes, and what a plan to half its MACs leaves of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import secateur as sc
from secateur.graph.graph import Graph
from secateur.graph.trace import trace
from secateur.measure.cost import weight_bytes
from secateur.plan import Plan
from secateur.targets.units.program import smaller_program
from secateur.targets.units.record import Record, attach
from secateur.targets.units.traced import Traced


@dataclass(frozen=True, eq=False)
class Subject:
    """What is pruned, with how much data.

    Attributes:
        name: For tables.
        model: On the meta device, or with weights.
        inputs: So many samples as the model takes them: a tensor, or a mapping with ``labels``.
        samples: How many are read for scores.
        repaired: How many are read by signals and repairs that need no labels.
        batch: Samples a batch.
        classes: Of the labels; 0 where samples have none.
        share: Of the dense MACs that the plan leaves.
    """

    name: str
    model: nn.Module
    inputs: Callable[[int], Any]
    samples: int
    repaired: int
    batch: int
    classes: int = 0
    share: float = 0.5

    @cached_property
    def graph(self) -> Graph:
        """The trace."""
        return trace(self.model, self.inputs(2))

    @cached_property
    def plan(self) -> Plan:
        """To the share of the MACs, the same part of every group, units at random."""
        drawn = np.random.default_rng(0)
        scores = {"random": {group.name: drawn.random(group.size) for group in self.graph.groups}}
        rule = sc.Uniform(removal="random")
        return rule.allocate(self.graph, scores, sc.Budget(macs=self.share))

    @cached_property
    def small(self) -> nn.Module:
        """The captured program after the plan."""
        program = smaller_program(Traced(self.model, self.graph), self.plan)
        return attach(program, Record(self.plan, "graph"))

    @property
    def bytes(self) -> int:
        """Of parameters and buffers."""
        return weight_bytes(self.model)

    def part(self, samples: int) -> Subject:
        """The same with a batch of another size; the trace is shared."""
        found = replace(self, batch=samples)
        found.__dict__.update({k: v for k, v in self.__dict__.items() if k in ("graph", "plan", "small")})
        return found

    def call(self, model: Callable[..., Any], samples: int) -> Any:
        """Run something with the model's signature."""
        given = self.inputs(samples)
        return model(**given) if isinstance(given, dict) else model(given)

    def loss(self, output: Any) -> Tensor:
        """As `secateur.signals.loss.default_loss`, with labels that stand for any."""
        found = getattr(output, "loss", None)
        if found is not None:
            return found
        labels = torch.zeros(len(output), dtype=torch.int64, device=output.device)
        return F.cross_entropy(output, labels)


def storages(values: Iterable[Any]) -> int:
    """Bytes that tensors take, shared storage counted once; also on the meta device."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def operators(graph: Graph) -> int:
    """Operators of the captured program."""
    return sum(isinstance(n, fx.Node) and n.op == "call_function" for n in graph.program.graph.nodes)
