"""Sizes that no configuration can say, in a folder that Transformers loads with a modeling file of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.artefact.export.owncode import base_of, sizes_beside
from tests.artefact.export.families import FAMILIES, pruned
from tests.zoo.importing import import_transformers

pytestmark = pytest.mark.skipif(import_transformers() is None, reason="transformers is not installed")
ROOT = Path(__file__).resolve().parents[3]
UNEVEN = {"neurons": (0.5, 0.25), "heads": (0.5, 0)}
TEXTS = ["gpt2", "opt", "qwen3", "neox", "gemma3", "bert", "vit"]


def test_it_loads_and_generates_where_secateur_is_not(tmp_path: Path) -> None:
    family, small = FAMILIES["llama"], pruned("llama", UNEVEN)
    with pytest.raises(sc.ExportError, match="own_code=True"):
        sc.export(small, tmp_path / "m")
    done = sc.export(small, tmp_path / "m", own_code=True)
    assert (done.runtime, done.difference) == ("transformers", 0)
    files = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"config.json", "model.safetensors", "modeling_secateur.py", "README.md"} <= files
    assert "trust_remote_code=True" in (tmp_path / "m" / "README.md").read_text()
    inputs = family.example(2, 7, 1)
    torch.save(inputs, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "from tests.zoo.importing import import_transformers\n"
        "import_transformers()\n"
        "from transformers import AutoModelForCausalLM as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'm')!r}, trust_remote_code=True).eval()\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        f"torch.save(model(**x).logits.detach(), {str(tmp_path / 'y.pt')!r})\n"
        "ids = x['input_ids'][:1]\n"
        "a, b = (model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=c, pad_token_id=0)\n"
        "        for c in (True, False))\n"
        "assert a.shape == (1, 12) and torch.equal(a, b)\n"
        "loss = model(input_ids=ids, labels=ids).loss\n"
        "loss.backward()\n"
        "assert not [name for name in sys.modules if name.startswith('secateur')]\n"
        "print(float(loss))"
    )
    away = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **away},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), small(**inputs).logits)
        ids = inputs["input_ids"][:1]
        assert float(child.stdout) == pytest.approx(float(small(input_ids=ids, labels=ids).loss), rel=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in TEXTS])
@pytest.mark.parametrize("what", ["neurons", "heads"])
def test_families(tmp_path: Path, name: str, what: str) -> None:
    done = sc.export(pruned(name, {what: UNEVEN[what]}), tmp_path / "m", own_code=True)
    assert done.difference == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert set(config["auto_map"].values()) == {f"modeling_secateur.{FAMILIES[name].model}"}
    assert config["pruned"]["shapes"]


def test_what_the_folder_says_is_what_differs() -> None:
    small = pruned("llama", {"neurons": (0.5, 0)})
    base = base_of(small)
    assert base is not None
    found = sizes_beside(small, base)
    assert found["shapes"] == {
        "model.layers.0.mlp.gate_proj.weight": [24, 32],
        "model.layers.0.mlp.up_proj.weight": [24, 32],
        "model.layers.0.mlp.down_proj.weight": [32, 24],
    }
    assert found["numbers"]["model.layers.0.mlp.down_proj"] == {"in_features": 24}


def test_the_file_is_ours_alone_and_short(tmp_path: Path) -> None:
    sc.export(pruned("llama", UNEVEN), tmp_path / "m", own_code=True)
    text = (tmp_path / "m" / "modeling_secateur.py").read_text()
    assert len(text.splitlines()) < 60
    assert "class LlamaForCausalLM(transformers.LlamaForCausalLM):" in text
    assert [line for line in text.splitlines() if line.startswith(("import ", "from "))] == [
        "import torch",
        "import transformers",
        "from torch import nn",
    ]


def test_wrong_sizes_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.artefact.export import owncode

    right = owncode.sizes_beside

    def wrong(model: nn.Module, base: type) -> dict[str, object]:
        return {**right(model, base), "shapes": {}}

    monkeypatch.setattr(owncode, "sizes_beside", wrong)
    with pytest.raises((sc.ExportError, RuntimeError)):
        sc.export(pruned("llama", UNEVEN), tmp_path / "m", own_code=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_more_than_sizes_is_refused(tmp_path: Path) -> None:
    small = pruned("llama", UNEVEN)
    with pytest.raises(sc.errors.SettingError, match="no own_code="):
        sc.export(small, tmp_path / "a.onnx", own_code=True)
    with pytest.raises(sc.errors.SettingError, match="expected a model of Transformers for own_code"):
        sc.export(nn.Linear(2, 2), tmp_path / "a", torch.zeros(2, 2), own_code=True)
    assert list(tmp_path.iterdir()) == []
