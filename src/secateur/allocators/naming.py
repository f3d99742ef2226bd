"""Find the groups that a name, a shell pattern or a module refers to."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from secateur.errors import SettingError
from secateur.graph.groups import Group, WeightGroup


def layers_of(group: Group) -> tuple[str, ...]:
    """The paths of the layers that produce a group's units."""
    tensors = (
        (group.name,) if isinstance(group, WeightGroup) else (s.tensor for s in group.of_role("produce"))
    )
    return tuple(dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors))


def covers(pattern: str, name: str) -> bool:
    """Whether a shell pattern matches a dotted name or one of its parents.

    Example:
        >>> covers("layer1", "layer1.0.conv1"), covers("*.conv1", "layer1.0.conv1"), covers("conv1", "conv10")
        (True, True, False)
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: k + 1]), pattern) for k in range(len(parts)))


def matching(where: str, pattern: str, groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups that a pattern refers to.

    The exact name of a group refers to that group only. Any other pattern refers to each group whose name it
    covers, and to each group with a producing layer whose path it covers.

    Args:
        where: Start of the error message, which says what was expected.
        pattern: A name or a shell pattern.
        groups: The groups to choose from.

    Raises:
        SettingError: No group matches.
    """
    exact = tuple(g for g in groups if pattern in (g.name, glob.escape(g.name)))
    found = exact or tuple(
        g for g in groups if any(covers(pattern, name) for name in (g.name, *layers_of(g)))
    )
    if not found:
        raise SettingError(
            f"{where}, got {pattern!r}, which matches none. Choose among {shorten(g.name for g in groups)}."
        )
    return found


def path_of(module: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """The path of a module in its model, escaped so that as a pattern it matches only this path.

    Args:
        module: A part of the model. It must have parameters.
        tensors: The model's parameters by name, the same objects that the module holds.

    Raises:
        SettingError: The module is not a part of the model.
    """
    own = dict(module.named_parameters())
    for path, tensor in tensors.items():
        for name, parameter in own.items():
            if tensor is parameter and path.endswith(f".{name}"):
                return glob.escape(path.removesuffix(f".{name}"))
    raise SettingError(
        f"limits: expected modules of the model that is pruned, with parameters of their own, got "
        f"{type(module).__name__}. Pass a part of that model, or the names of its layers."
    )


def shorten(names: Iterable[str], most: int = 8) -> str:
    """Join names in one line; of a long list, only the first ones and the number of the others.

    Example:
        >>> shorten(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    names = list(names)
    line = ", ".join(repr(name) for name in names[:most]) or "(none)"
    return line if len(names) <= most else f"{line} and {len(names) - most} more"
