"""The three forms: what each keeps of the model, and when each is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.targets.units.compare import relative_difference, run
from tests.graph.test_trace import assert_same, state_of
from tests.graph.tiny import Calls
from tests.helpers.models import TOPOLOGIES, build, randomise
from tests.helpers.traces import dense, traced
from tests.targets.units.plans import plan_of, random_plan
from tests.targets.units.test_equality import outputs

FORMS = ("module", "graph", "masked")


@pytest.mark.parametrize("form", FORMS)
def test_the_dense_model_is_left_as_it_was(form: str) -> None:
    model = build("residual")
    graph = sc.trace(model, TOPOLOGIES["residual"].inputs(3, torch.float64))
    plan = random_plan(graph)
    before = state_of(model)
    small = sc.apply(model, plan, form, graph=graph)
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.zero_()
    assert_same(before, state_of(model))


@pytest.mark.parametrize("form", FORMS)
def test_modes_frozen_parameters_and_dtype_come_along(form: str) -> None:
    model = build("residual", torch.float32)
    graph = sc.trace(model, TOPOLOGIES["residual"].inputs(3))
    plan = random_plan(graph)
    model.train()
    model.norm1.eval()  # as when fine-tuning with frozen statistics
    model.head.requires_grad_(False)
    small = sc.apply(model, plan, form, graph=graph)
    assert small.training
    assert not small.norm1.training
    assert small.norm2.training
    for name, parameter in model.named_parameters():
        assert small.get_parameter(name).requires_grad == parameter.requires_grad, name
        assert small.get_parameter(name).dtype == torch.float32
    assert not sc.apply(model.eval(), plan, form, graph=graph).training


def test_tied_parameters_stay_tied() -> None:
    model, graph = dense("tied_linear"), traced("tied_linear")
    plan = random_plan(graph)
    module, program = (sc.apply(model, plan, form, graph=graph) for form in ("module", "graph"))
    assert module.first.weight is module.second.weight
    assert sum(p.numel() for p in module.parameters()) == plan.predicted.params
    assert sum(p.numel() for p in program.parameters()) == plan.predicted.params
    assert program.get_parameter("first.weight") is program.get_parameter("second.weight")
    for small in (module, program):  # to change it changes both layers
        with torch.no_grad():
            small.get_parameter("first.weight").mul_(2)
    assert relative_difference(outputs(module, "tied_linear", 2), outputs(program, "tied_linear", 2)) <= 1e-9


def test_attributes_follow_their_tensors() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 12, 3, groups=6), nn.PReLU(12),
        nn.GroupNorm(6, 12), nn.ConvTranspose2d(12, 8, 2), nn.InstanceNorm2d(8, affine=True), nn.Flatten(),
        nn.Linear(200, 5), nn.Linear(5, 2),
    )  # fmt: skip
    graph = sc.trace(net, torch.zeros(2, 3, 6, 6))
    assert [(g.name, g.size) for g in graph.groups] == [("0", 6), ("5", 8), ("8", 5)]
    small = sc.apply(
        net, plan_of(graph, {g.name: np.arange(g.size) > 0 for g in graph.groups}), "module", graph=graph
    )
    assert (small[0].in_channels, small[0].out_channels, small[1].num_features) == (3, 5, 5)
    assert (small[2].in_channels, small[2].out_channels, small[2].groups) == (5, 10, 5)
    assert (small[3].num_parameters, small[4].num_channels, small[4].num_groups) == (10, 10, 5)
    assert (small[5].in_channels, small[5].out_channels, small[6].num_features) == (10, 7, 7)
    assert (small[8].in_features, small[8].out_features, small[9].in_features) == (175, 4, 4)
    assert (net[0].out_channels, net[2].groups, net[8].in_features) == (6, 6, 200)
    recurrent = nn.LSTM(3, 6, 2, batch_first=True, proj_size=4)
    net = Calls(lambda m, x: m.out(m.recurrent(x)[0]), recurrent=recurrent, out=nn.Linear(4, 2))
    graph = sc.trace(net, torch.zeros(2, 5, 3))
    small = sc.apply(net, random_plan(graph), "module", graph=graph)
    assert (small.recurrent.hidden_size, small.recurrent.proj_size, small.out.in_features) == (6, 3, 3)
    assert recurrent.proj_size == 4


def test_subclasses_keep_their_class_and_extras() -> None:
    class Scaled(nn.Linear):
        def __init__(self, into: int, out: int) -> None:
            super().__init__(into, out)
            self.note = ["mine"]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    net = nn.Sequential(Scaled(3, 4), nn.Linear(4, 2))
    graph = sc.trace(net, torch.zeros(2, 3))
    small = sc.apply(net, random_plan(graph), "module", graph=graph)
    assert type(small[0]) is Scaled
    assert small[0].note == ["mine"]
    assert small[0].note is not net[0].note
    assert small[0].out_features == 3


# Form graph


class NormAndActivation(nn.BatchNorm2d):
    """As timm has it: a batch norm with an activation, and more, inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act, self.gain = nn.PReLU(channels), nn.Parameter(torch.rand(channels, 1, 1))
        self.register_buffer("shift", torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x)) * self.gain + self.shift


