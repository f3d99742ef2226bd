"""Whatever is set on a pruned module later: it computes what the masked dense model does, or refuses."""

from __future__ import annotations

import copy
import functools
import io
import sys
import threading
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.targets.units.later_calls import callcheck
from secateur.targets.units.later_calls.callcheck import CallCheck, check_calls, suspend
from secateur.targets.units.record import attach

PER_UNIT: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "clip": lambda h: h.clamp(max=0.5),
    "scaled": lambda h: h * 3,
}
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: h.softmax(-1),
    "normalise": lambda h: F.normalize(h, dim=-1),
    "centre": lambda h: h - h.mean(-1, keepdim=True),
    "sort": lambda h: h.sort(-1).values,
    "roll": lambda h: h.roll(1, -1),
    "cumsum": lambda h: h.cumsum(-1),
    "halves": lambda h: torch.cat([h[:, :6] * 2, h[:, 6:]], 1),
    "view": lambda h: h.view(-1, 2, 4).transpose(1, 2).reshape(len(h), 8),
    "by width": lambda h: h / h.shape[-1] ** 0.5,
    "by numbers": lambda h: h * h[0].numel(),
    "ramp": lambda h: h + torch.arange(h.shape[-1]),
}
OPERATORS = PER_UNIT | MIXING

MODE: Any = None
SETTINGS: dict[str, Any] = {"mode": None, "deep": {"list": [1, 2]}}


def shaped(h: Tensor, options: Any) -> Tensor:
    """Code beside the module, with settings beside it."""
    return OPERATORS[options["mode"]](h) if options["mode"] else h


class Inner(nn.Module):
    shared: Any = None
    ahead: Any = None
    table: dict[str, Any] = {"mode": None}  # noqa: RUF012 that it is shared is what is tested

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self._hidden = where, None
        self.options: dict[str, Any] = {"mode": None, "other": 3}
        self.config = SimpleNamespace(options={"mode": [None]}, unread=4)
        self.none: Any = None
        self.function: Any = None
        self.act: nn.Module = nn.ReLU()
        self.pair = nn.ModuleList([nn.Identity()])
        self.calls = 0
        self.chosen, self.queue = set[str](), deque([None])
        self.mixed: dict[str, Any] = {"mode": None, "tensor": torch.ones(2)}
        self.long: dict[str, Any] = {f"of {k}": None for k in range(200)}
        self.user: Any = UserDict(mode=None)
        self.kept: Any = None

    @property
    def hidden(self) -> Any:
        """A setting behind a property."""
        return self._hidden

    @hidden.setter
    def hidden(self, value: Any) -> None:
        self._hidden = value

    def choice(self) -> Any:
        """The name of the operator, wherever it is set."""
        return {
            "dictionary": lambda: self.options["mode"],
            "deep": lambda: self.config.options["mode"][0],
            "global": lambda: MODE,
            "global dictionary": lambda: SETTINGS["mode"],
            "class": lambda: self.shared,
            "class dictionary": lambda: self.table["mode"],
            "property": lambda: self.hidden,
            "none": lambda: self.none,
            "absent": lambda: getattr(self, "missing", None),
            "set": lambda: next(iter(self.chosen), None),
            "deque": lambda: self.queue[0],
            "beside a tensor": lambda: self.mixed["mode"],
            "long": lambda: self.long["of 3"],
            "user dictionary": lambda: self.user["mode"],
            "instance": lambda: self.ahead,
            "absent in an object": lambda: getattr(self.config, "missing", None),
            "name that others set": lambda: self.kept,
            "tried": self.tried,
        }.get(self.where, lambda: None)()

    def tried(self) -> Any:
        """What may be missing."""
        try:
            return self.nowhere
        except AttributeError:
            return None

    def changed(self, h: Tensor) -> Tensor:
        """What may be replaced."""
        return h

    def forward(self, h: Tensor) -> Tensor:
        """Of [batch, units]."""
        self.calls += 1
        h = self.changed(self.pair[0](self.act(h)))
        h = h if self.function is None else self.function(h)
        if self.where == "helper":
            return shaped(h, self.options)
        name = self.choice()
        return OPERATORS[name](h) if name else h


