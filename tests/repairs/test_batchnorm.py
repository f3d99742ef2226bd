"""Running statistics measured anew, against the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import Calibration
from secateur.repairs.batchnorm import batch_norms, reestimate
from tests.helpers.models import build


def data(*sizes: int, shape: tuple[int, ...] = (3, 5, 5)) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, *shape, generator=generator, dtype=torch.float64) * 2 + 1,) for n in sizes]


def test_statistics_are_the_average_over_batches() -> None:
    net = (
        nn.Sequential(nn.BatchNorm2d(3, momentum=0.2), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double().train()
    )
    batches = data(4, 6, 2)
    wanted_mean = torch.stack([b.mean((0, 2, 3)) for (b,) in batches]).mean(0)
    wanted_var = torch.stack([b.var((0, 2, 3)) for (b,) in batches]).mean(0)
    reestimate(net, Calibration.of(batches))
    torch.testing.assert_close(net[0].running_mean, wanted_mean)
    torch.testing.assert_close(net[0].running_var, wanted_var)
    assert (net[0].momentum, net[2].momentum, int(net[0].num_batches_tracked)) == (0.2, 0.1, 3)
    # The second layer sees what the first passes on while it is being measured.
    normed = [
        (b - b.mean((0, 2, 3), keepdim=True)) / (b.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        for (b,) in batches
    ]
    with torch.no_grad():
        torch.testing.assert_close(
            net[2].running_mean, torch.stack([net[1](b).mean((0, 2, 3)) for b in normed]).mean(0)
        )


def test_nothing_else_changes() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.Conv2d(3, 2, 1), nn.InstanceNorm2d(2)).double()
    net[0].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random = torch.get_rng_state()
    reestimate(net, Calibration.of(data(4, 4)))
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    assert [m.training for m in net] == [False, True, True, True]
    assert torch.equal(random, torch.get_rng_state())


def test_modes_and_momenta_come_back_after_a_failure() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, momentum=0.2), nn.Linear(9, 9)).double()
    with pytest.raises(RuntimeError):
        reestimate(net, Calibration.of(data(4)))
    assert net[0].momentum == 0.2
    assert net.training


def test_layers_that_hold_statistics() -> None:
    net = nn.Sequential(
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm1d(3),
        nn.LayerNorm(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
    )
    assert batch_norms(net) == [net[0], net[4]]
    program = sc.apply(build("residual"), *plan_and_form())
    assert len(batch_norms(program)) == len(batch_norms(build("residual")))


def plan_and_form() -> tuple[Any, str]:
    from tests.helpers.traces import traced
    from tests.targets.units.plans import random_plan

    return random_plan(traced("residual")), "graph"


def test_the_rest_of_a_loader_is_left_out_if_it_is_a_single_sample() -> None:
    """PyTorch refuses one value a channel, and a single map would weigh as much as a whole batch."""
    net, same = (nn.Sequential(nn.BatchNorm1d(3)).double() for _ in range(2))
    batches = data(4, 6, 1, shape=(3,))
    reestimate(net, Calibration.of(batches))
    reestimate(same, Calibration.of(batches[:2]))
    assert torch.equal(net[0].running_mean, same[0].running_mean)
    assert torch.equal(net[0].running_var, same[0].running_var)


def test_single_samples_only() -> None:
    maps = nn.Sequential(nn.BatchNorm2d(3)).double()
    batches = data(1, 1)
    reestimate(maps, Calibration.of(batches))
    torch.testing.assert_close(maps[0].running_mean, torch.cat([b for (b,) in batches]).mean((0, 2, 3)))
    vectors = nn.Sequential(nn.BatchNorm1d(3, momentum=0.2)).double()
    with pytest.raises(
        sc.CalibrationError, match="expected more than one value a channel in a batch, got one"
    ):
        reestimate(vectors, Calibration.of(data(1, 1, shape=(3,))))
    assert vectors[0].momentum == 0.2
