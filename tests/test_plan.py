from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from secateur.errors import PlanError
from secateur.plan import CostRecord, Plan
from tests.allocators.fake import FakeGraph


def keeping(size: int, *removed: int) -> np.ndarray:
    keep = np.ones(size, dtype=bool)
    keep[list(removed)] = False
    return keep


def build(keep: Mapping[str, np.ndarray] | None = None, graph: Any = None, **more: Any) -> Plan:
    keep = {"layer0": keeping(4, 1, 3)} if keep is None else keep
    return Plan.build(graph or FakeGraph([4, 6, 5]), keep, **({"allocator": "own"} | more))


def test_every_group_and_every_slice_is_decided() -> None:
    plan = build()
    assert [g.name for g in plan.groups] == ["layer0", "layer1", "layer2"]
    first, second, third = plan.groups
    assert first.removed == (1, 3)
    assert first.keep.tolist() == [True, False, True, False]
    assert (first.kept, first.ratio) == (2, 0.5)
    assert [(s.tensor, s.axis, s.role, s.removed) for s in first.slices] == [
        ("layer0.weight", 0, "produce", (1, 3)),
        ("layer0.bias", 0, "produce", (1, 3)),
        ("layer1.weight", 1, "consume", (2, 3, 6, 7)),  # two positions a unit
    ]
    for untouched in (second, third):
        assert untouched.keep.all()
        assert [s.removed for s in untouched.slices] == [(), (), ()]
    assert plan.ratios == {"layer0": 0.5, "layer1": 0.0, "layer2": 0.0}
    assert {name: keep.sum() for name, keep in plan.keep.items()} == {"layer0": 2, "layer1": 6, "layer2": 5}


def test_costs_and_circumstances() -> None:
    graph = FakeGraph([4, 6, 5])
    plan = build(
        graph=graph, settings={"x": 0.25}, seed=3, budget={"macs": 0.5}, certificates={"c": [1, None]}
    )
    assert plan.dense == CostRecord.of(graph.cost())
    assert plan.predicted == CostRecord.of(graph.cost({"layer0": keeping(4, 1, 3)}))
    assert plan.predicted.macs < plan.dense.macs
    assert plan.secateur == version_if_installed()
    assert (plan.fingerprint, plan.inputs) == (graph.fingerprint, graph.inputs)
    assert (plan.settings, plan.seed, plan.budget) == ({"x": 0.25}, 3, {"macs": 0.5})
    assert plan.certificates == {"c": [1, None]}


def test_a_plan_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build().seed = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"layer9": keeping(4)}, "group 'layer9': expected a group of the graph, got an unknown name"),
        (
            {"layer0": keeping(3)},
            r"group 'layer0': expected a boolean mask of shape \(4,\), got bool of shape \(3,\)",
        ),
        ({"layer0": np.ones(4)}, r"boolean mask .* got float64 of shape \(4,\)"),
        ({"layer0": keeping(4, 0, 1, 2, 3)}, "group 'layer0': expected at least one unit kept, got none"),
    ],
)
def test_masks_that_do_not_fit(keep: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build(keep)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1: 2}])
def test_settings_are_json(value: Any) -> None:
    with pytest.raises(PlanError, match=r"plan: expected a valid decision, got .*\(in settings"):
        build(settings={"x": value})


def version_if_installed() -> str:
    try:
        return metadata.version("secateur")
    except metadata.PackageNotFoundError:
        return "unknown"


# JSON


@given(st.lists(st.integers(1, 9), min_size=0, max_size=4), st.data())
def test_round_trip(sizes: list[int], data: st.DataObject) -> None:
    graph = FakeGraph(sizes)
    keep = {}
    for group in graph.groups:
        gone = data.draw(st.sets(st.integers(0, group.size - 1), max_size=group.size - 1))
        keep[group.name] = keeping(group.size, *gone)
    plan = build(keep, graph, settings={"a": data.draw(st.floats(allow_nan=False, allow_infinity=False))})
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert json.loads(text)["format"] == 1


def test_the_order_in_which_dictionaries_were_filled_does_not_show() -> None:
    one = build(settings={"a": 1, "b": {"c": 2, "d": 3}}, certificates={"x": 1, "y": 2})
    other = build(settings={"b": {"d": 3, "c": 2}, "a": 1}, certificates={"y": 2, "x": 1})
    assert one.to_json() == other.to_json()


def test_one_line_for_each_group() -> None:
    lines = build().to_json().splitlines()
    assert sum(line.startswith('  {"name": ') for line in lines) == 3
    assert lines[1] == ' "format": 1,'


def test_files(tmp_path: Path) -> None:
    plan, path = build(), tmp_path / "plan.json"
    path.write_text("what was there before")
    text = plan.to_json(path)
    assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["plan.json"]
    assert Plan.from_json(path) == Plan.from_json(str(path)) == plan


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("what was there before")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PlanError, match=r"plan\.json: expected a place .*, got no space left"):
        build().to_json(path)
    assert path.read_text() == "what was there before"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="expected a place that can be written to, got no such folder"):
        build().to_json(tmp_path / "no" / "plan.json")


