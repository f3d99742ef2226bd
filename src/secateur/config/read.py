"""From a YAML file, ``--set`` and options to a checked `Run`. Nothing here imports torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from secateur.config.option import Setting, sections, settings
from secateur.config.run import Run
from secateur.errors import SettingError

Values = dict[str, Any]
"""By path: ``{"budget.macs": 0.5}``."""


def read_run(
    config: Path | None = None,
    sets: Sequence[str] = (),
    options: Mapping[str, tuple[str, Any]] | None = None,
) -> Run:
    """What a run is asked to do. Options win over ``--set``, which wins over the file.

    Args:
        config: A YAML file.
        sets: Each ``path=value``, the value as in YAML.
        options: By path, the option's name and what was given for it.

    Raises:
        SettingError: Something is unknown, of another type or out of range; it says where it was given.

    Example:
        >>> read_run(sets=["budget.macs=0.4", "limits.ignore=[stem]"]).budget.macs
        0.4
    """
    values: Values = {}
    places: dict[str, str] = {}
    if config is not None:
        for path, value in _file(config).items():
            values[path], places[path] = value, f"{config}: {path}"
    for text in sets:
        path, value = _assignment(text)
        values[path], places[path] = value, f"--set {path}"
    for path, (name, value) in (options or {}).items():
        values[path], places[path] = value, name
    known = settings(Run)
    for path, value in values.items():
        values[path] = _typed(known[path], value)
        _bounded(known[path], values[path], places[path])
    return _validated(values, places)


def _file(config: Path) -> Values:
    import yaml

    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"--config {config}: expected a YAML file, got none that can be read ({error}). Do secateur init."
        ) from error
    except yaml.YAMLError as error:
        raise SettingError(
            f"--config {config}: expected YAML, got {_first(str(error))}. Correct that line."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise SettingError(
            f"--config {config}: expected names and values, got {type(content).__name__}. See secateur init."
        )
    return _flat(content, f"--config {config}")


def _flat(content: Mapping[Any, Any], where: str) -> Values:
    known, parts = settings(Run), sections(Run)
    found: Values = {}
    for name, value in content.items():
        if name in parts:
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise SettingError(
                    f"{where}: expected names and values under {name}, got {value!r}. Indent them below it."
                )
            for inner, given in value.items():
                path = f"{name}.{inner}"
                if path not in known:
                    _unknown(path, where)
                found[path] = given
        elif name in known:
            found[str(name)] = value
        else:
            _unknown(str(name), where)
    return found


def _assignment(text: str) -> tuple[str, Any]:
    import yaml

    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals:
        raise SettingError(f"--set {text}: expected name=value, got no =. Write --set budget.macs=0.5.")
    if path not in settings(Run):
        _unknown(path, f"--set {text}")
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingError(
            f"--set {text}: expected a value as in YAML, got {_first(str(error))}. Quote it."
        ) from error


def _unknown(path: str, where: str) -> NoReturn:
    known = [*settings(Run)]
    near = difflib.get_close_matches(path, known, 1) or [
        each for each in known if each.rpartition(".")[2] == path.rpartition(".")[2]
    ]
    hint = f"Did you mean {near[0]}?" if near else "secateur init writes all that are known."
    raise SettingError(f"{where}: expected a known setting, got {path}. {hint}")


def _typed(setting: Setting, value: Any) -> Any:
    """Text as what it stands for: a list has commas between, a number is whole if it is written so."""
    if value is None:
        return setting.default
    if not setting.several:
        return _entry(setting, value)
    given = value if isinstance(value, list | tuple) else [value]
    cut = [each.split(",") if setting.commas and isinstance(each, str) else [each] for each in given]
    parts = [part for pieces in cut for part in pieces]
    return tuple(_entry(setting, part) for part in parts)


def _entry(setting: Setting, value: Any) -> Any:
    if setting.kind == "text":  # `memory: 1000` in YAML, or a layer that is called 3
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return str(value) if plain else value.strip() if isinstance(value, str) else value
    if setting.kind == "switch" or not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _bounded(setting: Setting, value: Any, place: str) -> None:
    """Raises SettingError for numbers out of range and for unknown names."""
    for each in value if isinstance(value, tuple) else (value,):
        wanted = ""
        if setting.bounds is not None and isinstance(each, int | float):
            wanted = setting.bounds.complaint(each)
        if setting.choices is not None and isinstance(each, str):
            wanted = setting.choices.complaint(each)
        if wanted:
            raise SettingError(f"{place} {each}: expected {wanted}, got {each}. Give another.")


def _validated(values: Values, places: Mapping[str, str]) -> Run:
    from pydantic import TypeAdapter, ValidationError

    nested: dict[str, Any] = {}
    for path, value in values.items():
        section, dot, name = path.rpartition(".")
        (nested.setdefault(section, {}) if dot else nested)[name] = value
    try:
        return TypeAdapter(Run).validate_python(nested)
    except ValidationError as error:
        raise SettingError(_complaint(error.errors(include_url=False), places)) from error


def _complaint(errors: Sequence[Any], places: Mapping[str, str]) -> str:
    """The first error in a line that says where the value was given."""
    first = errors[0]
    path = _path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if path not in settings(Run):  # of a section or of the whole: the message names what it is about
        about = [each for each in places if each.rpartition(".")[2] in message.split(" to be ")[0].split()]
        named = message.partition(":")[0]
        place = places.get(named) or (places[about[0]] if about else path or "configuration")
        text = message.partition(": ")[2] if named in places else message
        return f"{place}: {text}. Change one of them."
    setting = settings(Run)[path]
    got = first["input"]
    place = f"{places.get(path, path)} {got}"
    if setting.names:
        return f"{place}: expected one of {', '.join(setting.names)}, got {got!r}. Name one."
    kinds = {"whole": "a whole number", "switch": "true or false", "text": "text"}
    wanted = "a fraction or a count" if path.startswith("budget.") else "a number"
    advice = "Write 0.5, for example." if setting.kind == "number" else "Correct it."
    return f"{place}: expected {kinds.get(setting.kind, wanted)}, got {got!r}. {advice}"


def _path(loc: Sequence[Any]) -> str:
    """The longest path of a setting, or of a section, that an error's place begins with."""
    parts = [str(part) for part in loc]
    known = {**settings(Run), **sections(Run)}
    return next((p for n in range(len(parts), 0, -1) if (p := ".".join(parts[:n])) in known), "")


def _first(message: str) -> str:
    return " ".join(message.split())[:200]
