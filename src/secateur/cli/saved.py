"""Commands that read what an earlier run saved: `report`, `export`, `quantise`, `bench` and others."""

from __future__ import annotations

import json as json_format
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from secateur.cli.loading import example_of, load_data, model_source
from secateur.cli.output import file_to_write
from secateur.cli.shell import Debug, Json, Seed, reported, show
from secateur.errors import SettingError

if TYPE_CHECKING:
    from torch import nn

# Optional[...] rather than | None: typer reads these at run time, where older Pythons need it.
Place = Optional[Path]  # noqa: UP045
Text = Optional[str]  # noqa: UP045
Texts = Optional[list[str]]  # noqa: UP045
Number = Optional[float]  # noqa: UP045
Whole = Optional[int]  # noqa: UP045
Wholes = Optional[list[int]]  # noqa: UP045

REPORT = "report.json"
"""The name of the report in an artefact's folder."""


def report(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that prune wrote, or a report.json.")],
    html: Annotated[Place, typer.Option(help="Write the page into this file.")] = None,
    markdown: Annotated[Place, typer.Option(help="Write the same as Markdown into this file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the report of an earlier run again, and write it as a page or as Markdown."""
    with reported(debug=debug):
        places = {"--html": html, "--markdown": markdown}
        for option, place in places.items():
            if place is not None:
                file_to_write(option, place)
        from secateur.report.report import Report

        found = Report.from_json(source / REPORT if os.path.isdir(source) else source)
        if os.path.isdir(source) and found.artefact is not None:
            # A folder may have been moved since: it is read back from where it is now.
            found = found.model_copy(update={"artefact": source.as_posix()})
        if html is not None:
            found.to_html(html)
        if markdown is not None:
            found.to_markdown(markdown)
        shown = found.to_json().rstrip() if json else str(found)
        written = [str(place) for place in places.values() if place is not None]
        if written and not json:
            shown += f"\n\nreport in   {', '.join(written)}"
    show(shown)


MODEL_HELP = (
    "The dense model, as for prune: net.py:make, timm:resnet18 or a folder; its weights do not matter."
)
INPUT_HELP = "Sizes of an input, 1x3x224x224 or 1x16:int64, if not as in pruning; repeat it for several."
DATA_HELP = "Instead of --input: data whose first batch is the input."


def export(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that prune wrote.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    out: Annotated[
        Path, typer.Option(help="File to write, .onnx, .pt2 or .gguf; or a folder for Hugging Face.")
    ],
    input: Annotated[Texts, typer.Option(help=INPUT_HELP)] = None,
    data: Annotated[Text, typer.Option(help=DATA_HELP)] = None,
    tolerance: Annotated[
        Number, typer.Option(help="Largest relative difference to PyTorch; by default 3.5e-4 in float32.")
    ] = None,
    opset: Annotated[Whole, typer.Option(help="For .onnx, the version of the operator set.")] = None,
    base_model: Annotated[
        Text, typer.Option(help="For the model card of a folder: the dense model's name on the hub.")
    ] = None,
    license: Annotated[
        Text, typer.Option(help="For the model card: the licence, such as apache-2.0.")
    ] = None,
    fixed: Annotated[
        bool,
        typer.Option(
            "--fixed",
            help="For .onnx and .pt2: the file takes only the sizes of the input, also for the batch.",
        ),
    ] = False,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache",
            help="For .onnx of language models: the cache of keys and values is an input and an output.",
        ),
    ] = False,
    tokenizer: Annotated[
        Place,
        typer.Option(help="For .gguf: a GGUF file of the dense model, whose tokenizer is copied."),
    ] = None,
    own_code: Annotated[
        bool,
        typer.Option(
            "--own-code",
            help="For a folder: add a modeling file, for sizes that no configuration can express; load it "
            "with trust_remote_code=True.",
        ),
    ] = False,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a pruned model to .onnx, .pt2, .gguf or a Hugging Face folder, checked against PyTorch."""
    with reported(debug=debug):
        import secateur as sc

        if out.suffix and (base_model is not None or license is not None):
            raise SettingError(
                f"--out {out}: expected a folder with --base-model or --license, got a file, which has no "
                f"model card. Leave them out."
            )
        make = model_source("--model", model).make
        example = example_for("export", input, data, seed, make)
        small = sc.load(source, make, example_inputs=example)
        card = None
        if not out.suffix:
            report = sc.Report.from_json(source / REPORT) if os.path.isfile(source / REPORT) else None
            card = sc.model_card(small, report, base_model=base_model, license=license, own_code=own_code)
        done = sc.export(
            small,
            out,
            example,
            tolerance=tolerance,
            opset=opset,
            card=card,
            own_code=own_code,
            fixed=fixed,
            cache=cache,
            tokenizer=tokenizer,
        )
        found = {**asdict(done), "path": done.path.as_posix()}
        sizes = " and ".join(map(str, done.batches))
        open_axes = f"\nany size: {', '.join(done.open)}" if done.open else ""
        shown = (
            json_format.dumps(found, indent=1)
            if json
            else f"written to  {done.path}\n"
            f"{done.runtime} computes what PyTorch computes, to {done.difference:.1e} relative (allowed: "
            f"{done.tolerance:.0e}), with a batch of {sizes}{open_axes}"
        )
    show(shown)


def quantise(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that prune wrote.")],
    model: Annotated[str, typer.Option(help="The dense model with its weights, as for prune.")],
    data: Annotated[str, typer.Option(help="Data to calibrate with, as for prune; a fifth is held out.")],
    out: Annotated[Path, typer.Option(help="The .onnx file to write.")],
    kind: Annotated[
        str, typer.Option(help="int8: weights and activations; int4: weights of matrix products.")
    ] = "int8",
    evaluation: Annotated[
        Text, typer.Option(help="Data to measure quality on; by default the held-out fifth.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch, for data from files.")] = 64,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Quantise a pruned model to 8 or 4 bits as an ONNX file, measured beside the dense one."""
    with reported(debug=debug):
        if out.suffix != ".onnx":
            raise SettingError(
                f"--out {out}: expected a name that ends in .onnx. Write --out small.int8.onnx."
            )
        file_to_write("--out", out)
        import secateur as sc
        from secateur.pipeline.quantise import checked_kind

        known_kind = checked_kind(kind)
        made = model_source("--model", model)

        def read(option: str, text: str) -> Any:
            return load_data(option, text, batch_size=batch_size, seed=seed, source=made)

        judged = None if evaluation is None else read("--evaluation", evaluation)
        small = sc.load(source, made.make)
        done = sc.quantise(
            small, read("--data", data), known_kind, dense=made.load(), evaluation=judged, seed=seed
        )
        done.save(out)
        shown = done.figures.model_dump_json(indent=1) if json else f"{done}\n\nwritten to  {out}"
    show(shown)


def example_for(
    command: str, sizes: list[str] | None, data: str | None, seed: int, make: Callable[[], nn.Module]
) -> Any:
    """Example inputs of these sizes or from these data; None, for those of the plan, if neither is given.

    Args:
        command: For messages.
        sizes: Sizes of the inputs, as on the command line.
        data: Where the data come from, as on the command line.
        seed: Seed of the data.
        make: Makes the model that takes the inputs.

    Raises:
        SettingError: If both are given.
    """
    if sizes and data is not None:
        raise SettingError(f"secateur {command}: expected --input or --data, got both. Leave one out.")
    if sizes:
        return tuple(example_of(text) for text in sizes)
    if data is None:
        return None
    from secateur.calibration import Calibration

    batch = Calibration.of(load_data("--data", data, seed=seed), seed=seed, model=make()).first()
    return batch.inputs


def bench(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that prune wrote.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    backend: Annotated[
        Texts, typer.Option(help="eager, compile or onnxruntime; repeat it for several. By default eager.")
    ] = None,
    batch: Annotated[
        Wholes, typer.Option(help="Samples in a pass; repeat it for several. By default those of the input.")
    ] = None,
    input: Annotated[Texts, typer.Option(help=INPUT_HELP)] = None,
    data: Annotated[Text, typer.Option(help=DATA_HELP)] = None,
    rounds: Annotated[int, typer.Option(help="Number of timed passes of each model.")] = 30,
    warmup: Annotated[int, typer.Option(help="Number of untimed passes before them.")] = 5,
    confidence: Annotated[float, typer.Option(help="Confidence of the intervals, in (0, 1).")] = 0.95,
    threads: Annotated[Whole, typer.Option(help="Threads within an operator; by default all cores.")] = None,
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
            make = model_source("--model", model).make
            example = example_for("bench", input, data, seed, make)
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
    show(shown)


def prune_checkpoint(
    directory: Annotated[
        Path, typer.Argument(help="Folder with config.json and one or several safetensors files.")
    ],
    plan: Annotated[
        Path, typer.Option(help="Plan for its experts: a file of Plan.to_json, or what prune wrote to --out.")
    ],
    out: Annotated[Path, typer.Option(help="New or empty folder for the smaller checkpoint.")],
    debug: Debug = False,
) -> None:
    """Remove a plan's experts from a checkpoint on disk, one shard at a time."""
    with reported(debug=debug):
        from secateur.artefact.save import saved_record
        from secateur.plan import Plan
        from secateur.targets.experts import checkpoint

        decided = saved_record(plan).plan if os.path.isdir(plan) else Plan.from_json(plan)
        checkpoint.prune_checkpoint(directory, decided, out)
        kept, before = (sum(getattr(g, name) for g in decided.groups) for name in ("kept", "size"))
    show(f"written to  {out}\n{kept} of {before} experts kept in {len(decided.groups)} blocks")
