"""`secateur inspect`: show which parts of a model can be pruned, and why others cannot."""

from __future__ import annotations

import dataclasses
import json as json_format
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

from secateur.cli.command import READING, command
from secateur.cli.inputs import Inputs
from secateur.common.formatting import number, percent, shorten
from secateur.config.run import Run
from secateur.report.text import WIDTH

if TYPE_CHECKING:
    from secateur.graph.graph import Graph
    from secateur.targets.blocks.graph import BlockGraph
    from secateur.targets.experts.graph import ExpertGraph
    from secateur.targets.together.graph import Joined
    from secateur.targets.weights import Weights

MOST = 6
WORDS = {
    "unit": ("units", "units", "one unit"),
    "expert": ("experts", "experts", "the experts that its router needs"),
    "block": ("blocks", "blocks", "one block"),
    "rank": ("directions", "units", "a rank of 1"),
    "unit+rank": ("units and directions", "units", "one unit"),
    "unit+block": ("units and blocks", "number", "one unit or block"),
    "unit+expert": ("units and experts", "number", "one unit or the experts that its router needs"),
}
"""By granularity: what may be removed, the heading of its number, and the fewest that a group keeps."""
MADE: tuple[Literal["produce", "expert", "block"], ...] = ("produce", "expert", "block")
"""Roles of the slices that are a group's own."""
_UNSAID = "an older secateur wrote this folder; sc.record_of(sc.load(...)).takes tells them."


@command(
    "artefact",
    "model",
    "input",
    "data",
    "granularity",
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
    if run.artefact is not None:
        return _artefact(run.artefact, json)
    inputs = Inputs(run)
    network = inputs.source.make()
    name, graph = type(network).__name__, inputs.traced(network)
    if run.granularity == "weight":
        found = describe_weights(name, graph)
        return json_format.dumps(found, indent=1) if json else weights_listing(found)
    found = describe(name, graph)
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


def describe_weights(name: str, graph: Weights) -> dict[str, Any]:
    """Return the weights that a mask may set to zero as plain data. ``alone``: what no mask covers."""
    return {
        "model": name,
        "granularity": graph.granularity,
        "params": graph.parameters,
        "weights": graph.cost().weights,
        "groups": [{"name": g.name, "weights": g.size, "shape": list(g.shape)} for g in graph.groups],
        "alone": dict(graph.alone),
    }


def weights_listing(found: dict[str, Any]) -> str:
    """Format the result of `describe_weights` for a terminal."""
    groups = found["groups"]
    width = max(len(name) for name in (*(group["name"] for group in groups), "tensor"))
    return "\n".join(
        [
            f"{found['model']}: {number(found['params'])} parameters",
            f"{number(found['weights'])} of them, {percent(found['weights'], found['params'])}, are weights "
            f"in {len(groups)} tensors that a mask may set to zero.",
            "",
            f"{'tensor':{width}}  {'weights':>10}  {'of all':>7}  shape",
            *(
                f"{group['name']:{width}}  {number(group['weights']):>10}  "
                f"{percent(group['weights'], found['params']):>7}  {' × '.join(map(str, group['shape']))}"
                for group in groups
            ),
            "",
            "layers that no mask covers, with their parameters",
            *([f"  {layer}: {number(count)}" for layer, count in found["alone"].items()] or ["  none"]),
        ]
    )


def describe(name: str, graph: Graph | ExpertGraph | Joined | BlockGraph) -> dict[str, Any]:
    """Return a graph as plain data.

    ``fewest`` of a group is one unit, or the experts without which its router cannot work. ``alone`` is the
    model's cost if this group keeps the fewest and all other groups keep all. ``smallest`` is the model's
    cost if every group keeps the fewest. ``coverage`` is of the units; None without units.
    """
    import numpy as np

    units: Any = getattr(graph, "units", graph)
    experts: Any = getattr(graph, "others", graph)
    whole = experts.blocks if experts.granularity == "block" else {}  # which are no blocks of experts
    blocks = {} if whole else {block.name: block for block in getattr(experts, "blocks", ())}
    fewest = {g.name: blocks[g.name].min_keep if g.name in blocks else 1 for g in graph.groups}
    least = {group.name: np.arange(group.size) < fewest[group.name] for group in graph.groups}
    dense, smallest = graph.cost(), graph.cost(least)
    groups = []
    for group in graph.groups:
        alone = graph.cost({group.name: least[group.name]})
        made = [piece for role in MADE for piece in group.of_role(role)]
        groups.append(
            {
                "name": group.name,
                "units": group.size,
                "what": "experts" if group.name in blocks else "blocks" if group.name in whole else "units",
                "fewest": fewest[group.name],
                "exact": group.exact,
                "produced_by": list(dict.fromkeys(s.tensor for s in made)),
                "read_by": list(dict.fromkeys(s.tensor for s in group.of_role("consume"))),
                "alone": {"params": alone.params, "macs": alone.macs},
            }
        )
    covered = hasattr(units, "coverage") and not hasattr(graph, "uncorrelated")  # pairs are no layers of it
    return {
        "model": name,
        "granularity": graph.granularity,
        "params": dense.params,
        "macs": dense.macs,
        "smallest": {"params": smallest.params, "macs": smallest.macs},
        "units": sum(group.size for group in graph.groups),
        "groups": groups,
        "coverage": dataclasses.asdict(units.coverage()) if covered else None,
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
    least, coverage, groups = found["smallest"], found["coverage"], found["groups"]
    what, column, fewest = WORDS[found["granularity"]]
    lines = [
        f"{found['model']}: {number(dense_params)} parameters, {number(dense_macs)} MACs for one sample",
        f"{found['units']:,} {what} in {len(groups)} groups may be removed. "
        f"With {fewest} left in each: {percent(least['params'], dense_params)} of the parameters, "
        f"{percent(least['macs'], dense_macs)} of the MACs.",
    ]
    if coverage:
        lines.append(
            f"{coverage['macs_share']:.1%} of the MACs and {coverage['params_share']:.1%} "
            "of the parameters lie in layers with units that may be removed."
        )
    width = max(len(str(name)) for name in (*(group["name"] for group in groups), "group"))
    lines += ["", f"{'group':{width}}  {column:>7}  {'parameters':>10}  {'MACs':>7}  produced by"]
    for group in groups:
        alone = group["alone"]
        layers = list(dict.fromkeys(tensor.rpartition(".")[0] or tensor for tensor in group["produced_by"]))
        if group["what"] == "blocks":  # no tensors, but the blocks themselves
            layers = group["produced_by"]
        lines.append(
            f"{group['name']:{width}}  {group['units']:>7,}  "
            f"{percent(dense_params - alone['params'], dense_params):>10}  "
            f"{percent(dense_macs - alone['macs'], dense_macs):>7}  {shorten(layers)}"
            + ("" if group["exact"] else "  (mixed: removal changes the others)")
        )
    lines += ["", f"parameters, MACs: the share that goes if only this group is cut, down to {fewest}."]
    if coverage:
        lines += ["", *(part for line in coverage["inputs"].splitlines() for part in wrap(line, WIDTH))]
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
