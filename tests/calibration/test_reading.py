"""How what a loader gives becomes a call of the model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import secateur as sc
from secateur.calibration import Batch, Calibration
from secateur.calibration.reading import LABEL_KEYS, Reading, recorded

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6) % 3


class Net(nn.Module):
    """Takes an image and perhaps a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.config = nn.Linear(2, 3), SimpleNamespace(scale=2.0)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.layer(image if mask is None else image * mask)
        return out


class OwnLoss(nn.Module):
    """Takes labels, and may need them."""

    def __init__(self, needed: bool) -> None:
        super().__init__()
        self.layer, self.needed = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3)), needed

    def forward(self, x: Tensor, labels: Tensor | None = None, **more: Any) -> dict[str, Tensor]:
        logits = self.layer(x)
        if labels is None:
            if self.needed:
                raise ValueError("labels, please")
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def read(raw: Any, model: nn.Module | None = None, forward: Any = None) -> Batch:
    return Calibration.of([raw], model=model, forward=forward).first()


def given(batch: Batch) -> tuple[int, list[str]]:
    return len(batch.args), list(batch.kwargs)


# Labels


@pytest.mark.parametrize("key", LABEL_KEYS)
def test_labels_are_no_argument_of_a_model_that_does_not_take_them(key: str) -> None:
    batch = read({"image": X, key: Y}, Net())
    assert given(batch) == (0, ["image"])
    assert torch.equal(batch.classes(), Y)
    assert batch.extra is None
    assert batch.run(Net(), labelled=True).shape == (6, 3)


def test_what_is_called_a_target_is_an_input_if_the_model_takes_it() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    batch = read({"x": X, "y": X, "target": Y}, Both())
    assert given(batch) == (0, ["x", "y"])
    assert torch.equal(batch.classes(), Y)


def test_a_model_with_a_loss_of_its_own_gets_labels_where_a_loss_is_wanted() -> None:
    model = OwnLoss(needed=False)
    batch = read({"x": X, "labels": Y}, model)
    assert given(batch) == (0, ["x"])
    assert "loss" not in batch.run(model)
    assert "loss" in batch.run(model, labelled=True)
    graph = sc.trace(model, batch.inputs)
    assert list(graph.inputs.kwargs) == ["x"]


def test_a_model_that_cannot_run_without_labels_gets_them_always() -> None:
    model = OwnLoss(needed=True)
    batch = read({"x": X, "labels": Y}, model)
    assert given(batch) == (0, ["x", "labels"])
    assert "loss" in batch.run(model)
    assert "loss" in batch.run(model, labelled=True)


# forward=


@pytest.mark.parametrize(
    ("raw", "forward", "args", "kwargs", "labelled"),
    [
        ({"picture": X, "label": Y}, lambda m, b: m(b["picture"]), 1, [], True),
        ({"picture": X, "y": Y}, lambda m, b: m(image=b["picture"] / 2), 0, ["image"], True),
        ((X, X, Y), lambda m, b: m(b[0], b[1]), 2, [], False),
        ((X, Y), lambda m, b: m(b[0]).softmax(1), 1, [], True),
        ((X, X), lambda m, b: m(b[0], mask=b[1]), 0, ["image", "mask"], False),
        (SimpleNamespace(x=X, y=Y), lambda m, b: m(b.x * m.config.scale), 1, [], True),
        ({"y": X}, lambda m, b: m(b["y"]), 1, [], False),
    ],
)
def test_forward_says_how_to_call_the_model(
    raw: Any, forward: Any, args: int, kwargs: list[str], labelled: bool
) -> None:
    model = Net().eval()
    batch = read(raw, model, forward)
    assert given(batch) == (args, kwargs)
    assert (batch.labels is not None) == labelled
    assert torch.equal(batch.run(model), forward(model, raw))
    if "softmax" not in str(forward(model, raw).grad_fn).lower():
        assert torch.equal(model(*batch.args, **batch.kwargs), forward(model, raw))


