"""Each sample in several views: which, of what, and that they stay together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur.calibration import Calibration, Views
from secateur.calibration.subset import take_share
from secateur.calibration.views import crop
from secateur.errors import CalibrationError, SettingError
from secateur.repairs import sweep
from secateur.repairs.judging import Judge
from secateur.repairs.methods import REPAIRS, Work
from secateur.repairs.repair import folds_of
from tests.repairs.nets import pruned


def pictures(samples: int = 12, channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, channels, size, size + 2, generator=generator)


def flat(samples: int = 12, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Pictures of one colour each, the sample's number: so is every crop of them."""
    numbers = torch.arange(samples)
    x = numbers[:, None, None, None].expand(samples, 3, 6, 6).float()
    return list(zip(x.split(size), numbers.split(size), strict=True))


def seen(data: Any, **settings: Any) -> list[list[Tensor]]:
    """For each view the inputs of all batches."""
    calibration = Calibration.of(data, **settings)
    found: list[list[Tensor]] = [[] for _ in range(calibration.repeats)]
    for batch in calibration:
        found[batch.index % calibration.repeats].append(batch.args[0])
    return found


def test_views_follow_each_batch_with_its_labels() -> None:
    data = flat()
    found = list(Calibration.of(data, views=3))
    assert [batch.index for batch in found] == list(range(12))
    for k, batch in enumerate(found):
        inputs, labels = data[k // 3]
        assert batch.labels is not None
        assert torch.equal(batch.labels, labels)
        torch.testing.assert_close(batch.args[0], inputs)
    calibration = Calibration.of(data, views=3)
    assert (calibration.count(), calibration.samples(), calibration.repeats) == (12, 12, 3)


def test_the_first_view_is_the_batch_the_second_its_mirror_image() -> None:
    x = pictures()
    whole, mirrored, cropped, other = (torch.cat(parts) for parts in seen(x, views=4, batch_size=5))
    assert torch.equal(whole, x)
    assert torch.equal(mirrored, x.flip(-1))
    for crops in (cropped, other):
        assert crops.shape == x.shape
        assert crops.dtype == x.dtype
        assert all(not torch.allclose(a, b) for a, b in zip(crops, x, strict=True))
    assert not torch.allclose(cropped, other)


def test_every_pass_sees_the_same_and_no_random_number_is_used_up() -> None:
    data = Calibration.of(pictures(), views=3, batch_size=4)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    one, two = ([batch.args[0] for batch in data] for _ in range(2))
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002
    assert all(map(torch.equal, one, two))
    another = [batch.args[0] for batch in Calibration.of(pictures(), views=3, batch_size=4, seed=1)]
    assert not torch.equal(one[2], another[2])


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 3))
def test_how_samples_come_in_batches_does_not_matter(sizes: list[int], seed: int) -> None:
    x = pictures(sum(sizes))
    cut = seen([(part,) for part in x.split(sizes)], views=3, seed=seed)
    whole = seen([(x,)], views=3, seed=seed)
    for parts, (one,) in zip(cut, whole, strict=True):
        torch.testing.assert_close(torch.cat(parts), one, rtol=0, atol=0)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    mirror=st.booleans(),
)
def test_a_crop_has_the_size_of_the_map_and_nothing_that_was_not_in_it(
    sizes: list[int], channels: int, seed: int, mirror: bool
) -> None:
    x = torch.rand(channels, *sizes, generator=torch.Generator().manual_seed(seed))
    found = crop(x, torch.Generator().manual_seed(seed), mirror=mirror)
    assert found.shape == x.shape
    low, high = (getattr(x.flatten(1), what)(1).values for what in ("min", "max"))
    assert bool((found.flatten(1) >= low[:, None] - 1e-6).all())
    assert bool((found.flatten(1) <= high[:, None] + 1e-6).all())


