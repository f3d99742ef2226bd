from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secateur as sc
from tests.cli.conftest import refused, run

MODEL = ("--model", "net.py:make")


@pytest.fixture
def small(folder: Path) -> Path:
    """A folder that prune wrote, beside the user's files."""
    done = run("prune", *MODEL, "--data", "x.npz", "--macs", "0.6", "--repair", "none", "--out", "small")
    assert done.exit_code == 0, done.stderr
    return folder / "small"


def test_pt2_loads_in_a_process_without_the_training_code(small: Path) -> None:
    done = run("export", "small", *MODEL, "--out", "small.pt2")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("written to  small.pt2\ntorch computes what PyTorch computes")
    (small.parent / "net.py").unlink()
    x = torch.randn(3, 3, 6, 6)
    torch.save(x, small.parent / "x.pt")
    code = (
        "import sys, torch\n"
        "y = torch.export.load('small.pt2').module()(torch.load('x.pt'))\n"
        "assert not [m for m in sys.modules if m.startswith('secateur') or m == 'net']\n"
        "torch.save(y, 'y.pt')"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=small.parent, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    import tests.cli.conftest as files

    (small.parent / "net.py").write_text(files.NET)
    made: dict[str, object] = {}
    exec(compile(files.NET, "net.py", "exec"), made)
    with torch.no_grad():
        wanted = sc.load(small, made["make"])(x)  # type: ignore[arg-type]
    assert torch.equal(torch.load(small.parent / "y.pt"), wanted)


def test_onnx_as_json(small: Path) -> None:
    pytest.importorskip("onnxscript")
    done = run("export", "small", *MODEL, "--out", "small.onnx", "--data", "x.npz", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["path"] == "small.onnx"
    assert found["runtime"] == "onnxruntime"
    assert found["batches"] == [64, 65, 1]
    assert found["difference"] <= found["tolerance"]
    assert (small.parent / "small.onnx").is_file()


def test_every_option_reaches_the_export(small: Path) -> None:
    pytest.importorskip("onnxscript")
    base = ("export", "small", *MODEL, "--data", "x.npz", "--json")
    done = run(*base, "--out", "small.pt2", "--fixed")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["open"], found["batches"]) == ([], [64])
    assert "causal language model" in refused(2, *base, "--out", "small.onnx", "--cache")
    pytest.importorskip("gguf")
    assert "decoder that an architecture" in refused(2, *base, "--out", "small.gguf")
    assert "expected no tokenizer=" in refused(2, *base, "--out", "small.pt2", "--tokenizer", "dense.gguf")


def test_bad_input(small: Path) -> None:
    base = ("export", "small", *MODEL, "--out")
    assert ".onnx or .pt2" in refused(2, *base, "small.bin")
    assert "save_pretrained" in refused(2, *base, "there")
    assert "--input or --data, got both" in refused(
        2, *base, "a.pt2", "--input", "1x3x6x6", "--data", "x.npz"
    )
    assert "model card" in refused(2, *base, "a.pt2", "--license", "mit")
    assert "expected a folder with model.safetensors" in refused(
        2, "export", "none", *MODEL, "--out", "a.pt2"
    )
    assert sorted(p.name for p in small.parent.glob("*.pt2")) == []
