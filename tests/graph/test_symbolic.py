"""``len(tensor)`` and ``int(tensor)`` in a capture."""

from __future__ import annotations

import builtins

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph.capture import capture
from secateur.graph.symbolic import lengths_open, numbers_open


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        names = {len([x, x]): "two"}
        return x.reshape(len(x), -1) + len(names[2]) + len(x[0, 0])


def test_the_length_of_a_tensor_fixes_no_size() -> None:
    found = capture(Flat().eval(), (torch.randn(4, 2, 3),), {})
    assert found.static is None
    x = torch.randn(7, 2, 3)
    assert torch.equal(found.program.module()(x), Flat()(x))


def test_all_other_lengths_are_pythons_own() -> None:
    own = builtins.len
    with lengths_open():
        found = [len(torch.zeros(3)), len("abc"), len({})]
        with pytest.raises(TypeError, match="no len"):
            len(5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="0-d"):
            len(torch.tensor(0))
    assert found == [3, 3, 0]
    assert builtins.len is own


def test_len_comes_back_after_an_error() -> None:
    own = builtins.len
    with pytest.raises(ValueError, match="stop"), lengths_open():
        raise ValueError("stop")
    assert builtins.len is own


class Pooled(nn.Module):
    """Adds up the nodes of each graph; the data say how many graphs there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        count = int(graph.max()) + 1
        assert isinstance(count, int | torch.SymInt)
        nodes = self.a(x).relu()
        return self.b(nodes.new_zeros(count, nodes.shape[1]).index_add(0, graph, nodes))


def test_a_number_of_graphs_that_the_data_say_does_not_stop_a_capture() -> None:
    torch.manual_seed(0)
    model = Pooled().double().eval()
    given = (torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1]))
    graph = sc.trace(model, given)
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
    small, masked = sc.apply(model, plan, graph=graph), sc.apply(model, plan, "masked")
    assert sc.record_of(small).form == "module"
    other = (torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 3, 3, 0]))
    torch.testing.assert_close(small(*other), masked(*other))


def test_all_other_numbers_are_pythons_own() -> None:
    with numbers_open():
        assert int is not builtins.int
        assert [int("12"), int(2.5), 0, int("a", 16), int(torch.tensor(2.5))] == [12, 2, 0, 10, 2]
        assert isinstance(3, int)
        assert not isinstance("3", int)
        assert issubclass(bool, int)
    assert int is builtins.int


def test_int_comes_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="stop"), numbers_open():
        raise ValueError("stop")
    assert int is builtins.int
    assert "int" not in globals()


def test_code_that_asks_for_the_type_of_a_number_is_refused() -> None:
    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            count = int((x[:, 0] > 0).sum()) + 1
            return self.b(self.a(x).relu() * {int: 1, float: 2}.get(type(count), 3))[:count]

    with pytest.raises(sc.CaptureError, match="could not capture Typed"):
        sc.trace(Typed().eval(), torch.randn(4, 4))
