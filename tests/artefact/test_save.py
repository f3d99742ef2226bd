"""Artefacts: back bit for bit, refused when they are not what was written, never half written."""

from __future__ import annotations

import importlib
import json
import os
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.artefact.content import digest
from secateur.targets.units.compare import run
from tests.helpers.models import TOPOLOGIES, build
from tests.helpers.traces import applier, traced
from tests.targets.units.plans import random_plan

saving = importlib.import_module(
    "secateur.artefact.save"
)  # the package's attribute of this name is the function

TENSORS, RECORD = "model.safetensors", "secateur.json"


def pruned(name: str, form: str = "module", dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    plan = random_plan(traced(name, dtype, allow_inexact=True), seed=seed)
    return applier(name, dtype, allow_inexact=True)(plan, form)  # type: ignore[arg-type]


def other_weights(name: str, dtype: torch.dtype = torch.float64) -> Callable[[], nn.Module]:
    """Makes the same network with other weights, as a user's function does."""
    return lambda: build(name, dtype, seed=7)


def assert_same_model(ours: nn.Module, theirs: nn.Module, name: str, dtype: torch.dtype) -> None:
    mine, wanted = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == wanted.keys()
    for key in wanted:
        assert mine[key].dtype == wanted[key].dtype
        assert torch.equal(mine[key], wanted[key]), key
    inputs = TOPOLOGIES[name].inputs(2, dtype, seed=1)
    for a, b in zip(run(ours, inputs, {}), run(theirs, inputs, {}), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", ["module", "graph", "masked"])
@pytest.mark.parametrize(
    "name",
    ["residual", "tied_linear", "lstm_bidirectional", "grouped", "layer_norm", "functional", "expanded"],
)
def test_round_trip(name: str, form: str, tmp_path: Path) -> None:
    small = pruned(name, form)
    assert sc.save(small, tmp_path) == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == [TENSORS, RECORD]
    back = sc.load(tmp_path, other_weights(name))
    assert_same_model(back, small, name, torch.float64)
    assert sc.record_of(back) == sc.record_of(small)
    assert type(back).__name__ == type(small).__name__


@pytest.mark.parametrize("name", sorted(set(TOPOLOGIES) - {"channel_shuffle"}))
def test_every_topology_in_the_form_it_takes(name: str, tmp_path: Path) -> None:
    small = pruned(name, "auto")
    back = sc.load(sc.save(small, tmp_path), other_weights(name))
    assert_same_model(back, small, name, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["module", "graph"])
def test_other_precisions(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small = pruned("residual", form, dtype)
    assert_same_model(
        sc.load(sc.save(small, tmp_path), other_weights("residual", dtype)), small, "residual", dtype
    )


def test_a_model_in_the_place_of_the_function_that_makes_it_is_refused(tmp_path: Path) -> None:
    for given in (nn.Linear(2, 2), "model"):
        with pytest.raises(sc.SettingError, match=r"sc\.load\(directory, lambda: model\)"):
            sc.load(tmp_path, given)  # type: ignore[arg-type]


def test_attributes_that_hold_sizes_come_back(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.a, self.b = nn.Linear(3, 8), nn.Linear(40, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).view(-1, 5 * self.width))

    model = Sized()
    graph = sc.trace(model, torch.zeros(2, 5, 3))
    small = sc.apply(model, random_plan(graph), graph=graph)
    record = sc.record_of(small)
    back = sc.load(sc.save(small, tmp_path), Sized)
    if record.form == "module":
        assert back.width == small.width == 5
    x = torch.randn(4, 5, 3)
    assert torch.equal(back(x), small(x))


@pytest.mark.parametrize("form", ["module", "graph"])
def test_after_repair_with_what_it_brought(form: str, tmp_path: Path) -> None:
    small = pruned("residual", form)
    data = [(torch.randn(8, 3, 8, 8, dtype=torch.float64), torch.arange(8) % 5) for _ in range(5)]
    repaired = sc.repair(small, build("residual"), data)
    back = sc.load(sc.save(repaired, tmp_path), other_weights("residual"))
    assert_same_model(back, repaired, "residual", torch.float64)
    assert sc.record_of(back).repairs == sc.record_of(repaired).repairs
    assert sc.record_of(back).repairs[0]["method"] == "batchnorm"


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    from safetensors import safe_open

    small = pruned("tied_linear")
    sc.save(small, tmp_path)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        names = set(file.keys())
    assert len({"first.weight", "second.weight"} & names) == 1
    back = sc.load(tmp_path, other_weights("tied_linear"))
    assert back.first.weight is back.second.weight


def test_the_mode_is_that_of_the_function(tmp_path: Path) -> None:
    sc.save(pruned("mlp"), tmp_path)
    assert not sc.load(tmp_path, other_weights("mlp")).training
    assert sc.load(tmp_path, lambda: build("mlp").train()).training


@pytest.mark.filterwarnings(
    "ignore:.*script_method.*:DeprecationWarning"
)  # torch, when it loads its compiler
def test_a_compiled_model_is_seen_through(tmp_path: Path) -> None:
    sc.save(pruned("mlp"), tmp_path)
    back = sc.load(tmp_path, lambda: torch.compile(build("mlp", seed=7)))
    assert type(back).__name__ == "Mlp"


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    small = sc.load(sc.save(pruned("residual"), tmp_path), other_weights("residual")).train()
    out = small(*TOPOLOGIES["residual"].inputs(4, torch.float64))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_inputs_for_the_capture_can_be_given(tmp_path: Path) -> None:
    small = pruned("plain", "graph")
    sc.save(small, tmp_path)
    inputs = TOPOLOGIES["plain"].inputs(2, torch.float64)
    back = sc.load(tmp_path, other_weights("plain"), example_inputs=inputs)
    assert_same_model(back, small, "plain", torch.float64)


def test_no_pickle_is_written(tmp_path: Path) -> None:
    sc.save(pruned("residual"), tmp_path)
    raw = (tmp_path / TENSORS).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    spans = sorted(v["data_offsets"] for k, v in header.items() if k != "__metadata__")
    assert spans[0][0] == 0
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert 8 + length + spans[-1][1] == len(raw), "nothing but the header and the numbers"
    content = json.loads((tmp_path / RECORD).read_text())
    assert content["format"] == 1
    assert content["form"] == "module"
    for file in tmp_path.iterdir():
        assert not file.read_bytes().startswith((b"PK", b"\x80"))


def test_both_files_are_readable_by_whom_the_folder_is(tmp_path: Path) -> None:
    sc.save(pruned("mlp"), tmp_path)
    assert (tmp_path / TENSORS).stat().st_mode == (tmp_path / RECORD).stat().st_mode


# Refusals


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    return sc.save(pruned("mlp"), tmp_path / "artefact")


def refused(folder: Path, match: str, make_model: Callable[[], nn.Module] | None = None) -> None:
    with pytest.raises(sc.ArtefactError, match=match):
        sc.load(folder, make_model or other_weights("mlp"))


def rewrite(folder: Path, *, seal: bool = False, **changes: Any) -> None:
    """Change the record; with `seal` also its own checksum, as someone who knows how would."""
    content = json.loads((folder / RECORD).read_text()) | changes
    if seal:
        content.pop("record_sha256")
        content["record_sha256"] = digest(content)
    (folder / RECORD).write_text(json.dumps(content))


def test_no_folder_and_missing_files(artefact: Path) -> None:
    refused(artefact / "nowhere", r"expected a folder with model\.safetensors and secateur\.json, got none")
    (artefact / RECORD).rename(artefact / "other.json")
    refused(artefact, r"expected secateur\.json, got no file that can be read")
    (artefact / "other.json").rename(artefact / RECORD)
    (artefact / TENSORS).unlink()
    refused(artefact, r"got no model\.safetensors")


def test_truncated_tensors(artefact: Path) -> None:
    raw = (artefact / TENSORS).read_bytes()
    for length in (len(raw) - 1, len(raw) // 2, 4, 0):
        (artefact / TENSORS).write_bytes(raw[:length])
        refused(artefact, r"model\.safetensors is truncated, altered or from another save")


def test_altered_tensors(artefact: Path) -> None:
    raw = bytearray((artefact / TENSORS).read_bytes())
    for position in (8, len(raw) // 2, len(raw) - 1):
        raw[position] ^= 1
        (artefact / TENSORS).write_bytes(raw)
        refused(artefact, r"model\.safetensors is truncated, altered or from another save")
        raw[position] ^= 1


def test_an_altered_record(artefact: Path) -> None:
    for changes in ({"form": "graph"}, {"tied": {"0.weight": "3.weight"}}, {"plan": {}}, {"extra": 1}):
        before = (artefact / RECORD).read_text()
        rewrite(artefact, **changes)
        refused(artefact, r"secateur\.json was altered: its checksum does not fit its content")
        (artefact / RECORD).write_text(before)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("\x80\x04K\x01.", "is no JSON|is not secateur's"),
        ("[]", "is not secateur's: expected a mapping with 'format' and 'secateur'"),
        ('{"name": "something else"}', "is not secateur's"),
        ('{"format": "1", "secateur": "0.1"}', "is not secateur's"),
        ('{"format": 1, "secateur": "0.1"}', "was altered"),
    ],
)
def test_no_record_of_ours(artefact: Path, text: str, match: str) -> None:
    (artefact / RECORD).write_text(text)
    refused(artefact, match)


def test_no_text_at_all(artefact: Path) -> None:
    (artefact / RECORD).write_bytes(b"\xff\xfe\x00\x80")
    refused(artefact, "is no JSON")


def test_a_newer_format(artefact: Path) -> None:
    rewrite(artefact, format=2, secateur="9.9", seal=True)
    refused(artefact, r"expected format 1 or older, got 2, written by secateur 9\.9\. Upgrade secateur\.")


def test_a_record_that_was_sealed_again_but_is_wrong(artefact: Path) -> None:
    content = json.loads((artefact / RECORD).read_text())
    plan = content["plan"]
    rewrite(artefact, plan=plan | {"format": 2}, seal=True)
    refused(artefact, "a newer secateur wrote")
    rewrite(artefact, plan=plan | {"groups": 3}, seal=True)
    refused(artefact, "plan: expected a plan of format 1")
    group = plan["groups"][0]
    fewer = group | {
        "removed": group["removed"][1:],
        "slices": [s | {"removed": s["removed"][1:]} for s in group["slices"]],
    }
    rewrite(artefact, plan=plan | {"groups": [fewer, *plan["groups"][1:]]}, seal=True)
    refused(artefact, r"expected 0\.weight of shape .* these tensors do not belong to the plan")


@pytest.mark.parametrize("form", ["another", None, 3])
def test_a_form_that_does_not_exist(artefact: Path, form: Any) -> None:
    rewrite(artefact, form=form, seal=True)
    refused(artefact, "form")


@pytest.mark.parametrize("key", ["plan", "form", "tied", "note", "repairs", "sizes", "tensors_sha256"])
def test_a_sealed_record_without_a_part(artefact: Path, key: str) -> None:
    content = json.loads((artefact / RECORD).read_text())
    del content[key], content["record_sha256"]
    content["record_sha256"] = digest(content)
    (artefact / RECORD).write_text(json.dumps(content))
    refused(artefact, key)


def test_the_wrong_model(artefact: Path) -> None:
    refused(artefact, "expected the model it was made for", lambda: build("gated"))
    refused(artefact, "expected the model it was made for", lambda: nn.Linear(2, 2))


def test_a_model_that_was_pruned_twice_is_loaded_through_its_first_result(tmp_path: Path) -> None:
    def once(model: nn.Module) -> nn.Module:
        x = torch.randn(2, 4)
        graph = sc.trace(model, x)
        plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        return sc.apply(model, plan, graph=graph)

    def make_model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)).eval()

    small = once(make_model())
    first, second = sc.save(small, tmp_path / "first"), sc.save(once(small), tmp_path / "second")
    with pytest.raises(sc.ArtefactError, match="pruned before: load that result"):
        sc.load(second, make_model)
    loaded = sc.load(second, lambda: sc.load(first, make_model))
    assert loaded[0].weight.shape == (9, 4)


def test_a_model_that_was_never_pruned(tmp_path: Path) -> None:
    with pytest.raises(
        sc.ArtefactError, match=r"expected a model that secateur\.apply returned, got a plain Mlp"
    ):
        sc.save(build("mlp"), tmp_path)
    assert not list(tmp_path.iterdir())


# Interrupted


class Crash(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_failure_leaves_the_old_artefact(at: int, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = pruned("mlp"), pruned("mlp", seed=1)
    replace, calls = os.replace, 0

    def crashing(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Crash
        replace(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing)
        with pytest.raises(Crash):
            sc.save(new, artefact)
    back = sc.load(artefact, other_weights("mlp"))
    assert_same_model(back, old, "mlp", torch.float64)
    assert sc.record_of(back).plan == sc.record_of(old).plan
    sc.save(new, artefact)
    assert_same_model(sc.load(artefact, other_weights("mlp")), new, "mlp", torch.float64)
    assert sorted(p.name for p in artefact.iterdir()) == [TENSORS, RECORD]


def test_a_crash_of_the_first_save_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = pruned("mlp")

    def crashing(*args: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing)
        with pytest.raises(Crash):
            sc.save(small, tmp_path)
    assert not (tmp_path / TENSORS).exists()
    refused(tmp_path, r"expected secateur\.json, got no file")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_artefact(artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_file", full)
        with pytest.raises(
            sc.ArtefactError, match=r"got a full disk \([\d,]+ bytes are free there\)\. Free some space"
        ):
            sc.save(pruned("mlp", seed=1), artefact)
    assert_same_model(sc.load(artefact, other_weights("mlp")), pruned("mlp"), "mlp", torch.float64)


def test_saving_again_replaces(artefact: Path) -> None:
    new = pruned("mlp", "graph", seed=3)
    sc.save(new, artefact)
    back = sc.load(artefact, other_weights("mlp"))
    assert_same_model(back, new, "mlp", torch.float64)
    assert sc.record_of(back).form == "graph"


def test_the_trace_that_tests_share_is_not_needed_to_load(artefact: Path) -> None:
    assert sc.record_of(sc.load(artefact, other_weights("mlp"))).plan == random_plan(
        traced("mlp", allow_inexact=True)
    )


@pytest.mark.parametrize("form", ["module", "graph", "masked"])
def test_an_artefact_says_which_sizes_its_inputs_may_have(form: str, tmp_path: Path) -> None:
    small = pruned("residual", form)
    sc.save(small, tmp_path)
    said = sc.record_of(small).takes
    assert said.startswith("You may change ")
    assert json.loads((tmp_path / RECORD).read_text())["takes"] == said
    assert saving.saved_record(tmp_path).takes == said
    assert sc.record_of(sc.load(tmp_path, other_weights("residual"))).takes == said


def test_an_artefact_from_before_that_sentence_gets_it_when_loaded(tmp_path: Path) -> None:
    small = pruned("residual")
    sc.save(small, tmp_path)
    content = json.loads((tmp_path / RECORD).read_text())
    del content["takes"], content["record_sha256"]
    content["record_sha256"] = digest(content)
    (tmp_path / RECORD).write_text(json.dumps(content))
    assert saving.saved_record(tmp_path).takes == ""
    assert sc.record_of(sc.load(tmp_path, other_weights("residual"))).takes == sc.record_of(small).takes


class Extra(nn.Module):
    """Two layers, scaled by a number that is no tensor."""

    def __init__(self, scale: Any = 3.0) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 8), nn.Linear(8, 2), scale

    def get_extra_state(self) -> Any:
        return {"scale": self.scale} if isinstance(self.scale, float) else self.scale

    def set_extra_state(self, state: Any) -> None:
        self.scale = state["scale"] if isinstance(state, dict) else state

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * self.scale)


@pytest.mark.parametrize("scale", [7.0, torch.tensor(7.0)])
@pytest.mark.parametrize("form", ["module", "masked"])
def test_extra_state_comes_back(form: Any, scale: Any, tmp_path: Path) -> None:
    model, x = Extra(scale).eval(), torch.randn(3, 4)
    small = sc.apply(model, random_plan(sc.trace(model, x)), form)
    again = sc.load(sc.save(small, tmp_path), lambda: Extra(3.0 if scale == 7 else scale))
    assert torch.equal(again(x), small(x))


def test_extra_state_that_no_artefact_holds_is_refused(tmp_path: Path) -> None:
    model, x = Extra(7.0).eval(), torch.randn(3, 4)
    graph = sc.trace(model, x)
    plan = random_plan(graph)
    sc.save(sc.apply(model, plan, "graph", graph=graph), tmp_path / "graph")
    with pytest.raises(sc.ArtefactError, match="expected a model without get_extra_state"):
        sc.load(tmp_path / "graph", Extra)
    small = sc.apply(model, plan, graph=graph)
    small.get_extra_state = lambda: {1, 2}  # type: ignore[method-assign]
    with pytest.raises(sc.ArtefactError, match=r"get_extra_state\(\) to return a tensor, or plain data"):
        sc.save(small, tmp_path / "odd")