class Apply(nn.Module):
    """An operator as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, h: Tensor) -> Tensor:
        """Of [batch, units]."""
        return OPERATORS[self.name](h)


def _set_global(_: Any, name: Any) -> None:
    globals()["MODE"] = name


SET: dict[str, Callable[[Any, Any], Any]] = {
    "dictionary": lambda m, name: m.options.update(mode=name),
    "helper": lambda m, name: m.options.update(mode=name),
    "deep": lambda m, name: m.config.options["mode"].__setitem__(0, name),
    "global": _set_global,
    "global dictionary": lambda _, name: SETTINGS.update(mode=name),
    "class": lambda m, name: setattr(type(m), "shared", name),
    "class dictionary": lambda m, name: m.table.update(mode=name),
    "property": lambda m, name: setattr(m, "hidden", name),
    "none": lambda m, name: setattr(m, "none", name),
    "absent": lambda m, name: setattr(m, "missing", name),
    "set": lambda m, name: (m.chosen.clear(), m.chosen.add(name)),
    "deque": lambda m, name: m.queue.__setitem__(0, name),
    "beside a tensor": lambda m, name: m.mixed.update(mode=name),
    "long": lambda m, name: m.long.update({"of 3": name}),
    "user dictionary": lambda m, name: m.user.update(mode=name),
    "instance": lambda m, name: setattr(m, "ahead", name),
    "absent in an object": lambda m, name: setattr(m.config, "missing", name),
    "name that others set": lambda m, name: setattr(m, "kept", name),
    "tried": lambda m, name: setattr(m, "nowhere", name),
    "method": lambda m, name: setattr(m, "changed", OPERATORS[name]),
    "forward": lambda m, name: setattr(m.act, "forward", OPERATORS[name]),
    "function": lambda m, name: setattr(m, "function", OPERATORS[name]),
    "module for none": lambda m, name: setattr(m, "function", Apply(name)),
    "activation": lambda m, name: setattr(m, "act", Apply(name)),
    "in a list": lambda m, name: m.pair.__setitem__(0, Apply(name)),
}


class Net(nn.Module):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.up, self.inner, self.mid = nn.Linear(6, 12), Inner(where), nn.Linear(12, 10)
        self.out, self.kept = nn.Linear(10, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]."""
        self.kept = len(x)
        return self.out(self.mid(self.inner(self.up(x).relu())).relu())


INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()


@pytest.fixture(autouse=True)
def _globals() -> Iterator[None]:
    yield
    globals()["MODE"], SETTINGS["mode"] = None, None
    Inner.shared, Inner.table["mode"] = None, None


def pruned(model: nn.Module, *, of: Tensor = INPUTS, **options: Any) -> tuple[Any, Any]:
    """The model as a module, and masked."""
    graph = sc.trace(model, of, **options)
    keep = {g.name: np.arange(g.size) % 3 != 1 for g in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="every third")
    small, masked = (sc.apply(model, plan, form, graph=graph) for form in ("module", "masked"))
    return small, masked


def network(where: str) -> Net:
    torch.manual_seed(0)
    return Net(where).double().eval()


@pytest.mark.parametrize("where", SET)
def test_a_module_is_right_or_refuses_what_is_set_later(where: str) -> None:
    small, masked = pruned(network(where))
    want = masked(INPUTS)
    torch.testing.assert_close(small(INPUTS), want)
    for name in OPERATORS:
        for model in (small, masked):
            SET[where](model.inner, name)
        if name in MIXING:
            with pytest.raises(sc.InputError, match="may need units that were removed") as raised:
                small(INPUTS)
            assert len(str(raised.value)) < 600
        else:
            torch.testing.assert_close(small(INPUTS), masked(INPUTS))
            assert not torch.equal(masked(INPUTS), want)


