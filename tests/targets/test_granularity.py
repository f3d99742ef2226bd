"""One function for everything that can be removed: what it passes on, and what it refuses."""

from __future__ import annotations

import inspect
import json
import re
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.targets.granularity import MODULES, REFUSED
from secateur.targets.lowrank.factorise import factorise
from secateur.targets.together.rule import Together
from tests.targets.blocks.models import ROWS, Chain
from tests.targets.experts.models import PlainLM, words
from tests.targets.headsizes.models import WIDTH, network

OTHERS = [(name, granularity) for granularity, modules in MODULES.items() for name in modules]
CHANGED: dict[str, Any] = {
    "more_inputs": [torch.ones(1)],
    "methods": ["embed"],
    "allow_inexact": True,
    "memory": 2**40,
    "checkpoint": "file",
    "checkpoint_every": 1.0,
    "renormalise": True,
    "on_unrealisable": "leave",
    "other_sizes": False,
    "example_inputs": torch.ones(2, 4),
    "tolerance": 1e-3,
    "own": {},
    "forward": lambda model, batch: model(batch),
    "by_block": True,
    "loss_fn": lambda model, batch: None,
}


@pytest.fixture(scope="module")
def arguments() -> dict[tuple[str, str], tuple[Any, ...]]:
    """What the functions take before their options, by function and granularity."""
    torch.manual_seed(0)
    found: dict[tuple[str, str], tuple[Any, ...]] = {}
    units: tuple[Any, ...] = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(2, 4))
    for granularity, (model, inputs), signal in (
        ("unit", units, "magnitude"),
        ("expert", (PlainLM().eval(), words()), "weight_norm"),
        ("block", (Chain().eval(), ROWS), "magnitude"),
    ):
        graph = sc.trace(model, inputs, granularity=granularity)  # type: ignore[call-overload]
        plan = sc.Uniform(ratio=0.25, removal=signal).allocate(graph, sc.score(graph, None, signal))
        small = sc.apply(model, plan, graph=graph)
        found["trace", granularity] = model, inputs
        found["score", granularity] = (graph,)
        found["apply", granularity] = model, plan
        found["verify", granularity] = model, small, plan
        found["repair", granularity] = small, model, [inputs]
    for granularity in ("rank", "unit+rank"):
        pairs = factorise(units[0])
        graph = sc.trace(pairs, units[1], granularity=granularity)  # type: ignore[call-overload]
        plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        small = sc.apply(pairs, plan)
        found["score", granularity] = (graph,)
        found["apply", granularity] = pairs, plan
        found["repair", granularity] = small, pairs, [units[1]]
    model, inputs = PlainLM().eval(), words()
    both: Any = sc.trace(model, inputs, granularity=["unit", "expert"])  # type: ignore[call-overload]
    signals: Any = [("magnitude", "weight_norm")]
    together = Together(sc.Uniform(ratio=0.25), sc.Uniform(removal="weight_norm"))
    plan = together.allocate(both, sc.score(both, None, signals))
    found["trace", "unit+expert"] = model, inputs
    found["score", "unit+expert"] = (both,)
    found["repair", "unit+expert"] = sc.apply(model, plan, graph=both), model, [inputs]
    model, inputs = Chain().eval(), ROWS
    both = sc.trace(model, inputs, granularity=["unit", "block"])  # type: ignore[call-overload]
    signals = [("magnitude", "magnitude")]
    rule = {"unit": sc.Uniform(ratio=0.25), "block": sc.Uniform(ratio=0.25)}
    plan = Together.of(rule, "block").allocate(both, sc.score(both, None, signals))
    found["trace", "unit+block"] = found["trace", "unit+head_size+block"] = model, inputs
    found["score", "unit+block"] = (both,)
    found["apply", "unit+block"] = model, plan
    found["repair", "unit+block"] = sc.apply(model, plan, graph=both), model, [inputs]
    model = units[0]
    weights = sc.trace(model, granularity="weight")
    masks = sc.Uniform().allocate(weights, sc.score(weights), sc.Budget(sparsity=0.5))
    found["trace", "weight"] = (model,)
    found["score", "weight"] = (weights,)
    found["apply", "weight"] = model, masks
    found["verify", "weight"] = model, sc.apply(model, masks), masks
    return found