def test_the_model_is_not_run_to_find_its_arguments() -> None:
    def run(*args: Any) -> None:
        raise AssertionError

    model = Net()
    model.forward = run  # type: ignore[method-assign]
    assert recorded(lambda m, b: m(b, 1).logits, X, model) == ((X, 1), {})


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda m, b: b["picture"], r"to call the model, got no call"),
        (lambda m, b: m("text"), "expected inputs that are tensors, got str"),
        (lambda m, b: m(b["picture"], image=1), "with positional or with keyword arguments, got 1 and 1"),
    ],
)
def test_a_forward_that_does_not_call_the_model_is_refused(forward: Any, said: str) -> None:
    with pytest.raises(sc.CalibrationError, match=said):
        read({"picture": X}, Net(), forward)


def test_a_forward_that_calls_a_method_is_told_what_to_do() -> None:
    with pytest.raises(AttributeError, match=r"expected it to call the model itself.* got model\.layer"):
        read({"picture": X}, Net(), lambda m, b: m.layer(b["picture"]))


# Keys that are no arguments


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"picture": X, "label": Y}, r"arguments of Net\.forward \(image, mask\), got picture without image"),
        ({"image": X, "index": Y}, r"got image, index\. .* forward="),
        (({"mask": X}, Y), "got mask without image"),
    ],
)
def test_keys_that_are_no_arguments_are_named_with_the_remedy(raw: Any, said: str) -> None:
    with pytest.raises(sc.CalibrationError, match=said) as refused:
        read(raw, Net())
    assert len(str(refused.value)) <= 600


class Policy(nn.Module):
    """Takes one dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, seen: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.layer(torch.cat([seen["x"], seen["goal"]], -1))
        return out


class Masked(nn.Module):
    """Needs two tensors, and may take a third."""

    def forward(self, ids: Tensor, mask: Tensor, more: Tensor | None = None) -> Tensor:
        return ids * mask if more is None else ids * mask + more


@pytest.mark.parametrize(
    ("raw", "model", "hint"),
    [
        (({"x": X, "goal": X}, Y), Policy(), "model(batch[0])"),
        ({"x": X, "goal": X}, Policy(), "model(batch)"),
        (({"x": X, "goal": X},), Policy(), "model(batch[0])"),
        ({"name": "a", "picture": X, "label": Y}, Net(), "model(batch['picture'])"),
        (({"picture": X}, Y), Net(), "model(batch[0]['picture'])"),
        (
            {"index": Y, "ids": X, "mask": X, "label": Y},
            Masked(),
            "model(ids=batch['ids'], mask=batch['mask'])",
        ),
        ({"index": "a", "first": X, "second": X}, Masked(), "model(batch['first'], batch['second'])"),
        ((X, X, Y), Masked(), "model(batch[0], batch[1])"),
        (
            [{"picture": X[k], "label": Y[k]} for k in range(2)],
            Net(),
            "model(torch.stack([one['picture'] for one in batch]))",
        ),
        (SimpleNamespace(ids=X, mask=X, y=Y), Masked(), "model(ids=batch.ids, mask=batch.mask)"),
    ],
)
def test_the_hint_works_when_it_is_followed_to_the_letter(raw: Any, model: nn.Module, hint: str) -> None:
    with pytest.raises(sc.CalibrationError) as refused:
        read(raw, model)
    told = str(refused.value).rpartition("for instance ")[2].rstrip(".")
    assert told == f"lambda model, batch: {hint}"
    assert len(str(refused.value)) <= 600
    read(raw, model, eval(told)).run(model)


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda m, b: b["picture"], "got no call"),
        (lambda m, b: m(b["image"]), r"to run, got test_reading.py:.*KeyError: 'image'"),
        (lambda m, b: m(b[0]), r"to run, got test_reading.py:.*KeyError: 0"),
    ],
)
def test_the_hint_for_a_forward_that_does_not_work_works(forward: Any, said: str) -> None:
    with pytest.raises(sc.CalibrationError, match=said) as refused:
        read({"picture": X}, Net(), forward)
    assert len(str(refused.value)) <= 600
    told = str(refused.value).rpartition("for instance ")[2].rstrip(".")
    assert read({"picture": X}, Net(), eval(told)).run(Net()).shape == (6, 3)


# A list of images


class Detector(nn.Module):
    """Takes a list of images of any size, and perhaps boxes: then it gives its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))

    def forward(self, images: list[Tensor], targets: list[Any] | None = None) -> Any:
        found = [self.layers(image[None]).mean((2, 3))[0] for image in images]
        if targets is None:
            return [{"boxes": one} for one in found]
        return {
            "loss": sum(
                (one[:4] - t["boxes"].sum(0)).square().mean() for one, t in zip(found, targets, strict=True)
            )
        }