def test_the_message_says_where_and_what() -> None:
    small, _ = pruned(network("dictionary"))
    small.inner.options["mode"] = "sort"
    with pytest.raises(
        sc.InputError, match=r"expected model\.inner\.options\['mode'\] to be None.*got 'sort'"
    ):
        small(INPUTS)
    small.inner.options["mode"] = None
    small.inner.act = nn.Softmax(-1)
    with pytest.raises(
        sc.InputError, match=r"expected model\.inner\.act to be ReLU\(\).*got Softmax\(dim=-1\)"
    ):
        small(INPUTS)


def test_what_results_do_not_hang_on_is_not_refused() -> None:
    small, masked = pruned(network("dictionary"))
    for model in (small, masked):
        model.inner.options["other"], model.inner.config.unread = 8, 9
        model.inner.options["new"], model.note = "mine", {"any": 1}
        model.inner.act = nn.GELU()
        model.inner.function = nn.Dropout(0.5).eval()
        model.inner.none = "sort"  # which this network does not ask for
    torch.testing.assert_close(small(INPUTS), masked(INPUTS))
    small.out = nn.Linear(10 - 3, 7).double()  # a new head
    assert small(INPUTS).shape == (4, 7)
    small.train()(INPUTS).sum().backward()


def test_modules_that_no_code_names_may_be_added() -> None:
    small, masked = pruned(network("none"))
    small.mid.add_module("observer", nn.Softmax(-1))
    small.inner.add_module("note", nn.Softmax(-1))
    torch.testing.assert_close(small(INPUTS), masked(INPUTS))
    small.mid.register_forward_hook(lambda module, args, output: output.round(decimals=3))
    assert torch.isfinite(small(INPUTS)).all()
    small.inner.pair[0] = nn.Softmax(-1)
    with pytest.raises(sc.InputError, match=r"model\.inner\.pair\.0 to be Identity\(\), .*got Softmax"):
        small(INPUTS)


@pytest.mark.parametrize("over", ["children", "named_children", "_modules"])
def test_a_layer_that_is_added_where_code_runs_over_all_layers(over: str) -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.out = nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            layers = {
                "children": lambda: self.children(),
                "named_children": lambda: (layer for _, layer in self.named_children()),
                "_modules": lambda: self._modules.values(),
            }
            for layer in layers[over]():
                x = layer(x)
            return x

    torch.manual_seed(0)
    small, masked = pruned(Over().double().eval())
    for model in (small, masked):
        model.add_module("last", nn.Softmax(-1))  # behind the layer that reads the units
    torch.testing.assert_close(small(INPUTS), masked(INPUTS))
    small, masked = pruned(Over().double().eval())
    for added, is_right in ((nn.Tanh(), True), (nn.Softmax(-1), False)):
        for model in (small, masked):
            out = model._modules.pop("out")
            model._modules |= {"between": added, "out": out}
        if is_right:
            torch.testing.assert_close(small(INPUTS), masked(INPUTS))
        else:
            with pytest.raises(sc.InputError, match=r"expected model\.between to be"):
                small(INPUTS)


def test_a_setting_of_one_of_pytorchs_modules() -> None:
    class Softened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.soft, self.out = nn.Linear(6, 12), nn.Softmax(1), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.soft(self.up(x)[:, None]))

    torch.manual_seed(0)
    small, masked = pruned(Softened().double().eval())
    torch.testing.assert_close(small(INPUTS), masked(INPUTS))
    small.soft.dim = -1
    with pytest.raises(sc.InputError, match=r"expected model\.soft\.dim to be 1.*got -1"):
        small(INPUTS)


def test_other_inputs_are_looked_at_again() -> None:
    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).relu()
            return self.out(self.mid(self.inner(h) if len(x) > 4 else h).relu())

    torch.manual_seed(0)
    small, masked = pruned(Late("dictionary").double().eval())
    small.inner.options["mode"] = "softmax"
    torch.testing.assert_close(small(INPUTS), masked(INPUTS))
    with pytest.raises(sc.InputError, match="options"):
        small(torch.cat([INPUTS, INPUTS]))


