"""Which values a captured program overwrites."""

from __future__ import annotations

from torch import fx


def written(module: fx.GraphModule) -> frozenset[str]:
    """Names of the nodes that some operator writes in place."""
    names: set[str] = set()
    for part in module.modules():
        if not isinstance(part, fx.GraphModule):
            continue
        for node in part.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is None or not getattr(schema, "is_mutable", False):
                continue
            for position, argument in enumerate(schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                fx.map_arg(value, lambda n: names.add(n.name))
    return frozenset(names)
