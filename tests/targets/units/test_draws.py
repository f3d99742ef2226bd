"""Forward passes that draw: two runs get the same numbers, also where one of them draws smaller tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.targets.units.draws import Draws, NoDraws

BY_SHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: torch.rand(x.shape),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(*x.shape),
    "randn_like": torch.randn_like,
    "randint": lambda x: torch.randint(100, x.shape),
    "randint_like": lambda x: torch.randint_like(x, 5, 90),
    "normal": lambda x: torch.normal(0.0, 2.0, x.shape),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 3),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.1),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.5),
    "own generator": lambda x: torch.rand(x.shape, generator=torch.Generator()),
}
"""What depends on the shape alone."""

BY_VALUE: dict[str, Callable[[Tensor], Tensor]] = {
    "normal of a mean": lambda x: torch.normal(x, 0.5),
    "normal of a deviation": lambda x: torch.normal(0.0, x.abs() + 1),
    "normal of both": lambda x: torch.normal(x, x.abs() + 1),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(x.sigmoid()),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "feature_dropout": lambda x: F.dropout1d(x[:, :, None], 0.5, training=True)[..., 0],
    "sample": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    "layer of recurrent dropout": lambda x: F.dropout(torch.tanh(x), 0.3, training=True),
}
"""What also depends on values, elementwise."""

KEPT = torch.tensor([0, 2, 3])


@pytest.mark.parametrize("draw", [*BY_SHAPE.values(), *BY_VALUE.values()], ids=[*BY_SHAPE, *BY_VALUE])
def test_a_smaller_pass_draws_the_part_of_a_larger_one(draw: Callable[[Tensor], Tensor]) -> None:
    """And the pass that came first, run again, agrees with both."""
    large = torch.randn(64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws, found = Draws(), []
    for x in (large[:, KEPT], large, large[:, KEPT]):
        with draws.shared():
            found.append(draw(x))
    assert draws.narrowed
    assert not draws.unlike
    assert torch.equal(found[1][:, KEPT], found[2])
    assert len(found[2][:, 0].unique()) > 1, "constant along the other axis only"


@pytest.mark.parametrize("draw", [*BY_SHAPE.values(), *BY_VALUE.values()], ids=[*BY_SHAPE, *BY_VALUE])
def test_passes_of_one_size_draw_the_same(draw: Callable[[Tensor], Tensor]) -> None:
    x, draws, found = torch.randn(8, 5), Draws(seed=3), []
    for _ in range(2):
        with draws.shared():
            found.append(torch.stack([draw(x).double(), draw(x).double()]))
    assert torch.equal(found[0], found[1])
    assert not draws.narrowed
    with Draws(seed=4).shared():
        assert not torch.equal(found[0][0], draw(x).double()), "another seed, other numbers"


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.multinomial(x.softmax(-1), 2),
        lambda x: torch.poisson(x.exp()),
        lambda x: torch.distributions.Gamma(x.exp(), 1.0).sample(),
        lambda x: F.rrelu(x, training=True),
        lambda x: torch.distributions.Dirichlet(x.exp()).sample(),
    ],
    ids=["multinomial", "poisson", "gamma", "rrelu", "dirichlet"],
)
def test_what_depends_on_values_in_other_ways_needs_one_size(draw: Callable[[Tensor], Tensor]) -> None:
    x, draws, found = torch.randn(8, 5), Draws(), []
    for _ in range(2):
        with draws.shared():
            found.append(draw(x))
    assert torch.equal(*found)
    assert not draws.unlike
    with draws.shared():
        draw(x[:, :3])
    assert "[8, 5]" in draws.unlike
    assert "[8, 3]" in draws.unlike


def test_another_number_or_order_of_draws_is_named() -> None:
    fewer, other = Draws(), Draws()
    for draws, second in ((fewer, 1), (other, 2)):
        for count in (2, second):
            with draws.shared():
                torch.rand(3) if count == 2 and not draws.count else torch.randn(3)
                for _ in range(count - 1):
                    torch.rand(3)
    assert fewer.unlike
    assert "rand" in other.unlike


def test_what_draws_nothing_counts_for_nothing() -> None:
    x, draws, lstm = torch.randn(2, 4, 3), Draws(), torch.nn.LSTM(3, 4, 2, dropout=0.5).eval()
    with draws.shared():
        F.scaled_dot_product_attention(x, x, x)
        F.dropout(x, 0.5, training=False)
        F.rrelu(x, training=False)
        lstm(x)
    assert draws.count == 0


@pytest.mark.parametrize("name", [name for name in (*BY_SHAPE, *BY_VALUE) if name != "own generator"])
def test_a_pass_that_is_not_watched_says_that_it_drew(name: str) -> None:
    """But from a generator of the model's own, from which both models draw the same if of one size."""
    draws = NoDraws(Draws())
    x = torch.randn(8, 5)
    with draws.shared(double=False):
        {**BY_SHAPE, **BY_VALUE}[name](x)
    assert draws.drew
    with draws.shared(double=False):
        x.relu()
    assert draws.drew  # once is enough


def test_a_pass_that_is_not_watched_and_draws_nothing_says_so() -> None:
    x, draws, before = torch.randn(2, 4, 3), NoDraws(Draws()), torch.get_rng_state()
    with draws.shared():
        F.dropout(F.scaled_dot_product_attention(x, x, x).float(), 0.5, training=False)
    assert not draws.drew
    assert torch.equal(before, torch.get_rng_state())


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="size"), Draws().shared():
        torch.rand(3) + torch.rand(2)
    assert torch.equal(before, torch.get_rng_state())


class OwnGenerator(nn.Module):
    """Adds noise from generators of its own to its units: one that it keeps, one that each call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)
        self.stream = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.a(x).relu()
        h = h + 0.1 * torch.randn(h.shape, generator=self.stream)
        h = h + torch.normal(0.0, 1.0, (16,), generator=self.stream)  # a size in the code
        h = h.clone().bernoulli_(0.5, generator=self.stream) * h
        y: Tensor = self.b(h)
        return y, self.b(x.new_zeros(16) + torch.rand(16, generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_units_pass_noise_from_a_generator_that_the_model_owns(form: Any) -> None:
    """And no call moves the user's own generator; the smaller model draws anew in each pass."""
    model = OwnGenerator().eval()
    before = model.stream.get_state()
    data = [(torch.randn(8, 6), torch.arange(8) % 3)] * 2
    graph = sc.trace(model, data[0][0])
    assert [group.name for group in graph.groups] == ["a"]
    plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, data, ("magnitude", "wasserstein")))
    small = sc.apply(model, plan, form, graph=graph)
    assert sc.verify(model, small, plan).difference <= 1e-9
    assert torch.equal(model.stream.get_state(), before)
    (one, made), (two, made_anew) = small(data[0][0]), small(data[0][0])
    assert not torch.equal(one, two)
    assert torch.equal(made, made_anew)
    assert torch.equal(model.stream.get_state(), before)
