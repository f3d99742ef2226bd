from __future__ import annotations

import io
import random
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from secateur.calibration import Batch, Calibration, ending, seeded
from secateur.errors import CalibrationError, SettingError

X, Y = torch.arange(40.0).reshape(20, 2), torch.arange(20) % 3


class Noisy(Dataset):
    """Augments with every generator there is."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(()) + random.random() + np.random.random()  # noqa: NPY002
        return X[index] + noise, int(Y[index])


class Stream(IterableDataset):
    """Has no length."""

    def __iter__(self):
        return iter(X)


def values(calibration: Any) -> list[list[float]]:
    return [batch.args[0].flatten().tolist() for batch in calibration]


def states() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002


# What a batch may be


Pair = namedtuple("Pair", ["inputs", "labels"])


@pytest.mark.parametrize(
    ("raw", "args", "kwargs", "labelled"),
    [
        (X, 1, [], False),
        ((X,), 1, [], False),
        ([X], 1, [], False),
        ((X, Y), 1, [], True),
        ([X, Y], 1, [], True),
        (Pair(X, Y), 1, [], True),
        (((X, X), Y), 2, [], True),
        (([X, X, X],), 3, [], False),
        (({"a": X, "b": X}, Y), 0, ["a", "b"], True),
        ({"a": X, "labels": Y}, 0, ["a"], True),
        ({"a": X, "label": Y}, 0, ["a"], True),
        (OrderedDict(a=X), 0, ["a"], False),
        ((X, Y.tolist()), 1, [], True),
        ((X, Y.numpy()), 1, [], True),
        ((X, [{"boxes": X}]), 1, [], False),
        ((X, None), 1, [], False),
    ],
)
def test_kinds_of_batch(raw: Any, args: int, kwargs: list[str], labelled: bool) -> None:
    batch = Batch.of(raw)
    assert (len(batch.args), list(batch.kwargs), batch.size) == (args, kwargs, 20)
    assert batch.raw is raw
    if labelled:
        assert torch.equal(batch.classes(), Y)
    else:
        assert batch.labels is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ((X, X, Y), "batch 4: expected .* got tuple of 3. Wrap several inputs"),
        ((), "got tuple of 0"),
        ("text", "got str"),
        (3, "got int"),
        ((["a", "b"], Y), "expected inputs that are tensors, got str"),
        ({"text": "a", "labels": Y}, "expected inputs that are tensors, got str"),
        (({}, Y), "expected inputs that are tensors, got nothing"),
        ((torch.zeros(0, 3), Y), r"at least one sample along axis 0, got shape \[0, 3\]"),
        (torch.tensor(1.0), r"at least one sample along axis 0, got shape \[\]"),
    ],
)
def test_batches_that_cannot_be_used(raw: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        Batch.of(raw, 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool])
def test_classes_of_any_integer_type(dtype: torch.dtype) -> None:
    classes = Batch.of((X[:2], torch.tensor([0, 1], dtype=dtype))).classes()
    assert classes.dtype == torch.int64
    assert classes.tolist() == [0, 1]


def test_dtypes_stay_and_devices_follow() -> None:
    batch = Batch.of((X.half(), {"boxes": [X.double()]}))
    moved = batch.to("meta")
    assert moved.args[0].device.type == moved.raw[1]["boxes"][0].device.type == "meta"
    assert moved.args[0].dtype == torch.float16
    assert batch.to("cpu") is batch
    assert next(iter(Calibration.of([X]).to("meta"))).args[0].device.type == "meta"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_name_the_batch(value: float) -> None:
    bad = X.clone()
    bad[3, 1] = value
    with pytest.raises(CalibrationError, match=r"calibration batch 1: .* NaN or infinity .* shape \[20, 2\]"):
        list(Calibration.of([(X, Y), (bad, Y)]))
    with pytest.raises(CalibrationError, match="batch 0"):
        list(Calibration.of([{"a": X, "b": [bad]}]))


# Where batches come from


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        (DataLoader(TensorDataset(X, Y), batch_size=8), [8, 8, 4]),
        (TensorDataset(X, Y), [16, 4]),
        (Stream(), [16, 4]),
        ([(X, Y)] * 3, [20, 20, 20]),
        (X, [10, 10]),
        ((X, Y), [10, 10]),
        ({"a": X, "labels": Y}, [10, 10]),
        ((batch for batch in [(X, Y)] * 2), [20, 20]),
    ],
)
def test_sources(data: Any, sizes: list[int]) -> None:
    calibration = Calibration.of(data, batch_size=16)
    for _ in range(2):
        assert [batch.size for batch in calibration] == sizes
    assert [batch.index for batch in calibration] == list(range(len(sizes)))
    assert calibration.first().size == sizes[0]
    assert Calibration.of(calibration) is calibration


def test_rows_by_index_are_a_dataset_too() -> None:
    class Rows:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> torch.Tensor:
            return X[index]

    assert values(Calibration.of(Rows())) == [X[:3].flatten().tolist()]


@pytest.mark.parametrize(("data", "got"), [(3, "int"), ("path", "str"), (None, "NoneType")])
def test_no_source(data: Any, got: str) -> None:
    with pytest.raises(
        CalibrationError, match=f"expected a DataLoader, a Dataset or an iterable .* got {got}"
    ):
        Calibration.of(data)


@pytest.mark.parametrize("data", [[], DataLoader(TensorDataset(X), batch_size=32, drop_last=True)])
def test_empty(data: Any) -> None:
    calibration = Calibration.of(data)
    with pytest.raises(CalibrationError, match="expected at least one batch, got an empty loader"):
        list(calibration)
    with pytest.raises(CalibrationError, match="got an empty loader"):
        calibration.first()


def test_batch_size_out_of_range() -> None:
    with pytest.raises(SettingError, match="batch_size of at least 1, got 0"):
        Calibration.of(X, batch_size=0)


# Every pass is the same, and moves nobody's random numbers


def loaders() -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    sampler = torch.utils.data.RandomSampler(TensorDataset(X), generator=generator)
    return [
        DataLoader(Noisy(), batch_size=5, shuffle=True),
        DataLoader(Noisy(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1)),
        DataLoader(TensorDataset(X), batch_size=5, sampler=sampler),
    ]


@pytest.mark.parametrize("which", range(3))
def test_passes_are_the_same(which: int) -> None:
    loader = loaders()[which]
    calibration = Calibration.of(loader)
    before = states()
    first = values(calibration)
    assert states() == before
    torch.rand(3), random.random(), np.random.random()  # noqa: NPY002 a caller draws between passes,
    second = []
    for batch in calibration:
        second.append(batch.args[0].flatten().tolist())
        torch.rand(3), random.random(), np.random.random()  # noqa: NPY002 and between batches
    assert second == first
    list(loader)  # even if the loader is used elsewhere in between
    assert values(calibration) == first
    if which != 2:
        assert first != sorted(first)  # it did shuffle


def test_the_caller_draws_its_own_numbers_between_batches() -> None:
    with seeded(7):
        expected = torch.rand(3).tolist()
    drawn = []
    with seeded(7):
        for _ in Calibration.of(DataLoader(Noisy(), batch_size=4, shuffle=True)):
            drawn.append(float(torch.rand(())))
    assert drawn == expected


def test_a_loaders_generator_is_put_back() -> None:
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(X), batch_size=4, shuffle=True, generator=generator)
    calibration = Calibration.of(loader)
    state = generator.get_state()
    values(calibration)
    assert torch.equal(generator.get_state(), state)
    for _ in calibration:  # also if the pass is given up
        break
    assert torch.equal(generator.get_state(), state)


def test_some_batches_are_those_of_the_whole_pass() -> None:
    calibration = Calibration.of(DataLoader(Noisy(), batch_size=2, shuffle=True))
    whole = values(calibration)
    some = list(calibration.batches(takes=lambda index: index % 3 == 1))
    assert [batch.index for batch in some] == [1, 4]
    assert [batch.args[0].flatten().tolist() for batch in some] == [whole[1], whole[4]]
    assert list(calibration.batches(takes=lambda index: False)) == []


def test_seeds_differ() -> None:
    a, b, c = (values(Calibration.of(DataLoader(Noisy(), batch_size=4), seed=s)) for s in (0, 0, 1))
    assert a == b
    assert a != c


def test_seeded_restores_after_an_exception() -> None:
    before = states()

    def draw_and_fail() -> None:
        with seeded(3):
            torch.rand(1), random.random()
            raise KeyError

    with pytest.raises(KeyError):
        draw_and_fail()
    assert states() == before


class Once:
    """Gives the same iterator again and again."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = iter(batches)

    def __iter__(self) -> Iterator[Any]:
        return self.batches