@pytest.mark.parametrize("forward", [None, lambda m, b: m(b[0])])
@pytest.mark.parametrize("own_loss", [False, True])
def test_a_list_of_images_is_one_argument_of_a_model_that_takes_it_so(forward: Any, own_loss: bool) -> None:
    """Signals that need to know samples apart are left out by ``auto``."""
    torch.manual_seed(0)
    images = [[torch.randn(3, 12, 12), torch.randn(3, 10 + i, 14)] for i in range(6)]
    data = [(pair, [{"boxes": torch.rand(2, 4)} for _ in pair]) for pair in images]
    model = Detector().eval()
    assert given(read(data[0], model, forward)) == (1, [])
    more: Any = {"loss_fn": lambda m, b: m(b[0], b[1])["loss"]} if own_loss else {}
    result = sc.prune(
        model, data, sc.Budget(params=0.7), forward=forward, measure_latency=False, progress=False, **more
    )
    assert result.model([torch.randn(3, 20, 20)])[0]["boxes"].shape == (5,)
    assert result.report.proof["difference"] <= 1e-9


def test_a_list_of_several_arguments_is_spread_as_loaders_make_them() -> None:
    assert given(read(([X, X], Y), Net())) == (2, [])
    assert given(read(([X], Y), Net())) == (1, [])
    assert torch.equal(read(([X], Y), Net()).args[0], X)


def test_further_keys_are_left_to_a_model_that_takes_any() -> None:
    batch = read({"x": X, "flag": X}, OwnLoss(needed=False))
    assert given(batch) == (0, ["x", "flag"])
    with pytest.raises(sc.CalibrationError, match="got picture without x"):
        read({"picture": X}, OwnLoss(needed=False))


def test_without_a_model_keys_are_taken_as_they_are() -> None:
    assert given(Batch.of({"anything": X, "labels": Y})) == (0, ["anything"])


def test_data_keep_the_model_and_the_forward_that_they_were_made_with() -> None:
    def forward(model: Any, batch: Any) -> Any:
        return model(batch["picture"])

    net = Net()
    data = Calibration.of([{"picture": X}], forward=forward)
    assert Calibration.of(data) is data
    bound = Calibration.of(data, model=net)
    assert (bound.reading.model, bound.reading.forward) == (net, forward)
    assert Calibration.of(bound, model=Net()) is bound
    assert Reading(net).of(Net()).model is net


# Through the verbs


def test_every_verb_takes_forward() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [{"picture": torch.randn(8, 2), "label": torch.arange(8) % 3, "name": "x"} for _ in range(6)]
    plain = [(batch["picture"], batch["label"]) for batch in data]
    more: Any = {"forward": lambda model, batch: model(batch["picture"])}
    results = [
        sc.prune(net, d, sc.Budget(params=0.7), "tod", measure_latency=False, progress=False, **m)
        for d, m in ((data, more), (plain, {}))
    ]
    assert results[0].plan == results[1].plan
    assert results[0].report.figures == results[1].report.figures
    for a, b in zip(*(r.model.state_dict().values() for r in results), strict=True):
        assert torch.equal(a, b)
    assert sc.evaluate(net, data, **more) == sc.evaluate(net, plain)
    tuned = [
        sc.recover(results[0].model, net, d, epochs=1, progress=False, **m)
        for d, m in ((data, more), (plain, {}))
    ]
    for a, b in zip(*(t.state_dict().values() for t in tuned), strict=True):
        assert torch.equal(a, b)
    graph = sc.trace(net, data[0], **more)
    assert [g.name for g in graph.groups] == ["0"]
    masked = sc.prune(net, data, sc.Budget(sparsity=0.5), "emp", granularity="weight", progress=False, **more)
    assert masked.plan.sparsity == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("forward", "part"),
    [
        (lambda m, b: m[0](b["picture"]), r"model\[0\]"),
        (lambda m, b: m.layer(b["picture"]), r"model\.layer"),
        (lambda m, b: [layer(b["picture"]) for layer in m], "a loop over its modules"),
        (lambda m, b: len(m), r"len\(model\)"),
    ],
)
def test_a_forward_that_calls_parts_of_the_model_is_refused(forward: Any, part: str) -> None:
    with pytest.raises(
        sc.CalibrationError, match=rf"to call the model itself, model\(\.\.\.\), got {part}\."
    ):
        read({"picture": X}, Net(), forward)


