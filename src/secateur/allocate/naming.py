"""Which groups a name, a shell pattern or a module stands for."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from secateur.errors import SettingError
from secateur.graph.groups import Group
from secateur.graph.weight import WeightGroup


def layers_of(group: Group) -> tuple[str, ...]:
    """The paths of the layers whose outputs a group's units are."""
    tensors = (
        (group.name,) if isinstance(group, WeightGroup) else (s.tensor for s in group.of_role("produce"))
    )
    return tuple(dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors))


def covers(pattern: str, name: str) -> bool:
    """Whether a shell pattern matches a dotted name, or a module that holds what has that name.

    Example:
        >>> covers("layer1", "layer1.0.conv1"), covers("*.conv1", "layer1.0.conv1"), covers("conv1", "conv10")
        (True, True, False)
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: k + 1]), pattern) for k in range(len(parts)))


def matching(where: str, pattern: str, groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups that a pattern stands for.

    The name of a group stands for that group alone. Any other pattern stands for each group whose name it
    covers, or the path of a layer that produces its units.

    Raises:
        SettingError: There is none; the message starts with `where`, which says what was expected.
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
    """Where a module is in its model, as a pattern that matches this path alone.

    Args:
        module: A part of the model that has parameters.
        tensors: The model's own parameters by name.

    Raises:
        SettingError: The model does not hold it.
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
    """The names in one line, the tail of a long list as a count.

    Example:
        >>> shorten(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    names = list(names)
    line = ", ".join(repr(name) for name in names[:most]) or "(none)"
    return line if len(names) <= most else f"{line} and {len(names) - most} more"