@pytest.mark.parametrize("wrong", [None, 5, {"unit": sc.Uniform()}])
def test_what_is_no_name_of_a_granularity_is_refused(wrong: Any) -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(8, 4)
    for function in (
        lambda: sc.trace(model, x, granularity=wrong),
        lambda: sc.prune(model, [(x, torch.arange(8) % 2)], granularity=wrong, progress=False),
        lambda: sc.compare(model, [(x, torch.arange(8) % 2)], granularity=wrong, progress=False),
    ):
        with pytest.raises(sc.SettingError, match="expected a name or a list of names, such as 'unit'"):
            function()


def test_several_may_be_given_as_a_set() -> None:
    model, x = network("eager"), torch.randn(2, 5, WIDTH)
    one, other = (sc.trace(model, x, granularity=g) for g in ({"unit", "head_size"}, ["unit", "head_size"]))
    assert [group.name for group in one.groups] == [group.name for group in other.groups]
    assert one.head_sizes


@pytest.mark.parametrize(("name", "granularity"), OTHERS)
def test_every_option_is_passed_on_or_refused(name: str, granularity: str) -> None:
    public = set(inspect.signature(getattr(sc, name)).parameters) - {"granularity"}
    own = set(inspect.signature(getattr(import_module(MODULES[granularity][name]), name)).parameters)
    assert public - own == set(REFUSED.get((name, granularity), {}))
    assert own - public <= {"graph", "more_inputs"}  # what `prune` has at hand


@pytest.mark.parametrize(
    ("name", "granularity", "option"),
    [(*key, option) for key, options in REFUSED.items() for option in options],
)
def test_an_option_without_a_meaning_is_refused_by_name(
    arguments: dict[tuple[str, str], tuple[Any, ...]], name: str, granularity: str, option: str
) -> None:
    settings = {option: CHANGED[option]}
    if name == "trace":
        settings["granularity"] = granularity
    with pytest.raises(
        sc.SettingError, match=rf"{name}\({option}=.* with granularity '{re.escape(granularity)}'"
    ):
        getattr(sc, name)(*arguments[name, granularity], **settings)


def test_a_default_may_be_said(arguments: dict[tuple[str, str], tuple[Any, ...]]) -> None:
    model, inputs = arguments["trace", "expert"]
    graph = sc.trace(model, inputs, granularity="expert", allow_inexact=False)  # type: ignore[call-overload]
    assert isinstance(graph, sc.ExpertGraph)
    assert set(sc.score(graph, None, "random", memory=None).values) == {"random"}


@pytest.mark.parametrize(("one", "other"), [("unit", "expert"), ("expert", "unit")])
def test_a_trace_of_another_kind_is_refused(
    arguments: dict[tuple[str, str], tuple[Any, ...]], one: str, other: str
) -> None:
    (graph,) = arguments["score", other]
    for name in ("apply", "repair"):
        with pytest.raises(sc.SettingError, match=f"{name}: expected a trace with granularity '{one}', got"):
            getattr(sc, name)(*arguments[name, one], graph=graph)


def test_masks_are_saved_with_the_trace_of_units(arguments: dict[tuple[str, str], tuple[Any, ...]]) -> None:
    (weights,) = arguments["score", "weight"]
    with pytest.raises(sc.SettingError, match=r"got one with 'weight'. Pass sc.trace\(model, inputs\)"):
        sc.apply(*arguments["apply", "weight"], graph=weights)


def test_repair_of_both_is_a_part_of_prune(arguments: dict[tuple[str, str], tuple[Any, ...]]) -> None:
    with pytest.raises(sc.SettingError, match=r"Use sc\.prune\(\.\.\., repair=\.\.\.\)"):
        sc.repair(*arguments["repair", "unit+expert"])


