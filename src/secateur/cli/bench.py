"""`secateur bench`: whether a pruned model is faster on this machine."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Optional

import typer

from secateur.cli.export import DATA_HELP, INPUT_HELP, MODEL_HELP, Text, Texts, Whole, example_for
from secateur.cli.loading import model_source
from secateur.cli.shell import Debug, Json, Seed, reported
from secateur.errors import SettingError

Wholes = Optional[list[int]]  # noqa: UP045 typer reads it at run time, where older Pythons need it


def bench(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that prune wrote.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    backend: Annotated[
        Texts, typer.Option(help="eager, compile or onnxruntime; repeat it for several. Else eager.")
    ] = None,
    batch: Annotated[
        Wholes, typer.Option(help="Samples in a pass; repeat it for several. Else those of the input.")
    ] = None,
    input: Annotated[Texts, typer.Option(help=INPUT_HELP)] = None,
    data: Annotated[Text, typer.Option(help=DATA_HELP)] = None,
    rounds: Annotated[int, typer.Option(help="Passes of each model that count.")] = 30,
    warmup: Annotated[int, typer.Option(help="Passes before them that do not.")] = 5,
    confidence: Annotated[float, typer.Option(help="Of the intervals, in (0, 1).")] = 0.95,
    threads: Annotated[
        Whole, typer.Option(help="Threads within an operator; all cores if not given.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a pruned model against the dense one, in turn, and say plainly where there is no gain."""
    with reported(debug=debug):
        import torch

        import secateur as sc

        before = torch.get_num_threads()
        if threads is not None:
            if threads < 1:
                raise SettingError(f"--threads {threads}: expected at least 1. Give 1, for example.")
            torch.set_num_threads(threads)
        try:
            example = example_for("bench", input, data, seed)
            make = model_source("--model", model).make
            small = sc.load(source, make, example_inputs=example)
            found = sc.bench(
                make(),
                small,
                example,
                backends=backend or ("eager",),
                batches=batch,
                rounds=rounds,
                warmup=warmup,
                confidence=confidence,
                seed=seed,
            )
        finally:
            torch.set_num_threads(before)
        shown = json_format.dumps(found.to_dict(), indent=1) if json else str(found)
    typer.echo(shown)
