"""`compute_on` where there is no other device; `tests/cuda` has the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.common.computing import data_device


def test_the_cpu_changes_nothing() -> None:
    with sc.compute_on("cpu"):
        assert data_device(torch.device("cpu")) == torch.device("cpu")
        assert nn.Linear(3, 2)(torch.ones(1, 3)).device.type == "cpu"


@pytest.mark.parametrize("device", ["no such device", "cuda:99"])
def test_a_device_that_this_machine_lacks(device: str) -> None:
    with pytest.raises(sc.SecateurError, match=r"compute_on\(device='.*'\): expected a device of this"):
        with sc.compute_on(device):
            pass
