"""`secateur inspect`: what of a model may be pruned, and what not and why."""

from __future__ import annotations

import dataclasses
import json as json_format
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.loading import Target, example_of, load_data, load_model
from secateur.cli.prune import Text, Texts
from secateur.cli.shell import Debug, Json, reported
from secateur.errors import SettingError
from secateur.report import words

if TYPE_CHECKING:
    from secateur.graph.graph import Graph

MOST = 6


def inspect(
    model: Annotated[
        str, typer.Option(help="package.module:function or file.py:function that returns the model.")
    ],
    input: Annotated[
        Texts,
        typer.Option(help="Sizes of an input, 1x3x224x224 or 1x16:int64; repeat it for several inputs."),
    ] = None,
    data: Annotated[
        Text, typer.Option(help="Instead of --input: data whose first batch is the input.")
    ] = None,
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Also offer groups whose units an operator mixes.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's groups of units, what they cost, and what cannot be pruned and why."""
    with reported(debug=debug):
        import secateur as sc

        target = Target.of("--model", model)
        if (input is None) == (data is None):
            got = "neither" if data is None else "both"
            raise SettingError(
                f"inspect: expected either --input or --data, got {got}. "
                "Write --input 1x3x224x224, for example."
            )
        network, _ = load_model(target)
        graph = sc.trace(network, _example(input, data), allow_inexact=allow_inexact)
        found = describe(type(network).__name__, graph)
        shown = json_format.dumps(found, indent=1) if json else listing(found)
    typer.echo(shown)


def _example(sizes: Sequence[str] | None, data: str | None) -> Any:
    import secateur as sc

    if data is None:
        return tuple(example_of(text) for text in sizes or ())
    batch = sc.Calibration.of(load_data("--data", data, batch_size=2, seed=0)).first()
    return batch.kwargs or batch.args


def describe(name: str, graph: Graph) -> dict[str, Any]:
    """A graph as plain data.

    ``alone`` of a group is what the model would cost if that group kept one unit and the others all;
    ``smallest`` what it would cost if every group kept one unit.
    """
    import numpy as np

    def one_left(size: int) -> Any:
        return np.arange(size) == 0

    dense = graph.cost()
    smallest = graph.cost({group.name: one_left(group.size) for group in graph.groups})
    groups = []
    for group in graph.groups:
        alone = graph.cost({group.name: one_left(group.size)})
        groups.append(
            {
                "name": group.name,
                "units": group.size,
                "exact": group.exact,
                "produced_by": list(dict.fromkeys(s.tensor for s in group.of_role("produce"))),
                "read_by": list(dict.fromkeys(s.tensor for s in group.of_role("consume"))),
                "alone": {"params": alone.params, "macs": alone.macs},
            }
        )
    return {
        "model": name,
        "params": dense.params,
        "macs": dense.macs,
        "smallest": {"params": smallest.params, "macs": smallest.macs},
        "units": sum(group.size for group in graph.groups),
        "groups": groups,
        "coverage": dataclasses.asdict(graph.coverage()),
        "left": [
            {"name": left.group.name, "units": left.group.size, "reason": left.reason} for left in graph.left
        ],
        "frozen": [
            {"tensor": f.tensor, "axis": f.axis, "count": f.count, "reason": f.reason, "where": f.where}
            for f in graph.frozen
        ],
    }


def listing(found: dict[str, Any]) -> str:
    """What `describe` returned, for a terminal."""
    dense_macs, dense_params = found["macs"], found["params"]
    least = found["smallest"]
    lines = [
        f"{found['model']}: {words.number(dense_params)} parameters, "
        f"{words.number(dense_macs)} MACs for one sample",
        f"{found['units']:,} units in {len(found['groups'])} groups may be removed. "
        f"With one unit left in each: {words.percent(least['params'], dense_params)} of the parameters, "
        f"{words.percent(least['macs'], dense_macs)} of the MACs.",
        f"{found['coverage']['macs_share']:.1%} of the MACs and {found['coverage']['params_share']:.1%} "
        "of the parameters lie in layers with units that may be removed.",
        "",
    ]
    names = [str(group["name"]) for group in found["groups"]]
    width = max(len(name) for name in (*names, "group"))
    lines.append(f"{'group':{width}}  {'units':>6}  {'parameters':>10}  {'MACs':>7}  produced by")
    for group in found["groups"]:
        alone = group["alone"]
        layers = list(dict.fromkeys(tensor.rpartition(".")[0] or tensor for tensor in group["produced_by"]))
        lines.append(
            f"{group['name']:{width}}  {group['units']:>6,}  "
            f"{words.percent(dense_params - alone['params'], dense_params):>10}  "
            f"{words.percent(dense_macs - alone['macs'], dense_macs):>7}  {words.shorten(layers)}"
            + ("" if group["exact"] else "  (mixed: removal changes the others)")
        )
    lines += [
        "",
        "parameters, MACs: the share that goes with all but one of the group's units, the others left whole.",
    ]
    lines += ["", "left alone, and why", *(f"  {line}" for line in _left(found))]
    return "\n".join(lines)


def _left(found: dict[str, Any]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for left in found["left"]:
        by_reason.setdefault(left["reason"], []).append(f"{left['name']} ({left['units']})")
    for frozen in found["frozen"]:
        where = f" at {frozen['where']}" if frozen["where"] else ""
        by_reason.setdefault(f"{frozen['reason']}{where}", []).append(
            f"{frozen['tensor']} axis {frozen['axis']}"
        )
    return [f"{reason}: {words.shorten(what, MOST)}" for reason, what in by_reason.items()] or ["nothing"]
