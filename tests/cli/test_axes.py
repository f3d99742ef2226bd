"""Several granularities, with commas between them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import secateur as sc
from tests.cli.conftest import refused, run

CHAIN = """
import torch
from tests.targets.blocks.models import Chain


def make():
    torch.manual_seed(0)
    return Chain().eval()


def load():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 6, generator=generator), torch.arange(12) % 3) for _ in range(6)]
"""
MODEL = ("--model", "chain.py:make", "--data", "chain.py:load")


@pytest.fixture
def chain(folder: Path) -> Path:
    (folder / "chain.py").write_text(CHAIN)
    return folder


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_units_and_blocks_from_a_shell(chain: Path) -> None:
    axes = ("--granularity", "block,unit")
    shown = json.loads(done("inspect", *MODEL, *axes, "--json"))
    assert shown["granularity"] == "unit+block"
    assert {group["what"]: group["produced_by"] for group in shown["groups"]}["blocks"] == [
        f"blocks.{k}" for k in range(4)
    ]
    report = json.loads(
        done("prune", *MODEL, *axes, "--params", "0.5", "--repair", "none", "--out", "small", "--json")
    )
    assert report["asked"]["granularity"] == "unit+block"
    done("repair", *MODEL, "--artefact", "small", "--repair", "reconstruct", "--out", "better")
    record = sc.record_of(sc.load("better", make))
    assert record.plan.granularity == "unit+block"
    assert record.repairs[-1]["kept"]
    said = refused(2, "prune", *MODEL, "--granularity", "unit,weight", "--params", "0.5", "--out", "x")
    assert "expected one of unit, weight," in said


def make() -> torch.nn.Module:
    from tests.targets.blocks.models import Chain

    torch.manual_seed(0)
    return Chain().eval()


def test_step_by_step(chain: Path) -> None:
    axes = ("--granularity", "unit,block")
    done("score", *MODEL, *axes, "--out", "s.safetensors")
    done("plan", *MODEL, *axes, "--scores", "s.safetensors", "--params", "0.5", "--out", "plan.json")
    done("apply", *MODEL, "--plan", "plan.json", "--out", "small")
    plan = sc.Plan.from_json(chain / "plan.json")
    small = sc.load("small", make)
    assert sum(p.numel() for p in small.parameters()) == plan.predicted.params <= 0.5 * plan.dense.params