def test_only_colour_pictures_are_mirrored_unless_told() -> None:
    ramp = torch.arange(8.0) + 10 * torch.arange(20.0)[:, None, None, None].expand(
        20, 1, 8, 1
    )  # to the right
    for mirror, turned in ((None, False), (False, False), (True, True)):
        views = torch.cat([torch.cat(parts) for parts in seen([(ramp,)], views=Views(4, mirror=mirror))])
        assert bool((views[..., -1] < views[..., 0]).any()) == turned
    colours = torch.cat(seen([(ramp.expand(20, 3, 8, 8),)], views=3)[2])
    assert 0 < int((colours[:, 0, 0, -1] < colours[:, 0, 0, 0]).sum()) < 20
    plain = torch.cat(seen([(ramp.expand(20, 3, 8, 8),)], views=Views(3, mirror=False))[2])
    assert bool((plain[..., -1] > plain[..., 0]).all())


def test_bytes_stay_bytes_and_half_stays_half() -> None:
    x = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    for given_ in (x, x.half(), x.double()):
        for parts in seen([(given_,)], views=3):
            assert parts[0].dtype == given_.dtype
    (wanted,), (found,) = seen([(x.float(),)], views=3)[2], seen([(x,)], views=3)[2]
    assert float((wanted - found.float()).abs().max()) <= 0.5


