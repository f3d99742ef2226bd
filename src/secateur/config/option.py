"""One setting: what it is for, and between which bounds it lies."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Bounds:
    """Where a number lies.

    Attributes:
        least: It is at least this.
        above: It is above this.
        most: It is at most this.
        below: It is below this.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def complaint(self, value: float) -> str:
        """What is expected of a value that lies outside; empty for one that does not.

        Example:
            >>> Bounds(least=1).complaint(0)
            'a number of at least 1'
        """
        bounds = (
            ("of at least", self.least, operator.ge),
            ("above", self.above, operator.gt),
            ("of at most", self.most, operator.le),
            ("below", self.below, operator.lt),
        )
        given = [(word, bound, holds(value, bound)) for word, bound, holds in bounds if bound is not None]
        if all(held for _, _, held in given):
            return ""
        return "a number " + " and ".join(f"{word} {bound:g}" for word, bound, _ in given)


@dataclass(frozen=True)
class Choices:
    """Names of which a text holds one or several.

    Attributes:
        names: The names.
        joined: Characters that may stand between names in one text, as ``*`` in ``l1*wasserstein``.
    """

    names: tuple[str, ...]
    joined: str = ""

    def complaint(self, text: str) -> str:
        """What is expected of a text that holds other names; empty for one that does not.

        Example:
            >>> Choices(("l1", "fisher"), "*+").complaint("l1*fish")
            'one of l1, fisher, or such names with * or + between them'
        """
        for sign in self.joined:
            text = text.replace(sign, " ")
        parts = [part.strip(" ()") for part in (text.split() if self.joined else [text])]
        if parts and all(part in self.names for part in parts if part):
            return ""
        between = f", or such names with {' or '.join(self.joined)} between them" if self.joined else ""
        return f"one of {', '.join(self.names)}{between}"


def option(
    help: str,
    default: Any = None,
    *,
    bounds: Bounds | None = None,
    choices: Choices | None = None,
    commas: bool = True,
) -> Any:
    """A dataclass field with what a person needs to know of it.

    Args:
        help: One sentence, for ``--help`` and for the comment in a configuration.
        default: Its default; of a section, the section with all of its defaults.
        bounds: Of a number.
        choices: Of a text, where the type does not say.
        commas: Whether commas part the entries of a list that is given as one text.
    """
    about = {"help": help, "bounds": bounds, "choices": choices, "commas": commas}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class Setting:
    """A setting of a run, found by its path.

    Attributes:
        path: Names from the outermost section on, with dots: ``budget.macs``.
        help: What it is for.
        kind: ``text``, ``whole``, ``number`` or ``switch``; of a list, that of its entries.
        several: Whether it is a list.
        default: Its default.
        names: What it may be, where that is a choice.
        bounds: Where it lies, if it is a number.
        choices: The names that it may hold.
        commas: Whether commas part the entries of a list that is given as one text.
    """

    path: str
    help: str
    kind: str
    several: bool
    default: Any
    names: tuple[str, ...]
    bounds: Bounds | None
    choices: Choices | None
    commas: bool

    @property
    def shown(self) -> str:
        """Its default in words; empty where there is none."""
        if self.default in (None, (), False):
            return ""
        return ",".join(map(str, self.default)) if isinstance(self.default, tuple) else str(self.default)


@cache
def settings(of: type) -> dict[str, Setting]:
    """Every setting of a dataclass whose fields are `option`, by path, in order; sections are gone into."""
    hints = get_type_hints(of)
    found: dict[str, Setting] = {}
    for each in fields(of):
        if is_dataclass(hints[each.name]):
            inner = settings(hints[each.name])
            found |= {f"{each.name}.{path}": _within(each.name, setting) for path, setting in inner.items()}
        else:
            found[each.name] = _setting(each, hints[each.name])
    return found


@cache
def sections(of: type) -> dict[str, str]:
    """What each section is for, by name."""
    hints = get_type_hints(of)
    return {each.name: each.metadata["help"] for each in fields(of) if is_dataclass(hints[each.name])}


def _within(section: str, setting: Setting) -> Setting:
    return Setting(**{**vars(setting), "path": f"{section}.{setting.path}"})


def _setting(each: Field[Any], hint: Any) -> Setting:
    kinds = [kind for kind in _members(hint) if kind is not NoneType]
    several = any(get_origin(kind) is tuple for kind in kinds)
    if several:
        kinds = [get_args(kind)[0] for kind in kinds]
    names = tuple(name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind))
    meta = each.metadata
    meta = each.metadata
    return Setting(
        path=each.name,
        help=meta["help"],
        kind=_kind(kinds),
        several=several,
        default=each.default,
        names=names,
        bounds=meta["bounds"],
        choices=meta["choices"],
        commas=meta["commas"],
    )


def _members(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _kind(kinds: Sequence[Any]) -> str:
    if bool in kinds:
        return "switch"
    if float in kinds:
        return "number"
    return "whole" if int in kinds else "text"
