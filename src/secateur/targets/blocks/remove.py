"""A copy of a network without some of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from secateur.errors import PlanError
from secateur.plan import Plan
from secateur.targets.blocks.block import OTHER, Block, PassThrough
from secateur.targets.blocks.counts import set_new_numbers
from secateur.targets.units.copying import duplicate
from secateur.targets.units.later_calls.callcheck import suspend
from secateur.targets.units.module_form.sizes import Sizes
from secateur.targets.units.tensors import submodule_called


def without_blocks(
    model: nn.Module,
    removed: Iterable[Block],
    passing: Iterable[str] = (),
    sizes: Sizes | None = None,
    *,
    shared: bool = False,
) -> nn.Module:
    """Copy a model without some blocks. Their tensors are not copied, so there never is a whole copy.

    Args:
        model: The dense model.
        removed: The blocks that go.
        passing: Paths of those in whose place a `PassThrough` stays.
        sizes: New values of numbers and lists of the smaller model, by path in it.
        shared: Whether the copy shares the tensors of the model.

    Raises:
        ApplyError: The model cannot be copied.
    """
    stand_ins = {block.path: PassThrough(block, model.get_submodule(block.path)) for block in removed}
    memo: dict[int, object] = {id(model.get_submodule(path)): new for path, new in stand_ins.items()}
    if shared:
        memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    small = duplicate(model, memo)
    suspend(small)
    passing = set(passing)
    gone = {id(new) for path, new in stand_ins.items() if path not in passing}
    for container in {path.rpartition(".")[0] for path in stand_ins}:
        blocks_in = small.get_submodule(container)
        before = [*blocks_in._modules]
        left = {name: m for name, m in blocks_in._modules.items() if id(m) not in gone}
        if before == [str(k) for k in range(len(before))]:
            left = {str(k): m for k, m in enumerate(left.values())}
        blocks_in._modules = left
    set_new_numbers(small, sizes or {})
    return small


def can_pass(block: Block) -> bool:
    """Whether a `PassThrough` can return all that the block does."""
    return OTHER not in block.returns


def names_after(
    model: nn.Module, names: Iterable[str], removed: Iterable[str], passing: Iterable[str] = ()
) -> dict[str, str]:
    """Return the new name of each tensor or module that stays.

    A tensor of a removed block stays if a module outside shares it.

    Args:
        model: The dense model.
        names: Names of its tensors or modules.
        removed: Paths of the removed blocks.
        passing: Paths of those that a `PassThrough` replaces.
    """
    removed = [*removed]
    moved: dict[str, str] = {}
    gone = {*removed} - {*passing}
    for container in {path.rpartition(".")[0] for path in gone}:
        before = [*model.get_submodule(container)._modules]
        left = [name for name in before if _join(container, name) not in gone]
        if before == [str(k) for k in range(len(before))]:
            moved |= {_join(container, old): _join(container, str(k)) for k, old in enumerate(left)}

    def renamed(name: str) -> str:
        parts = name.split(".")
        for k in range(len(parts), 0, -1):  # lists inside lists: the innermost first
            new = moved.get(".".join(parts[:k]))
            if new is not None:
                parts = [*parts[: k - 1], new.rpartition(".")[2], *parts[k:]]
        return ".".join(parts)

    inside = tuple(f"{path}." for path in removed)
    tensors = dict((*_all(model.named_parameters), *_all(model.named_buffers))) if inside else {}
    staying: dict[int, str] = {}
    for name, tensor in tensors.items():
        if not name.startswith(inside):
            staying.setdefault(id(tensor), name)
    places = {
        name: staying.get(id(tensors.get(name))) if f"{name}.".startswith(inside) else name for name in names
    }
    return {name: renamed(place) for name, place in places.items() if place is not None}


def _all(named: Callable[..., Iterable[tuple[str, Tensor]]]) -> Iterable[tuple[str, Tensor]]:
    return named(remove_duplicate=False)


def _join(container: str, name: str) -> str:
    return f"{container}.{name}" if container else name


def require_blocks(model: nn.Module, paths: Iterable[str]) -> None:
    """Make sure that a model has these blocks in lists or sequences: a plan from a file may name others.

    Raises:
        PlanError: A path is no entry of one.
    """
    for path in paths:
        container, _, name = path.rpartition(".")
        owner = submodule_called(model, container)
        if not isinstance(owner, nn.ModuleList | nn.Sequential) or owner._modules.get(name) is None:
            raise PlanError(
                f"plan: expected {path!r} to be an entry of a ModuleList or Sequential of the model, got "
                "none. Make the plan again."
            )


def copied_tensors(names: Mapping[str, str], source: nn.Module, target: nn.Module) -> None:
    """Copy tensors of one model into another, in place.

    Args:
        names: Names in `source` -> names in `target`.
        source: Where they come from.
        target: Where they go.
    """
    given, own = source.state_dict(), target.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, new in names.items():
            if isinstance(own.get(new), torch.Tensor):
                own[new].copy_(given[name])


def rebuilt(
    model: nn.Module, plan: Plan, stand_ins: Mapping[str, Sequence[int | str]], sizes: Sizes
) -> nn.Module:
    """Apply a plan to a model without searching for blocks or running the model.

    Args:
        model: The dense model.
        plan: The plan.
        stand_ins: As in `secateur.targets.units.record.Record`.
        sizes: New values of numbers and lists, by path.

    Raises:
        PlanError: The plan names something that is no entry of a list of modules.
    """
    paths = removed_paths(plan)
    require_blocks(model, paths)
    blocks = [
        Block(path, kept[0], tuple(kept[1:])) if (kept := stand_ins.get(path)) else Block(path, 0)
        for path in paths
    ]
    return without_blocks(model, blocks, stand_ins, sizes)


def removed_paths(plan: Plan) -> list[str]:
    """The paths of the blocks that a plan removes."""
    return [
        piece.tensor
        for group in plan.groups
        for piece in group.slices
        if piece.role == "block" and piece.removed
    ]