def test_other_arguments_of_the_same_values_are_looked_at_again() -> None:
    class Two(Net):
        def forward(self, x: Tensor, *, a: bool = False, b: bool = False) -> Tensor:
            h = self.up(x).relu()
            return self.out(self.mid(self.inner(h) if b else h).relu())

    torch.manual_seed(0)
    switched = [{"x": INPUTS, "b": True}]
    small, _ = pruned(Two("dictionary").double().eval(), more_inputs=switched)
    small.inner.options["mode"] = "softmax"
    small(INPUTS, a=True)
    with pytest.raises(sc.InputError, match="options"):
        small(INPUTS, b=True)


def test_a_wrapper_of_a_method_is_no_other_method() -> None:
    small, masked = pruned(network("none"))
    forward = small.mid.forward

    @functools.wraps(forward)
    def wrapper(h: Tensor) -> Tensor:
        return forward(h.softmax(-1).exp().log() * 0 + h)  # as libraries move tensors

    small.mid.forward = wrapper
    torch.testing.assert_close(small(INPUTS), masked(INPUTS))


def test_what_grows_or_counts_is_not_looked_into_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__("none")
            self.seen: list[Any] = []
            self.notes: dict[str, Any] = {"count": 0, "mode": None}

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(self.seen))
            self.notes["count"] += 1
            h = self.up(x)
            return self.out(self.mid(h.softmax(-1) if self.notes["mode"] else h).relu())

    torch.manual_seed(0)
    small, _ = pruned(Counting().double().eval())
    for _ in range(3):
        small(INPUTS)
    monkeypatch.setattr(callcheck, "run_once", lambda *_: pytest.fail("checked again"))
    for _ in range(3):
        small(INPUTS)
    monkeypatch.undo()
    small.notes["mode"] = "soft"
    with pytest.raises(sc.InputError, match="mode"):
        small(INPUTS)


def test_branches_of_two_groups_that_are_swapped() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)
            self.also = nn.Linear(12, 3)
            self.options = {"swap": False}

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.out(b if self.options["swap"] else a) + self.also(a if self.options["swap"] else b)

    torch.manual_seed(0)
    small, _ = pruned(Two().double().eval())
    small.options["swap"] = True
    with pytest.raises(sc.InputError, match="swap"):
        small(INPUTS)


def test_inexact_plans_are_guarded_too() -> None:
    class Normed(Net):
        def __init__(self, where: str) -> None:
            super().__init__(where)
            self.norm, self.pooled = nn.LayerNorm(12), False

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.up(x))
            return self.out(self.mid(h.softmax(-1) if self.pooled else self.inner(h)).relu())

    torch.manual_seed(0)
    small, _ = pruned(Normed("none").double().eval(), allow_inexact=True)
    small.pooled = True
    with pytest.raises(sc.InputError, match=r"model\.pooled to be False"):
        small(INPUTS)


@pytest.mark.parametrize("where", ["dictionary", "global", "class dictionary"])
@pytest.mark.parametrize("way", ["save", "pickle", "copy", "again"])
def test_it_outlives_the_model_object(way: str, where: str, tmp_path: Path) -> None:
    small, _ = pruned(network(where))
    if way == "save":
        small = sc.load(sc.save(small, tmp_path / "small"), lambda: network(where))
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(small, file)
        small = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    elif way == "copy":
        small = copy.deepcopy(small)
    else:
        small, _ = pruned(small)
    small(INPUTS)
    SET[where](small.inner, "sort")
    with pytest.raises(sc.InputError, match=r"(?i)mode"):
        small(INPUTS)
    SET[where](small.inner, None)
    small.inner.act = nn.Softmax(-1)
    with pytest.raises(sc.InputError, match="act"):
        small(INPUTS)
    assert (
        sum(isinstance(hook, CallCheck) for m in small.modules() for hook in m._forward_pre_hooks.values())
        == 1
    )


@pytest.mark.parametrize(
    "noise",
    [
        lambda h: h * (0.7 + torch.rand((len(h), 1))).floor(),
        lambda h: h * torch.rand(len(h)).view(-1, 1).bernoulli(),
        lambda h: h * h.new_empty((len(h), 1)).bernoulli_(0.7),
        lambda h: torch.native_dropout(h, 0.3, True)[0],
        lambda h: h + 0.1 * torch.randn_like(h),
    ],
)
def test_noise_that_is_set_later_is_no_reason_to_refuse(noise: Callable[[Tensor], Tensor]) -> None:
    small, _ = pruned(network("none"))
    small.inner.function = noise
    assert torch.isfinite(small(INPUTS)).all()
    small.inner.function = lambda h: h[:, torch.rand_like(h[0]).argsort()]
    with pytest.raises(sc.InputError, match="function"):
        small(INPUTS)


