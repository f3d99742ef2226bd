"""Sizes that depend on values of integer inputs: packed sequences, segments, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import secateur as sc
from secateur.graph.branches import capture_branches

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
Options = dict[str, Any]


class Tagger(nn.Module):
    """A recurrent layer on packed sequences."""

    def __init__(self, kind: str = "lstm", **options: Any) -> None:
        super().__init__()
        self.options = {"first": True, "sorted": False, "total": False, "last": False, **options}
        both, layers = options.get("both", False), options.get("layers", 1)
        self.inner = nn.Linear(5, 12)
        self.rnn = KINDS[kind](12, 9, layers, batch_first=self.options["first"], bidirectional=both)
        self.mid, self.out = nn.Linear(18 if both else 9, 14), nn.Linear(14, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """[batch, steps, 5] (or steps first) and [batch] to scores."""
        o = self.options
        h = self.inner(x).relu()
        packed = pack_padded_sequence(h, lengths, batch_first=o["first"], enforce_sorted=o["sorted"])
        found, state = self.rnn(packed)
        if o["last"]:
            hidden = state[0] if isinstance(state, tuple) else state
            return self.out(self.mid(hidden.transpose(0, 1).flatten(1)).relu())
        steps = x.shape[1 if o["first"] else 0] if o["total"] else None
        y, _ = pad_packed_sequence(found, batch_first=o["first"], total_length=steps, padding_value=0.5)
        return self.out(self.mid(y).relu())


PACKED: dict[str, tuple[str, Options]] = {
    "lstm": ("lstm", {}),
    "gru": ("gru", {}),
    "rnn": ("rnn", {}),
    "both": ("lstm", {"both": True, "total": True}),
    "deep": ("gru", {"layers": 2}),
    "sorted": ("lstm", {"sorted": True}),
    "steps first": ("gru", {"first": False, "both": True}),
    "total, steps first": ("lstm", {"first": False, "total": True, "sorted": True}),
    "last": ("gru", {"last": True, "both": True}),
}
LENGTHS = [[7, 5, 2], [9, 4], [3], [6, 6, 6, 6], [5, 5, 3, 1, 1]]
"""The first are those of the trace."""


def sentences(lengths: list[int], steps: int, *, first: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    x = torch.randn(len(lengths), steps, 5, generator=generator).double()
    return x if first else x.transpose(0, 1).contiguous(), torch.tensor(lengths)


def pruned(model: nn.Module, inputs: Any, form: Any = "module") -> tuple[Any, Any, Any, Any]:
    """The graph, the plan, and the model in this form and masked."""
    graph = sc.trace(model, inputs)
    keep = {g.name: np.arange(g.size) % 3 != 1 for g in graph.groups}
    plan = sc.Plan.build(graph, keep, allocator="every third")
    small, masked = (sc.apply(model, plan, f, graph=graph) for f in (form, "masked"))
    return graph, plan, small, masked


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name: str) -> None:
    kind, options = PACKED[name]
    torch.manual_seed(0)
    model = Tagger(kind, **options).double().eval()
    first = options.get("first", True)
    inputs = sentences(LENGTHS[0], 7, first=first)
    graph, plan, small, masked = pruned(model, inputs)
    names = [group.name for group in graph.groups]
    assert names == ["inner", "rnn", "mid"]
    assert graph.values == ("lengths",)
    assert type(small) is Tagger
    for lengths in LENGTHS:
        for steps in {max(lengths), max(lengths) + 2} if options.get("total") else {max(lengths)}:
            args = sentences(lengths, steps, first=first)
            with torch.no_grad():
                torch.testing.assert_close(small(*args), masked(*args), rtol=1e-9, atol=1e-10)
    assert sc.verify(model, small, plan, inputs).difference < 1e-9
    with pytest.raises(sc.ApplyError, match=r"depend on lengths: a captured program is right for one value"):
        sc.apply(model, plan, "graph", graph=graph)


def test_scores_are_those_of_each_batch_with_its_own_lengths() -> None:
    torch.manual_seed(0)
    model = Tagger("lstm", last=True).double().eval()
    graph = sc.trace(model, sentences([7, 5, 2], 7))
    batches = [sentences(lengths, 7) for lengths in ([7, 5, 2], [7, 7, 1], [7, 3, 3])]
    found = sc.score(graph, [(batch, None) for batch in batches], "activation", progress=False)
    shown: list[Tensor] = []
    hook = model.mid.register_forward_hook(lambda m, args, output: shown.append(output.relu().abs().mean(0)))
    for batch in batches:
        model(*batch)
    hook.remove()
    wanted = torch.stack(shown).mean(0).detach().numpy()
    np.testing.assert_allclose(found["activation"]["mid"], wanted, rtol=1e-9)
    assert len(graph.programs) == 3


class Coded(nn.Module):
    """Linear layers around code of the user's."""

    def __init__(self, code: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.o, self.code = nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 3), code

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        """[rows, 5], and how many rows each segment has: [segments]."""
        return self.o(self.b(self.code(self, self.a(x).relu(), n)).relu())


