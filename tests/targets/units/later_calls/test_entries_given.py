"""Entries of lists and mappings, further arguments, dtypes and numbers of axes that no trace has had."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import secateur as sc
from tests.targets.units.later_calls.test_switched import pruned


class Order(Enum):
    SAME = 1
    TURNED = 2


class Pair(NamedTuple):
    one: Tensor
    other: Tensor | None = None


X, Y, Z = (torch.randn(2, length, 6, generator=torch.Generator().manual_seed(length)) for length in (5, 5, 3))
IDS = torch.tensor([[1, 0, 2, 1, 1], [0, 1, 2, 2, 0]])


class Net(nn.Module):
    def __init__(self, way: Callable[..., Any]) -> None:
        super().__init__()
        self.body, self.head, self.way = nn.Linear(6, 9), nn.Linear(9, 4), way

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[batch, length, 6] in any arguments to [batch, length, 4], of each hidden value."""
        found = self.way(self, *args, **kwargs)
        return self.head(found) if isinstance(found, Tensor) else [self.head(one) for one in found]

    def hidden(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x))


def every(net: Net, xs: list[Tensor]) -> list[Tensor]:
    return [net.hidden(x) for x in xs]


def turned(net: Net, *xs: Tensor) -> list[Tensor]:
    return [net.hidden(x).flip(-1) if n else net.hidden(x) for n, x in enumerate(xs)]


def pooled(net: Net, xs: Any) -> Tensor:
    first, *more = [net.hidden(x) for x in xs if x is not None]
    return first.flip(-1) * first if not more else first + more[0].mean(1, keepdim=True)


def merged(net: Net, maps: dict[str, Tensor]) -> Tensor:
    found = net.hidden(maps["x"])
    return found * net.hidden(maps["y"]).flip(-1) if "y" in maps else found


def pair(net: Net, given: Pair) -> Tensor:
    found = net.hidden(given.one)
    return found if given.other is None else found * net.hidden(given.other).flip(-1)


def ordered(net: Net, x: Tensor, order: Order = Order.SAME) -> Tensor:
    return net.hidden(x).flip(-1) if order is Order.TURNED else net.hidden(x)


def by_function(net: Net, x: Tensor, act: Any = torch.tanh) -> Tensor:
    return act(net.hidden(x))


def scaled(net: Net, x: Tensor, scale: float = 1.0) -> Tensor:
    return net.hidden(x) / scale if scale else net.hidden(x).cumsum(-1)


def masked_by(net: Net, x: Tensor, mask: Tensor) -> Tensor:
    kept = mask if mask.dtype is torch.bool else mask.softmax(1)
    found = net.hidden(x) * kept[..., None]
    return found if mask.dtype is torch.bool else found.flip(-1)


def centred(net: Net, x: Tensor) -> Tensor:
    return net.hidden(x) - net.hidden(x).mean(1, keepdim=True)


def seen(net: Net, x: Tensor) -> Tensor:
    return net.hidden(x).tanh() * 2


def numbered(net: Net, x: Tensor, shifts: list[int]) -> Tensor:
    return net.hidden(x).roll(shifts[0], -1)


TURN = {"act": lambda h: h.flip(-1)}
BOOL = IDS > 0
CASES: dict[str, tuple[Callable[..., Any], Any, Any, bool]] = {
    "one more in a list, each alone": (every, ([X, Z],), ([X, Y, Z],), True),
    "fewer in a list, each alone": (every, ([X, Z],), ([X, Y[:, :2]],), True),
    "one more in a list": (pooled, ([X],), ([X, Z],), False),
    "one less in a list": (pooled, ([X, Y],), ([X],), False),
    "None in a tuple": (pooled, ((X, Y),), ((X, None),), False),
    "one more argument": (turned, (X,), (X, Z), False),
    "further arguments of other lengths": (turned, (X, Y), (X, Z), True),
    "one more argument of several": (turned, (X, Y), (X, Y, Z), True),
    "one more in a mapping": (merged, ({"x": X},), ({"x": X, "y": Y},), False),
    "one less in a mapping": (merged, ({"x": X, "y": Y},), ({"x": X},), False),
    "one more in a named tuple": (pair, (Pair(X),), (Pair(X, Y),), False),
    "another member of an enumeration": (ordered, (X,), (X, Order.TURNED), False),
    "another function": (by_function, (X,), (X, TURN["act"]), False),
    "another function, by number": (by_function, (X,), (X, torch.sigmoid), True),
    "another float, other code": (scaled, (X,), (X, 0.0), False),
    "another float": (scaled, (X,), (X, 2.5), True),
    "a float mask": (masked_by, (X, BOOL), (X, X[..., 0]), False),
    "numbers for a mask of bools": (masked_by, (X, BOOL), (X, ~BOOL), True),
    "one axis less, which mixes": (centred, (X,), (X[0],), False),
    "one axis less": (seen, (X,), (X[0],), True),
    "one axis more": (seen, (X,), (X[None],), True),
    "another number in a list": (numbered, (X, [0]), (X, [1]), False),
}


def as_double(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)


@pytest.mark.parametrize("case", CASES)
def test_an_entry_is_right_or_refused(case: str) -> None:
    way, traced, later, is_right = CASES[case]
    traced, later = as_double(traced), as_double(later)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small, masked = pruned(Net(way).double().eval(), traced)
    for _ in range(2):
        if is_right:
            torch.testing.assert_close(small(*later), masked(*later))
        else:
            with pytest.raises(sc.InputError, match="more_inputs") as raised:
                small(*later)
            assert len(str(raised.value)) < 600
        torch.testing.assert_close(small(*traced), masked(*traced))