@pytest.mark.parametrize("wrap", [iter, Once])
def test_what_can_be_read_once_is_kept(wrap: Any) -> None:
    batches = [(torch.full((2, 3), float(k)), torch.tensor([0, 1])) for k in range(5)]
    model, data = torch.nn.Linear(3, 2), wrap(batches)
    assert values(Calibration.of(data, model=model)) == values(Calibration.of(batches))
    with pytest.raises(CalibrationError, match=r"that has none left\. An iterator gives its"):
        Calibration.of(data, model=model)


def endless() -> Iterator[torch.Tensor]:
    while True:
        yield torch.zeros(2, 1)


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return endless()


def test_data_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "MOST", 50)
    for source in (DataLoader(Endless(), batch_size=None), endless()):
        with pytest.raises(CalibrationError, match=r"more than 50 .*Pass Calibration\.of\(data, samples="):
            list(Calibration.of(source))


def test_an_iterator_that_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_free_memory", lambda: 200)
    with pytest.raises(CalibrationError, match="whose batches fit into memory, got more than 12 of them"):
        Calibration.of(endless())
    assert len(list(Calibration.of([torch.zeros(2, 1)] * 50))) == 50


@pytest.mark.parametrize(
    "source",
    [endless, lambda: DataLoader(Endless(), batch_size=None), lambda: [torch.zeros(2, 1)] * 9],
)
def test_at_most_so_many_samples(source: Any) -> None:
    data = Calibration.of(source(), samples=7)
    for again in (data, Calibration.of(data, model=torch.nn.Linear(1, 1))):
        assert again.samples() == 8  # whole batches
        assert [part.samples() for part in again.split()] == [7, 1]
    assert Calibration.of(data, samples=3).samples() == 4
    with pytest.raises(SettingError, match="expected samples of at least 1, got 0"):
        Calibration.of([torch.zeros(2, 1)], samples=0)


