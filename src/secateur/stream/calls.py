"""The captured program as a list of operator calls on the model's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from secateur.graph.binding import all_by_name, bound
from secateur.graph.graph import Graph
from secateur.graph.inline import Mode, in_modes, modes_of
from secateur.graph.nodes import lifted
from secateur.graph.writes import written


@dataclass(frozen=True)
class Call:
    """One operator call; arguments that are nodes stand for their values."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    modes: tuple[Mode, ...] = ()

    @classmethod
    def captured(cls, node: fx.Node) -> Call:
        """The call of a node, as it was captured."""
        return cls(node.target, tuple(node.args), dict(node.kwargs), modes_of(node))

    @classmethod
    def bound(cls, target: Any, arguments: dict[str, Any], modes: tuple[Mode, ...] = ()) -> Call:
        """A call from arguments by schema name."""
        return cls(target, *bound(target, arguments), modes)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """What the operator gives for these arguments, in the modes in which it was captured."""
        return in_modes(self.modes, self.target, *args, **kwargs)

    def arguments(self) -> dict[str, Any]:
        """Arguments by schema name, with defaults."""
        return all_by_name(self.target, self.args, self.kwargs)


class ProgramCalls:
    """All operator calls of the program, and the tensors they read.

    Attributes:
        graph: The trace.
        program: The captured program.
        nodes: The nodes that compute something, in order.
        index: Node -> its place among them.
        names: Placeholder -> state-dict name of the tensor that it stands for.
        inputs: The placeholders that stand for the model's inputs.
        writes: Names of the nodes whose values something writes into.
    """

    def __init__(self, graph: Graph, program: ExportedProgram | None = None) -> None:
        """Read a program.

        Args:
            graph: The trace.
            program: One of ``graph.programs``. None: the one that was captured first.
        """
        self.graph = graph
        self.program = program = program or graph.program
        self.names: dict[fx.Node, str] = {}
        self.inputs: list[fx.Node] = []
        for node, kind, name in lifted(program):
            if kind is InputKind.USER_INPUT:
                self.inputs.append(node)
            elif name is not None:
                self.names[node] = name
        self.nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self.index = {node: k for k, node in enumerate(self.nodes)}
        self.writes = written(program.graph_module)

    def is_tensor(self, node: Any) -> bool:
        """Whether an argument stands for a tensor of the model that the program does not write to."""
        return isinstance(node, fx.Node) and node in self.names and node.name not in self.writes