def test_a_schedule_of_values_that_come_back_is_looked_into_once(monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = pruned(network("dictionary"))
    values = [0.5 * k for k in range(2, 5)]
    for value in values:
        small.inner.options["mode"], small.inner.options["other"] = "tanh", value
        small(INPUTS)
    monkeypatch.setattr(callcheck, "run_once", lambda *_: pytest.fail("checked again"))
    for value in values:
        small.inner.options["other"] = value * 1.0
        small(INPUTS)


def test_the_message_names_the_value_that_matters() -> None:
    small, _ = pruned(network("dictionary"))
    small.inner.options["other"], small.inner.act = 8, nn.Tanh()
    small.inner.config.options["mode"][0], small.inner.none = "tanh", "tanh"
    small.inner.options["mode"] = "sort"
    with pytest.raises(sc.InputError, match=r"expected model\.inner\.options\['mode'\].*more have changed"):
        small(INPUTS)


def test_quantised_layers_are_the_users() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.up(x).relu())

    class Quantised(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.register_buffer("packed", layer.weight.detach() * 16)

        def forward(self, h: Tensor) -> Tensor:
            return F.linear(h, self.packed / 16)  # type: ignore[operator]

    torch.manual_seed(0)
    small, _ = pruned(Mlp().double().eval())
    small.up, small.out = Quantised(small.up), Quantised(small.out)
    assert small(INPUTS).shape == (4, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["itself", "inside", "copy"])
def test_a_module_can_be_scripted_where_the_dense_one_can(way: str) -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out, self.twice = nn.Linear(6, 12), nn.Linear(12, 3), False

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).relu()
            return self.out(h * 2 if self.twice else h)

    torch.manual_seed(0)
    small, masked = pruned(Mlp().double().eval())
    model = {"itself": small, "inside": nn.Sequential(small), "copy": copy.deepcopy(small)}[way]
    torch.testing.assert_close(torch.jit.script(model)(INPUTS), masked(INPUTS))
    small.up = nn.Sequential(small.up, nn.Softmax(-1))  # with weights: the user's
    small(INPUTS)
    assert any(isinstance(hook, CallCheck) for hook in small._forward_pre_hooks.values())


def test_values_that_are_right_one_by_one() -> None:
    class Checkpointed(Net):
        def __init__(self) -> None:
            super().__init__("none")
            self.careful, self.pooled = False, False
            self.options = {"odd": None}

        def forward(self, x: Tensor) -> Tensor:
            h = self.run(self.up, x) if self.careful else self.up(x)  # `run` is set later
            if self.options["odd"] and self.pooled:
                h = h.softmax(-1)
            return self.out(self.mid(h.relu() * 2 if self.pooled else h.relu()).relu())

    torch.manual_seed(0)
    small, masked = pruned(Checkpointed().double().eval())
    for model in (small, masked):
        model.run, model.careful = lambda layer, x: layer(x), True
    torch.testing.assert_close(small(INPUTS), masked(INPUTS))
    small.options["odd"] = True
    small(INPUTS)
    small.pooled = True  # right alone, and so are the options alone
    with pytest.raises(sc.InputError, match="odd"):
        small(INPUTS)


def test_threads_wait_while_one_looks() -> None:
    small, masked = pruned(network("dictionary"))
    for model in (small, masked):
        model.inner.options["mode"] = "tanh"
    want, found = masked(INPUTS), []

    def call() -> None:
        found.extend(small(INPUTS) for _ in range(5))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for one in found:
        torch.testing.assert_close(one, want)