def test_an_entry_that_the_trace_had_is_free() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, y = as_double([X, Y])
        small, masked = pruned(Net(pooled).double().eval(), ([x, y],), more_inputs=[([x],)])
    torch.testing.assert_close(small([x]), masked([x]))
    torch.testing.assert_close(small([x, y]), masked([x, y]))


class Translator(nn.Module):
    """Reads ids, or in their place what its encoder made of them, as `generate` of Transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body, self.back = nn.Embedding(9, 12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
        self.norm = nn.LayerNorm(12)  # keeps what it reads whole

    def forward(self, ids: Tensor | None = None, words: Tensor | None = None, encoded: Any = None) -> Tensor:
        if encoded is None:
            encoded = {"hidden": self.norm(self.back(torch.relu(self.body(self.words(ids)))))}
        hidden = encoded["hidden"]
        samples, length = hidden.shape[:2]
        keys, values = (f(hidden).view(samples, length, -1, 4).transpose(1, 2) for f in (self.k, self.v))
        asked = self.q(self.words(words)).view(samples, words.shape[1], -1, 4).transpose(1, 2)
        found = nn.functional.scaled_dot_product_attention(asked, keys, values)
        return self.out(found.transpose(1, 2).reshape(samples, words.shape[1], -1))


@pytest.mark.parametrize("length", [3, 5, 8])
def test_hidden_states_in_place_of_ids_have_their_length(length: int) -> None:
    """What the trace had in their place is drawn as long as they are, for the comparison."""
    torch.manual_seed(0)
    model = Translator().double().eval()
    ids, words = torch.randint(9, (2, 5)), torch.randint(9, (2, 4))
    small, masked = pruned(model, {"ids": ids, "words": words})
    given = {"words": words[:, :1], "encoded": {"hidden": torch.randn(2, length, 12).double()}}
    torch.testing.assert_close(small(**given), masked(**given))


def test_labels_in_place_of_ids_from_which_the_model_makes_them() -> None:
    """The known call is drawn as long as the labels, else it would run other sizes."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.one, self.two = nn.Embedding(5, 6), nn.Linear(6, 9), nn.Linear(9, 5)

        def forward(self, ids: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            """[batch, length] to [batch, length, 5]."""
            ids = labels.roll(1, 1) if ids is None and labels is not None else ids
            hidden = torch.relu(self.one(self.table(ids)))
            return self.two(hidden.view(len(hidden), hidden.shape[1], -1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        small, masked = pruned(Decoder().double().eval(), {"ids": IDS})
    labels = torch.cat([IDS, IDS], 1)
    torch.testing.assert_close(small(labels=labels), masked(labels=labels))


class Asking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 6] to [batch, length, 4]."""
        hidden = torch.relu(self.body(x))
        return self.head(hidden if x.is_contiguous() else hidden.flip(-1))


@pytest.mark.parametrize(
    "change", [lambda x: x[:, ::2], lambda x: x[:1].expand(2, -1, -1), lambda x: x.transpose(0, 1)]
)
def test_a_tensor_with_steps_or_repeats_in_memory_is_refused(change: Callable[[Tensor], Tensor]) -> None:
    """A copy of it would be contiguous."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small, masked = pruned(Asking().double().eval(), as_double(X))
    torch.testing.assert_close(small(as_double(X)), masked(as_double(X)))
    with pytest.raises(sc.InputError, match="is_contiguous"):
        small(change(as_double(X)))


def test_inside_vmap_an_axis_less_is_looked_into() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixes, _ = pruned(Net(centred).double().eval(), as_double(X))
        small, masked = pruned(Net(seen).double().eval(), as_double(X))
    x = as_double(X)
    torch.testing.assert_close(torch.vmap(small)(x), torch.vmap(masked)(x))
    with pytest.raises(sc.InputError, match="ndim"):
        torch.vmap(mixes)(x)


class Detector(nn.Module):
    """Gives the loss for a batch with its labels; the loss has numbers that kept sizes may equal."""

    def __init__(self, *, mixes: bool) -> None:
        super().__init__()
        self.a, self.b, self.mixes = nn.Linear(4, 12), nn.Linear(12, 3), mixes

    def forward(self, x: Any) -> Tensor:
        h = self.a(x["x"] if isinstance(x, dict) else x).relu()
        if not isinstance(x, dict):
            return self.b(h)
        y = self.b(h.softmax(-1) if self.mixes else h)
        numbers = torch.arange(6, dtype=y.dtype) + torch.ones(9, dtype=y.dtype).sum()
        weights = (x["y"] + 1).pow(6.0) / 9
        return ((y - x["y"]).square() * weights).sum() + numbers.sum() * y.mean()


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("removed", [3, 6, 9])
def test_a_batch_with_labels_in_place_of_a_tensor(removed: int, mixes: bool) -> None:
    torch.manual_seed(0)
    model, x = Detector(mixes=mixes).double().eval(), torch.randn(2, 4).double()
    graph = sc.trace(model, x)
    scores = sc.score(graph, None, "magnitude", progress=False)
    plan = sc.Uniform(ratio=removed / 12, removal="magnitude").allocate(graph, scores)
    small, masked = sc.apply(model, plan, "module", graph=graph), sc.apply(model, plan, "masked")
    batch = {"x": torch.randn(6, 4).double(), "y": torch.rand(6, 3).double(), "names": ["a"] * 6}
    if mixes:
        with pytest.raises(sc.InputError, match="expected arguments as when the model was traced"):
            small(batch)
    else:
        torch.testing.assert_close(small(batch), masked(batch))
