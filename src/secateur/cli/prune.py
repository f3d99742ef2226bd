"""`secateur prune`: the whole street for a user's own model."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from secateur.cli.loading import Target, load_data, load_model
from secateur.cli.shell import Debug, Json, Seed, folder_to_write, reported
from secateur.errors import BudgetError, SettingError
from secateur.report import words

if TYPE_CHECKING:
    from torch import nn

    from secateur.allocate import Budget
    from secateur.allocate.registry import Allocates
    from secateur.report.report import Report


class GranularityName(str, Enum):
    """What is removed."""

    unit = "unit"
    weight = "weight"
    expert = "expert"


class AllocatorName(str, Enum):
    """Rules that the command line knows."""

    tod = "tod"
    emp = "emp"
    uniform = "uniform"
    global_ = "global"
    erk = "erk"
    lamp = "lamp"
    owl = "owl"
    repair_aware = "repair_aware"
    random = "random"


class RepairName(str, Enum):
    """Repairs that the command line knows."""

    auto = "auto"
    none = "none"
    reconstruct = "reconstruct"
    variance = "variance"
    channelwise = "channelwise"
    layerwise = "layerwise"
    bias = "bias"
    batchnorm = "batchnorm"
    surgeon = "surgeon"


class FormName(str, Enum):
    """Forms of the result."""

    auto = "auto"
    module = "module"
    graph = "graph"
    masked = "masked"


# Optional[...] rather than | None: typer reads these at run time, where older Pythons need it.
Text = Optional[str]  # noqa: UP045
Number = Optional[float]  # noqa: UP045
Texts = Optional[list[str]]  # noqa: UP045


def prune(
    model: Annotated[
        str, typer.Option(help="package.module:function or file.py:function that returns the model.")
    ],
    data: Annotated[
        str, typer.Option(help="Calibration data: module:function, or .npz with arrays x and y.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model, report.json and report.html.")],
    macs: Annotated[Text, typer.Option(help="MACs to keep: a fraction (0.5) or a count (1000000).")] = None,
    params: Annotated[Text, typer.Option(help="Parameters to keep: a fraction or a count.")] = None,
    sparsity: Annotated[
        Number, typer.Option(help="Of single weights, the fraction that becomes zero, as 0.9.")
    ] = None,
    experts: Annotated[
        Text, typer.Option(help="Of a mixture of experts, how many stay: a fraction (0.75) or a count.")
    ] = None,
    granularity: Annotated[
        GranularityName,
        typer.Option(help="Channels, neurons and heads go, single weights become zero, or experts go."),
    ] = GranularityName.unit,
    allocator: Annotated[
        Optional[AllocatorName],  # noqa: UP045
        typer.Option(help="Rule for how much of each layer goes; tod, or emp for single weights."),
    ] = None,
    tolerance: Annotated[
        Number, typer.Option(help="Of tod, without a budget, in [0, 1]; default 0.1.")
    ] = None,
    ratio: Annotated[
        Number, typer.Option(help="Of uniform, without a budget: the fraction removed, in [0, 1).")
    ] = None,
    repair: Annotated[
        RepairName, typer.Option(help="What may undo damage, if it helps; surgeon: of single weights.")
    ] = RepairName.auto,
    round_to: Annotated[int, typer.Option(help="Keep a multiple of this many units in each layer.")] = 1,
    min_keep: Annotated[int, typer.Option(help="Keep at least this many units in each layer.")] = 1,
    ignore: Annotated[
        Texts, typer.Option(help="Leave groups of this name alone (* and ?); may be repeated.")
    ] = None,
    form: Annotated[
        FormName, typer.Option(help="Of the result; auto is a module where that can be.")
    ] = FormName.auto,
    evaluation: Annotated[
        Text,
        typer.Option(
            help="Data that accuracy is measured on, as for --data; else a held-out fifth of --data."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="For .npz files.")] = 64,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune a model: trace, score, allocate, apply, verify, repair, save."""
    with reported(debug=debug):
        import secateur as sc

        budget = _budget(macs, params, sparsity, experts)
        default = AllocatorName.emp if granularity is GranularityName.weight else AllocatorName.tod
        rule = _rule(allocator or default, granularity, tolerance, ratio, budget)
        limits = sc.Limits(round_to=round_to, min_keep=min_keep, ignore=tuple(ignore or ()))
        target = Target.of("--model", model)
        folder_to_write(out)
        dense, _ = load_model(target)
        calibration = load_data("--data", data, batch_size=batch_size, seed=seed)
        judged: Any = None
        if evaluation is not None:
            judged = load_data("--evaluation", evaluation, batch_size=batch_size, seed=seed)
        result = sc.prune(
            dense,
            calibration,
            budget,
            rule,
            granularity.value,
            repair=None if repair is RepairName.none else repair.value,
            limits=limits,
            form=form.value,
            evaluation=judged,
            seed=seed,
        )
        reload = reload_code(target.import_line, out)
        report = write(result.model, result.report, out, reload)
        shown = report.to_json().rstrip() if json else show(report, reload)
    typer.echo(shown)


