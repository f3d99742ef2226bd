"""Where a network can be compared with another one between its blocks.

At a neck of a program, one value alone says all that later nodes will read of what came before: the residual
stream between two blocks, the input of each layer of a plain chain, the input of a classifier. What does not
depend on parameters, such as a mask or a table of positions, is the same in both networks and does not count.
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.export.graph_signature import OutputKind

from secateur.graph.datasizes import depends_on_data
from secateur.stream.calls import ProgramCalls


def outputs(program: ProgramCalls) -> list[fx.Node]:
    """Return the nodes of floating numbers that the model returns."""
    (node,) = (n for n in program.program.graph.nodes if n.op == "output")
    specs = program.program.graph_signature.output_specs
    returned = [v for v, s in zip(node.args[0], specs, strict=True) if s.kind is OutputKind.USER_OUTPUT]
    return [v for v in dict.fromkeys(returned) if isinstance(v, fx.Node) and _is_feature(v)]


def features(program: ProgramCalls) -> list[fx.Node]:
    """Return the necks of a program, in order; of necks with no layer in between the last one.

    The model's outputs are not among them.
    """
    learnt = _depends_on_parameters(program)
    last = {n: max((program.index.get(u, len(program.nodes)) for u in n.users), default=-1) for n in learnt}
    live: set[fx.Node] = set()
    necks: list[int] = []
    for k, node in enumerate(program.nodes):
        live = {n for n in live if last[n] > k}
        if node in learnt and last[node] > k:
            live.add(node)
        if live == {node} and _is_feature(node):
            necks.append(k)
    found = []
    returned = {*outputs(program)}
    for k in necks:
        node = program.nodes[k]
        follower = program.nodes[k + 1] if k + 1 < len(program.nodes) else None
        if node not in returned and not (k + 1 in necks and not _reads_matrix(follower, program)):
            found.append(node)
    return found


def _depends_on_parameters(program: ProgramCalls) -> set[fx.Node]:
    """Return the nodes whose values depend on a parameter."""
    parameters = {*program.program.graph_signature.parameters}
    found: set[fx.Node] = set()
    for node in program.nodes:
        if any(n in found or program.names.get(n) in parameters for n in node.all_input_nodes):
            found.add(node)
    return found


def _reads_matrix(node: fx.Node | None, program: ProgramCalls) -> bool:
    """Whether a node reads a weight of at least two axes."""
    read = () if node is None else node.all_input_nodes
    return any(n in program.names and n.meta["val"].ndim > 1 for n in read)


def _is_feature(node: fx.Node) -> bool:
    """Whether a node's value is one tensor of floating numbers, of a size that the data do not decide."""
    value = node.meta.get("val")
    return (
        isinstance(value, Tensor) and value.is_floating_point() and not any(map(depends_on_data, value.shape))
    )
