"""In which order values of the captured program have samples and their positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from secateur.graph.programs import symbols_of

_MERGING = (
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
)


def positions_come_first(node: fx.Node) -> bool:
    """Whether a value is [positions, samples, ...], or a matrix whose rows go position by position.

    So it is inside `nn.MultiheadAttention`. Otherwise samples come first. Where the batch is fixed, that
    cannot be told, and the answer is no.

    Args:
        node: The value. A matrix is followed back to where the two axes became one.
    """
    values = [held.meta.get("val") for held in node.graph.nodes if held.op == "placeholder"]
    given = [value for value in values if symbols_of(value, 0)]
    batch = set[Any]().union(*(symbols_of(value, 0) for value in given))

    def of_samples(value: Tensor, axis: int) -> bool:
        return value.ndim > axis and bool(symbols_of(value, axis) & batch)

    value = node.meta["val"]
    if str(value.shape[0]) in {str(each.shape[0]) for each in given}:
        return False
    if of_samples(value, 1):
        return True
    while (before := next((n for n in node.all_input_nodes if _has_axes(n)), None)) is not None:
        earlier = before.meta["val"]
        if str(earlier.shape[0]) != str(value.shape[0]):
            merged = str(node.target) in _MERGING
            return merged and of_samples(earlier, 1) and not of_samples(earlier, 0)
        node = before
    return False


def _has_axes(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 0
