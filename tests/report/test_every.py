"""Every registered rule, signal, repair and target describes itself on every face of the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocators.registry import RULES
from secateur.common.formatting import plain
from secateur.errors import SettingError
from secateur.pipeline.options import TARGETS
from secateur.repairs.methods import REPAIRS
from secateur.report.html import render
from secateur.report.markdown import escape
from secateur.report.outcomes import outcomes, settings
from secateur.report.sentences import rule as described
from secateur.signals.blocks import SIGNALS as BLOCK_SIGNALS
from secateur.signals.experts import SIGNALS as EXPERT_SIGNALS
from secateur.signals.registry import SIGNALS
from secateur.signals.weights.score import CRITERIA
from secateur.targets.granularity import UNITS
from tests.report.test_html import Page
from tests.targets.blocks.models import ResNet
from tests.targets.experts.models import PlainLM, spread, words
from tests.targets.headsizes.models import WIDTH, chain
from tests.targets.headsizes.models import network as attentive

DASH = "\N{EN DASH}"


def flat(text: str) -> str:
    return " ".join(text.split())


FACES: dict[str, Callable[[sc.Report], str]] = {
    "text": lambda report: flat(str(report)),
    "markdown": lambda report: flat(report.to_markdown()),
    "html": lambda report: flat(Page(render(report)).text),
}


def shown(face: str, text: str) -> str:
    """A text of the report as this face writes it."""
    return escape(text) if face == "markdown" else flat(text)


def network() -> tuple[nn.Module, list[Any]]:
    """A small network with batch norms, and labelled data for it."""
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).eval()
    return model, [(torch.randn(10, 2, 6, 6), torch.arange(10) % 4) for _ in range(5)]


def mixture() -> tuple[nn.Module, list[Any]]:
    """A small language model with two blocks of experts, and texts with labels for it."""
    model = nn.Sequential(spread(PlainLM(experts=4, inner=6)), LastToken()).eval()
    return model, [(words(4, seed=seed), torch.arange(4) % 3) for seed in range(5)]


class LastToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


def residual() -> tuple[nn.Module, list[Any]]:
    """A small network of residual blocks with batch norms, and labelled data for it."""
    torch.manual_seed(0)
    return ResNet().eval(), [(torch.randn(10, 3, 6, 6), torch.arange(10) % 4) for _ in range(5)]


def attention() -> tuple[nn.Module, list[Any]]:
    """A small network with two attentions and neurons behind them, and labelled data for it."""
    model = nn.Sequential(attentive("fused", classes=8), nn.ReLU(), nn.Linear(8, 4)).eval()
    return model, [(torch.randn(10, 5, WIDTH), torch.arange(10) % 4) for _ in range(5)]


def attentive_blocks() -> tuple[nn.Module, list[Any]]:
    """Residual blocks, each an attention, and labelled data for them."""
    torch.manual_seed(0)
    return chain().eval(), [(torch.randn(10, 5, WIDTH), torch.arange(10) % 4) for _ in range(5)]


def narrow() -> tuple[nn.Module, list[Any]]:
    """A small network whose first layer gives fewer directions than outputs, and labelled data for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    return model, [(torch.randn(10, 10), torch.arange(10) % 4) for _ in range(5)]


NETWORKS = {
    "expert": mixture,
    "unit+expert": mixture,
    "block": residual,
    "unit+block": residual,
    "unit+head_size+block": attentive_blocks,
    "head_size": attention,
    "unit+head_size": attention,
    "rank": narrow,
    "unit+rank": narrow,
}


def pruned(granularity: str = "unit", budget: sc.Budget | None = None, **asked: Any) -> sc.Report:
    torch.manual_seed(0)
    model, data = NETWORKS.get(granularity, network)()
    result = sc.prune(
        model,
        data,
        budget,
        granularity=granularity,  # type: ignore[arg-type]
        measure_latency=False,
        progress=False,
        **asked,
    )
    assert sc.Report.from_json(result.report.to_json()) == result.report
    return result.report


TRACED: dict[Any, Any] = {}
"""By target and the values of a model: its trace."""


