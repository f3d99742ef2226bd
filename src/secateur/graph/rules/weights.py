"""Weights that are not parameters themselves, but computed from parameters or chosen from one by data."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from secateur.graph.rules.naming import operator_name

ZERO_AT_ZERO = frozenset(
    f"aten.{name}"
    for name in (
        "view.default", "reshape.default", "_unsafe_view.default", "flatten.using_ints", "unflatten.int",
        "permute.default", "transpose.int", "t.default", "numpy_T.default", "matrix_H.default", "mT.default",
        "adjoint.default", "swapaxes.default", "swapdims.default", "movedim.int", "unsqueeze.default",
        "squeeze.default", "squeeze.dim", "squeeze.dims", "expand.default", "repeat.default",
        "repeat_interleave.self_int", "slice.Tensor", "narrow.default", "select.int",
        "index.Tensor", "index_select.default", "flip.default", "split.Tensor",
        "split_with_sizes.default", "chunk.default", "unbind.int", "roll.default", "clone.default",
        "contiguous.default", "detach.default", "detach_.default", "alias.default", "to.dtype",
        "to.device", "to.dtype_layout", "_to_copy.default", "type_as.default", "dropout.default",
        "neg.default", "abs.default", "relu.default", "tanh.default", "sign.default",
        "sqrt.default", "square.default", "silu.default", "gelu.default", "div.Tensor",
        "div.Scalar", "mul.Scalar", "sum.dim_IntList", "mean.dim", "constant_pad_nd.default",
        "pad.default", "_weight_norm.default",
    )
) | {"operator.getitem"}  # fmt: skip
"""Operators whose result is zero wherever their first operand is."""

_READS = frozenset({"aten.index.Tensor", "aten.index_select.default"})
"""Operators that take positions of their first operand."""

PRODUCTS = frozenset(
    f"aten.{name}" for name in ("mul.Tensor", "matmul.default", "mm.default", "bmm.default", "einsum.default")
)
"""Operators whose result is zero wherever one of the operands is."""

SUMS = frozenset(f"aten.{name}" for name in ("add.Tensor", "sub.Tensor", "cat.default", "stack.default"))
"""Operators whose result is zero wherever all operands are."""


class Weights:
    """How the nodes of a program depend on parameters. Nodes are added in the order of the program.

    Attributes:
        computed: Parameters, buffers and constants, and what is computed from them alone.
        chosen: Parts of these that the data choose, by an index for example.
    """

    def __init__(self) -> None:
        self.computed: set[fx.Node] = set()
        self.chosen: set[fx.Node] = set()
        self._origin: dict[fx.Node, fx.Node] = {}
        self._vanishing: dict[fx.Node, tuple[Callable[[list[bool]], bool], list[fx.Node]]] = {}

    def add_parameter(self, node: fx.Node) -> None:
        """Add a placeholder that stands for a parameter, a buffer or a constant."""
        self.computed.add(node)
        self._origin[node] = node
        self._vanishing[node] = all, []

    def add_call(self, node: fx.Node, sources: list[fx.Node]) -> None:
        """Add an operator call with these tensor arguments."""
        name = operator_name(node)
        if sources and all(n in self.computed for n in sources):
            self.computed.add(node)
        elif len(sources) == 1 and name in ZERO_AT_ZERO and sources[0] in self.chosen:
            self.chosen.add(node)
        elif name in _READS and sources[0] in self.computed:
            self.chosen.add(node)
        found = [n for n in sources if n in self._vanishing]
        if name in ZERO_AT_ZERO and found[:1] == sources[:1] and found:
            self._vanishing[node] = all, found[:1]
        elif name in PRODUCTS and found:
            self._vanishing[node] = any, found
        elif name in SUMS and len(found) == len(sources) > 0 and not adds_number(node):
            self._vanishing[node] = all, found
        if node in self.computed or node in self.chosen or node in self._vanishing:
            origins = (self._origin[n] for n in found or sources if n in self._origin)
            if (origin := next(origins, None)) is not None:
                self._origin[node] = origin

    def origin(self, weight: fx.Node) -> fx.Node | None:
        """Return the first parameter that a weight is or is computed from; None if there is none."""
        return self._origin.get(weight)

    def vanishing(self, weight: fx.Node, holds: Callable[[fx.Node], bool]) -> list[fx.Node] | None:
        """Return the parameters in which zeros for some units make the weight zero for them.

        Args:
            weight: The weight.
            holds: Says whether a parameter has all of these units along one of its axes.

        Returns:
            The parameters, one twice if it is in several summands; None if zeros in no parameter are sure to
            do that.
        """
        found: dict[fx.Node, list[fx.Node] | None] = {}
        pending = [weight]  # a stack in place of recursion, since programs can be deep
        while pending:
            node = pending[-1]
            which, sources = self._vanishing.get(node, (any, []))
            waiting = [n for n in sources if n not in found]
            if waiting:
                pending += waiting
                continue
            pending.pop()
            if node in found:
                continue
            known = [found[n] for n in sources]
            if node not in self._vanishing:
                found[node] = None
            elif not sources:
                found[node] = [node] if holds(node) else None
            elif which is any:  # one factor that is zero is enough
                found[node] = next((f for f in known if f is not None), None)
            else:  # all summands have to be zero
                every = [p for f in known if f is not None for p in f]
                few = [p for k, p in enumerate(every) if every[:k].count(p) < 2]
                found[node] = None if None in known else few
        return found[weight]


def adds_number(node: fx.Node) -> bool:
    """Whether an addition adds a number to a tensor, so that its result is not zero at zero."""
    return len(node.all_input_nodes) < 2 and any(isinstance(a, int | float) for a in node.args[:2])
