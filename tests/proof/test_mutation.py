"""The mutation test: spoiling whatever a plan cut makes the proof fail, or the proof had named it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.proof.exercised import perturbed_copy
from secateur.targets.units.tensors import removed_positions, tensor_called
from tests.helpers.models import TOPOLOGIES
from tests.helpers.traces import dense, traced
from tests.targets.units.plans import random_plan
from tests.zoo.models import ZOO, Entry

SMALL = (
    "concat",
    "expanded",
    "flatten_to_linear",
    "gru",
    "multi_input",
    "pixel_shuffle",
    "prelu",
    "squeeze_excite",
    "stack_unbind_roll",
    "unet",
)
"""A second or two each; `mlp`-like chains are in the others."""

LARGE = frozenset(
    {
        "resnet18", "densenet121", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
        "shufflenet_v2_x1_0",
        "squeezenet1_1", "regnet_y_400mf", "seresnet18", "convnextv2_atto", "starnet_s050", "repvit_m0_9",
        "vit_tiny_patch16_224", "xcit_nano_12_p8_224", "levit_128s", "pvt_v2_b0", "edgenext_xx_small",
        "mobilevit_xxs", "bert", "albert", "gpt2", "t5", "llama", "opt", "dinov2", "segformer",
        "unet", "lstm_tagger", "pointnet", "translator", "grouped_queries",
    }
)  # fmt: skip
MOST = 6
"""Tensors spoiled of each large model, evenly spread."""


def survivors(
    model: nn.Module, graph: sc.Graph, inputs: Any, most: int | None = None
) -> tuple[sc.Proof, list[str]]:
    """The proof, and the tensors that could be spoiled without it failing or having named them."""
    plan = random_plan(graph)
    small = sc.apply(model, plan, graph=graph, example_inputs=inputs)
    proof = sc.verify(model, small, plan, inputs)
    named, missed = proof.not_exercised, []
    cut = list(removed_positions(plan))
    for name in cut[:: max(1, len(cut) // most)] if most else cut:
        broken = copy.deepcopy(small)
        target = tensor_called(broken, name)
        with torch.no_grad():
            target.copy_(perturbed_copy(target, seed=1))
        try:
            sc.verify(model, broken, plan, inputs)
        except sc.VerificationError:
            continue
        if name not in named:
            missed.append(name)
    return proof, missed


@pytest.mark.parametrize("name", SMALL)
def test_a_spoiled_tensor_is_seen(name: str) -> None:
    inputs = TOPOLOGIES[name].inputs(3, torch.float64)
    proof, missed = survivors(dense(name), traced(name), inputs)
    assert proof.proven
    assert len(proof.sizes) == 2
    assert not missed


def test_it_notices_a_proof_that_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tolerance that lets everything pass, all spoiled tensors would survive."""
    verify = sc.verify
    monkeypatch.setattr(sc, "verify", lambda *args: verify(*args, tolerance=1e9))
    inputs = TOPOLOGIES["gru"].inputs(3, torch.float64)
    proof, missed = survivors(dense("gru"), traced("gru"), inputs)
    assert not proof.proven
    assert not missed
    assert set(proof.not_exercised) == set(proof.exercised)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own, which differ from version to version
@pytest.mark.parametrize("entry", [e for e in ZOO if e.name in LARGE], ids=lambda e: e.name)
def test_a_spoiled_tensor_of_an_architecture_is_seen(entry: Entry) -> None:
    if not entry.available():
        pytest.skip(f"{entry.family} is not installed")
    model, inputs = entry.make(), entry.inputs()
    graph = sc.trace(model, inputs, allow_inexact=entry.inexact)
    proof, missed = survivors(model, graph, inputs, MOST)
    assert not missed
    assert proof.proven, proof.doubts