@pytest.fixture(autouse=True)
def each_network_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces take most of the time here, and these tests are about what comes after them."""

    def remembering(trace: Callable[[Any, nn.Module], Any]) -> Callable[[Any, nn.Module], Any]:
        def known(target: Any, model: nn.Module) -> Any:
            key = type(target), tuple((n, t.double().sum().item()) for n, t in model.state_dict().items())
            if key not in TRACED:
                TRACED[key] = trace(target, model)
            return TRACED[key]

        return known

    for kind in set(TARGETS.values()):
        monkeypatch.setattr(kind, "trace", remembering(kind.trace))


BUDGETS = {
    "unit": sc.Budget(macs=0.6),
    "weight": sc.Budget(sparsity=0.4),
    "expert": sc.Budget(experts=0.75),
    "unit+expert": sc.Budget(params=0.75),
    "block": sc.Budget(macs=0.75),
    "unit+block": sc.Budget(macs=0.5),
    "unit+head_size+block": sc.Budget(params=0.6),
    "head_size": sc.Budget(params=0.8),
    "unit+head_size": sc.Budget(params=0.8),
    "rank": sc.Budget(params=0.8),
    "unit+rank": sc.Budget(params=0.7),
}
SET = {
    "unit": sc.Ratios({"0": 0.5, "3": 0.25}),
    "weight": sc.Ratios({"0.weight": 0.5, "3": 0.25}),
    "expert": sc.Ratios({"*": 0.25}, removal="reap"),
    "unit+expert": sc.Ratios({"*": 0.25}),
    "block": sc.Ratios({"*": 0.4}, removal="output_change"),
    "unit+block": sc.Ratios({"*": 0.25}),
    "unit+head_size+block": sc.Ratios({"*": 0.25}),
    "head_size": sc.Ratios({"*.v": 0.5, "*.q": 0.25}),
    "unit+head_size": sc.Ratios({"*.v": 0.5, "*.q": 0.25}),
    "rank": sc.Ratios({"0": 0.5, "2": 0.25}),
    "unit+rank": sc.Ratios({"0.second": 0.25, "2.first": 0.25}),
}
"""The rule that decides nothing without a setting."""
TOLERANCE = {
    "unit": sc.ToD(removal="magnitude", protection="taylor"),  # no sample has one row of each expert
    "expert": sc.ToD(removal="reap", protection="expert_taylor"),
}
REFUSED = {
    *((granularity, "erk") for granularity in TARGETS if "unit" in granularity or granularity in UNITS),
    *((granularity, "repairability") for granularity in TARGETS if "head_size" in granularity),
    *(("weight", name) for name in ("tod", "repair_aware", "flap")),
    *(
        (granularity, name)
        for granularity in ("expert", "block")
        for name in ("flap", "erk", "lamp", "owl", "repairability", "repair_aware")
    ),
    *(
        ("unit+expert", name)
        for name in ("global", "flap", "lamp", "owl", "repairability", "repair_aware", "ratios")
    ),
}
"""Rules that a granularity does not have under their name alone."""
DECIDED = [(granularity, name) for granularity in TARGETS for name in RULES]


def by_rule(granularity: str, name: str) -> sc.Report:
    """What the rule decides within a budget."""
    rule: Any = SET[granularity] if name == "ratios" else name
    rule = TOLERANCE if (granularity, name) == ("unit+expert", "tod") else rule
    return pruned(granularity, BUDGETS[granularity], allocator=rule, repair=None)


@pytest.mark.parametrize(("granularity", "name"), sorted(REFUSED))
def test_rules_that_a_target_does_not_have(granularity: str, name: str) -> None:
    assert name not in TARGETS[granularity].compared
    with pytest.raises(SettingError, match="expected"):
        by_rule(granularity, name)


@pytest.mark.parametrize(("granularity", "name"), [each for each in DECIDED if each not in REFUSED])
def test_every_rule(granularity: str, name: str) -> None:
    report = by_rule(granularity, name)
    found = described(report)
    value = report.settings[found.setting]
    assert isinstance(value, float)
    solved = f"{plain(value)}, solved for the budget"
    (allocator,) = (line for line in outcomes(report) if line.what == "allocator")
    assert allocator.achieved == f"{found.setting} {solved}"
    assert dict(settings(report))[found.setting] == solved
    assert found.knob != "knob"
    certificate = found.certificate
    assert bool(report.certificates) == (certificate is not None)
    for face, write in FACES.items():
        text = write(report)
        assert shown(face, solved) in text
        assert '{"' not in text
        assert '":' not in text
        if face == "text":
            continue
        assert report.knob is None or shown(face, f"What every {found.knob} would leave") in text
        if certificate is not None:
            assert certificate.titles[0] == ("axis" if "axes" in report.certificates else "layer")
            assert certificate.rows
            for line in (*certificate.sentences, certificate.note):
                assert shown(face, line) in text
            for row in certificate.rows:
                assert DASH not in row
                assert len(row) == len(certificate.titles)
                assert (" | ".join(map(escape, row)) if face == "markdown" else " ".join(row)) in text
    # A report of an older version has no description: the rule of that name gives it.
    if "axes" not in report.certificates:
        assert described(report.model_copy(update={"description": None})) == found


SCORED = [
    *(("unit", name) for name in SIGNALS),
    *(("weight", name) for name in CRITERIA),
    *(("expert", name) for name in EXPERT_SIGNALS),
    *(("block", name) for name in BLOCK_SIGNALS),
]


@pytest.mark.parametrize(("granularity", "name"), SCORED)
def test_every_signal(granularity: str, name: str) -> None:
    report = pruned(granularity, allocator=sc.Uniform(ratio=0.25, removal=name), repair=None)
    assert report.layers
    for layer in report.layers:
        assert [histogram.signal for histogram in layer.scores] == [name]
    for face, write in FACES.items():
        text = write(report)
        assert shown(face, name) in text
        assert face == "text" or shown(face, f"{name} (removal)") in text


@pytest.mark.parametrize("name", REPAIRS)
def test_every_repair(name: str) -> None:
    report = pruned(allocator=sc.Uniform(ratio=0.25, removal="magnitude"), repair=name)
    (tried,) = report.repairs
    assert tried["method"] == name
    assert math.isfinite(tried["before"])
    assert math.isfinite(tried["after"])
    outcome = "kept" if tried["kept"] else "not kept"
    figures = f"{tried['before']:.4g} before and {tried['after']:.4g} after"
    for face, write in FACES.items():
        assert shown(face, f"{name}: {outcome}; {tried['measure']} {figures}") in write(report)


@pytest.mark.parametrize("granularity", TARGETS)
def test_every_target(granularity: str) -> None:
    report = pruned(granularity, BUDGETS[granularity])
    kind = TARGETS[granularity]
    assert report.asked["granularity"] == granularity
    assert report.form in kind.forms
    assert (report.selection is not None) == (kind.default == "auto")
    removed = [layer for layer in report.layers if layer.kept < layer.total]
    assert removed
    assert report.repairs
    for face, write in FACES.items():
        text = write(report)
        for line in outcomes(report) if face != "text" else ():
            assert shown(face, line.what) in text
            assert shown(face, line.achieved) in text
        for layer in removed:
            assert shown(face, layer.group) in text
        for tried in report.repairs:
            outcome = "not done" if "why" in tried else "kept" if tried["kept"] else "not kept"
            assert shown(face, f"{tried['method']}: {outcome}") in text
        assert "proof" in text.lower()


def test_a_rule_of_ones_own_is_described_where_its_class_is_not_known() -> None:
    class Own(sc.Uniform):
        name = "own"
        knob_name = "share"

        def certificates(self, *args: Any) -> dict[str, Any]:
            return {"sum": 0.125, "each": {"0": [1, 2]}}

    made = pruned(allocator=Own(ratio=0.25), repair=None)
    report = sc.Report.from_json(made.to_json())
    assert (described(report).setting, described(report).knob) == ("ratio", "share")
    for face in ("markdown", "html"):
        text = FACES[face](report)
        assert "What every share would leave" in text
        assert ("each / 0 | 1, 2" if face == "markdown" else "each / 0 1, 2") in text
        assert '"sum"' not in text
