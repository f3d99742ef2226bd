"""Padding counts for nothing: padded batches give what each sample gives at its own length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.calibration.batch import Batch
from secateur.calibration.padding import Padding
from secateur.calibration.reading import Reading
from secateur.measure.evaluate import evaluate

WORDS, LENGTHS = 12, (7, 3, 5, 4)


class Tokens(nn.Module):
    """A block of a transformer whose mask has the name that PyTorch or Transformers gives it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.embed = nn.Embedding(WORDS, 8)
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, src_key_padding_mask: Any = None
    ) -> Tensor:
        """Ids [batch, length] to scores of tokens [batch, length, 5]."""
        real = attention_mask.bool() if self.name == "attention_mask" else ~src_key_padding_mask
        x = self.embed(input_ids)
        logits = self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5
        logits = logits.masked_fill(~real[:, None], -torch.inf)
        x = x + self.out(logits.softmax(-1) @ self.value(x))
        return self.head(x + self.down(self.up(x).relu()))


def network(name: str = "attention_mask") -> Tokens:
    torch.manual_seed(0)
    return Tokens(name).double().eval()


def samples(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, WORDS, (n,), generator=generator) for n in LENGTHS]


def padded(ids: list[Tensor], name: str = "attention_mask", *, left: bool = False) -> dict[str, Tensor]:
    """A batch as long as its longest sample, with other words as padding."""
    longest = max(map(len, ids))
    words, real = torch.full((len(ids), longest), 3), torch.zeros(len(ids), longest, dtype=torch.bool)
    for k, sample in enumerate(ids):
        place = slice(longest - len(sample), None) if left else slice(len(sample))
        words[k, place], real[k, place] = sample, True
    return {"input_ids": words, name: real.long() if name == "attention_mask" else ~real}


def labelled(batches: list[dict[str, Tensor]]) -> list[Any]:
    """Batches with the classes 0, 1, 0, 1, ... of their samples."""
    count = 0
    found = []
    for batch in batches:
        size = len(batch["input_ids"])
        found.append((batch, (torch.arange(size) + count) % 2))
        count += size
    return found


SIGNALS = ("activation", "apoz", "rank", "wanda", "fluctuation", "reconstruction", "wasserstein")


def by_position(batch: dict[str, Tensor]) -> Any:
    """The same arguments by position, as `forward` of `Tokens` orders them."""
    ids, attention = batch["input_ids"], batch.get("attention_mask")
    return (ids, attention) if attention is not None else (ids, None, batch["src_key_padding_mask"])


