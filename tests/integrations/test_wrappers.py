from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.compat.training import own_forward
from secateur.integrations.wrappers import check_whole, refresh
from tests.integrations.distributed import train
from tests.integrations.training import a_pruner, batches, network
from tests.signals.processes import in_processes


def test_two_processes_under_ddp() -> None:
    one, other = in_processes(train, 2)
    assert one["same"] == other["same"] == [True] * 6
    assert one["plan"] == other["plan"]
    assert all(np.array_equal(v, other["state"][k]) for k, v in one["state"].items() if "running" not in k)
    dense, after, again = one["macs"]
    assert after == again <= dense / 2
    assert one["hooks"] == 6
    assert one["settings"] == (True, False, 3 * 2**20)
    assert one["averaged"] >= 6


def test_without_a_wrapper_there_is_nothing_to_do() -> None:
    refresh(network())


def test_autocast_around_forward_is_put_aside_and_back() -> None:
    """As Accelerate prepares a model for bf16."""
    model = network()
    own = type(model).forward

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return own(self, x).float()  # type: ignore[arg-type]

    model._original_forward = model.forward
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
    patched = model.forward
    with own_forward(model):
        assert "forward" not in vars(model)
    assert model.forward is patched
    done = a_pruner(rounds=1, end=1).advance(model, step=1)
    assert done is not None
    assert model.forward is patched
    assert model.forward.__self__ is model  # type: ignore[attr-defined]
    assert model(batches()[0][0]).shape == (12, 3)


def test_sharded_models_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(
        sc.SettingError, match="the whole model in each process, got FullyShardedDataParallel"
    ):
        check_whole(nn.Sequential(FullyShardedDataParallel()))


def test_data_parallel_goes_on(monkeypatch: Any) -> None:
    model = network()
    wrapped = nn.DataParallel(model)
    a_pruner(rounds=1, end=1).advance(wrapped, step=1)
    assert wrapped.module is model
    assert wrapped(batches()[0][0]).shape == (12, 3)
