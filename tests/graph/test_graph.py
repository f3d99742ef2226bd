"""A graph is read-only: no step of the pipeline changes what it says."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch

import secateur as sc
from secateur.graph.groups import Group
from tests.helpers.models import TOPOLOGIES, build
from tests.targets.units.plans import random_plan


def group_of(group: Group) -> list[Any]:
    """All that a group says, as plain data."""
    slices = [(s.tensor, s.axis, s.role, s.position.tolist(), s.unit.tolist()) for s in group.slices]
    sites = [(s.node, s.axis, s.stage, s.producer, s.position.tolist(), s.unit.tolist()) for s in group.sites]
    return [group.name, group.size, group.exact, group.inexact_because, slices, sites]


def masks_of(masks: list[Any]) -> list[Any]:
    """Masks, and lists of such, as plain data."""
    return [mask.tolist() if isinstance(mask, np.ndarray) else masks_of(mask) for mask in masks]


def said_by(graph: sc.Graph, removed: dict[str, dict[int, Any]]) -> dict[str, Any]:
    """All that a graph says, as plain data; `removed` is what to ask the positions of tensors for."""
    programs = {None: graph.program} | {view: view.program for view in graph.views}
    return {
        "text": str(graph),
        "groups": [group_of(group) for group in graph.all_groups],
        "left": [(group_of(entry.group), entry.reason) for entry in graph.left],
        "frozen": graph.frozen,
        "fingerprint": graph.fingerprint,
        "inputs": graph.inputs.model_dump(),
        "folded": graph.folded,
        "static_batch": graph.static_batch,
        "coverage": graph.coverage(),
        "cost": [graph.cost(), graph.cost({group.name: np.arange(group.size) < 1 for group in graph.groups})],
        "programs": [str(program.graph) for program in programs.values()],
        "nodes": [
            (
                node.name,
                masks_of(kept.at(node)),
                kept.constant(node) is None,
                graph.origin(node),
                graph.is_weight(node),
            )
            for view, program in programs.items()
            for kept in [graph.kept(removed, view)]
            for node in program.graph.nodes
        ],
        "tensors": {
            name: hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
            for name, tensor in graph.program.state_dict.items()
        },
    }


def traced(name: str) -> tuple[torch.nn.Module, torch.Tensor, sc.Graph]:
    """One of the small networks, inputs for it, and its trace."""
    model = build(name)
    (x,) = TOPOLOGIES[name].inputs(4, torch.float64)
    return model, x, sc.trace(model, x)


@pytest.mark.parametrize("name", ["residual", "hard_coded_view"])
def test_no_step_changes_a_graph(name: str) -> None:
    model, x, graph = traced(name)
    plan = random_plan(graph, 0.4)
    removed: dict[str, dict[int, Any]] = {}
    for group in plan.groups:
        for piece in group.slices:
            at = removed.setdefault(piece.tensor, {}).setdefault(piece.axis, [])
            at.extend(piece.removed)
    before = said_by(graph, removed)
    assert any(not np.all(mask) for _, masks, *_ in before["nodes"] for mask in masks)  # the plan shows in it
    batches = [(torch.randn_like(x),) for _ in range(3)]

    def unchanged() -> bool:
        return said_by(graph, removed) == before

    scores = sc.score(graph, batches, ["activation", "reconstruction"])
    assert unchanged()
    allocated = sc.Uniform(removal="activation").allocate(graph, scores, sc.Budget(macs=0.7))
    assert unchanged()
    for form in ("module", "graph", "masked", "auto"):
        small = sc.apply(model, allocated, form, graph=graph)
        assert unchanged()
        sc.verify(model, small, allocated, x)
        assert unchanged()
    sc.repair(small, model, batches, "reconstruct", graph=graph)
    assert unchanged()


def test_a_graph_cannot_be_set() -> None:
    graph = traced("plain")[2]
    with pytest.raises(AttributeError):
        graph.groups = ()  # type: ignore[misc]


def test_a_restricted_graph_knows_all_groups() -> None:
    graph = traced("residual")[2]
    one = graph.restricted_to(graph.groups[:1])
    assert [group.name for group in one.groups] == [graph.groups[0].name]
    assert one.all_groups == graph.all_groups == graph.groups
    with pytest.raises(sc.PlanError, match="expected one of the model's 1 prunable groups"):
        one.cost({graph.groups[1].name: np.ones(graph.groups[1].size, dtype=bool)})
