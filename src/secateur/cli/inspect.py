"""`secateur inspect`: show which parts of a model can be pruned, and why others cannot."""

from __future__ import annotations

import dataclasses
import json as json_format
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from secateur.cli.command import READING, command
from secateur.cli.inputs import Inputs
from secateur.common.formatting import number, percent, shorten
from secateur.config.run import Run
from secateur.report.text import WIDTH

if TYPE_CHECKING:
    from secateur.graph.graph import Graph

MOST = 6
_UNSAID = "an older secateur wrote this folder; sc.record_of(sc.load(...)).takes tells them."


@command(
    "artefact",
    "model",
    "input",
    "data",
    "allow_inexact",
    *READING,
    "seed",
    needs=("model",),
    folder="artefact",
)
def inspect(run: Run, json: bool) -> str:
    """Show a model's groups of units, what they cost, and what cannot be pruned and why; or a pruned model.

    Of a pruned model's folder: what each group kept, the form, and which sizes its inputs may have.
    """
    import secateur as sc

    if run.artefact is not None:
        return _artefact(run.artefact, json)
    inputs = Inputs(run)
    network = inputs.source.make()
    graph = sc.trace(network, inputs.example, allow_inexact=run.allow_inexact)
    found = describe(type(network).__name__, graph)
    return json_format.dumps(found, indent=1) if json else listing(found)


def _artefact(folder: str, json: bool) -> str:
    """Show the record of a saved result. No model is made."""
    from secateur.artefact.save import saved_record

    record = saved_record(folder)
    if json:
        found = {
            "plan": record.plan.model_dump(mode="json"),
            "form": record.form,
            "note": record.note,
            "takes": record.takes,
        }
        return json_format.dumps(found, indent=1)
    form = f"form {record.form}" + (f": {record.note}" if record.note else "")
    return "\n\n".join([str(record.plan), form, f"sizes of the inputs: {record.takes or _UNSAID}"])


def describe(name: str, graph: Graph) -> dict[str, Any]:
    """Return a graph as plain data.

    ``alone`` of a group is the model's cost if this group keeps one unit and all other groups keep all.
    ``smallest`` is the model's cost if every group keeps one unit.
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
    """Format the result of `describe` for a terminal."""
    dense_macs, dense_params = found["macs"], found["params"]
    least = found["smallest"]
    lines = [
        f"{found['model']}: {number(dense_params)} parameters, {number(dense_macs)} MACs for one sample",
        f"{found['units']:,} units in {len(found['groups'])} groups may be removed. "
        f"With one unit left in each: {percent(least['params'], dense_params)} of the parameters, "
        f"{percent(least['macs'], dense_macs)} of the MACs.",
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
            f"{percent(dense_params - alone['params'], dense_params):>10}  "
            f"{percent(dense_macs - alone['macs'], dense_macs):>7}  {shorten(layers)}"
            + ("" if group["exact"] else "  (mixed: removal changes the others)")
        )
    lines += [
        "",
        "parameters, MACs: the share that goes with all but one of the group's units, the others left whole.",
    ]
    lines += ["", *(part for line in found["coverage"]["inputs"].splitlines() for part in wrap(line, WIDTH))]
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
    return [f"{reason}: {shorten(what, MOST)}" for reason, what in by_reason.items()] or ["nothing"]