def test_unknown_granularities_are_refused() -> None:
    expected = r"trace: expected granularity 'unit' or 'expert' or .* or 'block' or .*, got 'layer'"
    with pytest.raises(sc.SettingError, match=expected):
        sc.trace(nn.Linear(2, 2), torch.ones(1, 2), granularity="layer")  # type: ignore[call-overload]


def test_wrong_arguments_are_refused_as_of_any_function() -> None:
    with pytest.raises(TypeError, match=r"trace\(\) got an unexpected keyword argument 'inputs'"):
        sc.trace(nn.Linear(2, 2), inputs=torch.ones(1, 2))  # type: ignore[call-overload]


def test_masks_are_applied_and_compared_bit_for_bit(
    arguments: dict[tuple[str, str], tuple[Any, ...]],
) -> None:
    model, masks = arguments["apply", "weight"]
    graph = sc.trace(model, torch.ones(2, 4))
    small = sc.apply(model, masks, "masked", graph=graph)
    assert all((small.get_parameter(n) != 0).tolist() == mask.tolist() for n, mask in masks.masks.items())
    assert sc.verify(model, small, masks).proven
    repaired = sc.repair(small, model, [torch.randn(20, 4) for _ in range(4)], "reconstruct", progress=False)
    assert not any(repaired.get_parameter(n)[torch.tensor(~mask)].any() for n, mask in masks.masks.items())
    with torch.no_grad():
        small.get_parameter("0.bias")[0] += 1e-6
    with pytest.raises(sc.VerificationError, match=r"got a difference in '0\.bias'"):
        sc.verify(model, small, masks)
    with pytest.raises(sc.SettingError, match=r"apply\(form='graph'\): expected one of auto, masked"):
        sc.apply(model, masks, "graph")


def test_forms_and_repairs_that_experts_do_not_have(
    arguments: dict[tuple[str, str], tuple[Any, ...]],
) -> None:
    with pytest.raises(
        sc.SettingError, match=r"apply\(form='masked'\): expected one of auto, module for exp"
    ):
        sc.apply(*arguments["apply", "expert"], "masked")
    with pytest.raises(
        sc.SettingError, match=r"repair\(methods='bias'\): expected None, 'auto', 'experts', 'merge' or"
    ):
        sc.repair(*arguments["repair", "expert"], "bias")
    small = arguments["repair", "expert"][0]
    same = sc.repair(*arguments["repair", "expert"], None)
    assert same is not small
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in same.state_dict().items())


def test_what_repair_and_scoring_find_out_themselves(
    arguments: dict[tuple[str, str], tuple[Any, ...]],
) -> None:
    (graph,), (small, model, data) = arguments["score", "expert"], arguments["repair", "expert"]
    one = sc.repair(small, model, data, "experts", memory=None, progress=False)
    two = sc.repair(small, model, data, "experts", graph=graph, progress=False)
    assert all(torch.equal(t, two.state_dict()[n]) for n, t in one.state_dict().items())
    named = [{"ids": ids} for ids in data]
    plain = sc.score(graph, data, ("frequency", "reap"), progress=False)
    called = sc.score(graph, named, ("frequency", "reap"), forward=lambda m, b: m(b["ids"]), progress=False)
    assert all((plain[s][n] == called[s][n]).all() for s in plain.values for n in plain[s])
    again = sc.trace(model, named[0], granularity="expert", forward=lambda m, b: m(b["ids"]))
    assert again.dense == graph.dense


@pytest.mark.parametrize("granularity", ["unit", "expert"])
def test_plans_that_are_older_than_the_field(
    arguments: dict[tuple[str, str], tuple[Any, ...]], granularity: str
) -> None:
    plan = arguments["apply", granularity][1]
    assert plan.granularity == granularity
    data = json.loads(plan.to_json())
    assert data.pop("granularity") == granularity
    assert sc.Plan.from_json(json.dumps(data)) == plan
