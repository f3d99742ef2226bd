"""`secateur`: the commands. A command's module is imported when it is called, so that help comes at once."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from secateur.cli.entry import stoppable


class Entry(NamedTuple):
    """Where a command is, and what ``--help`` says of it."""

    module: str
    help: str
    example: str


COMMANDS = {
    "demo": Entry(
        "start",
        "Train a small network on handwritten digits, prune it to half its MACs, prove it and save it.",
        "demo --out demo",
    ),
    "inspect": Entry(
        "inspect",
        "Show a model's groups of units, what they cost, and what cannot be pruned and why; or a pruned "
        "model.\n\n"
        "Of a pruned model's folder: what each group kept, the form, and which sizes its inputs may have.",
        "inspect --model net.py:make --input 1x3x32x32",
    ),
    "prune": Entry(
        "pipeline",
        "Prune a model: trace, score, allocate, apply, verify, repair, save.",
        "prune --model net.py:make --data x.npz --macs 0.5 --out new",
    ),
    "init": Entry(
        "start",
        "Write a configuration with a comment for every setting.",
        "init --model net.py:make --data x.npz --out run.yaml",
    ),
    "score": Entry(
        "pipeline",
        "Score every unit, weight, expert or block, and write the table. A fifth of the data is held out, as "
        "prune does it.",
        "score --config run.yaml --out scores.safetensors",
    ),
    "plan": Entry(
        "pipeline",
        "Make a plan from scores, and write it. Data are used as example inputs.",
        "plan --config run.yaml --macs 0.5 --out plan.json",
    ),
    "apply": Entry(
        "pipeline",
        "Remove what a plan says, prove it, and save the smaller model, unrepaired.",
        "apply --model net.py:make --plan plan.json --out small",
    ),
    "repair": Entry(
        "pipeline",
        "Repair a pruned model without labels, and save the result.",
        "repair --config run.yaml --artefact small --out fixed",
    ),
    "compare": Entry(
        "curves",
        "Compare rules at equal budgets, by the accuracy of the pruned and of the repaired model.",
        "compare --model net.py:make --data x.npz --macs 0.8,0.5",
    ),
    "report": Entry(
        "saved",
        "Show the report of an earlier run again, and write it as a page or as Markdown.",
        "report small --markdown report.md",
    ),
    "compare-runs": Entry(
        "runs",
        "Compare several runs: costs, quality, and what each layer kept.",
        "compare-runs small smaller --html runs.html",
    ),
    "tolerance": Entry(
        "curves",
        "Show the MACs, parameters and units of each layer for each tolerance of the rule tod.",
        "tolerance --model net.py:make --data x.npz",
    ),
    "transition": Entry(
        "curves",
        "Show up to which sparsity of single weights the models of each rule can be repaired.",
        "transition --model net.py:make --data x.npz",
    ),
    "bench": Entry(
        "saved",
        "Time a pruned model against the dense one, in turn, and say if there is no gain.",
        "bench small --model net.py:make --batch 1 --batch 32",
    ),
    "export": Entry(
        "saved",
        "Export a pruned model to ONNX, PyTorch's .pt2 or a Hugging Face folder, checked against PyTorch.",
        "export small --model net.py:make --out small.onnx",
    ),
    "quantise": Entry(
        "saved",
        "Quantise a pruned model to 8 or 4 bits as an ONNX file, measured beside the dense one.",
        "quantise small --model net.py:make --data x.npz --out small.int8.onnx",
    ),
    "prune-checkpoint": Entry(
        "saved",
        "Remove a plan's experts from a checkpoint on disk, one shard at a time.",
        "prune-checkpoint dense --plan plan.json --out new",
    ),
}


class _Commands(TyperGroup):
    """The commands as `COMMANDS` lists them; the one that is called is imported, with its options."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else _imported(name), rest


def _imported(name: str) -> Any:
    module = import_module(f"secateur.cli.{COMMANDS[name].module}")
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    _register(alone, name, getattr(module, name.replace("-", "_")))
    return typer.main.get_command(alone)


def _register(application: typer.Typer, name: str, function: Any) -> None:
    entry = COMMANDS[name]
    application.command(name, help=entry.help, epilog=f"Example: secateur {entry.example}")(function)


def _version(show: bool) -> None:
    if show:
        from importlib import metadata

        typer.echo(f"secateur {metadata.version('secateur')}")
        raise typer.Exit


class _Application(typer.Typer):
    """The commands, which end in one line after a signal however they were started."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stoppable(partial(super().__call__, *args, **kwargs))


app = _Application(
    name="secateur",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: secateur demo",
)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prune trained PyTorch networks: decide how much to remove, remove it, repair and prove the result.

    Exit codes: 0 done, 2 bad input, 3 budget unreachable, 4 verification failed, 130 Ctrl-C, 143 SIGTERM.
    """


for _name in COMMANDS:
    _register(app, _name, lambda: None)  # for the list of commands; `_Commands` calls the real one


if __name__ == "__main__":
    app()
