"""Find the projections of a residual network: the layers on a shortcut that change its shape."""

from __future__ import annotations

from torch import fx

from secateur.graph.graph import Graph
from secateur.graph.nodes import tensor_of
from secateur.repairs.regression.layers import Site
from secateur.stream.calls import Call, ProgramCalls

_SUMS = ("aten.add.Tensor", "aten.add_.Tensor")


def projections(graph: Graph) -> tuple[str, ...]:
    """Find the projection weights of a residual network.

    A projection is a linear layer, or a convolution with kernel size 1, on the shortcut of a residual block:
    its output, perhaps after a normalisation, is added to the output of a branch of other layers, and that
    branch starts at the projection's input. The settings ``dense`` and ``along`` of `Repairability` take such
    names.

    Args:
        graph: The model's trace.

    Returns:
        Names of the weights in the state dict, in order of execution, each once.

    Example:
        ``Repairability(dense=projections(graph))`` prunes all layers except the projections.
    """
    program_calls = ProgramCalls(graph)
    sites = {}
    for node in program_calls.nodes:
        site = Site.of(node, Call.captured(node), program_calls)
        if site is not None:
            sites[node] = site
    found = []
    for site in sites.values():
        name = program_calls.names[site.weight]
        small = all(length == 1 for length in tensor_of(graph.program, name).shape[2:])
        other = _added_to(site.node, sites, program_calls) if small else None
        if other is not None and _reaches(site.x, other, sites):
            found.append(name)
    return tuple(dict.fromkeys(found))


def _added_to(node: fx.Node, sites: dict[fx.Node, Site], program_calls: ProgramCalls) -> fx.Node | None:
    """Follow a layer's output to the addition it goes into, and return the other summand.

    Returns:
        None if the output is used more than once, or if another layer or another input joins before the
        addition.
    """
    while len(node.users) == 1:
        (user,) = node.users
        others = [n for n in user.all_input_nodes if n is not node and n not in program_calls.names]
        if str(user.target) in _SUMS and len(others) == 1:
            return others[0]
        if user in sites or others or user not in program_calls.index:
            return None
        node = user
    return None


def _reaches(start: fx.Node, end: fx.Node, sites: dict[fx.Node, Site]) -> bool:
    """Whether `end` is computed from `start` through at least one layer."""
    seen: set[tuple[fx.Node, bool]] = set()
    waiting = [(end, False)]
    while waiting:
        node, layered = waiting.pop()
        if node is start and layered:
            return True
        if (node, layered) not in seen:
            seen.add((node, layered))
            waiting += [(n, layered or node in sites) for n in node.all_input_nodes]
    return False
