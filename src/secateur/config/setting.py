"""List the settings of `Run` by path, with what options, configuration files and messages show of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from secateur.config.run import Run

_BOUNDS = (
    ("of at least", "minimum"),
    ("above", "exclusiveMinimum"),
    ("of at most", "maximum"),
    ("below", "exclusiveMaximum"),
)


@dataclass(frozen=True)
class Setting:
    """The description of one setting.

    Attributes:
        path: Section and name, joined by dots: ``budget.macs``.
        help: The help text.
        kind: ``string``, ``integer``, ``number`` or ``boolean``. For a list, the kind of its entries.
        several: Whether it is a list.
        commas: Whether commas separate the entries of a list that is given as one text.
        names: The allowed values, if it is a choice; otherwise empty.
        word: A word that is allowed beside numbers; empty if there is none.
        bounds: The allowed range in words; empty if there is none.
        default: The default value.
        example: An example value; the default, if no example is declared.
    """

    path: str
    help: str
    kind: str
    several: bool
    commas: bool
    names: tuple[str, ...]
    word: str
    bounds: str
    default: Any
    example: Any

    @property
    def shown(self) -> str:
        """The default as text; empty if there is none."""
        if self.default in (None, (), False):
            return ""
        return ",".join(map(str, self.default)) if isinstance(self.default, tuple) else str(self.default)


@cache
def settings() -> dict[str, Setting]:
    """Return all settings by path, in the order of their declaration.

    Example:
        >>> settings()["limits.max_ratio"].bounds
        'a number of at least 0 and below 1'
    """
    return {each.path: each for each in _settings(Run, "")}


@cache
def sections() -> dict[str, str]:
    """Return the help text of each section by name."""
    fields = Run.model_fields.items()
    return {name: field.description or "" for name, field in fields if isinstance(field.default, BaseModel)}


def _settings(model: type[BaseModel], before: str) -> Iterator[Setting]:
    schemas = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from _settings(type(field.default), f"{name}.")
        else:
            yield _setting(before + name, schemas[name], field.default)


def _setting(path: str, schema: dict[str, Any], default: Any) -> Setting:
    """Make the description of a setting from its JSON schema."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    several = "items" in kinds[0]
    if several:
        kinds = [kinds[0]["items"]]
    bounds = [f"{word} {kinds[0][key]:g}" for word, key in _BOUNDS if key in kinds[0]]
    return Setting(
        path=path,
        help=schema["description"],
        kind=kinds[-1]["type"],  # of a whole number or a fraction: a number
        several=several,
        commas=schema.get("commas", True),
        names=tuple(kinds[0].get("enum", ())),
        word=next((kind["const"] for kind in kinds if "const" in kind), ""),
        bounds="a number " + " and ".join(bounds) if bounds else "",
        default=default,
        example=schema.get("examples", [default])[0],
    )