WAYS: dict[str, Any] = {
    "named": (None, lambda batch, labels: (batch, labels)),
    "position": (None, lambda batch, labels: (by_position(batch), labels)),
    "listed": (None, lambda batch, labels: [list(by_position(batch)), labels]),
    "called": (
        lambda model, batch: model(*by_position(batch[0])),
        lambda batch, labels: (batch, labels),
    ),
    "mixed": (
        lambda model, batch: model(
            batch[0]["input_ids"], **{k: v for k, v in batch[0].items() if "mask" in k}
        ),
        lambda batch, labels: (batch, labels),
    ),
}
"""A function that calls the model, and one that makes a batch of arguments and labels."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["attention_mask", "src_key_padding_mask"])
def test_a_mask_counts_by_position_as_by_name(name: str, way: str) -> None:
    model, ids = network(name), samples() + samples(1)
    forward, given = WAYS[way]
    batches = labelled([padded(ids[:4], name), padded(ids[4:], name)])
    data = [given(*batch) for batch in batches]
    graph = sc.trace(model, data[0], forward=forward) if forward else sc.trace(model, data[0][0])
    found = sc.score(graph, data, SIGNALS, forward=forward, progress=False)
    wanted = sc.score(graph, labelled([padded([s], name) for s in ids]), SIGNALS, progress=False)
    for signal in SIGNALS:
        for group in graph.groups:
            mine, alone = (np.asarray(of[signal][group.name]) for of in (found, wanted))
            np.testing.assert_allclose(mine, alone, rtol=1e-8, atol=1e-10, err_msg=f"{signal} {group.name}")


@pytest.mark.parametrize("form", ["module", "graph"])
def test_a_distance_by_position_is_that_by_name(form: Any) -> None:
    model, batch = network(), padded(samples())
    graph = sc.trace(model, by_position(batch))
    plan = sc.Uniform(ratio=0.4).allocate(graph, sc.score(graph, None, "magnitude"))
    small = sc.apply(model, plan, form, graph=graph)
    named = sc.apply(model, plan, "masked", graph=graph)
    found = evaluate(small, [(by_position(batch), None)], dense=model, progress=False).loss
    assert found == pytest.approx(evaluate(named, [batch], dense=model, progress=False).loss, rel=1e-9)


def test_an_encoder_of_pytorch_takes_its_mask_by_position() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 8, generator=generator).double()
    hidden = torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]
    both = [((x, None, hidden), torch.zeros(3).long()), ({"src": x, "src_key_padding_mask": hidden}, None)]
    padding = [Batch.of(raw, 0, Reading(model)).padding for raw in both]
    for found in padding:
        assert found.rows(18, x.device).tolist() == torch.nonzero(~hidden.flatten())[:, 0].tolist()
    square = torch.zeros(6, 6).bool()  # of queries and keys, which hides no position of a sample
    assert Batch.of(((x, square), None), 0, Reading(model)).padding.masks == ()


@pytest.mark.parametrize("name", ["attention_mask", "src_key_padding_mask"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_scores_are_those_of_the_samples_at_their_own_lengths(name: str, left: bool) -> None:
    model, ids = network(name), samples() + samples(1)
    batches = [padded(ids[:4], name, left=left), padded(ids[4:], name, left=left)]
    graph = sc.trace(model, batches[0])
    assert [group.name for group in graph.groups]
    found = sc.score(graph, labelled(batches), SIGNALS, progress=False)
    wanted = sc.score(graph, labelled([padded([s], name) for s in ids]), SIGNALS, progress=False)
    full = [{**b, name: torch.full_like(b[name], name == "attention_mask")} for b in batches]
    otherwise = sc.score(graph, labelled(full), SIGNALS, progress=False)
    for signal in SIGNALS:
        for group in graph.groups:
            scores = (of[signal][group.name] for of in (found, wanted, otherwise))
            mine, alone, all_count = map(np.asarray, scores)
            np.testing.assert_allclose(mine, alone, rtol=1e-8, atol=1e-10, err_msg=f"{signal} {group.name}")
            assert signal == "rank" or not np.allclose(mine, all_count, rtol=1e-3)


def test_single_weights_do_not_count_it_either() -> None:
    model, ids = network(), samples()
    both = [padded(ids)], [padded([s]) for s in ids]
    weights = sc.trace(model, granularity="weight")
    scores, wanted = (sc.score(weights, data, "wanda", progress=False)["wanda"] for data in both)
    for name in wanted:
        np.testing.assert_allclose(scores[name], wanted[name], rtol=1e-6)
    how: Any = {"granularity": "weight", "allocator": sc.Uniform(ratio=0.5), "progress": False}
    small, other = (sc.prune(model, data, **how).model for data in both)
    for mine, theirs in zip(small.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["reconstruct", "bias", "polish", "divergence"])
def test_a_repair_is_that_of_the_same_batches_without_padding(method: str) -> None:
    model, generator = network(), torch.Generator().manual_seed(0)
    plain = [padded([torch.randint(1, WORDS, (5,), generator=generator) for _ in range(4)]) for _ in range(8)]
    longer = [
        {
            "input_ids": nn.functional.pad(b["input_ids"], (0, 3), value=3),
            "attention_mask": nn.functional.pad(b["attention_mask"], (0, 3)),
        }
        for b in plain
    ]
    graph = sc.trace(model, longer[0])
    plan = sc.Uniform(ratio=0.4).allocate(graph, sc.score(graph, None, "magnitude"))
    small = sc.apply(model, plan, graph=graph)
    hows = {
        "polish": sc.Polish(passes=1, batch=4),
        "divergence": sc.Polish(passes=1, batch=4, divergence=True),
    }
    how: Any = hows.get(method, method)
    mine, wanted = (
        sc.repair(small, model, data, (how,), graph=graph, progress=False) for data in (longer, plain)
    )
    assert sc.record_of(mine).repairs[0]["kept"]
    changed = 0
    states = (m.state_dict() for m in (mine, wanted, small))
    for ours, theirs, before in zip(*(state.values() for state in states), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
        changed += not torch.equal(ours, before)
    assert changed


@torch.no_grad()
def test_a_distance_does_not_see_padding() -> None:
    model, other = network(), network()
    with torch.no_grad():
        other.head.bias += 1
        other.embed.weight[3] += 1  # the word that is padding here, and nowhere else
    ids = [torch.tensor([1, 2, 4, 5, 6]), torch.tensor([2, 1])]
    found = evaluate(other, [padded(ids)], dense=model, progress=False).loss
    wanted = 0.0
    scale = 0.0
    for sample in ids:
        a, b = (m(**padded([sample])) for m in (other, model))
        wanted, scale = wanted + float((a - b).square().sum()), scale + float(b.square().sum())
    assert found == pytest.approx(wanted / scale, rel=1e-9)


def test_masks_that_disagree_or_do_not_fit_hide_nothing() -> None:
    ids, half = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    one = Padding.of({"input_ids": ids, "attention_mask": half})
    assert one.real(2, 4, ids.device).sum() == 5
    assert one.rows(8, ids.device).tolist() == [0, 1, 4, 5, 6]
    assert one.real(2, 5, ids.device) is None
    assert one.rows(3, ids.device).tolist() == [0, 1, 2]
    two = Padding.of({"input_ids": ids, "attention_mask": half, "decoder_attention_mask": half.flip(0)})
    assert len(two.masks) == 2
    assert two.real(2, 4, ids.device) is None
    whole = Padding.of({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert whole.masks == ()


def test_a_mask_of_one_side_hides_nothing_of_the_other() -> None:
    ids, half = torch.ones(2, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    whole, state = torch.ones_like(ids), torch.ones(2, 4, 8)
    sides: list[dict[str, Tensor]] = [
        {"input_ids": ids, "attention_mask": half, "decoder_input_ids": ids},
        {"input_ids": ids, "attention_mask": half, "decoder_input_ids": ids, "decoder_attention_mask": whole},
        {"src": state, "tgt": state, "src_key_padding_mask": half == 0},
        {"src": state, "tgt": state, "tgt_key_padding_mask": half == 0},
    ]
    for batch in sides:
        assert Padding.of(batch).real(2, 4, ids.device) is None
    longer = Padding.of({"src": state, "tgt": torch.ones(2, 5, 8), "src_key_padding_mask": half == 0})
    assert longer.rows(8, ids.device).tolist() == [0, 1, 4, 5, 6]
    assert longer.rows(10, ids.device).tolist() == [*range(10)]


@pytest.mark.parametrize("low", [-torch.inf, -1e4])
def test_a_mask_that_is_added_to_scores(low: float) -> None:
    added = torch.tensor([[0, 0, low, low], [0, 0, 0, low]])
    for name in ("attention_mask", "key_padding_mask"):
        assert Padding.of({name: added}).rows(8, added.device).tolist() == [0, 1, 4, 5, 6]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(20, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        found: Tensor = self.head(x + self.attend(x, x, x, key_padding_mask=key_padding_mask)[0])
        return found


@pytest.mark.parametrize(
    ("signal", "lengths"),
    [
        ("wanda", (7, 3, 5)),
        ("fluctuation", (7, 3, 5)),
        ("activation", (7, 3, 5)),
        ("wanda", (3, 1, 2)),  # as many positions as samples: the program says which are which
    ],
)
def test_positions_may_come_first_as_inside_attention_of_pytorch(
    signal: str, lengths: tuple[int, ...]
) -> None:
    """Both in [positions, samples, features] and in the rows that its last layer reads."""
    torch.manual_seed(0)
    model = Attending().double().eval()
    longest = max(lengths)
    ids = torch.randint(20, (len(lengths), longest))
    hidden = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    graph = sc.trace(
        model, {"ids": torch.ones(2, 5, dtype=torch.long), "key_padding_mask": hidden[:2, :1].expand(2, 5)}
    )
    padded = [{"ids": ids, "key_padding_mask": hidden}]
    alone = [
        {"ids": row[None, :n], "key_padding_mask": hidden[:1, :n]}
        for row, n in zip(ids, lengths, strict=True)
    ]
    found, wanted = (sc.score(graph, data, signal, progress=False).values[signal] for data in (padded, alone))
    assert set(wanted) == {"embed", "attend"}
    for group, values in wanted.items():
        np.testing.assert_allclose(found[group], values, rtol=1e-9)


class Packed(nn.Module):
    """Layers before and behind a recurrent layer that reads each sample to its own length.

    With `last`, they read its last states, else the states at all positions.
    """

    def __init__(self, kind: str, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.embed, self.up, self.down = nn.Embedding(WORDS, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.layer = getattr(nn, kind)(6, 8, batch_first=True)
        self.head = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Words [batch, length], of which `lengths` count [batch], to scores [batch, (length,) 3]."""
        x = self.down(self.up(self.embed(tokens)).relu())
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        states, last = self.layer(packed)
        if self.last:
            return self.head(last[0][0] if isinstance(last, tuple) else last[0])
        return self.head(nn.utils.rnn.pad_packed_sequence(states, batch_first=True)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("last", [True, False])
def test_lengths_tell_padding_as_masks_do(kind: str, last: bool) -> None:
    torch.manual_seed(0)
    model, ids = Packed(kind, last=last).double().eval(), samples()

    def batch(chosen: list[Tensor]) -> dict[str, Any]:
        lengths = torch.tensor([len(sample) for sample in chosen])
        return {"tokens": padded(chosen)["input_ids"], "lengths": lengths}

    graph = sc.trace(model, batch(ids))
    names = [group.name for group in graph.groups]
    assert set(names) == {"embed", "up", "down", "layer", "head.0"}
    data = [(batch(ids), torch.tensor([0, 1, 0, 1]))]
    alone = [(batch([s]), torch.tensor([k % 2])) for k, s in enumerate(ids)]
    found = sc.score(graph, data, SIGNALS, progress=False)
    wanted = sc.score(graph, alone, SIGNALS, progress=False)
    for signal in SIGNALS:
        for name in names:
            mine, theirs = (np.asarray(of[signal][name]) for of in (found, wanted))
            np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-10, err_msg=f"{signal} {name}")


def test_lengths_that_fit_no_value_hide_nothing() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    for lengths in (
        torch.tensor([5, 2]),
        torch.tensor([0, 2]),
        torch.tensor([1.0, 2.0]),
        [1, 2, 3],
        "ab",
        [],
    ):
        assert Padding.of({"input_ids": ids, "lengths": lengths}).masks == ()
    found = Padding.of({"input_ids": ids, "input_lengths": [4, 1]})
    assert found.rows(8, ids.device).tolist() == [0, 1, 2, 3, 4]