def split(m: Any, h: Tensor, n: Tensor) -> Tensor:
    return torch.cat([part - part.mean(0) for part in torch.split(h, n.tolist())])


def ranges(m: Any, h: Tensor, n: Tensor) -> Tensor:
    starts = torch.cat([n.new_zeros(1), n.cumsum(0)])
    return torch.stack([h[starts[k] : starts[k + 1]].mean(0) for k in range(len(n))])


def loop(m: Any, h: Tensor, n: Tensor) -> Tensor:
    found, start = [], 0
    for count in n:
        if count > 2:
            found.append(h[start : start + int(count)].amax(0))
        start += int(count)
    return torch.stack([*found, h.sum(0)])


def repeated(m: Any, h: Tensor, n: Tensor) -> Tensor:
    means = torch.stack([part.mean(0) for part in h.split(n.tolist())])
    return h - means.repeat_interleave(n, 0)


def counted(m: Any, h: Tensor, n: Tensor) -> Tensor:
    segment = torch.repeat_interleave(torch.arange(len(n)), n)
    sums = h.new_zeros(int(segment.max()) + 1, h.shape[1]).index_add(0, segment, h)
    return sums / n.clamp(min=1)[:, None]


def chosen(m: Any, h: Tensor, n: Tensor) -> Tensor:
    first = torch.zeros(len(h), dtype=torch.bool)
    first[n.cumsum(0) - n] = True
    return h[first] * 2


def written(m: Any, h: Tensor, n: Tensor) -> Tensor:
    ends = n.clone()
    ends += 1
    view = ends[1:]
    view.fill_(2)
    return h[: int(ends.sum()) % 5 + 1]


def halved(m: Any, h: Tensor, n: Tensor) -> Tensor:
    return torch.stack([part[: int((n.float() / 2).ceil().long().min())].sum(0) for part in h.split(list(n))])


def listed(m: Any, h: Tensor, n: Tensor) -> Tensor:
    order = torch.tensor([k for k, count in enumerate(n) if count > 1])
    return h[order] + torch.ones(len(order), h.shape[1])


CODES = [split, ranges, loop, repeated, counted, chosen, written, halved, listed]
SEGMENTS = [[3, 2, 4], [4, 4, 1], [1, 5, 3], [2, 2, 2], [6, 3]]


