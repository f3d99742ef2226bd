"""`secateur export`: a pruned model into a file or folder that other programs load."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from secateur.cli.loading import example_of, load_data, model_source
from secateur.cli.report import REPORT
from secateur.cli.shell import Debug, Json, Seed, reported
from secateur.errors import SettingError

# Optional[...] rather than | None: typer reads these at run time, where older Pythons need it.
Text = Optional[str]  # noqa: UP045
Texts = Optional[list[str]]  # noqa: UP045
Number = Optional[float]  # noqa: UP045
Whole = Optional[int]  # noqa: UP045

MODEL_HELP = (
    "The dense model, as for prune: net.py:make, timm:resnet18 or a folder; its weights do not matter."
)
INPUT_HELP = "Sizes of an input, 1x3x224x224 or 1x16:int64, if not as in pruning; repeat it for several."
DATA_HELP = "Instead of --input: data whose first batch is the input."


def export(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that prune wrote.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="File to write, .onnx or .pt2; or a folder for Hugging Face.")],
    input: Annotated[Texts, typer.Option(help=INPUT_HELP)] = None,
    data: Annotated[Text, typer.Option(help=DATA_HELP)] = None,
    tolerance: Annotated[
        Number, typer.Option(help="Largest relative difference to PyTorch; 3.5e-4 in float32.")
    ] = None,
    opset: Annotated[Whole, typer.Option(help="For .onnx, the version of the operator set.")] = None,
    base_model: Annotated[
        Text, typer.Option(help="For the model card of a folder: the dense model's name on the hub.")
    ] = None,
    license: Annotated[Text, typer.Option(help="For the model card: the licence, apache-2.0.")] = None,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a pruned model to ONNX, PyTorch's .pt2 or a Hugging Face folder, checked against PyTorch."""
    with reported(debug=debug):
        import secateur as sc

        if out.suffix and (base_model is not None or license is not None):
            raise SettingError(
                f"--out {out}: expected a folder with --base-model or --license, got a file, which has no "
                f"model card. Leave them out."
            )
        example = example_for("export", input, data, seed)
        small = sc.load(source, model_source("--model", model).make, example_inputs=example)
        card = None
        if not out.suffix:
            report = sc.Report.from_json(source / REPORT) if (source / REPORT).is_file() else None
            card = sc.model_card(small, report, base_model=base_model, license=license)
        done = sc.export(small, out, example, tolerance=tolerance, opset=opset, card=card)
        found = {**asdict(done), "path": done.path.as_posix()}
        sizes = " and ".join(map(str, done.batches))
        shown = (
            json_format.dumps(found, indent=1)
            if json
            else f"written to  {done.path}\n"
            f"{done.runtime} computes what PyTorch computes, to {done.difference:.1e} relative (allowed: "
            f"{done.tolerance:.0e}), with a batch of {sizes}"
        )
    typer.echo(shown)


def example_for(command: str, sizes: list[str] | None, data: str | None, seed: int) -> Any:
    """Example inputs of these sizes or from these data; None, for those of the plan, if neither is given.

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

    batch = Calibration.of(load_data("--data", data, seed=seed), seed=seed).first()
    return batch.inputs
