"""A model whose weights lie in files gives what the same model in memory gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur as sc
from secateur.common import mapped
from secateur.common.mapped import is_mapped, map_weights
from secateur.common.preserving import State, _same_values
from secateur.errors import ArtefactError
from secateur.signals import inparts
from secateur.signals.checkpoint import Checkpoint
from secateur.stream import parts, pending


class Block(nn.Module):
    """Attention with two heads and a gated MLP, each added to the stream."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.after = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.after(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Three blocks between an embedding and a head of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 16)
        self.blocks = nn.ModuleList(Block(16, 24) for _ in range(3))
        self.head = nn.Linear(16, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def convolutional() -> nn.Module:
    """Convolutions with batch norms and a residual sum."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.inner, self.back = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
            self.last = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x)).relu()
            x = (x + self.back(self.inner(x).relu())).relu()
            return self.last(x.mean((2, 3)))

    return Net()


@pytest.fixture(params=["decoder", "convolutional"])
def pair(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module, Any]:
    """A model in memory, the same one in a file, and data. Parts are small, and all is put aside in files."""
    torch.manual_seed(0)
    make = {"decoder": Decoder, "convolutional": convolutional}[request.param]
    dense = make().eval()
    save_file({n: t.clone() for n, t in dense.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        there = make()
    monkeypatch.setattr(mapped, "SMALL", 0)
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    monkeypatch.setattr(pending, "HELD_BYTES", 0)
    data: list[Tensor] = (
        [torch.randint(17, (4, 6)) for _ in range(14)]
        if request.param == "decoder"
        else [torch.randn(4, 3, 8, 8) for _ in range(14)]
    )
    return dense, map_weights(there, tmp_path), data


def test_weights_come_from_the_files_and_ties_stay(pair: Any) -> None:
    dense, there, _ = pair
    for name, tensor in there.named_parameters():
        assert is_mapped(tensor), name
    for (name, a), (_, b) in zip(dense.state_dict().items(), there.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    if isinstance(there, Decoder):
        assert there.head.weight is there.embed.weight


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[inparts.InParts]:
    """All runs in parts of the test."""
    found: list[inparts.InParts] = []
    run = inparts.InParts.run

    def noted(self: inparts.InParts, *args: Any) -> Any:
        found.append(self)
        return run(self, *args)

    monkeypatch.setattr(inparts.InParts, "run", noted)
    return found


def test_directions_are_scored_in_parts_too(pair: Any, ran: list[inparts.InParts]) -> None:
    """Each part sees some of the groups alone."""
    dense, there, data = pair
    found = []
    for model in (dense, there):
        graph = sc.trace(sc.factorise(model, data[:4], progress=False), data[0], granularity="rank")
        found.append(sc.score(graph, data[:4], "reconstruction", progress=False)["reconstruction"])
    assert ran
    for group, vector in found[0].items():
        np.testing.assert_allclose(found[1][group], vector, rtol=1e-3, atol=1e-6)


def test_the_pipeline_gives_the_same(pair: Any, ran: list[inparts.InParts]) -> None:
    dense, there, data = pair
    found = []
    for model in (dense, there):
        graph = sc.trace(model, data[0])
        scores = sc.score(graph, data, ("reconstruction", "activation"), progress=False)
        plan = sc.RepairAware().allocate(graph, scores, sc.Budget(params=0.7))
        small = sc.apply(model, plan, graph=graph)
        assert sc.verify(model, small, plan, data[0]).proven
        fixed = sc.repair(small, model, data, "reconstruct", graph=graph, progress=False)
        found.append((scores, plan, small, fixed))
    assert len(ran) == 1  # the model in files
    assert len(ran[0]._programs[0].ends) > 3
    (scores, plan, small, fixed), (scores_, plan_, small_, fixed_) = found
    for name in scores.values:
        for group in scores[name]:
            np.testing.assert_allclose(scores_[name][group], scores[name][group], rtol=1e-12)
    assert plan_.to_json() == plan.to_json()
    for here, other in ((small, small_), (fixed, fixed_)):
        assert all(is_mapped(p) for p in other.parameters())
        for (name, a), (_, b) in zip(here.state_dict().items(), other.state_dict().items(), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=name)
    for (name, a), (_, b) in zip(dense.state_dict().items(), there.state_dict().items(), strict=True):
        assert torch.equal(a, b), name  # nothing was written


@pytest.mark.parametrize("sizes", [(9,), (6, 9, 1), (9, 6)])
def test_batches_of_other_sizes_are_scored_in_parts_too(
    pair: Any, sizes: tuple[int, ...], ran: list[inparts.InParts]
) -> None:
    dense, there, data = pair
    others = [
        torch.randint(17, (4, size)) if data[0].ndim == 2 else torch.randn(4, 3, size, size)
        for size in sizes * 3
    ]
    others[-1] = others[-1][:1]  # and a batch of one
    found = []
    for model in (dense, there):
        graph = sc.trace(model, data[0])
        found.append(sc.score(graph, others, ("reconstruction", "activation"), progress=False))
    assert len(ran) == 1
    for name in found[0].values:
        for group, vector in found[0][name].items():
            np.testing.assert_allclose(found[1][name][group], vector, rtol=1e-6, atol=1e-9)


def test_a_scoring_that_was_killed_goes_on_at_its_part(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, there, data = pair
    graph = sc.trace(there, data[0])
    asked = ("reconstruction", "activation")
    whole = sc.score(graph, data, asked, progress=False)
    path, saves, started = tmp_path / "scoring", [0], [0]
    save, begin = Checkpoint.save, inparts._Program.start

    def counted(self: Any, batch: Any) -> Any:
        started[0] += 1
        return begin(self, batch)

    def dying(self: Checkpoint, now: Any) -> None:
        save(self, now)
        saves[0] += 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", dying)
    monkeypatch.setattr(inparts._Program, "start", counted)
    for _ in range(50):
        try:
            found = sc.score(graph, data, asked, checkpoint=path, checkpoint_every=0, progress=False)
        except KeyboardInterrupt:
            continue
        break
    assert saves[0] >= (4 if isinstance(there, Decoder) else 1)
    assert started[0] <= len(data) * (saves[0] + 1)  # each run starts the batches once
    assert not path.exists()
    for name in whole.values:
        assert list(found[name]) == list(whole[name])
        for group, vector in whole[name].items():
            assert found[name][group].tobytes() == vector.tobytes(), (name, group)
    monkeypatch.setattr(Checkpoint, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        sc.score(graph, data, asked, checkpoint=path, checkpoint_every=0, progress=False)
    other = [*data[:-1], data[-1].roll(1, 0)]
    with pytest.raises(ArtefactError, match="batches that were read before"):
        sc.score(graph, other, asked, checkpoint=path, checkpoint_every=0, progress=False)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(ArtefactError, match=r"expected model.safetensors, got none"):
        map_weights(net, tmp_path)
    save_file({"0.weight": torch.zeros(4, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"expected 0.weight \[2, 3\], which the model has, got \[4, 3\]"):
        map_weights(net, tmp_path)
    save_file({"0.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtefactError, match=r"expected values of 0.bias, got none"):
        map_weights(net, tmp_path)
    for wrong in (torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.complex64)):
        save_file({"0.weight": wrong}, tmp_path / "model.safetensors")
        with pytest.raises(ArtefactError, match=r"expected 0.weight of dtype torch.float32"):
            map_weights(net, tmp_path)
    save_file({"0.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:20], whole[:-4], b"\xff" * 100, whole.replace(b'"F32"', b'"X32"')):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ArtefactError, match=r"expected (a safetensors file|values of 0.weight)"):
            map_weights(net, tmp_path)
    for index in ("{}", "[1]", '{"weight_map": 3}', "[" * 100_000):
        (tmp_path / mapped.INDEX).write_text(index)
        with pytest.raises(ArtefactError, match="expected a list of shards"):
            map_weights(net, tmp_path)
    (tmp_path / mapped.INDEX).write_text('{"weight_map": {"0.weight": "../other.safetensors"}}')
    with pytest.raises(ArtefactError, match=r"expected ../other.safetensors, got none"):
        map_weights(net, tmp_path)


def test_signals_that_need_gradients_run_the_model_whole(pair: Any) -> None:
    dense, there, data = pair
    batches = [{"ids": x, "labels": x[:, 0]} if x.ndim == 2 else (x, torch.arange(len(x)) % 5) for x in data]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch["ids"] if isinstance(batch, dict) else batch[0]
        return model(x).square().mean()

    found = []
    for model in (dense, there):
        graph = sc.trace(model, data[0])
        found.append(sc.score(graph, batches, "taylor", loss_fn=loss, progress=False)["taylor"])
    for group, vector in found[0].items():
        np.testing.assert_allclose(found[1][group], vector, rtol=1e-5, atol=1e-9)


def test_a_fifth_of_the_data_is_held_out_once_where_fits_take_long(pair: Any) -> None:
    dense, there, data = pair
    held = []
    for model in (dense, there):
        graph = sc.trace(model, data[0])
        plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        small = sc.apply(model, plan, graph=graph)
        fixed = sc.repair(small, model, data[:10], "bias", graph=graph, progress=False)
        held.append(sc.record_of(fixed).repairs[0]["held_out_samples"])
    assert held == [40, 8]


def test_an_artefact_of_a_mapped_model_loads(pair: Any, tmp_path: Path) -> None:
    _, there, data = pair
    graph = sc.trace(there, data[0])
    plan = sc.Uniform(ratio=0.5).allocate(graph, sc.score(graph, None, "magnitude"))
    small = sc.apply(there, plan, graph=graph)
    sc.save(small, tmp_path / "small")

    def make() -> nn.Module:
        return type(there)().eval()

    again = sc.load(tmp_path / "small", make)
    assert torch.equal(again(data[0]), small(data[0]))


def test_a_module_under_two_names_takes_the_values_of_either(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = self.a

    values = {"b.weight": torch.ones(2, 2), "b.bias": torch.ones(2), "more": torch.ones(1)}
    save_file(values, tmp_path / "model.safetensors")
    net = map_weights(Twice(), tmp_path)
    assert bool((net.a.weight == 1).all())
    assert net.b.bias is net.a.bias


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch, pair: Any) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    _, there, data = pair
    graph = sc.trace(there, data[0])
    plan = sc.Uniform(ratio=0.5).allocate(graph, sc.score(graph, None, "magnitude"))
    monkeypatch.setattr(mapped.os, "posix_fallocate", full)
    with pytest.raises(ArtefactError, match=r"space for a temporary file .*No space left .*TMPDIR"):
        sc.apply(there, plan, graph=graph)


def test_views_of_weights_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5000, 4))
            self.one, self.two, self.last = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            table = self.table[: x.shape[1]]
            return self.last(self.two((self.one(x + table)).relu()) + table)

    torch.manual_seed(0)
    monkeypatch.setattr(mapped, "SMALL", 0)
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    monkeypatch.setattr(pending, "HELD_BYTES", 0)
    save_file(Positions().state_dict(), tmp_path / "model.safetensors")
    net = map_weights(Positions(), tmp_path)
    data = [torch.randn(6, 3, 4) for _ in range(6)]
    sizes: list[int] = []
    write = pending._ValuesFile.write.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, path: Path, values: Any) -> Any:
        file = write(cls, path, values)
        sizes.append(sum(file.sizes))
        return file

    monkeypatch.setattr(pending._ValuesFile, "write", classmethod(counted))
    graph = sc.trace(net, data[0])
    scores = sc.score(graph, data, "reconstruction", progress=False)
    plan = sc.RepairAware().allocate(graph, scores, sc.Budget(params=0.999))
    sc.repair(sc.apply(net, plan, graph=graph), net, data, "reconstruct", graph=graph, progress=False)
    assert sizes
    assert max(sizes) < 5000 * 4 * 4


def test_what_is_remembered_of_weights_in_files_lies_in_files(pair: Any) -> None:
    _, there, _ = pair
    state = State(there, parameters=True)
    kept = [r.args for r in state._restorers if getattr(r, "func", None) is _same_values]
    assert any(is_mapped(tensor) for tensor, _ in kept)
    assert all(is_mapped(copy) for tensor, copy in kept if is_mapped(tensor))
    before = {name: tensor.clone() for name, tensor in there.named_parameters()}
    with torch.no_grad():
        for parameter in there.parameters():
            parameter.add_(1)
    assert state.restore()
    for name, tensor in there.named_parameters():
        assert torch.equal(tensor, before[name])
