"""`sc.prune(granularity="expert")`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import secateur as sc
from tests.experts.models import make, maker, words
from tests.experts.test_apply import logits


def data() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part, "labels": part} for part in words(20, 16).chunk(5)]


@pytest.mark.parametrize("allocator", ["tod", "emp", sc.Uniform(removal="frequency*reap")])
def test_the_whole_street(allocator: str | sc.ToD, tmp_path: Path) -> None:
    model = make("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    results = [
        sc.prune(
            model, data(), sc.Budget(experts=0.5), allocator, "expert", measure_latency=False, progress=False
        )
        for _ in range(2)
    ]
    result = results[0]
    assert sum(g.kept for g in result.plan.groups) == 8
    assert result.plan.to_json() == results[1].plan.to_json()
    assert result.report.proof["difference"] < 1e-9
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert "routers may not choose the removed experts" in " ".join(str(result.report).split())
    figures = {f.stage: f.loss for f in result.report.figures}
    assert figures.get("repaired", 0.0) <= figures["pruned"]
    sc.save(result.model, tmp_path)
    assert torch.equal(logits(sc.load(tmp_path, maker("qwen2")), words()), logits(result.model, words()))


def test_forms_that_experts_do_not_have_are_refused() -> None:
    with pytest.raises(sc.SettingError, match="expected 'auto' or 'module' for experts"):
        sc.prune(make("plain"), [], sc.Budget(experts=0.5), "tod", "expert", form="graph")


def test_repairs_for_units_are_refused_before_scoring() -> None:
    with pytest.raises(sc.SettingError, match="expected None, 'auto' or 'experts'"):
        sc.prune(make("plain"), [], sc.Budget(experts=0.5), "tod", "expert", repair="batchnorm")