@pytest.mark.parametrize("batches", [2, 12])
def test_views_of_a_sample_stay_together_where_a_part_is_held_out(batches: int) -> None:
    data = Calibration.of(flat(12, 12 // batches), views=4)
    halves = [data.split(), *folds_of(data)]
    assert len(halves) > 2
    for parts in halves:
        numbers = [[int(v) for b in part for v in b.args[0][:, 0, 0, 0].round()] for part in parts]
        assert not {*numbers[0]} & {*numbers[1]}
        assert sorted(numbers[0] + numbers[1]) == sorted([*range(12)] * 4)


def test_a_share_is_of_samples_with_all_their_views() -> None:
    data = Calibration.of(flat(64, 32), views=3)
    part = take_share(data, 0.5)
    assert part.samples() == 32
    found = torch.cat([b.args[0][:, 0, 0, 0].round() for b in part]).unique(return_counts=True)[1]
    assert found.tolist() == [3] * 32


class Net(nn.Sequential):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(6, 3),
        )  # fmt: skip


def test_views_of_a_sample_stay_together_in_cross_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = Net().eval(), pictures(12)
    graph, small = pruned(net, x[:2])
    counts: list[list[int]] = []
    fit = sweep.fit

    def noted(parts: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append([part.count for part in parts])
        return fit(parts, *args, **kwargs)

    monkeypatch.setattr(sweep, "fit", noted)
    copy = sc.repair(small, net, [(x,)], None)
    sweep.sweep("reconstruct", copy, graph, Calibration.of([(x[:8],), (x[8:],)], views=5))
    assert all(len(parts) == 2 and parts[0] == 2 * parts[1] for parts in counts)  # a part for each batch
    assert counts[-1] == [40, 20]


def test_what_judges_and_measures_takes_each_sample_once_as_it_is() -> None:
    net, data = Net().eval(), [(pictures(), torch.arange(12) % 3)]
    many, once = Calibration.of(data, views=3), Calibration.of(data)
    assert sc.evaluate(net, many) == sc.evaluate(net, once)
    torch.manual_seed(1)
    other = Net().eval()
    nn.init.normal_(other[5].weight)
    assert Judge(net, many).samples == 12
    assert np.array_equal(Judge(net, many)(other), Judge(net, once)(other))


def test_statistics_of_batch_norms_come_from_samples_as_they_are() -> None:
    graph, found = sc.trace(Net().eval(), pictures(2)), []
    for views in (1, 3):
        net = nn.Sequential(nn.BatchNorm2d(3)).eval()
        data = Calibration.of(list(pictures(60).split(12)), views=views)
        REPAIRS["batchnorm"].run(net, Work(lambda: graph, data))
        found.append([tensor.clone() for tensor in net.state_dict().values()])
    assert float(found[0][2].abs().max()) > 0  # the running mean was zero
    assert all(map(torch.equal, *found))


def test_scores_come_from_all_views_and_count_samples_once() -> None:
    net, data = Net().eval(), [(pictures(6), torch.arange(6) % 3), (pictures(6).flip(2), torch.arange(6) % 3)]
    graph = sc.trace(net, data[0][0])
    names = ("activation", "reconstruction")
    once, thrice = (sc.score(graph, Calibration.of(data, views=k), names, progress=False) for k in (1, 3))
    spelt = sc.score(graph, [b.raw for b in Calibration.of(data, views=3)], "activation", progress=False)
    assert once.samples == thrice.samples == 12
    for name in names:
        assert all(not np.allclose(values, once[name][group]) for group, values in thrice[name].items())
    for group, values in spelt["activation"].items():
        np.testing.assert_array_equal(values, thrice["activation"][group])


def test_prune_takes_views_and_says_so() -> None:
    torch.manual_seed(0)
    data = [(x, torch.arange(12) % 3) for x in pictures(60).split(12)]
    options: dict[str, Any] = {"repair": "reconstruct", "measure_latency": False, "progress": False}
    found = sc.prune(Net().eval(), data, sc.Budget(macs=0.6), "repair_aware", views=2, **options)
    assert found.report.asked["views"] == 2
    assert found.report.calibration["samples"] == 48
    assert found.report.figures[0].samples == 12
    assert found.report.repairs[0]["held_out_samples"] == 12
    plain = sc.prune(Net().eval(), data, sc.Budget(macs=0.6), "repair_aware", **options)
    assert "views" not in plain.report.asked
    of_data = sc.prune(
        Net().eval(), Calibration.of(data, views=2), sc.Budget(macs=0.6), "repair_aware", **options
    )
    assert of_data.plan.to_json() == found.plan.to_json()


def test_nobody_who_does_not_ask_gets_views() -> None:
    data = Calibration.of([(pictures(),)])
    assert data.views is None
    assert data.plain is data
    assert len(list(data)) == data.count() == 1


def test_a_calibration_keeps_its_views_until_it_is_given_others() -> None:
    data = Calibration.of([(pictures(),)], views=3)
    assert Calibration.of(data).repeats == Calibration.of(data, model=Net()).repeats == 3
    assert Calibration.of(data, views=1).repeats == data.plain.repeats == 1
    assert Calibration.of(data, views=Views(2)).repeats == 2
    assert len(list(Calibration.of(data, views=1))) == 1


def shifted(inputs: Any, k: int, generator: torch.Generator) -> Any:
    """Each sample plus k and a random number; draws from the global generators too, and writes in place."""
    x = inputs["x"] if isinstance(inputs, dict) else inputs
    x += k + torch.rand(1, generator=generator) + torch.rand(1)
    return inputs


class Named(nn.Module):
    """Takes one argument by name."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("form", ["tensor", "pair", "tuple", "mapping", "forward"])
def test_own_views_get_what_the_loader_gives(form: str) -> None:
    x = torch.arange(6.0)[:, None]
    raw: Any = {
        "tensor": x.clone(), "pair": (x.clone(), torch.arange(6)), "tuple": [x.clone()],
        "mapping": {"x": x.clone(), "labels": torch.arange(6)}, "forward": {"x": x.clone(), "weight": 3},
    }[form]  # fmt: skip
    forward = (lambda model, batch: model(batch["x"])) if form == "forward" else None
    state = torch.get_rng_state()
    data = Calibration.of([raw], views=shifted, forward=forward, model=Named())
    passes = [list(data) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    for one, two in zip(*passes, strict=True):
        mine, theirs = (b.args[0] if b.args else b.kwargs["x"] for b in (one, two))
        assert torch.equal(mine, theirs)
        assert one.index <= float((mine - x)[0]) <= one.index + 2
        torch.testing.assert_close(mine - x, (mine - x)[:1].expand_as(x))
        assert (one.labels is None) == (form in ("tensor", "tuple", "forward"))
    assert len(passes[0]) == 3
    assert torch.equal(passes[0][0].args[0] if passes[0][0].args else passes[0][0].kwargs["x"], x)


def test_pictures_within_a_batch_of_any_form_are_cropped() -> None:
    x, labels = pictures(), torch.arange(12)
    wanted = seen([(x, labels)], views=3)[2][0]
    forward = Calibration.of(
        [{"picture": x, "label": labels, "name": "a"}],
        views=3,
        forward=lambda model, batch: model(batch["picture"]),
    )
    (found,) = [batch for batch in forward if batch.index == 2]
    assert torch.equal(found.args[0], wanted)
    assert torch.equal(found.raw["picture"], wanted)
    assert found.labels is not None
    assert torch.equal(found.labels, labels)


def test_series_are_cropped_where_a_convolution_slides_along_them() -> None:
    x = torch.randn(4, 2, 50)
    model = nn.Sequential(nn.Conv1d(2, 3, 5), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    assert [part[0].shape for part in seen([(x,)], views=2, model=model)] == [x.shape] * 2
    with pytest.raises(CalibrationError, match=r"expected maps .* got shape \[4, 2, 50\]"):
        Calibration.of([(x,)], views=2, model=nn.Sequential(nn.Linear(50, 3)))


IDS = torch.zeros(4, 8, dtype=torch.long)
PICTURES = torch.zeros(4, 3, 8, 8)


@pytest.mark.parametrize(
    ("batch", "why"),
    [
        ({"input_ids": IDS}, "int64 .* use more samples"),
        ((torch.zeros(4, 8), torch.zeros(4)), r"expected maps .* got shape \[4, 8\]"),
        (((PICTURES, PICTURES), torch.zeros(4)), "expected one input, .* got 2 tensors"),
        ((torch.zeros(4, 8, 8, 3), None), "expected maps of at least 4 positions"),
        ((PICTURES, torch.zeros(4, 8, 8)), "labels of whole samples"),
        ((PICTURES, [{"boxes": torch.zeros(2, 4)}] * 4), "labels of whole samples"),
        ((PICTURES, ["a cat"] * 4), "labels of whole samples"),
    ],
)
def test_what_cannot_be_cropped_is_refused_at_once(batch: Any, why: str) -> None:
    with pytest.raises(CalibrationError, match=why) as refused:
        Calibration.of([batch], views=2)
    assert "sc.Views(3, make=...)" in str(refused.value)


def test_what_forward_makes_is_refused() -> None:
    with pytest.raises(CalibrationError, match="got one that forward makes"):
        Calibration.of([{"x": pictures()}], views=2, forward=lambda model, batch: model(batch["x"] / 255))
    with pytest.raises(CalibrationError, match="labels of whole samples"):
        Calibration.of(
            [{"x": pictures(), "mask": pictures() > 0}],
            views=2,
            forward=lambda model, batch: model(batch["x"]),
        )


def test_own_views_must_keep_the_samples_and_be_numbers() -> None:
    with pytest.raises(
        CalibrationError, match="expected make to return 12 samples, as many as it got, got 11"
    ):
        Calibration.of([(pictures(),)], views=lambda x, k, generator: x[1:])
    with pytest.raises(CalibrationError, match="finite"):
        Calibration.of([(pictures(),)], views=Views(2, make=lambda x, k, generator: x / 0))


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "three"])
def test_a_wrong_number_is_refused(number: Any) -> None:
    with pytest.raises(SettingError, match="expected a number of at least 1"):
        Calibration.of([(pictures(),)], views=number)


def test_own_views_get_all_inputs_of_a_batch_that_lists_them() -> None:
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    def both(inputs: tuple[Tensor, Tensor], k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        a, b = inputs
        return a + k, b - k

    x, y, labels = torch.zeros(4, 1), torch.ones(4, 1), torch.arange(4)
    for raw in ((x, y), [x, y, labels]):
        first, second = Calibration.of([raw], views=Views(2, make=both), model=Pair())
        assert [float(v[0]) for v in (*first.args, *second.args)] == [0, 1, 1, 0]
        assert (second.labels is None) == (len(raw) == 2)
