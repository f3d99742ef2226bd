"""`secateur`: the commands. Nothing here imports torch before a command runs, so that help comes at once."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from secateur.cli.demo import demo
from secateur.cli.inspect import inspect
from secateur.cli.prune import prune
from secateur.cli.prune_checkpoint import prune_checkpoint
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
app.command(epilog="Example: secateur tolerance --model net.py:make --data x.npz")(tolerance)
app.command(epilog="Example: secateur transition --model net.py:make --data x.npz")(transition)

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

    Exit codes: 0 done, 2 bad input, 3 budget unreachable, 4 verification failed.
    """


if __name__ == "__main__":
    app()