# Holding out


@pytest.mark.parametrize(("batches", "held"), [(5, [4]), (11, [4, 9]), (9, [4])])
def test_every_fifth_batch_is_held_out(batches: int, held: list[int]) -> None:
    data = [(torch.full((2, 1), float(i)), torch.zeros(2)) for i in range(batches)]
    fit, rest = Calibration.of(data).split()
    assert [v[0] for v in values(rest)] == held
    assert [v[0] for v in values(fit)] == [i for i in range(batches) if i not in held]
    assert (fit.count(), rest.count()) == (batches - len(held), len(held))


@pytest.mark.parametrize(
    ("sizes", "fit_samples", "held_samples"), [([20], 16, 4), ([6, 6], 10, 2), ([3], 2, 1), ([2], 1, 1)]
)
def test_few_batches_are_cut_first(sizes: list[int], fit_samples: int, held_samples: int) -> None:
    inputs = torch.arange(float(sum(sizes)))[:, None].split(sizes)
    data = [(x, x[:, 0].long()) for x in inputs]
    fit, held = Calibration.of(data).split(5)
    parts = [[v for batch in values(part) for v in batch] for part in (fit, held)]
    assert [len(part) for part in parts] == [fit_samples, held_samples]
    assert sorted(parts[0] + parts[1]) == list(range(sum(sizes)))
    assert all(torch.equal(b.classes(), b.args[0][:, 0].long()) for part in (fit, held) for b in part)


def test_cutting_shares_what_is_not_a_sample() -> None:
    pieces = Batch.of({"x": X, "scale": torch.ones(3), "labels": Y}).cut(3)
    assert [p.size for p in pieces] == [6, 7, 7]
    assert all(p.kwargs["scale"].shape == (3,) for p in pieces)
    assert torch.equal(torch.cat([p.classes() for p in pieces]), Y)


def test_split_of_data_that_shuffles_and_has_no_length() -> None:
    shuffled = Calibration.of(DataLoader(TensorDataset(X), batch_size=2, shuffle=True), seed=2)
    fit, held = shuffled.split(5)
    assert sorted(values(fit) + values(held)) == sorted(values(shuffled))
    assert values(held) == values(held) == [values(shuffled)[i] for i in (4, 9)]
    endless = Calibration.of(DataLoader(Stream(), batch_size=2))
    assert [part.count() for part in endless.split(5)] == [8, 2]


def test_a_single_sample_cannot_be_split() -> None:
    with pytest.raises(CalibrationError, match="expected at least two samples, got 1"):
        Calibration.of([(X[:1], Y[:1])]).split()
    with pytest.raises(CalibrationError, match="expected at least two samples, got 0"):
        Calibration.of([]).split()
    with pytest.raises(SettingError, match="every of at least 2, got 1"):
        Calibration.of([X]).split(1)


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"),
    [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)],
)
def test_a_bar_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], progress: bool, shown: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream())
    assert len(list(Calibration.of([X] * 3).batches("Scoring", progress))) == 3
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("Scoring" in written and "3/3" in written) == shown
    assert bool(written) == shown


def test_recut_cuts_what_can_be_cut() -> None:
    data = Calibration.of(
        [(torch.arange(7.0)[:, None], torch.arange(7)), (torch.zeros(2, 1), torch.zeros(2))]
    )
    cut = data.recut(3)
    assert (cut.count(), cut.samples()) == (4, 9)
    assert [b.size for b in cut] == [2, 2, 3, 2]
    assert torch.cat([b.args[0] for b in cut][:3]).flatten().tolist() == [*range(7)]
    assert torch.cat([b.labels for b in cut][:3]).tolist() == [*range(7)]  # type: ignore[misc]
    whole = Calibration.of([torch.zeros(7, 1)], whole=True).recut(3)
    assert [b.size for b in whole] == [7]
