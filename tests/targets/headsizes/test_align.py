"""Another basis for each head: the same outputs, and the best that r dimensions can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.targets.headsizes.align import align_heads
from secateur.targets.units.compare import relative_difference, run
from tests.targets.headsizes.models import HEADS, SIZE, WIDTH, Eager, network
from tests.targets.units.plans import plan_of

BATCHES = [torch.randn(16, 5, WIDTH, generator=torch.Generator().manual_seed(k)) for k in range(3)]


def aligned(model: nn.Module) -> tuple[Any, int]:
    batches = [batch.to(next(model.parameters()).dtype) for batch in BATCHES]
    graph = sc.trace(model, batches[0], granularity="head_size")
    return align_heads(model, graph, batches, progress=False)


@pytest.mark.parametrize(
    ("name", "turned"),
    [("fused", 4), ("grouped", 4), ("eager", 4), ("rotary", 2), ("normed", 2), ("kernel", 2), ("tied", 4)],
)
def test_the_outputs_stay(name: str, turned: int) -> None:
    model = network(name, dtype=torch.float64)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    same, found = aligned(model)
    assert found == turned
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    changed = {key for key, tensor in same.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed
    assert ("1.q.weight" in changed) == (name not in ("rotary", "normed", "kernel", "tied"))
    x = torch.randn(4, 9, WIDTH, dtype=torch.float64)
    assert relative_difference(run(same, (x,), {}), run(model, (x,), {})) <= 1e-9


class Copied(Eager):
    """Heads are copied, and then viewed as the same heads of one long batch, and back."""

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.contiguous().view(-1, *t.shape[2:]).view(t.shape) for t in super().heads(x))
        return q, k, v


def test_heads_that_are_copied_and_viewed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Copied(), Copied()).double().eval()
    same, found = aligned(model)
    assert found == 4
    x = torch.randn(4, 9, WIDTH, dtype=torch.float64)
    assert relative_difference(run(same, (x,), {}), run(model, (x,), {})) <= 1e-9


def test_einsums_and_layers_that_run_twice_keep_their_basis() -> None:
    assert aligned(network("summed", dtype=torch.float64))[1] == 0
    layer = Eager().double()
    model = nn.Sequential(layer, layer).eval()
    assert aligned(model) == (model, 0)


def heads(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all batches. [heads, positions, size] each"""
    q, k, v = layer.heads(torch.cat(BATCHES).double())
    return tuple(t.transpose(0, 1).flatten(1, 2) for t in (q, k, v))  # type: ignore[return-value]


def test_logits_are_the_best_of_their_rank() -> None:
    """Against the definition: all pairs of a query and a key, and the best matrix of rank r between them."""
    torch.manual_seed(0)
    model = nn.Sequential(Eager()).double().eval()
    same, _ = aligned(model)
    for head in range(HEADS):
        q, k, _ = (t[head].detach() for t in heads(model[0]))
        logits = q @ k.T
        size = torch.linalg.svdvals(logits)
        for r in (1, 2, 4):
            best = float(size[r:].square().sum())
            new_q, new_k, _ = (t[head].detach() for t in heads(same[0]))
            mine = float((logits - new_q[:, :r] @ new_k[:, :r].T).square().sum())
            plain = float((logits - q[:, :r] @ k[:, :r].T).square().sum())
            assert mine <= best * 1.001
            assert mine < plain


def test_outputs_are_the_best_of_their_rank() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Eager()).double().eval()
    same, _ = aligned(model)
    layer, other = model[0], same[0]
    x = torch.cat(BATCHES).double()
    with torch.no_grad():
        sums = layer.attend(*layer.heads(x)).transpose(0, 1).flatten(1, 2)
        turned = other.attend(*other.heads(x)).transpose(0, 1).flatten(1, 2)
        for head in range(HEADS):
            own = slice(head * SIZE, (head + 1) * SIZE)
            wanted = sums[head] @ layer.o.weight[:, own].T
            best = torch.linalg.svdvals(wanted)
            for r in (1, 3):
                got = turned[head][:, :r] @ other.o.weight[:, own].T[:r]
                error = float((wanted - got).square().sum())
                assert error <= float(best[r:].square().sum()) * 1.001


def test_what_goes_costs_less_in_the_new_basis() -> None:
    model = network("eager")
    same, _ = aligned(model)
    errors = []
    for each in (model, same):
        graph = sc.trace(each, BATCHES[0], granularity="head_size")
        keep = {group.name: np.arange(group.size) < SIZE - 2 for group in graph.groups}
        small = sc.apply(each, plan_of(graph, keep), graph=graph)
        x = torch.randn(32, 5, WIDTH, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            errors.append(float((small(x) - model(x)).square().mean()))
    assert errors[1] < errors[0] / 2


def test_broken_activations_are_refused() -> None:
    model = network("eager")
    graph = sc.trace(model, BATCHES[0], granularity="head_size")
    with pytest.raises(sc.CalibrationError, match="align_heads: expected finite activations at"):
        align_heads(model, graph, [torch.full((4, 5, WIDTH), 1e30)], progress=False)


def test_values_stay_as_large_as_they_were_however_many_data() -> None:
    model = network("eager")
    graph = sc.trace(model, BATCHES[0], granularity="head_size")
    few, _ = align_heads(model, graph, BATCHES[:1], progress=False)
    many, _ = align_heads(model, graph, BATCHES[:1] * 1000, progress=False)
    torch.testing.assert_close(many[1].v.weight, few[1].v.weight, rtol=1e-3, atol=1e-4)
    x = torch.cat(BATCHES[:1])
    sizes = []
    for layer in (model[1], few[1]):
        with torch.no_grad():
            sizes.append(layer.attend(*layer.heads(x)).square().mean(dim=(0, 2, 3)))
    torch.testing.assert_close(sizes[1], sizes[0], rtol=0.5, atol=0)


def test_what_is_no_trace_of_head_sizes_of_this_model_is_refused() -> None:
    model = network("eager")
    graph = sc.trace(model, BATCHES[0], granularity="head_size")
    for wrong in (None, sc.trace(model, BATCHES[0]), sc.trace(model, BATCHES[0], granularity="block")):
        with pytest.raises(sc.SettingError, match=r"expected a trace of head sizes\. Pass sc.trace"):
            align_heads(model, wrong, BATCHES, progress=False)  # type: ignore[arg-type]
    with pytest.raises(sc.SettingError, match=r"expected the model that was traced, with 1\.k.weight"):
        align_heads(network("grouped"), graph, BATCHES, progress=False)
    with pytest.raises(sc.SettingError, match=r"expected a torch\.nn\.Module"):
        align_heads(None, graph, BATCHES, progress=False)  # type: ignore[type-var]


def test_prune_aligns_first(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network("eager")
    data = [(batch, torch.arange(len(batch)) % 3) for batch in BATCHES]
    result = sc.prune(model, data, sc.Budget(params=0.9), "uniform", "head_size", repair=None, progress=False)
    assert "Heads have another basis in 4 products of queries, keys and values." in result.report.note
    assert result.plan.predicted.params <= 0.9 * result.plan.dense.params
    assert any(not keep.all() for keep in result.plan.keep.values())
    sc.save(result.model, tmp_path / "small")
    loaded = sc.load(tmp_path / "small", lambda: network("eager"))
    assert torch.equal(loaded(BATCHES[0]), result.model(BATCHES[0]))
