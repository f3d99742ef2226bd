"""`sc.recover`: the loss as the formula says, learning, masks, and what is refused."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import Batch
from tests.graph.test_trace import assert_same, state_of
from tests.helpers.models import build
from tests.targets.units.plans import random_plan

MODULE = importlib.import_module("secateur.pipeline.recover")


def data(batches: int = 4, *, labels: bool = True) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    dense, found = build("mlp"), []
    for _ in range(batches):
        x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            found.append((x, dense(x).argmax(1)) if labels else (x,))
    return found


@functools.cache
def pruned(form: str = "module") -> tuple[nn.Module, nn.Module]:
    dense = build("mlp")
    graph = sc.trace(dense, torch.zeros(2, 6, dtype=torch.float64))
    return dense, sc.apply(dense, random_plan(graph, 0.3), form, graph=graph)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("form", ["module", "graph", "masked"])
def test_the_measure_falls_and_inputs_are_left_alone(form: str, labels: bool) -> None:
    dense, small = pruned(form)
    before, teacher, random = state_of(small), state_of(dense), torch.get_rng_state()
    tuned = sc.recover(small, dense, data(labels=labels), epochs=6, learning_rate=0.05)
    assert_same(before, state_of(small))
    assert_same(teacher, state_of(dense))
    assert torch.equal(random, torch.get_rng_state())
    ours, theirs = (sc.evaluate(m, data(labels=labels), dense=dense).loss for m in (tuned, small))
    assert ours < theirs
    assert tuned.training == small.training
    assert sc.record_of(tuned) == sc.record_of(small)
    again = sc.recover(small, dense, data(labels=labels), epochs=6, learning_rate=0.05)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tuned.state_dict().items())


def test_masks_stay() -> None:
    dense, small = pruned("masked")
    zeros = {k: v == 0 for k, v in small.named_parameters() if v.ndim > 1}
    assert any(z.any() for z in zeros.values())
    tuned = dict(sc.recover(small, dense, data(), epochs=1).named_parameters())
    for name, zero in zeros.items():
        assert (tuned[name][zero] == 0).all()
        assert not torch.equal(tuned[name], dict(small.named_parameters())[name])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_hintons(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 4).double(), nn.Linear(3, 4).double()
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    got = MODULE._Objective(teacher, 0.7, temperature, None)(student, Batch.of((x, labels)))
    wanted = 0.0
    for row, label in zip(x, labels, strict=True):
        q, p = (m(row).detach() for m in (student, teacher))
        ours, theirs = ((z / temperature).exp() for z in (q, p))
        ours, theirs = ours / ours.sum(), theirs / theirs.sum()
        kl = sum(float(t) * math.log(float(t) / float(o)) for t, o in zip(theirs, ours, strict=True))
        task = math.log(sum(math.exp(float(v)) for v in q)) - float(q[label])
        wanted += (0.7 * temperature**2 * kl + 0.3 * task) / len(x)
    assert float(got.detach()) == pytest.approx(wanted, rel=1e-12)


def test_labels_alone_a_loss_of_ones_own_and_an_optimizer() -> None:
    _, small = pruned()
    seen: list[float] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        loss = model(batch[0]).square().mean()
        seen.append(float(loss.detach()))
        return loss

    sc.recover(small, None, data(), epochs=5, loss_fn=loss_fn, optimizer=lambda p: torch.optim.Adam(p, 0.01))
    assert len(seen) == 20
    assert seen[-1] < seen[0]
    tuned = sc.recover(small, None, data(), epochs=8, learning_rate=0.1)
    assert sc.evaluate(tuned, data()).loss < sc.evaluate(small, data()).loss


def loss_through(model: Any, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])


def test_a_loss_of_ones_own_and_the_teacher_share_one_call_of_the_model() -> None:
    dense = build("residual")
    graph = sc.trace(dense, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    small = sc.apply(dense, random_plan(graph, 0.3), graph=graph)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 3, 8, 8, generator=generator, dtype=torch.float64)
    given = [(images, torch.arange(16) % 5) for images in x]
    own = sc.recover(small, dense, given, epochs=1, loss_fn=loss_through)
    assert own.norm1.num_batches_tracked == small.norm1.num_batches_tracked + 3
    default = sc.recover(small, dense, given, epochs=1)
    assert all(torch.equal(v, default.state_dict()[k]) for k, v in own.state_dict().items())

    def on_other_inputs(model: Any, batch: Any) -> Tensor:
        return loss_through(model, (batch[0] + 1, batch[1]))

    other = sc.recover(small, dense, given, epochs=1, loss_fn=on_other_inputs)
    assert other.norm1.num_batches_tracked == small.norm1.num_batches_tracked + 6
    assert not other._forward_hooks


def test_a_shuffling_loader_shuffles_anew_in_each_epoch() -> None:
    _, small = pruned()
    seen: list[float] = []

    def loss_fn(model: Any, batch: Any) -> Tensor:
        seen.extend(batch[:, 0].tolist())
        return model(batch).square().mean()

    rows = torch.cat([x for x, *_ in data()])
    loader = torch.utils.data.DataLoader(rows, 16, shuffle=True)  # type: ignore[arg-type]
    sc.recover(small, None, loader, epochs=2, loss_fn=loss_fn)
    first, second = seen[: len(rows)], seen[len(rows) :]
    assert first != second
    assert sorted(first) == sorted(second) == sorted(rows[:, 0].tolist())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_a_teacher_elsewhere_is_copied_to_where_the_model_is() -> None:
    dense, small = pruned()
    near = sc.recover(small, dense, data(), epochs=1)
    moved = sc.recover(sc.repair(small, dense, data(), None).cuda(), dense, data(), epochs=1)
    assert {p.device.type for p in dense.parameters()} == {"cpu"}
    assert {p.device.type for p in moved.parameters()} == {"cuda"}
    for name, tensor in near.state_dict().items():
        torch.testing.assert_close(moved.state_dict()[name].cpu(), tensor)


def test_refusals() -> None:
    dense, small = pruned()
    for settings, message in (
        ({"epochs": 0}, "expected epochs of at least 1, got 0"),
        ({"distill": 1.5}, r"expected distill of a share in \[0, 1\], got 1.5"),
        ({"temperature": 0}, "expected temperature of a number above 0"),
    ):
        with pytest.raises(sc.SettingError, match=message):
            sc.recover(small, dense, data(), **settings)
    with pytest.raises(sc.ArtefactError, match=r"secateur\.apply returned"):
        sc.recover(dense, dense, data())
    with pytest.raises(sc.CalibrationError, match="expected labels, got none"):
        sc.recover(small, None, data(labels=False))
    with pytest.raises(sc.CalibrationError, match="expected a finite loss"):
        sc.recover(small, dense, data(), learning_rate=1e30, epochs=3)
    with pytest.raises(sc.CalibrationError, match="logits of one shape"):
        sc.recover(small, nn.Linear(6, 2).double(), data())