def test_a_batch_norm_that_holds_more() -> None:
    net = (
        randomise(nn.Sequential(nn.Conv2d(3, 6, 1), NormAndActivation(6), nn.Conv2d(6, 2, 1))).double().eval()
    )
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    graph = sc.trace(net, x)
    plan = random_plan(graph)
    small = sc.apply(net, plan, "graph", graph=graph)
    assert relative_difference(run(small, (x,), {}), run(sc.apply(net, plan, "masked"), (x,), {})) <= 1e-9
    assert small.state_dict().keys() == net.state_dict().keys()


def test_batch_norm_settings_come_back() -> None:
    """Capture writes constants; the layers that training needs have to be what they were."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6, eps=0.5, momentum=None), nn.Conv2d(6, 5, 1),
        nn.BatchNorm2d(5, momentum=0.3, affine=False), nn.Conv2d(5, 2, 1),
        nn.BatchNorm2d(2, track_running_stats=False),
    )  # fmt: skip
    graph = sc.trace(net, torch.zeros(2, 3, 4, 4))
    small = sc.apply(net, plan_of(graph, {}), "graph", graph=graph)
    first, second = small.get_submodule("1"), small.get_submodule("3")
    assert (first.eps, first.momentum, second.momentum, second.weight) == (0.5, None, 0.3, None)
    x = torch.randn(4, 3, 4, 4)
    module = copy.deepcopy(net).train()
    for model in (module, small.train()):
        for _ in range(3):
            model(x)
    assert relative_difference(run(small, (x,), {}), run(module, (x,), {})) <= 1e-6


def test_a_norm_that_always_uses_the_batch() -> None:
    class Always(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.0, self.eps
            )

    net = nn.Sequential(nn.Conv2d(3, 6, 1), Always(6), nn.Conv2d(6, 2, 1)).double().eval()
    graph = sc.trace(net, torch.zeros(4, 3, 4, 4, dtype=torch.float64))
    plan = random_plan(graph)
    x = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    small, masked = (sc.apply(net, plan, form, graph=graph) for form in ("graph", "masked"))
    assert relative_difference(run(small, (x,), {}), run(masked, (x,), {})) <= 1e-9


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)]
)
def test_dropout_drops_when_training(layer: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 1), layer, nn.Conv2d(6, 2, 1))
    graph = sc.trace(net, torch.zeros(2, 3, 4, 4))
    small = sc.apply(net, plan_of(graph, {}), "graph", graph=graph)
    x = torch.randn(2, 3, 4, 4)
    results = []
    for model in (net, small):
        torch.manual_seed(0)
        results.append(model.train()(x))
    assert torch.equal(*results)
    assert not torch.equal(small(x), small(x))
    small.eval()
    assert torch.equal(small(x), small(x))


def test_the_program_has_the_models_names_and_class() -> None:
    model, graph = dense("residual"), traced("residual")
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    assert type(small).__name__ == "Residual"
    assert small.state_dict().keys() == model.state_dict().keys()
    assert [n for n, _ in small.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_dict_outputs_and_keyword_inputs_survive() -> None:
    model, graph = dense("dict_output"), traced("dict_output")
    small = sc.apply(model, random_plan(graph), "graph", graph=graph)
    out = small(*TOPOLOGIES["dict_output"].inputs(2, torch.float64))
    assert {k: tuple(v.shape) for k, v in out.items()} == {"features": (2, 6), "logits": (2, 5)}


def test_units_pass_through_regions_of_autocast() -> None:
    """The program computes such a region in autocast, as the module does."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = F.relu(m.b(F.relu(m.a(x))))
        with torch.autocast("cpu", torch.bfloat16):
            x = m.c(x)
        return m.e(F.relu(m.d(x.float())))

    net = Calls(
        forward, a=nn.Linear(3, 6), b=nn.Linear(6, 5), c=nn.Linear(5, 4), d=nn.Linear(4, 8), e=nn.Linear(8, 2)
    )
    graph = sc.trace(net, torch.zeros(2, 3))
    assert [g.name for g in graph.groups] == ["a", "b", "c", "d"]
    plan = random_plan(graph)
    module, program = (sc.apply(net, plan, form, graph=graph) for form in ("module", "graph"))
    for small in (module, program):
        assert sc.verify(net, small, plan).difference <= 1e-9
    x = torch.randn(4, 3)
    assert torch.equal(module(x), program(x))
    with torch.autocast("cpu", enabled=False):
        plain = module.c(F.relu(module.b(F.relu(module.a(x)))))
    assert not torch.equal(program(x), module.e(F.relu(module.d(plain))))


