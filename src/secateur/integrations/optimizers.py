"""What an optimizer remembers, carried over to smaller parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.apply.tensors import Removed, cut, removed_positions
from secateur.plan import Plan


@dataclass(frozen=True, eq=False)
class Move:
    """A parameter that another one stands in for.

    Attributes:
        name: In the model.
        old: Before.
        new: After.
        removed: What went, by axis.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter
    removed: Removed = field(default_factory=dict)


def moves(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter], plan: Plan) -> list[Move]:
    """Every parameter of a model that a plan was applied to, tied ones once.

    Args:
        before: By name, with duplicates.
        after: The same names.
        plan: For the model before.
    """
    removed = {id(before[name]): axes for name, axes in removed_positions(plan).items() if name in before}
    found = {
        id(old): Move(name, old, after[name], removed.get(id(old), {}))
        for name, old in before.items()
        if name in after
    }
    return list(found.values())


@torch.no_grad()
def carry(optimizers: Iterable[torch.optim.Optimizer], moved: Iterable[Move]) -> tuple[str, ...]:
    """Let optimizers go on with the new parameters, in place: groups, schedulers and wrappers stay valid.

    State that has a parameter's shape (moments, momentum) loses the same positions; single numbers (the step)
    stay. A parameter with state of another shape (factored moments) starts anew if it shrank, as one does
    that has not been stepped.

    Returns:
        The parameters that start anew.
    """
    by_old = {id(move.old): move for move in moved}
    anew = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [by_old[id(p)].new if id(p) in by_old else p for p in group["params"]]
        state = optimizer.state
        for old in [p for p in state if id(p) in by_old]:
            move, held = by_old[id(old)], state.pop(old)
            smaller = {key: _carried(value, move) for key, value in held.items()}
            if any(value is _LOST for value in smaller.values()):
                anew.append(move.name)
            else:
                state[move.new] = smaller
    return tuple(anew)


_LOST = object()


def _carried(value: Any, move: Move) -> Any:
    """A piece of state for the new parameter, or `_LOST`."""
    if not move.removed or not isinstance(value, Tensor) or value.numel() == 1:
        return value
    return cut(value, move.removed) if value.shape == move.old.shape else _LOST
