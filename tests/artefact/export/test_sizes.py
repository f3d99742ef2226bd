"""An axis that may have any size for the model may have any size in the file, or the file says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.signals.test_padding import network, padded, samples
from tests.targets.units.plans import random_plan

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SUFFIXES = (".onnx", ".pt2")


def runner(path: Path) -> Callable[..., Tensor]:
    """The file in its runtime, as a function of the inputs in order."""
    if path.suffix == ".pt2":
        module = torch.export.load(path).module()
        return lambda *inputs: module(*inputs).detach()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        found = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
        return torch.as_tensor(found[0])

    return run


def pruned(model: nn.Module, inputs: object) -> nn.Module:
    graph = sc.trace(model, inputs)
    return sc.apply(model, random_plan(graph), graph=graph).eval()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_texts_of_any_length(tmp_path: Path, suffix: str) -> None:
    small = pruned(network().float(), padded(samples()))
    done = sc.export(small, tmp_path / f"small{suffix}")
    assert done.open == ("batch", "axis 1 of input_ids, attention_mask")
    module = torch.export.load(done.path).module() if suffix == ".pt2" else None
    for ids in (samples(1), [*samples(2), torch.arange(1, 12)], samples()[:1], [torch.tensor([5])]):
        batch = padded(ids)
        with torch.no_grad():
            wanted = small(**batch)
        found = module(**batch) if module is not None else runner(done.path)(*batch.values())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pictures_of_any_size_unless_all_is_to_be_fixed(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip
    small = pruned(model, torch.randn(2, 2, 12, 10))
    done = sc.export(small, tmp_path / f"small{suffix}")
    assert done.open == ("batch", "axis 2 of input", "axis 3 of input")
    for shape in ((1, 2, 12, 10), (3, 2, 9, 17)):
        x = torch.randn(shape)
        torch.testing.assert_close(runner(done.path)(x), small(x).detach(), rtol=1e-4, atol=1e-5)
    fixed = sc.export(small, tmp_path / f"fixed{suffix}", fixed=True)
    assert (fixed.open, fixed.batches) == ((), (2,))
    run = runner(fixed.path)
    assert run(torch.randn(2, 2, 12, 10)).shape == (2, 3)
    with pytest.raises(Exception, match=r"(?i)shape|dimension|guard"):
        run(torch.randn(3, 2, 12, 10))
    with pytest.raises(sc.SettingError, match="expected no fixed= for this format"):
        sc.export(small, tmp_path / "folder", fixed=True)


class Branching(nn.Module):
    """Does something else with long inputs."""

    def __init__(self, turn: int) -> None:
        super().__init__()
        self.turn = turn
        self.up, self.down = nn.Linear(4, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 4] to [batch, 4]."""
        h = self.up(x).relu()
        h = h * 2 if x.shape[1] > self.turn else h - h.mean(1, keepdim=True)
        return self.down(h).sum(1)


@pytest.mark.parametrize("turn", [7, 30, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 9))])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_never_takes_the_wrong_branch(tmp_path: Path, suffix: str, turn: int) -> None:
    torch.manual_seed(0)
    small = pruned(Branching(turn).eval(), torch.randn(2, 8, 4))
    done = sc.export(small, tmp_path / f"small{suffix}")
    assert done.open == ("batch",)
    run = runner(done.path)
    for length in (2, 5, 8, 10, 40):
        x = torch.randn(3, length, 4)
        try:
            found = run(x)
        except Exception:
            assert length != 8
        else:
            torch.testing.assert_close(found, small(x).detach(), rtol=1e-4, atol=1e-5)


ASKING: dict[str, tuple[Callable[[int, int], bool], tuple[int, int]]] = {
    "a long text": (lambda batch, length: length > 500, (1, 501)),
    "many samples": (lambda batch, length: batch > 32, (33, 8)),
    "one sample": (lambda batch, length: batch == 1, (1, 8)),
    "many words in all": (lambda batch, length: batch * length > 150, (20, 8)),
    "a root": (lambda batch, length: int(length**0.5) > 2, (2, 10)),
}


class Asking(Branching):
    """Does something else at some sizes, far from the usual ones."""

    def __init__(self, what: str) -> None:
        super().__init__(0)
        self.asks, self.there = ASKING[what]

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, 4] to [batch, length, 4]."""
        h = self.up(x).relu()
        return self.down(h * 2 if self.asks(x.shape[0], x.shape[1]) else h)


@pytest.mark.parametrize("what", ASKING)
def test_a_file_does_not_outlive_what_the_code_asked(tmp_path: Path, what: str) -> None:
    torch.manual_seed(0)
    model = Asking(what).eval()
    small = pruned(model, torch.randn(2, 8, 4))
    for suffix in SUFFIXES:
        done = sc.export(small, tmp_path / f"small{suffix}")
        run = runner(done.path)
        x = torch.randn(2, 8, 4)
        torch.testing.assert_close(run(x), small(x).detach(), rtol=1e-4, atol=1e-5)
        x = torch.randn(*model.there, 4)
        with pytest.raises(Exception, match=r"(?i)invalid dimensions|expected input"):
            run(x)


def test_a_table_that_ends_does_not_close_an_axis(tmp_path: Path) -> None:
    class Table(Branching):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x + self.table[: x.shape[1]]).relu())

    torch.manual_seed(0)
    model = Table(0).eval()
    model.table = nn.Parameter(torch.randn(50, 4))
    small = pruned(model, torch.randn(2, 8, 4))
    done = sc.export(small, tmp_path / "small.onnx")
    assert done.open == ("batch", "axis 1 of x")
    x = torch.randn(1, 50, 4)
    torch.testing.assert_close(runner(done.path)(x), small(x).detach(), rtol=1e-4, atol=1e-5)