def test_constants_with_removed_positions_follow() -> None:
    class Constants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.plain = torch.rand(4)  # neither a parameter nor a buffer
            self.register_buffer("unsaved", torch.rand(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x) * self.plain + self.unsaved))

    net = Constants()
    graph = sc.trace(net, torch.zeros(2, 3))
    plan = random_plan(graph)
    for form in ("module", "graph"):
        small = sc.apply(net, plan, form, graph=graph)
        assert small.plain.shape == small.unsaved.shape == (3,)
        assert sc.verify(net, small, plan).difference <= 1e-9


# Form auto


def test_a_size_that_the_code_holds_is_mended_at_the_call() -> None:
    model, graph = dense("hard_coded_view"), traced("hard_coded_view")
    keep = {"conv1": np.arange(6) > 0, "conv2": np.arange(8) > 2, "hidden": np.arange(10) > 0}
    plan = plan_of(graph, keep)
    small = sc.apply(model, plan, graph=graph)
    record = sc.record_of(small)
    assert (record.form, record.captured) == ("module", ("",))
    assert "mended at the call: the model itself" in record.note
    assert type(small) is type(model)
    assert sc.verify(model, small, plan).difference <= 1e-9


def test_auto_takes_a_module_where_it_can() -> None:
    model, graph = dense("residual"), traced("residual")
    record = sc.record_of(sc.apply(model, random_plan(graph), graph=graph))
    assert (record.form, record.note, record.repairs) == ("module", "", ())


def test_a_size_attribute_is_found_and_updated() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.width = 4, 2
            self.q, self.k, self.v, self.out = (nn.Linear(3, 8) for _ in range(3)), None, None, None
            self.q, self.k, self.v = (nn.Linear(3, 8) for _ in range(3))
            self.out = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                f(x).view(x.shape[0], -1, self.heads, self.width).transpose(1, 2)
                for f in (self.q, self.k, self.v)
            )
            y = F.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).reshape(x.shape[0], -1, self.heads * self.width))

    net = Heads()
    graph = sc.trace(net, torch.zeros(2, 5, 3))
    assert [(g.name, g.size) for g in graph.groups] == [("q", 4)]
    plan = plan_of(graph, {"q": np.array([True, False, True, True])})
    small = sc.apply(net, plan, "module", graph=graph)
    assert (small.heads, small.width, net.heads) == (3, 2, 4)
    assert sc.record_of(small).sizes == {"heads": 3}
    assert sc.verify(net, small, plan).difference <= 1e-9


