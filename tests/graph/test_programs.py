"""The captured program, and others for inputs of other sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import Calibration
from secateur.graph import programs as programs_module
from secateur.graph.matching import matched
from secateur.graph.programs import Programs, leaves_of, shapes_of, values_at
from secateur.graph.resizing import graph_at
from secateur.targets.units.tensors import removed_positions
from tests.helpers.lengths import SIZES, batches, network


def all_programs(name: str) -> tuple[sc.Graph, list[Any]]:
    """A trace, and the program for each batch."""
    model = network(name)
    data = list(Calibration.of(batches(name), model=model))
    graph = sc.trace(model, data[0].inputs)
    return graph, [graph.programs.of(b.args, b.kwargs) for b in data]


@pytest.mark.parametrize("name", SIZES)
def test_each_program_gives_what_the_model_gives(name: str) -> None:
    from secateur.signals.program import CapturedModel

    model = network(name)
    graph, _ = all_programs(name)
    run = CapturedModel(graph.programs)
    for batch in Calibration.of(batches(name), model=model):
        found, wanted = batch.run(run), batch.run(model)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_an_axis_that_differs_is_captured_as_one_of_any_size() -> None:
    graph, found = all_programs("tokens")
    assert shapes_of(found[1]) == {"[0][0]": (None, None)}
    assert found[0] is graph.program
    assert len({id(p) for p in found}) == 2


class Held(nn.Module):
    """Adds a table of positions, cut to a length that capture holds as a number, or asks for no size."""

    def __init__(self, *, held: bool) -> None:
        super().__init__()
        self.layer, self.table, self.held = nn.Linear(4, 6), nn.Parameter(torch.randn(9, 6)), held

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return (y + self.table[: int(np.array(x.shape[1]))]).mean(1) if self.held else y.relu()


def test_what_a_program_gives_at_another_size_is_known_where_it_is_right_there() -> None:
    x, y = torch.randn(2, 3, 4), torch.randn(3, 5, 4)
    model = Held(held=False).eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b"), 1: None},))
    values = values_at(program, model, [y])
    assert values is not None
    *_, result = (node for node in program.graph.nodes if node.op == "call_function")
    assert (values[result].shape, values[result].device.type) == ((3, 5, 6), "meta")
    model = Held(held=True).eval()
    assert values_at(torch.export.export(model, (x,)), model, [x]) is not None
    assert values_at(torch.export.export(model, (x,)), model, [y]) is None


def test_trace_captures_once_where_the_program_is_right_at_other_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from secateur.graph import branches

    captured: list[bool] = []
    true = branches.capture
    monkeypatch.setattr(branches, "capture", lambda *a, **k: captured.append(True) or true(*a, **k))
    for held, times in ((False, 1), (True, 2)):
        captured.clear()
        model = nn.Sequential(nn.Linear(4, 4), Held(held=held), nn.Linear(6, 2)).eval()
        graph = sc.trace(model, torch.randn(2, 3, 4))
        assert [(a.size, a.other) for a in graph.inputs.open if not a.batch] == [(3, 2)]
        assert len(captured) == times


def test_a_size_that_the_code_holds_has_a_program_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            length = int(np.array(x.shape[1]))
            out: Tensor = self.layer(x).reshape(-1, length * 6).sum(1, keepdim=True)
            return out

    model = Held().eval()
    programs = Programs(torch.export.export(model, (torch.randn(2, 3, 4),)), model)
    for length in (3, 5, 6, 5):
        (leaf,) = leaves_of(programs.of((torch.randn(2, length, 4),), {}), (torch.randn(2, length, 4),), {})
        assert leaf.shape[1] == length
    assert len(programs) == 3
    monkeypatch.setattr(programs_module, "MOST", 3)
    with pytest.raises(sc.CalibrationError, match="at most 3 sizes, since the model is captured once for"):
        programs.of((torch.randn(2, 7, 4),), {})


def test_inputs_that_do_not_agree_with_each_other_are_refused() -> None:
    graph, _ = all_programs("padded")
    ids, mask = torch.zeros(4, 8, dtype=torch.long), torch.ones(4, 7, dtype=torch.long)
    with pytest.raises(sc.CalibrationError, match=r"model inputs?"):
        graph.programs.of((ids, mask), {})


@pytest.mark.parametrize("name", SIZES)
def test_layers_are_matched_by_what_they_read(name: str) -> None:
    graph, found = all_programs(name)
    for program in found:
        pairs = matched(graph.program, program)
        layers = [
            n
            for n in graph.program.graph.nodes
            if str(n.target) in ("aten.linear.default", "aten.conv2d.default")
        ]
        for node in layers:
            if node in pairs:
                own, other = ([str(a) for a in n.args[1:3]] for n in (node, pairs[node]))
                assert own == other
            else:
                assert name == "steps"


@pytest.mark.parametrize("name", [name for name in SIZES if name != "steps"])
def test_units_lie_alike_in_every_program(name: str) -> None:
    graph, found = all_programs(name)
    masks = {g.name: np.arange(g.size) % 3 != 1 for g in graph.groups}
    removed = removed_positions(sc.Plan.build(graph, masks, allocator="every third"))
    for program in found:
        at = graph_at(graph, program)
        assert at.cost(masks) == graph.cost(masks)
        kept = at.kept(removed)
        pairs = matched(graph.program, program)
        for group in graph.groups:
            for site in group.sites:
                node = next(n for n in graph.program.graph.nodes if n.name == site.node)
                mask = kept.at(pairs[node])[site.axis]
                expected = np.ones(len(mask), dtype=bool)
                expected[site.position] = masks[group.name][site.unit]
                assert (mask[site.position] == expected[site.position]).all()


def test_sizes_at_which_fewer_units_can_go_are_refused() -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            if x.shape[1] > 500_000:  # farther than trace looks
                hidden = hidden + hidden.flip(-1)  # ties each unit to another
            out: Tensor = self.b(hidden.relu()).mean(1)
            return out

    graph = sc.trace(Turning().eval(), torch.randn(2, 5, 4))
    assert [g.size for g in graph.groups] == [6]
    assert graph_at(graph, graph.programs.of((torch.randn(2, 7, 4),), {})).groups == graph.groups
    with pytest.raises(sc.CalibrationError, match=r"fewer can\. Pass inputs of these sizes to sc.trace"):
        graph_at(graph, graph.programs.of((torch.randn(2, 500_001, 4),), {}))
