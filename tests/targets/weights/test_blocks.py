"""Block by block gives what the whole model gives, in the memory of one block."""

from __future__ import annotations

import copy
import importlib
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.allocators import Budget
from secateur.calibration import Calibration
from secateur.common.models import evaluating
from secateur.errors import SettingError
from secateur.targets.weights import surgeon
from secateur.targets.weights.apply import apply, check
from secateur.targets.weights.blocks import Chain, lists_of
from tests.targets.weights.chains import DEPTH, Plain, language_model, texts, vectors
from tests.targets.weights.nets import allocate, score, traced

SCORING = importlib.import_module("secateur.signals.weights.score")
KINDS = ["llama", "gpt_neox", "opt"]


def model_and_data(kind: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return (Plain().double(), vectors()) if kind == "plain" else (language_model(kind), texts())


def chain_of(model: nn.Module, batches: list[Any]) -> Chain | None:
    with evaluating(model), torch.no_grad():
        return Chain.of(model, Calibration.of(batches))


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_wanda_equals_the_whole_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_data(kind)
    before = copy.deepcopy(model.state_dict())
    whole = score(model, batches, "wanda", by_block=False, progress=False)
    monkeypatch.setattr(SCORING, "_gather", None)  # what runs the model whole
    found = score(model, batches, "wanda", by_block=True, progress=False)
    assert found.samples == whole.samples == sum(len(b if kind == "plain" else b["labels"]) for b in batches)
    for name, values in whole["wanda"].items():
        np.testing.assert_allclose(found["wanda"][name], values, rtol=1e-12)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    if kind != "plain":
        assert model.config.use_cache is True  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_the_surgeon_equals_the_whole_model(kind: str) -> None:
    model, batches = model_and_data(kind)
    plan = allocate(traced(model), score(model), "uniform", Budget(sparsity=0.5))
    found, whole = apply(model, plan), apply(model, plan)
    names = surgeon(found, model, plan, batches)
    assert names == surgeon(whole, model, plan, batches, by_block=False) == tuple(plan.masks)
    masked = apply(model, plan).state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-9, atol=1e-11)
        assert torch.equal(tensor, masked[name]) == (name not in plan.masks)
        if name in plan.masks:
            assert not tensor[torch.tensor(~plan.masks[name])].any()


def test_the_surgeon_runs_one_block_at_a_time() -> None:
    """A pass for each layer of a block and one to go on; a whole run would take every block each time."""
    model, batches = model_and_data("plain")
    plan = allocate(traced(model), score(model), "uniform", Budget(sparsity=0.5))
    counts = [0]
    small = apply(model, plan)
    for block in small.chain:  # type: ignore[union-attr]
        block.up.register_forward_hook(lambda *a: counts.append(counts.pop() + 1))
    surgeon(small, model, plan, batches)
    # For what is before: the whole model. Then the first block once, to see what it returns.
    assert counts == [len(batches) * DEPTH + 1 + len(batches) * DEPTH * (2 + 1)]


@pytest.mark.parametrize("batches", [2, 5])
def test_memory_is_that_of_the_states_and_one_block(batches: int) -> None:
    model = language_model("llama", num_hidden_layers=6)
    most = {"blocks": 0, "inside": 0}

    def watch(kind: str) -> Any:
        living: list[weakref.ref[Tensor]] = []

        def see(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            living.append(weakref.ref(tensor))
            now = {t.untyped_storage().data_ptr() for t in (ref() for ref in living) if t is not None}
            most[kind] = max(most[kind], len(now))

        return see

    blocks, inside = watch("blocks"), watch("inside")
    (layers,) = lists_of(model)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for block in layers:
        block.register_forward_hook(blocks)
    for layer in linear:
        layer.register_forward_hook(inside)
    score(model, texts(batches), "wanda", by_block=True, progress=False)
    assert (
        most["blocks"] == batches + 1
    )  # what one batch gets now, beside what each got from the block before
    assert most["inside"] <= len(linear) // len(layers)


@pytest.mark.parametrize("settings", [{"between": True}, {"kept": True}])
def test_a_list_that_is_no_chain_is_run_whole(settings: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = Plain(**settings).double()
    assert chain_of(model, vectors()) is None
    assert not any("forward" in vars(m) for m in model.modules())
    whole, found = (
        score(model, vectors(), "wanda", by_block=by_block, progress=False)["wanda"]
        for by_block in (False, True)
    )
    for name, values in whole.items():
        np.testing.assert_array_equal(found[name], values)


def test_lists_are_found_by_structure() -> None:
    model = Plain()
    assert lists_of(model) == [tuple(model.chain)]
    assert lists_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    assert lists_of(nn.ModuleList([nn.Linear(2, 2), nn.Conv1d(2, 2, 1)])) == []
    shared = nn.Linear(2, 2)
    assert lists_of(nn.ModuleList([shared, shared])) == []
    small = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    both = nn.ModuleDict({"small": small, "large": model.chain})
    assert lists_of(both) == [tuple(model.chain), tuple(small)]
    nested = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in "ab")}) for _ in "abc"
    )
    assert lists_of(nested) == [tuple(nested)]


def test_offloaded_by_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, batches = model_and_data("llama")
    plan = allocate(traced(model), score(model), "uniform", Budget(sparsity=0.5))
    wanda = score(model, batches, "wanda", progress=False)["wanda"]
    small = apply(model, plan)
    surgeon(small, model, plan, batches)

    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in offloaded.parameters())
    monkeypatch.setattr(SCORING, "_gather", None)  # block by block without being told
    found = score(offloaded, batches, "wanda", progress=False)["wanda"]
    for name, values in wanda.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12)
    assert all(p.is_meta for p in offloaded.parameters())
    again = apply(offloaded, plan)
    check(offloaded, again, plan)
    assert surgeon(again, offloaded, plan, batches) == tuple(plan.masks)
    assert all(p.is_meta for p in again.parameters())
    with torch.no_grad():
        for batch in batches:
            expected, got, dense = (m(**batch).logits for m in (small, again, offloaded))
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(dense, model(**batch).logits)


def test_offloaded_to_disk_is_scored_and_not_written(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, batches = model_and_data("llama")
    wanda = score(model, batches, "wanda", progress=False)["wanda"]
    offloaded = accelerate.disk_offload(
        copy.deepcopy(model), str(tmp_path), execution_device=torch.device("cpu")
    )
    found = score(offloaded, batches, ["magnitude", "wanda"], progress=False)
    for name, values in wanda.items():
        np.testing.assert_allclose(found["wanda"][name], values, rtol=1e-12)
    plan = allocate(traced(offloaded), found, "uniform", Budget(sparsity=0.5))
    with pytest.raises(
        SettingError, match="expected weights that can be written, got those of Linear on disk"
    ):
        apply(offloaded, plan)
    with pytest.raises(SettingError, match="got an empty one on the device 'meta'"):
        score(nn.Linear(2, 2, device="meta"))