def test_a_plan_without_its_trace_is_traced_again() -> None:
    model, graph = dense("layer_norm"), traced("layer_norm", allow_inexact=True)
    plan = random_plan(graph)
    for form in ("module", "graph"):
        given, anew = sc.apply(model, plan, form, graph=graph), sc.apply(model, plan, form)
        for a, b in zip(outputs(given, "layer_norm", 2), outputs(anew, "layer_norm", 2), strict=True):
            assert torch.equal(a, b)


# Refusals


def test_unknown_settings() -> None:
    model, graph = dense("mlp"), traced("mlp")
    with pytest.raises(
        sc.SettingError, match=r"apply\(form='sliced'\): expected one of auto, module, graph, masked"
    ):
        sc.apply(model, random_plan(graph), "sliced")
    with pytest.raises(sc.SettingError, match=r"on_unrealisable='raise'"):
        sc.apply(model, random_plan(graph), on_unrealisable="raise")


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_for_another_model(form: str) -> None:
    with pytest.raises(sc.PlanError, match="expected the model it was made for"):
        sc.apply(dense("gated"), random_plan(traced("mlp")), form)


class Uncopyable:
    """Refuses to be copied in its own words."""

    def __deepcopy__(self, memo: object) -> object:
        """Refuses."""
        raise TypeError("one of a kind")


@pytest.mark.parametrize("form", ["module", "masked"])
def test_a_model_that_cannot_be_copied(form: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    graph = sc.trace(net, torch.zeros(2, 3))
    net.handle = Uncopyable()
    with pytest.raises(sc.ApplyError, match=r"to be copyable, got .*: one of a kind"):
        sc.apply(net, random_plan(graph), form, graph=graph)


@pytest.mark.parametrize("form", FORMS)
def test_the_record_survives_a_copy(form: str) -> None:
    model, graph = dense("mlp"), traced("mlp")
    plan = random_plan(graph)
    small = sc.apply(model, plan, form, graph=graph)
    from secateur.targets.units.copying import duplicate

    assert sc.record_of(duplicate(small)) == sc.record_of(small)
    assert sc.record_of(small).plan == plan
    assert sc.record_of(small).form == form


def test_a_model_of_other_origin_has_no_record() -> None:
    for thing in (nn.Linear(3, 2), torch.fx.symbolic_trace(nn.Linear(3, 2)), 3):
        with pytest.raises(
            sc.ArtefactError, match=r"expected a model that secateur\.apply returned, got a plain"
        ):
            sc.record_of(thing)


def test_masking_zeroes_what_consumes_and_nothing_else() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = sc.trace(net, torch.zeros(2, 3))
    masked = sc.apply(net, plan_of(graph, {"0": np.array([True, False, True, False])}), "masked")
    assert torch.equal(masked[0].weight, net[0].weight)
    assert torch.equal(masked[0].bias, net[0].bias)
    assert masked[2].weight[:, [1, 3]].eq(0).all()
    assert torch.equal(masked[2].weight[:, [0, 2]], net[2].weight[:, [0, 2]])


def test_entries_of_a_list_that_hold_no_tensor_stay() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 6, 1)
            self.branches = nn.ModuleList([nn.Identity(), nn.Conv2d(6, 6, 1), nn.Sequential()])
            self.last = nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for branch in self.branches:
                x = branch(x).relu()
            return self.last(x)

    model, x = Branches().eval(), torch.randn(2, 3, 4, 4)
    graph = sc.trace(model, x)
    keep = {group.name: np.arange(group.size) > 0 for group in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="by hand", settings={})
    small = sc.apply(model, plan, "module", graph=graph, example_inputs=x)
    assert len(small.branches) == 3
