"""`secateur`: the commands. Nothing here imports torch before a command runs, so that help comes at once."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from secateur.cli.apply import apply
from secateur.cli.bench import bench
from secateur.cli.compare import compare
from secateur.cli.demo import demo
from secateur.cli.export import export
from secateur.cli.init import init
from secateur.cli.inspect import inspect
from secateur.cli.plan import plan
from secateur.cli.prune import prune
from secateur.cli.prune_checkpoint import prune_checkpoint
from secateur.cli.repair import repair
from secateur.cli.report import report
from secateur.cli.score import score
from secateur.cli.tolerance import tolerance
from secateur.cli.transition import transition

app = typer.Typer(
    name="secateur",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: secateur demo",
)
app.command(epilog="Example: secateur demo --out demo")(demo)
app.command(epilog="Example: secateur inspect --model net.py:make --input 1x3x32x32")(inspect)
app.command(epilog="Example: secateur prune --model net.py:make --data x.npz --macs 0.5 --out new")(prune)
app.command(epilog="Example: secateur init --model net.py:make --data x.npz --out run.yaml")(init)
app.command(epilog="Example: secateur score --config run.yaml --out scores.safetensors")(score)
app.command(epilog="Example: secateur plan --config run.yaml --macs 0.5 --out plan.json")(plan)
app.command(epilog="Example: secateur apply --model net.py:make --plan plan.json --out small")(apply)
app.command(epilog="Example: secateur repair --config run.yaml --artefact small --out fixed")(repair)
app.command(epilog="Example: secateur compare --model net.py:make --data x.npz --macs 0.8,0.5")(compare)
app.command(epilog="Example: secateur report small --markdown report.md")(report)
app.command(epilog="Example: secateur tolerance --model net.py:make --data x.npz")(tolerance)
app.command(epilog="Example: secateur transition --model net.py:make --data x.npz")(transition)

app.command(epilog="Example: secateur bench small --model net.py:make --batch 1 --batch 32")(bench)
app.command(epilog="Example: secateur export small --model net.py:make --out small.onnx")(export)
app.command("prune-checkpoint", epilog="Example: secateur prune-checkpoint dense --plan plan.json --out new")(
    prune_checkpoint
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"secateur {metadata.version('secateur')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Prune trained PyTorch networks: decide how much of each layer goes, remove it, repair it, prove it.

    Exit codes: 0 done, 2 bad input, 3 budget unreachable, 4 verification failed, 130 interrupted.
    """


if __name__ == "__main__":
    app()