def test_looking_leaves_no_trace() -> None:
    small, _ = pruned(network("dictionary"))
    small.train()
    small.inner.act = nn.GELU()
    small.inner.options["other"] = 8
    state, random = copy.deepcopy(small.state_dict()), torch.get_rng_state()
    calls = small.inner.calls
    small(INPUTS)
    assert small.inner.calls == calls + 1
    assert not small.inner.act._forward_pre_hooks
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(v, small.state_dict()[k]) for k, v in state.items())


def test_it_costs_little() -> None:
    small, _ = pruned(network("dictionary"))
    (watch,) = (hook for hook in small._forward_pre_hooks.values() if isinstance(hook, CallCheck))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    watch(small, (INPUTS,), {})
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        watch(small, (INPUTS,), {})
    finally:
        sys.setprofile(before)
    assert calls < 1000  # calls and returns of functions
    check_calls(small, sc.record_of(small).plan)
    assert len(small._forward_pre_hooks) == 1


def test_three_flags_at_once() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(6, 12), nn.Linear(12, 3)
            self.a = self.b = self.c = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            return self.out(h.softmax(-1) if self.a and self.b and self.c else h.flip(-1) if self.a else h)

    torch.manual_seed(0)
    small, masked = pruned(Three().double().eval())
    for model in (small, masked):
        model.a = model.b = True
    torch.testing.assert_close(small(INPUTS), masked(INPUTS))
    small.c = True
    with pytest.raises(sc.InputError, match=r"expected model\.[abc] to be False"):
        small(INPUTS)


def test_a_copy_that_is_changed_on_purpose_knows_its_new_values() -> None:
    small, _ = pruned(network("dictionary"))
    record = sc.record_of(small)
    changed = copy.deepcopy(small)
    suspend(changed)
    changed.inner.options["mode"] = "sort"
    changed(INPUTS)
    attach(changed, record)
    changed(INPUTS)
    changed.inner.options["mode"] = "roll"
    with pytest.raises(sc.InputError, match=r"to be 'sort'.*got 'roll'"):
        changed(INPUTS)


def _mark(module: nn.Module, name: str) -> None:
    """Set an attribute in a way that no reader of the code sees."""
    setattr(module, name, True)


class Prepared(nn.Module):
    """Installs hooks in its first call, as Transformers does to give all hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.out = nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 6] to [batch, 3]; what hooks saw counts, so each may be there only once."""
        if not getattr(self, "_installed", False):
            self.act.register_forward_hook(lambda module, args, output: self.seen.append(output))
            _mark(self, "_installed")
        self.seen.clear()
        h = self.act(self.up(x))
        return self.out(h + sum(self.seen))


def test_what_the_code_prepares_once_is_its_own() -> None:
    torch.manual_seed(0)
    small, masked = pruned(Prepared().double().eval())
    assert len(small.act._forward_hooks) == 0
    for _ in range(3):
        torch.testing.assert_close(small(INPUTS), masked(INPUTS))
    assert len(small.act._forward_hooks) == 1
    small._installed = masked._installed = False  # by the user: the hooks are installed a second time
    torch.testing.assert_close(small(INPUTS), masked(INPUTS))


BEHIND: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": lambda y, h, x: y.softmax(-1),
    "sort": lambda y, h, x: y.sort(-1).values,
    "mean": lambda y, h, x: y.mean(-1, keepdim=True) + y,
    "tokens": lambda y, h, x: y.flip(1),
    "loss": lambda y, h, x: F.cross_entropy(y.mT, x[..., 0].gt(0).long(), reduction="none"),
    "smoothed": lambda y, h, x: F.cross_entropy(y.mT, x[..., 1].gt(0).long(), label_smoothing=0.2),
    "of inputs": lambda y, h, x: torch.cat([y, x.cumsum(-1)], -1),
    "written": lambda y, h, x: y.new_zeros(y.shape).index_copy(-1, torch.tensor([2, 0, 1]), y),
}  # fmt: skip
BEFORE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": lambda y, h, x: y + h.softmax(-1).amax(-1, keepdim=True),
    "sum": lambda y, h, x: y + h.sum(-1, keepdim=True),
    "size": lambda y, h, x: torch.cat([y, y.new_ones(*y.shape[:-1], 1) * h.shape[-1]], -1),
    "axis": lambda y, h, x: y[..., None].expand(*y.shape, h.shape[-1]).sum(-1),
    "mean over": lambda y, h, x: y * y.new_ones(h.shape[-1], 1).sum(),
    "twice": lambda y, h, x: y * y.new_ones(2 * h.shape[-1]).sum(),
    "half": lambda y, h, x: y + y[..., None].expand(*y.shape, h.shape[-1] // 2).sum(-1),
    "all": lambda y, h, x: y + y.new_ones(h.numel()).sum(),
    "written": lambda y, h, x: _written(y, h).sort(-1).values,
    "weight": lambda y, h, x: y + h.new_ones(h.shape[-1]).softmax(-1)[0],
}


