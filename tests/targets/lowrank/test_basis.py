"""The directions of a layer are the best ones, and what goes is the error: against a slow reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.targets.lowrank import basis as basis_module
from secateur.targets.lowrank.basis import Basis, bases, basis_of_weight
from secateur.targets.lowrank.factorise import factorise
from secateur.targets.lowrank.pair import LowRank, matrix_of, pairs_of
from tests.targets.lowrank.models import LAYERS, batches, several


def measured(layer: nn.Module, x: Tensor) -> Basis:
    data = sc.Calibration.of([x], model=layer)
    model = nn.Sequential(layer)
    return bases(model, {"0": layer}, data)["0"]


def made(out: int, into: int, *, bias: bool, reached: int, seed: int) -> tuple[nn.Linear, Tensor]:
    """A layer, and inputs with a mean that vary along `reached` directions alone. [50, into]"""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(into, out, bias=bias).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator))
    spread = torch.randn(reached, into, dtype=torch.float64, generator=generator)
    x = torch.randn(50, reached, dtype=torch.float64, generator=generator) @ spread
    return layer, x + (1.0 if bias else 0.0)


def best_errors(layer: nn.Linear, x: Tensor) -> Tensor:
    """Literally: the squared singular values of W C^(1/2), by the eigenvalues of C. [min(in, out)]"""
    if layer.bias is not None:
        x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    return torch.linalg.svdvals(layer.weight.detach() @ root).square()


@given(
    out=st.integers(2, 9),
    into=st.integers(2, 9),
    bias=st.booleans(),
    share=st.sampled_from([0.4, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_the_error_of_a_rank_is_the_sum_of_the_squares_behind_it(
    out: int, into: int, bias: bool, share: float, seed: int
) -> None:
    layer, x = made(out, into, bias=bias, reached=max(1, int(share * into)), seed=seed)
    found, wanted = measured(layer, x), best_errors(layer, x)
    # Damping orders what the data do not reach, and changes what they do by less than its own size.
    assert torch.allclose(found.energy, wanted, rtol=1e-2, atol=2e-3 * float(wanted.sum()))
    y = layer(x).detach()
    pair = factorise(nn.Sequential(layer, nn.Identity()), [x], progress=False)[0] if out * into > 12 else None
    for rank in range(1, min(out, into) + 1):
        u = found.directions[:, :rank]
        kept = x @ layer.weight.detach().T - (0 if found.mean is None else found.mean)
        error = (y - (kept @ u @ u.T + (0 if found.mean is None else found.mean))
                 - (0 if layer.bias is None else layer.bias.detach())).square().sum(1).mean()  # fmt: skip
        tail = found.energy[rank:].sum() + found.energy.new_tensor(0.0)
        assert float(error) == pytest.approx(float(tail), rel=1e-9, abs=1e-9 * float(wanted.sum()))
        assert float(error) >= float(wanted[rank:].sum()) - 1e-9 * float(wanted.sum())
        if isinstance(pair, LowRank):
            inner = pair[0](x).detach().clone()
            inner[:, rank:] = 0
            left = (pair[1](inner).detach() - y).square().sum(1).mean()
            assert float(left) == pytest.approx(float(tail), rel=1e-9, abs=1e-9 * float(wanted.sum()))


@pytest.mark.parametrize(("out", "into"), [(6, 9), (9, 6)])
def test_singular_moments_still_span_the_weight(out: int, into: int) -> None:
    """Inputs that vary along one direction: all others are ordered by the weight, and none is lost."""
    layer, x = made(out, into, bias=False, reached=1, seed=3)
    found = measured(layer, x)
    u, weight = found.directions, layer.weight.detach()
    assert torch.allclose(u.T @ u, torch.eye(min(out, into), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(u @ u.T @ weight, weight, atol=1e-12)
    assert float(found.energy[1:].sum()) < 1e-3 * float(found.energy[0])
    sizes = (u.T @ weight).square().sum(1)[1:]
    assert (sizes.diff() <= 1e-9).all()


def test_without_data_it_is_the_plain_decomposition() -> None:
    layer, _ = made(6, 9, bias=True, reached=9, seed=0)
    found = basis_of_weight(layer)
    wanted = torch.linalg.svdvals(layer.weight.detach()).square()
    assert torch.allclose(found.energy, wanted)


def test_what_a_factorised_model_computes() -> None:
    model = several()
    pairs = factorise(model, batches(), progress=False)
    assert (*pairs_of(pairs),) == LAYERS
    for x in batches():
        assert float((pairs(x) - model(x)).detach().abs().max()) < 1e-13
    assert all(pair.rank == min(matrix_of(pair).shape) for pair in pairs_of(pairs).values())


def test_the_mean_is_in_the_bias() -> None:
    """Inputs that hardly vary: with a bias, one direction is as good as none is lost."""
    torch.manual_seed(0)
    x = 5 + 1e-3 * torch.randn(40, 8, dtype=torch.float64)
    layer = nn.Linear(8, 8).double()
    pair = factorise(nn.Sequential(layer, nn.Identity()), [x], progress=False)[0]
    with torch.no_grad():
        pair[0].weight[1:] = 0
        pair[0].bias[1:] = 0
    with torch.no_grad():
        assert float((pair(x) - layer(x)).square().mean()) < 1e-6 * float(layer(x).square().mean())


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            found: Tensor = self.layer(x)
            return found

    model = Rows().double()
    x, mask = torch.randn(4, 5, 6, dtype=torch.float64), torch.ones(4, 5, dtype=torch.long)
    mask[:, 3:] = 0
    spoiled = torch.where(mask[..., None] == 0, 100.0, x)
    one, other = (
        bases(
            model, {"layer": model.layer}, sc.Calibration.of([{"x": v, "attention_mask": mask}], model=model)
        )
        for v in (x, spoiled)
    )
    assert torch.equal(one["layer"].energy, other["layer"].energy)


def test_the_data_are_read_in_rounds_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = several()
    layers = {path: model.get_submodule(path) for path in LAYERS}
    data = sc.Calibration.of(batches(), model=model)
    whole = bases(model, layers, data)
    monkeypatch.setattr(basis_module, "MEMORY", 8 * 12**2)
    parts = bases(model, layers, data)
    assert [*parts] == [*whole]
    assert all(torch.equal(parts[path].energy, whole[path].energy) for path in layers)


def test_batches_may_be_cut_in_any_way() -> None:
    model = several()
    layers = {path: model.get_submodule(path) for path in LAYERS}
    one, other = (
        bases(model, layers, sc.Calibration.of(data, model=model))
        for data in ([torch.cat(batches())], batches())
    )
    for path in layers:
        assert np.allclose(one[path].energy.numpy(), other[path].energy.numpy(), rtol=1e-9, atol=1e-12)


def test_the_model_is_left_as_it_was() -> None:
    model = several().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factorise(model, batches(), progress=False)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def shared() -> tuple[nn.Module, dict[str, str]]:
    model: Any = several()
    model.head.weight = nn.Parameter(torch.randn(5, 12, dtype=torch.float64))
    model.other = nn.Linear(12, 5).double()
    model.other.weight = model.head.weight
    return model, {"head": "shared with other.weight"}


def shared_bias() -> tuple[nn.Module, dict[str, str]]:
    model: Any = several()
    model.other = nn.Linear(12, 24).double()
    model.other.bias = model.up.bias
    return model, {"up": "its bias is shared with other.bias"}


def hooked() -> tuple[nn.Module, dict[str, str]]:
    model: Any = several()
    model.up.register_forward_hook(lambda module, args, output: output + 1)
    return model, {"up": "hooks"}


def own_class() -> tuple[nn.Module, dict[str, str]]:
    class Mine(nn.Linear):
        pass

    model: Any = several()
    model.up = Mine(12, 24).double()
    return model, {"up": "class of its own"}


def normed() -> tuple[nn.Module, dict[str, str]]:
    model: Any = several()
    nn.utils.parametrizations.weight_norm(model.up)
    return model, {"up": "ParametrizedLinear is a class of its own"}


def twice() -> tuple[nn.Module, dict[str, str]]:
    model: Any = several()
    model.again = model.up
    return model, {"up": "it is also again"}


def tiny() -> tuple[nn.Module, dict[str, str]]:
    model: Any = several()
    model.head = nn.Linear(12, 1).double()
    return model, {"head": "too small"}


def held() -> tuple[nn.Module, dict[str, str]]:
    model: Any = several()
    model.layers = [model.up]
    model.call = model.head.forward
    return model, {"up": "it is also layers", "head": "it is also call"}


def marked() -> tuple[nn.Module, dict[str, str]]:
    model: Any = several()
    model.up.scale = 2.0
    return model, {"up": "attributes of its own: scale"}


@pytest.mark.parametrize("make", [shared, shared_bias, hooked, own_class, normed, twice, tiny, held, marked])
def test_layers_that_stay_one_say_why(make: Callable[[], tuple[nn.Module, dict[str, str]]]) -> None:
    from secateur.targets.lowrank.layers import replaceable

    model, wanted = make()
    layers, reasons = replaceable(model)
    assert not layers.keys() & wanted.keys()
    for path, why in wanted.items():
        assert why in reasons[path]
    pairs = factorise(model, batches(), progress=False)
    assert not pairs_of(pairs).keys() & wanted.keys()
    for x in batches(1):
        assert float((pairs(x) - model(x)).detach().abs().max()) < 1e-12


def test_a_layer_that_no_data_reach_stays_one() -> None:
    model: Any = several()
    model.unused = nn.Linear(12, 12).double()
    assert "unused" not in pairs_of(factorise(model, batches(), progress=False))


def test_what_has_no_such_layer_is_refused() -> None:
    with pytest.raises(sc.NothingToPruneError, match=r"factorise: expected .* got none.* too small"):
        factorise(nn.Sequential(nn.Linear(3, 1), nn.ReLU()), [torch.randn(4, 3)], progress=False)


def test_inputs_that_are_not_finite_are_refused() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x / 0)
            return found

    with pytest.raises(sc.CalibrationError, match="factorise: expected finite inputs of layer"):
        factorise(Broken(), [torch.randn(4, 6)], progress=False)


def test_layers_called_by_name_are_measured() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 9)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(input=x)
            return found

    model, data = Named(), [torch.randn(8, 6)]
    pairs = factorise(model, data, progress=False)
    assert torch.allclose(pairs(data[0]), model(data[0]), atol=1e-5)


@pytest.mark.parametrize("asks", ["kind", "attribute"])
def test_code_that_asks_what_its_layers_are_is_refused(asks: str) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(x)
            if asks == "kind":
                return found if isinstance(self.layer, nn.Conv2d) else 2 * found
            return found * self.layer.groups

    with pytest.raises(sc.CaptureError, match="factorise: expected the model to compute the same"):
        factorise(Asks(), [torch.randn(4, 6, 3, 3)], progress=False)


def test_a_model_of_low_rank_is_refused() -> None:
    small = sc.prune(several(), batches(), sc.Budget(params=0.8), "uniform", "rank", progress=False).model
    with pytest.raises(sc.NothingToPruneError, match="of low rank already"):
        factorise(small, batches(), progress=False)