def reload_code(import_line: str, out: Path) -> str:
    """Python that loads the model again; `import_line` defines `make_model`."""
    return (
        f"import secateur as sc\n{import_line}\nmodel = sc.load({words.quoted(out.as_posix())}, make_model)"
    )


def write(small: nn.Module, report: Report, out: Path, reload: str) -> Report:
    """Save the model and both reports; returns the report with the place in it."""
    import secateur as sc
    from secateur.report.html import render

    report = report.model_copy(update={"artefact": out.as_posix()})
    sc.save(small, out)
    (out / "report.json").write_text(report.to_json(), encoding="utf-8")
    try:
        page = render(report, reload=reload)
    except SettingError as error:  # Jinja is missing: no reason to lose the model
        typer.echo(f"secateur: {out / 'report.html'} was not written. {error}", err=True)
    else:
        (out / "report.html").write_text(page, encoding="utf-8")
    return report


def show(report: Report, reload: str) -> str:
    """The table for a terminal."""
    from secateur.report.text import table

    return table(report, reload=reload)


def _budget(
    macs: str | None, params: str | None, sparsity: float | None, experts: str | None
) -> Budget | None:
    import secateur as sc

    if macs is None and params is None and sparsity is None and experts is None:
        return None
    return sc.Budget(
        macs=_amount("--macs", macs),
        params=_amount("--params", params),
        sparsity=sparsity,
        experts=_amount("--experts", experts),
    )


def _amount(option: str, text: str | None) -> float | int | None:
    """A count where the text is a whole number, else a fraction."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise BudgetError(
        f"{option} {text}: expected a fraction or a count, got text. Write {option} 0.5, for example."
    )


def _rule(
    allocator: AllocatorName,
    granularity: GranularityName,
    tolerance: float | None,
    ratio: float | None,
    budget: Budget | None,
) -> Allocates:
    """The allocator; a setting that would do nothing is refused."""
    from secateur.allocate import resolve
    from secateur.experts.allocate import rule_called

    if ratio is not None and allocator is not AllocatorName.uniform:
        raise SettingError(
            f"--ratio: expected it with --allocator uniform, got {allocator.value}. "
            "Give --tolerance or --macs."
        )
    if tolerance is not None and allocator is not AllocatorName.tod:
        raise SettingError(
            f"--tolerance: expected it with --allocator tod, got {allocator.value}. Give --ratio or --macs."
        )
    if tolerance is not None and budget is not None:
        raise SettingError(
            "--tolerance: expected either a tolerance or a budget, got both. "
            "Under a budget the tolerance is solved; leave one out."
        )
    if allocator is AllocatorName.uniform:
        if (ratio is None) == (budget is None):
            got = "neither" if budget is None else "both"
            raise SettingError(
                f"--ratio: expected either a ratio or a budget for uniform, got {got}. Give one."
            )
    named: Any = (rule_called if granularity is GranularityName.expert else resolve)(allocator.value)
    settings = {"ratio": ratio, "tolerance": tolerance}
    given = {name: value for name, value in settings.items() if value is not None}
    found: Allocates = replace(named, **given)
    return found
