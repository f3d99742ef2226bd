"""Move an optimizer's state to the smaller parameters of a pruned model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.plan import Plan
from secateur.targets.units.tensors import Removed, cut, removed_positions


@dataclass(frozen=True, eq=False)
class Move:
    """A parameter before and after pruning.

    Attributes:
        name: Its name in the model.
        old: The parameter before.
        new: The parameter after.
        removed: The removed positions of each axis.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter
    removed: Removed = field(default_factory=dict)


def moves(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter], plan: Plan) -> list[Move]:
    """Pair the parameters of a model before and after a plan was applied. Tied parameters appear once.

    Args:
        before: Parameters before by name; tied ones under each of their names.
        after: Parameters after, by the same names.
        plan: The plan that was applied.
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
    """Make optimizers use the new parameters, in place. Groups, schedulers and wrappers stay valid.

    State with the parameter's shape (moments, momentum) loses the same positions as the parameter. Single
    numbers (the step count) are kept. State of any other shape (factored moments) cannot be cut: if the
    parameter shrank, its state is dropped, and the optimizer starts it again.

    Returns:
        The names of the parameters whose state was dropped.
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


_LOST = object()  # marks state that cannot be cut


def _carried(value: Any, move: Move) -> Any:
    """Return one entry of the state for the new parameter, or `_LOST`."""
    if not move.removed or not isinstance(value, Tensor) or value.numel() == 1:
        return value
    return cut(value, move.removed) if value.shape == move.old.shape else _LOST
