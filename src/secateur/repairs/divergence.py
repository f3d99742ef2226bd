"""How far class scores are from the dense ones: the divergence of the classes' probabilities.

A shift of all scores of a position changes no probability, and a language model scores tens of thousands of
words of which few are likely. The squared distance counts all of them alike; the divergence counts what the
model would say.
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from secateur.signals.loss import logits_of
from secateur.stream.calls import ProgramCalls


def divergence(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence KL(wanted || got) of each position, at least in float32.

    Args:
        got: Scores. [..., classes]
        wanted: The dense model's scores; minus infinity excludes a class. [..., classes]

    Returns:
        One number for each position, 0 or more. [...]
    """
    if got.dtype.itemsize < 4:
        got, wanted = got.float(), wanted.float()
    mine, theirs = F.log_softmax(got, -1), F.log_softmax(wanted, -1)
    return (theirs.exp() * (theirs - mine).masked_fill(theirs.isneginf(), 0.0)).sum(-1)


def scores_of(program: ProgramCalls) -> fx.Node | None:
    """Return the node of the class scores: the model's only output, or the output that it calls `logits`."""
    (node,) = (n for n in program.program.graph.nodes if n.op == "output")
    specs = program.program.graph_signature.output_specs
    returned = [v for v, s in zip(node.args[0], specs, strict=True) if s.kind.name == "USER_OUTPUT"]
    values = [v.meta["val"] if isinstance(v, fx.Node) else v for v in returned]
    scores = logits_of(pytree.tree_unflatten(values, program.program.call_spec.out_spec))
    return next((v for v, value in zip(returned, values, strict=True) if value is scores), None)


def is_language(program: ProgramCalls) -> bool:
    """Whether a model reads whole numbers and calls an output of [texts, tokens, words] `logits`."""
    reads = (node.meta.get("val") for node in program.inputs)
    reads_ids = any(isinstance(v, Tensor) and not v.is_floating_point() for v in reads)
    spec = program.program.call_spec.out_spec
    scores = None if spec is None or spec.is_leaf() else scores_of(program)
    return reads_ids and scores is not None and scores.meta["val"].ndim == 3
