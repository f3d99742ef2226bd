"""Read a checked `Run` from a configuration file, ``--set`` and options. Nothing here imports torch."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from secateur.common.reading import parse_json, read_text
from secateur.config.run import Run
from secateur.config.setting import sections, settings
from secateur.config.values import UNKNOWN_NAME
from secateur.errors import SettingError

LARGEST = 1 << 18
"""The most bytes of a configuration."""

_OUT_OF_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def read_run(
    config: Path | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, tuple[str, Any]] | None = None,
) -> Run:
    """Read the settings of a run. Options override ``--set``, which overrides the file.

    Args:
        config: A YAML, JSON or TOML file. The suffix gives the format; others are read as YAML.
        sets: Texts of the form ``path=value``, with the value in YAML.
        options: For each path, the option's name and the given value.

    Raises:
        SettingError: If a setting is unknown, has the wrong type or is out of range. The message says
            where it was given.

    Example:
        >>> read_run(sets=["budget.macs=0.4", "limits.ignore=[stem]"]).budget.macs
        0.4
    """
    values: dict[str, Any] = {}  # by path: {"budget.macs": 0.5}
    places: dict[str, str] = {}
    if config is not None:
        for path, value in _by_path(_content(config), f"--config {config}"):
            values[path], places[path] = value, f"{config}: {path}"
    for text in sets:
        path, value = _assignment(text)
        values[path], places[path] = value, f"--set {path}"
    for path, (name, value) in (options or {}).items():
        values[path], places[path] = value, name
    nested: dict[str, Any] = {}
    for path, value in values.items():
        section, dot, name = path.rpartition(".")
        if value is not None:  # None leaves the default
            (nested.setdefault(section, {}) if dot else nested)[name] = (
                value.strip() if isinstance(value, str) else value
            )
    try:
        return Run.model_validate(nested)
    except ValidationError as error:
        raise SettingError(_complaint(error.errors(include_url=False)[0], places)) from error


def _content(config: Path) -> Any:
    text = read_text(config, LARGEST, f"--config {config}", SettingError, "a YAML file")
    kind = {".json": "JSON", ".toml": "TOML"}.get(config.suffix.lower(), "YAML")
    if kind == "TOML" and sys.version_info < (3, 11):
        raise SettingError(
            f"--config {config}: expected YAML or JSON, got TOML, which needs Python 3.11. Run "
            "secateur init, which writes YAML."
        )
    try:
        return _parsed(kind, text)
    except (ValueError, RecursionError) as error:
        raise SettingError(
            f"--config {config}: expected {kind}, got {_first(str(error))}. Correct that line."
        ) from error


def _parsed(kind: str, text: str) -> Any:
    """Parse a text as JSON, TOML or YAML. Raises ValueError if it is malformed."""
    if kind == "JSON":
        return parse_json(text)
    if sys.version_info >= (3, 11) and kind == "TOML":
        import tomllib

        return tomllib.loads(text)
    from secateur.config.yaml import parse_yaml

    return parse_yaml(text)


def _by_path(content: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield (path, value) for each setting of a file.

    Args:
        content: The parsed file.
        where: The file, for messages.
    """
    if content is None:
        return
    if not isinstance(content, Mapping):
        raise SettingError(
            f"{where}: expected names and values, got {type(content).__name__}. See secateur init."
        )
    for name, value in content.items():
        if name not in sections():
            yield _known(str(name), where), value
        elif isinstance(value, Mapping):
            for inner, given in value.items():
                yield _known(f"{name}.{inner}", where), given
        elif value is not None:
            raise SettingError(
                f"{where}: expected names and values under {name}, got {value!r}. Indent them below it."
            )


def _assignment(text: str) -> tuple[str, Any]:
    path, equals, value = text.partition("=")
    if not equals:
        raise SettingError(f"--set {text}: expected name=value, got no =. Write --set budget.macs=0.5.")
    path = _known(path.strip(), f"--set {text}")
    try:
        return path, _parsed("YAML", value)
    except (ValueError, RecursionError) as error:
        raise SettingError(
            f"--set {text}: expected a value as in YAML, got {_first(str(error))}. Quote it."
        ) from error


def _known(path: str, where: str) -> str:
    """Return the path, if there is such a setting.

    Raises:
        SettingError: If there is none.
    """
    known = [*settings()]
    if path in known:
        return path
    near = difflib.get_close_matches(path, known, 1) or [
        each for each in known if each.rpartition(".")[2] == path.rpartition(".")[2]
    ]
    hint = f"Did you mean {near[0]}?" if near else "secateur init writes all that are known."
    raise SettingError(f"{where}: expected a known setting, got {path}. {hint}")


def _complaint(error: ErrorDetails, places: Mapping[str, str]) -> str:
    """Return a pydantic error as one line that says where the value was given.

    Args:
        error: The error.
        places: For each path, the option or the file entry that gave its value.
    """
    parts = [str(part) for part in error["loc"]]
    path = next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in settings()), "")
    if error["type"] == "value_error":  # of one of our checks: the message says what is expected
        message = error["msg"].removeprefix("Value error, ")
        named, _, text = (path, "", message) if path else message.partition(": ")
        return f"{places.get(named, named)}: {text}. Change one of them."
    setting, got = settings()[path], error["input"]
    place = f"{places.get(path, path)} {got}"
    if setting.word:
        return f"{place}: expected {setting.bounds} or {setting.word}, got {got!r}. Give one of them."
    if error["type"] in (*_OUT_OF_BOUNDS, UNKNOWN_NAME):
        wanted = error["msg"] if error["type"] == UNKNOWN_NAME else setting.bounds
        return f"{place}: expected {wanted}, got {got}. Give another."
    if setting.names:
        return f"{place}: expected one of {', '.join(setting.names)}, got {got!r}. Name one."
    kinds = {"integer": "a whole number", "boolean": "true or false", "string": "text"}
    wanted = "a fraction or a count" if path.startswith("budget.") else "a number"
    advice = "Write 0.5, for example." if setting.kind == "number" else "Correct it."
    return f"{place}: expected {kinds.get(setting.kind, wanted)}, got {got!r}. {advice}"


def _first(message: str) -> str:
    return " ".join(message.split())[:200]
