"""Limits on pruning, for all allocators: how many units a group may lose."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from torch import Tensor, nn

from secateur.allocators.checks import fraction
from secateur.allocators.naming import matching, path_of
from secateur.errors import NothingToPruneError, SettingError
from secateur.graph.groups import Group

MEASURED = "measured"


@dataclass(frozen=True)
class Limits:
    """Bounds on the removal in every group, for all allocators.

    Attributes:
        round_to: The number of kept units is rounded up to a multiple of this, at most to the whole group.
            ``"measured"``: `sc.prune` times the plans for 1, 4, 8, 16 and 32 at one budget, and takes the
            fastest that is as good.
        min_keep: At least this many units stay. A group with fewer units is not pruned.
        max_ratio: At most this fraction of a group is removed, in [0, 1). The default is from Lin et al.
            2025, ToD.
        ignore: Groups that are not pruned: names of groups or layers, as shell patterns (``*``, ``?``), or
            modules of the model. A layer stands for all groups whose units it produces. A module stands for
            all its layers.

    Raises:
        SettingError: A value is out of range.

    Example:
        >>> Limits(round_to=8).removable(size=64, k=30)  # 34 kept, rounded up to 40
        24
    """

    round_to: int | Literal["measured"] = 1
    min_keep: int = 1
    max_ratio: float = 0.99
    ignore: tuple[str | nn.Module, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("round_to", "min_keep"):
            value = getattr(self, name)
            if (name, value) != ("round_to", MEASURED):
                object.__setattr__(self, name, _positive(name, value))
        object.__setattr__(self, "max_ratio", fraction("limits", "max_ratio", self.max_ratio))
        object.__setattr__(self, "ignore", _ignored(self.ignore))

    def feasible(self, size: int) -> NDArray[np.int64]:
        """All numbers of units above zero that a group of `size` units may lose, ascending."""
        most = min(_floor_of(self.max_ratio, size), size - self.min_keep)
        # size - removed must be a multiple of round_to.
        least = size % self.multiple or self.multiple
        return np.arange(least, most + 1, self.multiple, dtype=np.int64)

    @property
    def multiple(self) -> int:
        """`round_to` as a number.

        Raises:
            SettingError: It is still to be measured.
        """
        if isinstance(self.round_to, str):
            raise SettingError(
                f"limits: expected a number as round_to here, got {self.round_to!r}, which sc.prune alone "
                "measures. Write Limits(round_to=8), for example."
            )
        return self.round_to

    def removable(self, size: int, k: int) -> int:
        """The largest number of units that may be removed and is at most `k`; 0 if there is none.

        The result never falls as `k` grows.
        """
        feasible = self.feasible(size)
        found = int(np.searchsorted(feasible, k, side="right"))
        return int(feasible[found - 1]) if found else 0

    def allowed(self, size: int) -> int:
        """The largest number of units that a group of `size` units may lose."""
        return self.removable(size, size)

    def named(self, tensors: Mapping[str, Tensor]) -> Limits:
        """Return these limits with each module in `ignore` replaced by its path in the model.

        Args:
            tensors: The parameters of the model by name. They must be the same objects that the modules hold.

        Raises:
            SettingError: A module is not a part of the model.
        """
        paths = (path_of(part, tensors) if isinstance(part, nn.Module) else part for part in self.ignore)
        return replace(self, ignore=tuple(paths))

    def considered(self, groups: Iterable[Group]) -> tuple[Group, ...]:
        """The groups that may be pruned: those that `ignore` does not match.

        Raises:
            SettingError: A pattern matches no group, or `ignore` still holds a module (see `named`).
            NothingToPruneError: No group is left.
        """
        groups = tuple(groups)
        ignored = {
            group.name
            for pattern in self._patterns
            for group in matching("limits: expected each ignore pattern to match a group", pattern, groups)
        }
        left = tuple(g for g in groups if g.name not in ignored)
        if not left:
            why = f"all {len(groups)} groups ignored" if groups else "no group at all"
            raise NothingToPruneError(
                f"allocate: expected a group whose units may go, got {why}. "
                + ("Ignore fewer." if groups else "See graph.frozen for the reasons.")
            )
        return left

    @property
    def _patterns(self) -> list[str]:
        for part in self.ignore:
            if isinstance(part, nn.Module):
                raise SettingError(
                    f"limits: expected names here, got the module {type(part).__name__} and no model to "
                    "find it in. Pass the name of the layer, or limits.named(dict(model.named_parameters()))."
                )
        return [str(part) for part in self.ignore]

    def as_settings(self) -> dict[str, JsonValue]:
        """The limits as plain values, to be stored in a plan."""
        return {
            "round_to": self.round_to,
            "min_keep": self.min_keep,
            "max_ratio": self.max_ratio,
            "ignore": [*self._patterns],
        }


def _positive(name: str, value: object) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # its TypeError is the check
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise SettingError(
            f"limits: expected {name} to be an integer of at least 1, got {value!r}. Give a number of units."
        )
    return number


def _ignored(value: object) -> tuple[str | nn.Module, ...]:
    # A single string is refused: as a sequence, it would be a list of one-letter patterns.
    if isinstance(value, list | tuple) and all(isinstance(part, str | nn.Module) for part in value):
        return tuple(value)
    raise SettingError(
        f"limits: expected ignore to be a tuple of patterns or modules, got {value!r}. "
        'Write ignore=("layer1.*",), for example.'
    )


def _floor_of(ratio: float, size: int) -> int:
    """The largest k with k / size <= ratio.

    It compares the quotient and not the product, because of rounding: 29 / 100 equals the float 0.29, but
    0.29 * 100 is slightly below 29.
    """
    k = math.floor(ratio * size) + 1
    while k > 0 and k / size > ratio:
        k -= 1
    return k


DEFAULTS: Mapping[str, Limits] = MappingProxyType({"weight": Limits(max_ratio=1 - 1e-12)})
"""Default limits by granularity, where they differ: common sparsities of single weights are above 99 %, so at
least one weight of each tensor stays."""