@pytest.mark.parametrize("source", ["no/such/plan.json", "", "[1]", "a\0b"])
def test_no_such_file(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match="expected JSON text or a readable file of it"):
        Plan.from_json(source)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(PlanError, match=r"expected JSON text or a readable file of it in UTF-8, got .*utf-8"):
        Plan.from_json(path)
    path.write_bytes(b"[1, 2]")
    with pytest.raises(PlanError, match="expected a plan, got JSON whose format is None"):
        Plan.from_json(path)


def test_every_truncation_is_refused() -> None:
    text = build().to_json().rstrip()
    for end in range(1, len(text)):
        with pytest.raises(PlanError, match="damaged or cut short"):
            Plan.from_json(text[:end])


def test_a_newer_format_says_so() -> None:
    data = json.loads(build().to_json()) | {"format": 2, "something": "new"}
    with pytest.raises(
        PlanError, match=r"expected format 1, got format 2, which a newer secateur wrote\. Upgrade"
    ):
        Plan.from_json(json.dumps(data))


def put(*path: Any) -> Any:
    """A change of one place to the last argument."""
    *keys, last, value = path

    def change(data: Any) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("format"), r"expected a plan, got JSON whose format is None"),
        (lambda d: d.pop("dense"), r"Field required \(in dense\)"),
        (lambda d: d.update(extra=1), r"Extra inputs are not permitted \(in extra\)"),
        (put("format", 0), r"should be 1 \(in format\)"),
        (put("format", True), r"JSON whose format is True"),
        (put("format", "1"), r"JSON whose format is '1'"),
        (put("seed", 0.5), r"\(in seed\)"),
        (put("seed", True), r"\(in seed\)"),
        (put("dense", "macs", -1), r"greater than or equal to 0 \(in dense\.macs\)"),
        (put("groups", 0, "removed", [3, 1]), r"ascending order, each once \(in groups\.0\.removed\)"),
        (put("groups", 0, "removed", [1, 1]), r"ascending order, each once \(in groups\.0\.removed\)"),
        (put("groups", 0, "removed", [1, 4]), r"units below the size 4, got 4 \(in groups\.0\)"),
        (put("groups", 0, "removed", [0, 1, 2, 3]), r"at least one unit kept, got all 4 removed"),
        (put("groups", 0, "removed", []), r"no position to go where no unit goes"),
        (put("groups", 0, "removed", [1, "3"]), r"valid integer \(in groups\.0\.removed\.1\)"),
        (
            put("groups", 0, "slices", 0, "removed", [-1]),
            r"greater than or equal to 0 \(in groups\.0\.slices\.0",
        ),
        (
            put("groups", 0, "slices", 0, "role", "eat"),
            r"'produce', 'consume', 'match', 'scale', 'expert' or 'block' \(in groups\.0\.slices\.0",
        ),
        (put("groups", 1, "name", "layer0"), r"each group once, got 'layer0' twice"),
        (put("settings", "x", float("nan")), r"NaN is not JSON"),
        (put("inputs", 3), r"\(in inputs\)"),
    ],
)
def test_altered_plans(change: Any, message: str) -> None:
    data = json.loads(build().to_json())
    change(data)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(data))


def test_groups_own_different_positions() -> None:
    plan = build({"layer0": keeping(4, 1), "layer1": keeping(6, 2)})
    data = json.loads(plan.to_json())
    shared = {"tensor": "layer1.weight", "axis": 1, "role": "consume"}
    data["groups"][1]["slices"].append(shared | {"removed": [4]})
    assert Plan.from_json(json.dumps(data)).groups[1].slices[-1].removed == (4,)
    data["groups"][1]["slices"][-1]["removed"] = [3, 4]
    with pytest.raises(
        PlanError, match=r"'layer1' and 'layer0' to own different positions of axis 1 of 'layer1\.weight'"
    ):
        Plan.from_json(json.dumps(data))


def test_deeply_nested_text_is_refused() -> None:
    with pytest.raises(PlanError, match="expected"):
        Plan.from_json('{"a": ' * 100_000)


def test_another_model() -> None:
    plan = build()
    plan.check(FakeGraph([4, 6, 5]).fingerprint)
    with pytest.raises(PlanError, match=r"expected the model it was made for \(fingerprint f{12}\), got one"):
        plan.check(FakeGraph([4, 6, 7]).fingerprint)


def test_a_table_to_read() -> None:
    plan = build({"layer0": keeping(4, 3)}, FakeGraph([4, 6], repeat=1, area=1), budget={"macs": 0.9})
    assert str(plan).splitlines() == [
        "plan by own, budget macs=0.9, seed 0",
        "",
        "group       kept / total  removed",
        "---------------------------------",
        "layer0         3 /     4    25.0%",
        "layer1         6 /     6     0.0%",
        "---------------------------------",
        "parameters   106 /   116     8.6%",
        "MACs          87 /    96     9.4%",
    ]
