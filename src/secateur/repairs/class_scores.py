"""Find the class scores among the outputs of a captured model."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from secateur.measure.divergence import reads_and_writes_words
from secateur.signals.loss import logits_of
from secateur.stream.calls import ProgramCalls


def scores_of(program: ProgramCalls) -> fx.Node | None:
    """Return the node of the class scores: the model's only output, or the output that it calls `logits`."""
    returned, values = _returned(program)
    scores = logits_of(pytree.tree_unflatten(values, program.program.call_spec.out_spec))
    return next((v for v, value in zip(returned, values, strict=True) if value is scores), None)


def _returned(program: ProgramCalls) -> tuple[list[Any], list[Any]]:
    """Return what the program gives back: its nodes (or constants), and their example values."""
    (node,) = (n for n in program.program.graph.nodes if n.op == "output")
    specs = program.program.graph_signature.output_specs
    returned = [v for v, s in zip(node.args[0], specs, strict=True) if s.kind.name == "USER_OUTPUT"]
    return returned, [v.meta["val"] if isinstance(v, fx.Node) else v for v in returned]


def is_language(program: ProgramCalls) -> bool:
    """Whether a captured model `reads_and_writes_words`."""
    spec = program.program.call_spec.out_spec
    if spec is None:
        return False
    given = (node.meta.get("val") for node in program.inputs)
    return reads_and_writes_words(given, pytree.tree_unflatten(_returned(program)[1], spec))
