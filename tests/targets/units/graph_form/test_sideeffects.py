"""What no captured program can hold: random numbers that are not PyTorch's, and gradients of one's own."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secateur as sc
from secateur.targets.units.graph_form.sideeffects import side_effects_of
from tests.targets.units.plans import random_plan

OWN = random.Random(3)
GENERATOR = np.random.default_rng(3)


class Net(nn.Module):
    """Two layers; what happens to the values in between is up to `between`."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 16), nn.Linear(16, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.between(self, self.a(x)).relu())


def made(between: Callable[[nn.Module, Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(between).eval(), torch.randn(4, 6)


def as_graph(model: nn.Module, x: Tensor) -> nn.Module:
    graph = sc.trace(model, x)
    return sc.apply(model, random_plan(graph), "graph", graph=graph)


def _reseeded(model: nn.Module, h: Tensor) -> Tensor:
    np.random.seed(0)  # noqa: NPY002
    return h * float(np.random.rand())  # noqa: NPY002


DRAWS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "python": lambda model, h: h * random.uniform(0.5, 1.5),
    "choice": lambda model, h: h * random.choice([0.5, 1.5]),
    "order": lambda model, h: h[random.sample(range(len(h)), len(h))],
    "branch": lambda model, h: h + 1 if random.random() < 1e-9 else h,
    "numpy": lambda model, h: h * float(np.random.rand()),  # noqa: NPY002
    "own": lambda model, h: h * OWN.random(),
    "generator": lambda model, h: h * float(GENERATOR.random()),
    "fresh": lambda model, h: h * float(np.random.default_rng().random()),
}
REPEATABLE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "torch": lambda model, h: h * torch.rand(()),
    "seeded": lambda model, h: h * random.Random(0).random(),
    "reseeded": _reseeded,
    "training only": lambda model, h: h * random.random() if model.training else h,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_program_would_hold_one_draw_for_ever(draw: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = made(draw)
    with pytest.raises(sc.ApplyError, match=r"random numbers are PyTorch's.*would repeat one draw"):
        as_graph(model, x)


@pytest.mark.parametrize("draw", REPEATABLE.values(), ids=REPEATABLE)
def test_what_evaluation_computes_anew_or_always_alike_is_no_such_draw(
    draw: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    model, x = made(draw)
    small = as_graph(model, x)
    torch.manual_seed(1)
    first = small(x)
    torch.manual_seed(1)
    assert torch.equal(small(x), first)


@pytest.mark.parametrize("name", ["python", "numpy", "branch", "fresh"])
def test_a_program_does_not_train_where_training_draws(name: str) -> None:
    model, x = made(lambda model, h: DRAWS[name](model, h) if model.training else h)
    small = as_graph(model, x)
    with pytest.raises(sc.ApplyError, match="random numbers"):
        small.train()


def test_auto_does_not_return_such_a_program_either() -> None:
    model, x = made(lambda model, h: h * float(np.random.rand()) + _sixteen())  # noqa: NPY002
    graph = sc.trace(model, x)
    with pytest.raises(sc.ApplyError, match=r"got neither\..*NumPy.*on_unrealisable='leave'") as caught:
        sc.apply(model, random_plan(graph), graph=graph)
    assert len(str(caught.value)) <= 600


def _last(model: nn.Module, h: Tensor) -> Tensor:
    before, model.last = getattr(model, "last", None), h.detach()
    return h if before is None else h + before


def _nested(model: nn.Module, h: Tensor) -> Tensor:
    model.o.seen = [*getattr(model.o, "seen", []), h.detach()]
    return h / len(model.o.seen)  # type: ignore[arg-type]


def _counted(model: nn.Module, h: Tensor) -> Tensor:
    model.calls = getattr(model, "calls", 0) + 1
    return h if model.calls < 2 else h.tanh()  # type: ignore[operator]


def _cached(model: nn.Module, h: Tensor) -> Tensor:
    if getattr(model, "table", None) is None:
        model.table = torch.linspace(0, 1, 4)[:, None]
    return h * model.table  # type: ignore[operator]


@pytest.mark.parametrize("keep", [_last, _nested, _counted])
def test_a_program_keeps_nothing_for_the_next_call(keep: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = made(keep)
    with pytest.raises(sc.ApplyError, match=r"something else at the second call \(it sets (o\.)?\w+\)"):
        as_graph(model, x)
    graph = sc.trace(model, x)
    small, masked = (sc.apply(model, random_plan(graph), form, graph=graph) for form in ("auto", "masked"))  # type: ignore[arg-type]
    for _ in range(3):
        torch.testing.assert_close(small(x), masked(x))
    model, x = made(lambda model, h: keep(model, h) if model.training else h)
    with pytest.raises(sc.ApplyError, match="second call"):
        as_graph(model, x).train()


def _averaged(model: nn.Module, h: Tensor) -> Tensor:
    if model.training:
        with torch.no_grad():
            model.o.bias.mul_(0.5)  # type: ignore[operator, union-attr]
    return h


@pytest.mark.parametrize("keep", [_cached, _averaged])
def test_what_gives_the_same_at_each_call_is_no_state(keep: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = made(keep)
    as_graph(model, x)


def _sixteen() -> Tensor:
    return torch.tensor(range(16)) / 16  # a table that no module can shorten


def test_nothing_moves_the_users_random_numbers() -> None:
    model, x = made(DRAWS["python"])
    sc.trace(model, x)  # imports draw names of files
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    graph = sc.trace(model, x)
    sc.apply(model, random_plan(graph), graph=graph)
    side_effects_of(model, ((x,), {}), training=True)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]  # noqa: NPY002


def _hooked(model: nn.Module, h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 3)
    return h


def _node_hooked(model: nn.Module, h: Tensor) -> Tensor:
    if h.grad_fn is not None:
        h.grad_fn.register_prehook(lambda gradients: tuple(g * 3 for g in gradients))
    return h


def _saved(model: nn.Module, h: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 3, lambda t: t):
        return h * h


def _module_hooked(model: nn.Module, h: Tensor) -> Tensor:
    handle = model.o.register_full_backward_hook(lambda module, grads, _: tuple(g * 3 for g in grads))
    try:
        return h + model.o(h).sum()
    finally:
        handle.remove()


class _Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 3


GRADIENTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "tensor": _hooked,
    "node": _node_hooked,
    "saved": _saved,
    "module": _module_hooked,
    "function": lambda model, h: _Tripled.apply(h),  # type: ignore[no-untyped-call]
    "training": lambda model, h: _hooked(model, h) if model.training else h,
}


@pytest.mark.parametrize("change", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_that_a_program_does_not_hold_are_refused(
    change: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    asks = "asks torch.is_grad_enabled"  # known before there is a program
    seen = r"PyTorch's own gradients.*test_sideeffects\.py:\d+"
    with pytest.raises(sc.ApplyError, match=f"({asks}|{seen}).*form 'module'"):
        as_graph(*made(change))(torch.randn(4, 6)).sum().backward()


@pytest.mark.parametrize("pre", [False, True])
def test_hooks_of_modules_are_seen(pre: bool) -> None:
    model, x = made(lambda model, h: h)
    if pre:
        model.a.register_full_backward_pre_hook(lambda module, grads: tuple(g * 3 for g in grads))
    else:
        model.o.register_full_backward_hook(lambda module, grads, _: tuple(g * 3 for g in grads))
    small = as_graph(model, x)
    with pytest.raises(sc.ApplyError, match="a hook changes gradients"):
        small(x).sum().backward()


def test_hooks_of_parameters_are_seen() -> None:
    model, x = made(lambda model, h: h)
    model.o.weight.register_hook(lambda gradient: gradient * 3)
    small = as_graph(model, x)
    with pytest.raises(sc.ApplyError, match=r"a hook changes the gradient of o\.weight"):
        small(x).sum().backward()


PLAIN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "checkpoint": lambda model, h: checkpoint(torch.sin, h, use_reentrant=False),
    "nothing": lambda model, h: h,
}


@pytest.mark.parametrize("change", PLAIN.values(), ids=PLAIN)
def test_pytorchs_own_hooks_keep_gradients(change: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = made(change)
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    found = []
    for form in ("module", "graph"):
        small = sc.apply(model, plan, form, graph=graph)  # type: ignore[arg-type]
        small(x).sum().backward()
        found.append(small.get_parameter("a.weight").grad)
    torch.testing.assert_close(*found)