def _written(y: Tensor, h: Tensor) -> Tensor:
    both = y.new_zeros(*y.shape[:-1], 8)
    both[..., :3] = h[..., :3]
    return torch.cat([y, both.flip(-1)[..., -3:]], -1)


class Behind(nn.Module):
    """Does something with results, with the values in which units are missing at hand."""

    def __init__(self, ways: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]) -> None:
        super().__init__()
        self.up, self.mid, self.out = nn.Linear(6, 12), nn.Linear(12, 9), nn.Linear(9, 3)
        self.settings: dict[str, Any] = {"way": None}
        self.ways = ways

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        y = self.out(self.mid(h).relu())
        way = self.settings["way"]
        return y if way is None else self.ways[way](y, h, x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", BEHIND)
def test_code_behind_what_was_cut_may_change(way: str, training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6).double()
    small, masked = pruned(Behind(BEHIND).double().eval(), of=x)
    for model in (small, masked):
        model.train(training).settings["way"] = way
    for given in (x, torch.randn(2, 7, 6).double()):
        got, wanted = (model(given) for model in (small, masked))
        torch.testing.assert_close(got, wanted)
        got.sum().backward()


@pytest.mark.parametrize("way", BEFORE)
def test_code_that_reads_what_was_cut_may_not(way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 6).double()
    small, masked = pruned(Behind(BEFORE).double().eval(), of=x)
    for model in (small, masked):
        model.settings["way"] = way
    with pytest.raises(sc.InputError, match="may need units that were removed"):
        small(x)


def test_values_in_which_units_are_missing_may_not_be_returned() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 7, 6).double()
    ways = {
        "hidden": lambda y, h, x: [y, h],
        "doubled": lambda y, h, x: [y, 2 * h],
        "input": lambda y, h, x: [y, x],
    }
    small, masked = pruned(Behind(ways).double().eval(), of=x)
    for way in ("hidden", "doubled"):
        small.settings["way"] = way
        with pytest.raises(sc.InputError, match="may need units that were removed"):
            small(x)
    for model in (small, masked):
        model.settings["way"] = "input"
    torch.testing.assert_close(small(x), masked(x))


@pytest.mark.parametrize("way", ["sort", "smoothed"])
def test_what_a_second_round_or_a_file_knows_of_what_was_cut(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6).double()
    first, _ = pruned(Behind(BEHIND | BEFORE).double().eval(), of=x)
    twice, _ = pruned(first, of=x)
    again = sc.load(sc.save(first, tmp_path), lambda: Behind(BEHIND | BEFORE).double().eval())
    for small in (first, twice, again, copy.deepcopy(twice)):
        small.settings["way"] = way
        small(x)
        small.settings["way"] = "sum"
        with pytest.raises(sc.InputError, match="units that were removed"):
            small(x)


def test_attention_may_drop_out_later() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out, self.options = nn.Linear(6, 36), nn.Linear(12, 3), {"p": 0.0}

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
            p = self.options["p"] if self.training else 0.0
            return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    x = torch.randn(4, 5, 6).double()
    small, masked = pruned(Attends().double().eval(), of=x)
    for model in (small, masked):
        model.train().options["p"] = 0.5
    assert not torch.equal(small(x), small(x))
    small(x).sum().backward()
    torch.testing.assert_close(small.eval()(x), masked.eval()(x))
