"""The papers' experiments run from the published layouts; the figures of tiny noise mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import papers
from secateur.cli.loading.archives import LAYOUTS
from tests.cli.test_archives import write_cifar10


class Tiny(nn.Module):
    """Stands in for ResNet-56."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(torch.relu(self.norm(self.first(x)))).relu()
        out: Tensor = self.last(inner.mean((2, 3)))
        return out


def test_the_network_is_that_of_the_paper() -> None:
    model = papers.ResNet56()
    assert sum(p.numel() for p in model.parameters()) == 853_018
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 56


def test_published_rows_stand_beside_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(papers, "ResNet56", Tiny)
    pixels, _ = write_cifar10(tmp_path / "data", each=20)
    images, labels = papers.load(tmp_path / "data", "cifar10")
    mean, std = (np.reshape(v, (1, 3, 1, 1)) for v in (LAYOUTS["cifar10"].mean, LAYOUTS["cifar10"].std))
    wanted = (pixels.reshape(-1, 3, 32, 32) / 255 - mean) / std
    np.testing.assert_allclose(images.numpy(), wanted, atol=1e-5)
    assert len(labels) == 100
    asked = ["fair", "--data", str(tmp_path / "data"), "--weights", str(tmp_path / "w.safetensors")]
    rows = papers.main([*asked, "--epochs", "1", "--tune", "1", "--json", str(tmp_path / "rows.json")])
    assert [row.who for row in rows] == ["published"] * 2 + ["ours"] * 6
    assert [row.what for row in rows[2:5]] == ["tod, as pruned", "tod, repaired", "tod, fine-tuned"]
    assert all(row.macs <= papers.KEPT for row in rows[2:])
    printed = capsys.readouterr().out
    assert "FAIR-Pruner, fine-tuned" in printed
    assert "93.64" in printed
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][0]["pruned"] == 93.64
    again = papers.main([*asked, "--epochs", "0", "--tune", "0"])  # the weights are read back
    assert [row.what for row in again[2:]] == [
        "tod, as pruned", "tod, repaired", "repair_aware, as pruned", "repair_aware, repaired",
    ]  # fmt: skip
    assert again[2].dense == rows[2].dense


def test_a_batch_is_mirrored_and_moved_but_not_changed() -> None:
    torch.manual_seed(0)
    images = torch.arange(2 * 3 * 32 * 32).float().reshape(2, 3, 32, 32) + 1
    ((x, y),) = papers.epoch(images, torch.tensor([0, 1]), "cpu")
    assert x.shape == images.shape
    for image, label in zip(x, y, strict=True):
        whole = images[int(label)]
        inside = image[image > 0]
        assert torch.isin(inside, whole).all()
        assert len(inside) >= 3 * 28 * 28