def test_a_loss_that_calls_parts_of_the_model_is_refused() -> None:
    model = OwnLoss(needed=False)
    with pytest.raises(sc.CalibrationError, match=r"got model\.layer\."):
        sc.score(sc.trace(model, X), [X], "taylor", loss_fn=lambda m, b: m.layer(b).sum(), progress=False)


def popping(model: Any, batch: Any) -> Any:
    """Takes the picture out of the batch, and writes into it."""
    picture = batch.pop("picture") if isinstance(batch, dict) else batch["parts"].pop()
    return model(picture.mul_(2))


@pytest.mark.parametrize("key", [*LABEL_KEYS, "parts"])
def test_a_forward_may_change_its_batch(key: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    kept = torch.randn(6, 2)
    data = [{"picture": kept.clone(), key: Y} for _ in range(4)]
    batch = read(data[0], model, popping)
    assert torch.equal(batch.args[0], 2 * kept)
    assert key == "parts" or (batch.labels is not None and torch.equal(batch.labels, Y))
    for _ in range(2):
        assert torch.equal(batch.run(model), model(2 * kept))
    assert all(torch.equal(one["picture"], kept) for one in data)


class Two(nn.Module):
    """Needs two inputs; a third one is optional."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 16), nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """[batch, 4] and [batch, 3] to scores of classes [batch, 2]."""
        return self.out((self.a(left) - self.b(right)).abs())


class Scaled(Two):
    """With an argument that may be left out."""

    def forward(self, left: Tensor, right: Tensor, scale: Any = 1.0) -> Tensor:
        """The same, with the second input scaled."""
        return super().forward(left, right * scale)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_batch_may_be_the_arguments_where_the_model_needs_them(kind: Any) -> None:
    a, b, y = torch.randn(5, 4), torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    two, scaled = Reading(Two()), Reading(Scaled())
    for reading in (two, scaled):
        pair = reading.take(kind((a, b)), "here")
        assert (len(pair.args), pair.labels) == (2, None)
        wrapped = reading.take((kind((a, b)), y), "here")
        assert (len(wrapped.args), wrapped.labels is y) == (2, True)
    three = two.take(kind((a, b, y)), "here")
    assert (len(three.args), three.labels is y) == (2, True)
    with pytest.raises(sc.CalibrationError, match="Wrap several inputs in a tuple"):
        scaled.take(kind((a, b, y)), "here")  # the third may be labels or the scale


def test_arguments_that_the_model_takes_by_name_alone_get_their_names() -> None:
    class ByName(Two):
        def forward(self, left: Tensor, *, right: Tensor) -> Tensor:
            return super().forward(left, right)

    model, a, b = ByName(), torch.randn(6, 4), torch.randn(6, 3)
    for raw, labels in (((a, b), None), ((a, b, Y), Y)):
        batch = read(raw, model)
        assert (given(batch), batch.labels is labels) == ((0, ["left", "right"]), True)
        assert torch.equal(batch.run(model), model(a, right=b))


def test_arguments_beside_labels_serve_the_whole_pipeline() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 4), torch.randn(24, 3), torch.randint(0, 2, (24,)))
    result = sc.prune(Two(), data, sc.Budget(params=0.6), progress=False)
    assert result.report.figures[0].accuracy is not None
    assert result.report.proof["difference"] <= 1e-9
    pairs = TensorDataset(torch.randn(24, 4), torch.randn(24, 3))
    small = sc.prune(Two(), pairs, sc.Budget(params=0.6), progress=False).model
    assert small(torch.randn(2, 4), torch.randn(2, 3)).shape == (2, 2)


def test_a_pair_with_labels_that_the_model_needs_is_a_mapping() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return (x.sum(1) - labels).square().mean()

    x, labels = torch.randn(4, 3), torch.ones(4)
    taken = Reading(Own()).take((x, labels), "here")
    assert set(taken.kwargs) == {"x", "labels"}
    assert taken.labels is labels
