"""Make a command from the settings that it reads: its options, ``--config``, ``--set``, and their checks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from secateur.cli.shell import Debug, Json, reported, show
from secateur.config.read import read_run
from secateur.config.run import Run
from secateur.config.setting import Setting, settings
from secateur.errors import SettingError

METAVARS: Mapping[str, str] = {"string": "TEXT", "integer": "INTEGER", "number": "NUMBER"}

READING = ("batch_size", "samples", "images.size", "text.tokenizer", "text.length", "views", "device")
"""The settings that say how data from files become batches, and where these are processed."""
NAMES = {"images.size": "image_size", "text.length": "text_length"}
RULE = ("allocator", "tolerance", "ratio", "removal", "protection")
BUDGET = ("budget.macs", "budget.params")
LIMITS = ("limits.round_to", "limits.min_keep", "limits.ignore")

# Optional[...] rather than | None: typer reads these at run time, where older Pythons need it.
Text = Optional[str]  # noqa: UP045
Texts = Optional[list[str]]  # noqa: UP045
Place = Optional[Path]  # noqa: UP045

Body = Callable[[Run, bool], str]


def command(
    *paths: str, needs: Sequence[str] = (), names: Mapping[str, str] | None = None, folder: str = ""
) -> Callable[[Body], Callable[..., None]]:
    """Return a decorator that makes a command from a function ``body(run, json)``.

    The function gets a checked `Run`, and whether JSON output is wanted. It is called only if all settings
    are valid. The text that it returns is printed on stdout. An exception becomes one line and an exit
    code. Its docstring is the command's help.

    Args:
        paths: The settings that get an option, by path. ``--config`` and ``--set`` reach all others.
        needs: The settings in `paths` that the command requires.
        names: Names of options that differ from the last part of their path: ``{"artefact": "out"}``.
        folder: A setting that is a positional argument instead of an option. If it is given, `needs` is
            not required. It is read only from the command line.
    """
    known = settings()
    called = NAMES | dict(names or {})
    options = {called.get(path, path.rpartition(".")[2]): known[path] for path in paths}

    def decorate(body: Body) -> Callable[..., None]:
        def run(config: Path | None, sets: list[str] | None, json: bool, debug: bool, **given: Any) -> None:
            with reported(debug=debug):
                chosen = {
                    options[name].path: (_dashed(name), value)
                    for name, value in given.items()
                    if value not in (None, False, [])
                }
                asked = read_run(config, sets or (), chosen)
                if folder:
                    asked = asked.model_copy(update={folder: chosen.get(folder, ("", None))[1]})
                if folder in chosen and len(chosen) > 1:
                    other = next(option for path, (option, _) in chosen.items() if path != folder)
                    raise SettingError(
                        f"secateur {body.__name__}: expected a folder alone, got {other} too. Leave one out."
                    )
                _require(body.__name__, asked, () if folder in chosen else needs, options)
                with _computing(asked):
                    shown = body(asked, json)
            show(shown)

        parameters = [
            _argument(name, setting) if setting.path == folder else _parameter(name, setting)
            for name, setting in options.items()
        ]
        signature = inspect.Signature([*parameters, *_COMMON])
        run.__name__, run.__doc__ = body.__name__, body.__doc__
        run.__signature__ = signature  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def _computing(run: Run) -> AbstractContextManager[None]:
    """Return a block inside which data of a model whose weights stay in files go to the run's device."""
    if run.device is None or not (run.model or "").startswith("mapped:"):
        return nullcontext()
    from secateur.common.computing import compute_on

    return compute_on(run.device)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameter(name: str, setting: Setting) -> inspect.Parameter:
    words = [setting.help]
    if setting.several:
        words.append("With commas between, or repeated." if setting.commas else "May be repeated.")
    if setting.shown:
        words.append(f"Default: {setting.shown}.")
    about: dict[str, Any] = {"help": " ".join(words), "show_default": False}
    if setting.kind == "boolean":
        return _keyword(name, Annotated[bool, typer.Option(_dashed(name), **about)], False)
    about["metavar"] = f"[{'|'.join(setting.names)}]" if setting.names else METAVARS[setting.kind]
    kind = Texts if setting.several else Text
    return _keyword(name, Annotated[kind, typer.Option(_dashed(name), **about)], None)


def _argument(name: str, setting: Setting) -> inspect.Parameter:
    return _keyword(name, Annotated[Text, typer.Argument(metavar="[DIR]", help=setting.help)], None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_CONFIG = typer.Option("--config", help="YAML, JSON or TOML file with settings; secateur init writes one.")
_SET = typer.Option("--set", metavar="NAME=VALUE", help="A setting of the configuration; may be repeated.")
_COMMON = (
    _keyword("config", Annotated[Place, _CONFIG], None),
    _keyword("sets", Annotated[Texts, _SET], None),
    _keyword("json", Json, False),
    _keyword("debug", Debug, False),
)


def _require(command: str, run: Run, needs: Sequence[str], options: Mapping[str, Setting]) -> None:
    """Check that all required settings are given, and that model and data name something that can exist.

    Raises:
        SettingError: If a setting is missing, or names no model or data.
    """
    from secateur.cli.loading import check_data, check_model

    for name, setting in options.items():
        if setting.path in needs and getattr(run, setting.path) is None:
            raise SettingError(
                f"secateur {command}: expected {_dashed(name)}, or {setting.path} in a configuration, got "
                f"neither. Write {_dashed(name)} {setting.example}, for example."
            )
    paths = {setting.path for setting in options.values()}
    if run.model is not None and "model" in paths:
        check_model("--model", run.model)
    for path in ("data", "evaluation", "held_out"):
        text = getattr(run, path)
        if text is not None and path in paths:
            check_data(_dashed(path), text)
