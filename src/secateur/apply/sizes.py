"""Attributes that hold sizes (heads, split sizes, shapes), found from the captured program.

Where an operator's constant changes, capture knows which module was running. Attributes of that module
(or of the one around it) that hold the old value are taken to be where the constant came from; or it is
a multiple of a count that the module or its configuration holds. That is a guess, so there are several,
and a forward pass decides.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from secateur.errors import ArtifactError

Sizes = Mapping[str, Any]
"""``module.path.attribute`` -> its new value: an integer, a list of them, or a boolean; see `set_sizes`."""


@dataclass(frozen=True)
class Change:
    """A constant of the program that changed, or a list of which some did.

    Attributes:
        modules: Paths of the modules that were running, outermost first.
        old: In the dense model.
        new: What it has to be.
    """

    modules: tuple[str, ...]
    old: Any
    new: Any


def running_modules(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules that were running when an operator was captured, outermost first."""
    return tuple(path for path, _ in (node.meta.get("nn_module_stack") or {}).values())


class Prefer:
    """Which of several attributes with the old value to update; `doubt`: the value also occurs unchanged."""

    def __init__(self, pattern: str, *, doubted: bool) -> None:
        self._pattern, self._doubted = re.compile(pattern), doubted

    def __call__(self, names: list[str], doubt: bool) -> list[str]:
        """The attributes to update."""
        if doubt and not self._doubted:
            return []
        return [name for name in names if self._pattern.search(name)]


_every = Prefer("", doubted=True)
_undoubted = Prefer("", doubted=False)
_counts = Prefer("heads|groups|^num|^n_", doubted=True)

_FACTOR = re.compile("^(n|num)_|_(n|num)_|heads?$|groups?$")
"""Names of counts of which a constant may be a multiple: ``num_heads`` in ``num_heads * head_dim``."""


@dataclass
class SizeChanges:
    """What became of the program's size constants.

    Attributes:
        numbers: Single sizes.
        lists: Lists of sizes, as a whole.
        unchanged: Innermost running module, and a size there that stayed.
        owners: Innermost running modules of all calls that changed in whatever way; never the whole model.
    """

    numbers: list[Change] = field(default_factory=list)
    lists: list[Change] = field(default_factory=list)
    unchanged: set[tuple[str, int]] = field(default_factory=set)
    owners: set[str] = field(default_factory=set)

    def note(self, node: fx.Node, before: Any, after: Any) -> None:
        """Compare two versions of an argument, position by position."""
        if isinstance(before, str):
            return
        modules = running_modules(node)
        if isinstance(before, Sequence) and isinstance(after, Sequence) and len(before) == len(after):
            if before != after and all(map(_is_size, before)) and all(map(_is_size, after)):
                self.lists.append(Change(modules, list(before), list(after)))
            pairs = list(zip(before, after, strict=True))
        elif _is_size(before) and isinstance(after, Sequence) and len(set(after)) == 1:
            pairs = [(before, after[0])]  # one size for all parts of a split
        else:
            pairs = [(before, after)]
        for old, new in dict.fromkeys((b, a) for b, a in pairs if _is_size(b) and _is_size(a) and b > 1):
            if old != new:
                self.numbers.append(Change(modules, old, new))
            elif modules:
                self.unchanged.add((modules[-1], old))

    def guesses(self, model: nn.Module) -> Iterator[dict[str, Any]]:
        """Attributes with their new values, in different readings; equal ones once."""
        seen: list[dict[str, Any]] = []
        for prefer in (_every, _undoubted, _counts):
            for factors in (False, True):
                guess = self._read(model, prefer, factors=factors)
                if guess not in seen:
                    seen.append(guess)
                    yield guess

    def _read(self, model: nn.Module, prefer: Prefer, *, factors: bool) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for change in self.lists:
            for path in _nearby(model, change.modules):
                for name, value in vars(model.get_submodule(path)).items():
                    if isinstance(value, list | tuple) and len(value) > 1 and list(value) == change.old:
                        found[_join(path, name)] = change.new
        clashing = set()
        for change in self.numbers:
            for path in change.modules[:-3:-1]:
                held = vars(model.get_submodule(path)).items()
                names = [name for name, value in held if _is_size(value) and value == change.old]
                new = dict.fromkeys(
                    (_join(path, n) for n in prefer(names, (path, change.old) in self.unchanged)), change.new
                )
                if not names and factors:
                    new = _factors(model, path, change)
                for key, value in new.items():
                    if found.setdefault(key, value) != value:
                        clashing.add(key)
                if names or new:
                    break
        return {key: value for key, value in found.items() if key not in clashing}


def _factors(model: nn.Module, path: str, change: Change) -> dict[str, int]:
    """Counts of a module, and of plain objects that it holds (a configuration), that explain a change."""
    module = model.get_submodule(path)
    holders = {path: vars(module)}
    for name, value in vars(module).items():
        if "config" in name and not isinstance(value, nn.Module | dict) and hasattr(value, "__dict__"):
            holders[_join(path, name)] = vars(value)
    found = {}
    for holder, attributes in holders.items():
        for name, count in attributes.items():
            if _is_size(count) and count > 1 and change.old % count == 0 and _FACTOR.search(name):
                rest = change.old // count
                if change.new % rest == 0:
                    found[_join(holder, name)] = change.new // rest
    return found


def _nearby(model: nn.Module, modules: tuple[str, ...]) -> list[str]:
    """The running module and those it holds directly: they may have made the constant in a method."""
    if not modules:
        return []
    path = modules[-1]
    return [path, *(_join(path, name) for name, _ in model.get_submodule(path).named_children())]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def set_sizes(dense: nn.Module, small: nn.Module, sizes: Sizes) -> None:
    """Set numbers of `small`, as far as they are still those of `dense`: a layer's own have followed.

    A path goes through submodules, attributes, list positions and mapping keys.
    """
    for key, value in sizes.items():
        path, _, name = key.rpartition(".")
        old = _step(_reach(dense, path), name)
        if _step(_reach(small, path), name) != old or not _same_kind(old, value):
            continue
        new = type(old)(value) if isinstance(old, list | tuple) else value
        holder = _reach(small, path, own=True)
        if isinstance(holder, MutableMapping):
            holder[name] = new
        else:
            setattr(holder, name, new)


def _reach(root: nn.Module, path: str, *, own: bool = False) -> Any:
    """What a path leads to; with `own`, a plain object that a submodule holds is first made its alone.

    Submodules share a configuration, but may come to differ in what it says.
    """
    holder: Any = root
    for part in path.split(".") if path else []:
        held = _step(holder, part)
        plain = not isinstance(held, nn.Module | Mapping | list | tuple)
        if own and plain and isinstance(holder, nn.Module) and holder is not root:
            held = copy.copy(held)
            setattr(holder, part, held)
        holder = held
    return holder


def _step(holder: Any, part: str) -> Any:
    if part.startswith("__"):
        raise ArtifactError(f"sizes: expected a path of submodules and attributes, got {part!r} in it.")
    if isinstance(holder, Mapping):
        return holder[part]
    if isinstance(holder, list | tuple):
        return holder[int(part)]
    return getattr(holder, part)


def _same_kind(old: Any, value: Any) -> bool:
    """True for a number or boolean in place of one, or as many in place of a sequence: no more is held."""
    if isinstance(old, int):
        return type(old) is type(value)
    return isinstance(old, list | tuple) and isinstance(value, list) and len(old) == len(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