def rows(segments: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(segments))
    return torch.randn(sum(segments), 5, generator=generator).double(), torch.tensor(segments)


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_code_that_asks_for_values(code: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Coded(code).double().eval()
    (captured, *_) = capture_branches(model, rows(SEGMENTS[0]), {})
    args = rows(SEGMENTS[0])
    torch.testing.assert_close(captured.program.module()(*args), model(*args))
    _, _, small, masked = pruned(model, args)
    assert type(small) is Coded
    for segments in SEGMENTS:
        args = rows(segments)
        torch.testing.assert_close(small(*args), masked(*args), rtol=1e-9, atol=1e-10)


def test_values_of_units_are_not_taken_for_known() -> None:
    def listed(h: Tensor, n: Tensor) -> Tensor:
        return h[:, n.tolist()].repeat(1, 4)

    def sliced(h: Tensor, n: Tensor) -> Tensor:
        return h[..., : int(n[0])].sum(-1, keepdim=True).expand(-1, 12)

    def one(h: Tensor, n: Tensor) -> Tensor:
        return h * h[:, n.tolist()[0]][:, None]

    def cut(h: Tensor, n: Tensor) -> Tensor:
        first, second = torch.split(h, [int(n[0]), 12 - int(n[0])], dim=1)
        return first.sum(1, keepdim=True) + second.mean(1, keepdim=True).expand(-1, 12)

    def rolled(h: Tensor, n: Tensor) -> Tensor:
        return h.roll(n.tolist()[0] - 3, 1)

    for code in (listed, sliced, one, cut, rolled):
        torch.manual_seed(0)
        model = Coded(lambda m, h, n, code=code: code(h, n)).double().eval()
        x, _ = rows([3, 2, 4])
        graph, _, small, masked = pruned(model, (x, torch.tensor([3, 2, 4])))
        assert [group.name for group in graph.groups] == ["b"], code.__name__
        for values in ([3, 2, 4], [1, 2, 4], [11, 10, 9], [7, 8, 0]):
            n = torch.tensor(values)
            torch.testing.assert_close(small(x, n), masked(x, n))


def test_lengths_that_are_not_known_are_refused_in_words() -> None:
    class Guessed(Tagger):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return super().forward(x, (lengths.double() * x.abs().mean().clamp(max=1)).ceil().long())

    for kind in KINDS:
        with pytest.raises(sc.CaptureError, match=r"test_knownvalues.py:\d+: .*packed by lengths") as raised:
            sc.trace(Guessed(kind).double().eval(), sentences([7, 5, 2], 7))
        assert len(str(raised.value)) < 600


def threshold(m: Any, h: Tensor, n: Tensor) -> Tensor:
    h = (torch.relu, torch.tanh)[n.tolist()[0] % 2](h[: int(n[0])])
    return h.softmax(-1) if n.tolist()[0] > 8 else h


def far(m: Any, h: Tensor, n: Tensor) -> Tensor:
    count = n.tolist()[0]
    h = (torch.relu, torch.tanh)[count % 2](h[: count % 5 + 1])
    if count - 1 == 39:
        h = h.flip(-1)
    if n[1] > 50:
        h = h.sort(-1).values
    return h


def times(m: Any, h: Tensor, n: Tensor) -> Tensor:
    for _ in range(int(n[0]) - 2):  # not once at the trace
        h = h.softmax(-1)
    return h[: int(n[1])]


def parity(m: Any, h: Tensor, n: Tensor) -> Tensor:
    count = n.tolist()[0]
    return (lambda v: v, lambda v: v.cumsum(-1))[count % 2](h[:count])


def keyed(m: Any, h: Tensor, n: Tensor) -> Tensor:
    count = n.tolist()[0]
    return {2: torch.tanh, 4: lambda v: v.softmax(-1)}.get(count, torch.relu)(h[:count])


def shifted(m: Any, h: Tensor, n: Tensor) -> Tensor:
    count = n.tolist()[0]
    return h[:count].roll(count - 2, -1)


@pytest.mark.parametrize("code", [threshold, far, times, parity, keyed, shifted], ids=lambda c: c.__name__)
def test_what_other_values_make_the_code_do(code: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Coded(code).double().eval(), torch.randn(9, 5).double()
    graph, _, small, masked = pruned(model, (x, torch.tensor([2, 2])))
    assert graph.values == ("n",)
    for values in ([2, 2], [1, 3], [4, 4], [5, 1], [8, 8], [9, 2], [40, 2], [41, 2], [2, 51], [3, 9]):
        n = torch.tensor(values)
        torch.testing.assert_close(small(x, n), masked(x, n))
