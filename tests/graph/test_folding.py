"""Weights computed from parameters: folded where removal would change what is left of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import secateur as sc
from secateur.graph.folding import foldable, folded
from tests.targets.units.plans import random_plan


class Standardised(nn.Conv2d):
    """A convolution with a standardised kernel."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        kernel = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PaddedFirst(Standardised):
    """The same, with an input that is padded first: no layer of PyTorch's does that."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Doubled(nn.Module):
    """A parametrization that follows its parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def doubled(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Doubled())


KINDS: dict[str, tuple[type[nn.Conv2d], Callable[[nn.Module], nn.Module]]] = {
    "weight_norm": (nn.Conv2d, parametrizations.weight_norm),
    "spectral_norm": (nn.Conv2d, parametrizations.spectral_norm),
    "older weight_norm": (nn.Conv2d, nn.utils.weight_norm),
    "older spectral_norm": (nn.Conv2d, nn.utils.spectral_norm),
    "standardised": (Standardised, lambda layer: layer),
}


def network(kind: str) -> nn.Sequential:
    layer, change = KINDS[kind]
    torch.manual_seed(0)
    sizes = [(3, 8), (8, 6), (6, 2)]
    layers = [change(layer(i, o, 3, padding=1)) for i, o in sizes]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).double().eval()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_exact(kind: str) -> None:
    model, x = network(kind), torch.randn(2, 3, 6, 6).double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wanted = model(x)
    graph = sc.trace(model, x)
    assert [(group.name, group.size, group.exact) for group in graph.groups] == [
        ("0", 8, True),
        ("2", 6, True),
    ]
    assert graph.folded == ("0.weight", "2.weight", "4.weight")
    torch.testing.assert_close(folded(model, graph.folded)(x), wanted)
    plan = sc.Plan.from_json(random_plan(graph).to_json())
    small = sc.apply(model, plan, "module", graph=graph)
    torch.testing.assert_close(small(x), sc.apply(model, plan, "masked")(x))
    assert sc.verify(model, small, plan, x).difference <= 1e-9
    assert type(small[0]) is nn.Conv2d
    assert set(small[0].state_dict()) == {"weight", "bias"}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(x), wanted)


def test_a_pruned_model_with_folded_weights_is_loaded(tmp_path: object) -> None:
    model, x = network("weight_norm"), torch.randn(2, 3, 6, 6).double()
    small = sc.apply(model, random_plan(sc.trace(model, x)))
    loaded = sc.load(sc.save(small, str(tmp_path) + "/small"), lambda: network("weight_norm"))
    assert torch.equal(loaded(x), small(x))


def test_what_follows_its_parameters_stays() -> None:
    model = nn.Sequential(doubled(nn.Linear(3, 8)), nn.ReLU(), doubled(nn.Linear(8, 2)))
    assert foldable(model) == ()
    assert folded(model, ()) is model
    assert foldable(nn.Sequential(nn.Linear(3, 8), PaddedFirst(3, 4, 3))) == ()


def test_one_of_two_computed_weights() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 4))
    parametrize.register_parametrization(layer, "bias", Doubled())
    x = torch.randn(2, 3)
    same = folded(layer, foldable(layer))
    assert foldable(layer) == ("weight",)
    assert parametrize.is_parametrized(same, "bias")
    assert not parametrize.is_parametrized(same, "weight")
    assert parametrize.is_parametrized(layer, "weight")
    torch.testing.assert_close(same(x), layer(x))
