"""`secateur prune-checkpoint`: experts removed from a checkpoint on disk, with the memory of one shard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from secateur.cli.shell import Debug, reported

# Optional[...] rather than | None: typer reads it at run time, where older Pythons need it.
Place = Optional[Path]  # noqa: UP045


def prune_checkpoint(
    directory: Annotated[
        Path, typer.Argument(help="Folder with config.json and safetensors, whole or sharded.")
    ],
    plan: Annotated[
        Path, typer.Option(help="Plan for its experts: a file of Plan.to_json, or what prune wrote to --out.")
    ],
    out: Annotated[Path, typer.Option(help="New or empty folder for the smaller checkpoint.")],
    debug: Debug = False,
) -> None:
    """Remove a plan's experts from a checkpoint on disk, one shard at a time."""
    with reported(debug=debug):
        from secateur.experts import checkpoint
        from secateur.plan import Plan
        from secateur.save import saved_record

        decided = saved_record(plan).plan if plan.is_dir() else Plan.from_json(plan)
        checkpoint.prune_checkpoint(directory, decided, out)
        kept, before = (sum(getattr(g, name) for g in decided.groups) for name in ("kept", "size"))
    typer.echo(f"written to  {out}\n{kept} of {before} experts kept in {len(decided.groups)} blocks")
