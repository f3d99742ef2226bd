"""Every export of 20 architectures, pruned unevenly, run in a fresh process with the target's runtime alone.

    python -m benchmarks.bench_exports [name ...]

30 % of the units of every group go, drawn at random, with random weights. Each file is then run in a process
that cannot import what the target must not need: an `.onnx` file runs with NumPy and ONNX Runtime, a `.pt2`
file with PyTorch, a Hugging Face folder with its own modeling file with PyTorch and Transformers, a `.gguf`
file (of `llama` and `qwen3`) with llama.cpp, where `llama-cpp-python` is installed; for `gguf, uneven` each
layer keeps another number of heads and neurons. The table
has the largest difference of the outputs from the model's, max|file - model| / max|model|. Results:
`benchmarks/results/exports.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

import secateur as sc
from benchmarks.bench_architectures import random_keep
from benchmarks.results import read, table, write
from secateur.targets.units.compare import run
from tests.zoo.entry import Entry
from tests.zoo.models import ZOO

NAMES = (
    *("resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x1_0", "convnext_tiny", "swin_t"),
    *("ghostnet_100", "vit_tiny_patch16_224", "edgenext_xx_small", "levit_128s", "mobilevitv2_050"),
    *("bert", "gpt2", "llama", "qwen3", "opt", "unet", "lstm_tagger", "transformer_encoder", "two_inputs"),
)
TARGETS = ("onnx", "pt2", "folder", "gguf", "gguf, uneven")
LLAMA_CPP = importlib.util.find_spec("llama_cpp")
WRITTEN_AS_GGUF = {"gguf": ("llama", "qwen3"), "gguf, uneven": ("llama",)}
ALLOWED = 3.5e-4
"""sqrt(eps) of float32, as for `sc.export`."""

BLOCK = """
import importlib.util, sys
blocked, look = {blocked!r}, importlib.util.find_spec
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Blocked())
importlib.util.find_spec = lambda name, *more: None if name in blocked else look(name, *more)
"""
GGUF = """
import llama_cpp, numpy as np
m = llama_cpp.Llama("m.gguf", logits_all=True, verbose=False, n_ctx=64, n_threads=1, type_k=0, type_v=0)
found = []
for text in np.load("x.npz")["00"]:
    m.reset()
    m.eval(text.tolist())
    found.append(np.array(m.scores[: len(text)]))
np.savez("y.npz", np.stack(found))
"""
LIBRARIES = {"secateur", "timm", "torchvision", "transformers", "tests", "benchmarks"}
RUNS = {
    "onnx": (
        LIBRARIES | {"torch", "onnx", "onnxscript"},
        "import numpy as np, onnxruntime as o\n"
        "s = o.InferenceSession('m.onnx', providers=['CPUExecutionProvider'])\n"
        "x = np.load('x.npz')\n"
        "feeds = {i.name: x[k] for i, k in zip(s.get_inputs(), sorted(x.files))}\n"
        "np.savez('y.npz', *s.run(None, feeds))",
    ),
    "pt2": (
        LIBRARIES,
        "import numpy as np, torch\n"
        "from torch.utils import _pytree as tree\n"
        "x = np.load('x.npz')\n"
        "given = [torch.from_numpy(x[k]) for k in sorted(x.files)]\n"
        "m = torch.export.load('m.pt2').module()\n"
        "names = open('names').read().split()\n"
        "with torch.no_grad():\n"
        "    y = m(**dict(zip(names, given))) if names else m(*given)\n"
        "np.savez('y.npz', *[v.numpy() for v in tree.tree_leaves(y) if isinstance(v, torch.Tensor)])",
    ),
    "folder": (
        LIBRARIES - {"transformers"},
        "import json, numpy as np, torch, transformers\n"
        "x = np.load('x.npz')\n"
        "given = [torch.from_numpy(x[k]) for k in sorted(x.files)]\n"
        "auto = next(iter(json.load(open('m/config.json'))['auto_map']))\n"
        "m = getattr(transformers, auto).from_pretrained('m', trust_remote_code=True).eval()\n"
        "names = open('names').read().split()\n"
        "with torch.no_grad():\n"
        "    y = m(**dict(zip(names, given)), use_cache=False) if auto.endswith('LM') else "
        "m(**dict(zip(names, given)))\n"
        "np.savez('y.npz', *[v.numpy() for v in y.to_tuple() if isinstance(v, torch.Tensor)])",
    ),
    "gguf": (LIBRARIES | {"torch", "gguf"}, GGUF),
    "gguf, uneven": (LIBRARIES | {"torch", "gguf"}, GGUF),
}


def elsewhere(folder: Path, target: str) -> list[np.ndarray[Any, Any]]:
    """Run what was written in a process of its own, and return its outputs."""
    blocked, code = RUNS[target]
    away = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    if target.startswith("gguf") and LLAMA_CPP is not None:
        away["PYTHONPATH"] = str(Path(str(LLAMA_CPP.origin)).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code],
        cwd=folder,
        env={**os.environ, **away},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:200])
    with np.load(folder / "y.npz") as found:
        return [found[name] for name in found.files]


def difference(found: list[np.ndarray[Any, Any]], wanted: list[torch.Tensor]) -> float:
    """The largest over outputs of max|a - b| / max|b|."""
    pairs = zip(found, (t.numpy() for t in wanted), strict=True)
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) for a, b in pairs)


def exported(entry: Entry) -> dict[str, float | str]:
    """The difference of each export of one architecture, or why there is none."""
    model, inputs = entry.make(), entry.inputs()
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False
    graph = sc.trace(model, inputs)
    plan = sc.Plan.build(graph, random_keep(graph), allocator="random")
    small = sc.apply(model, plan, graph=graph, example_inputs=inputs)
    args, kwargs = (inputs, {}) if isinstance(inputs, tuple) else ((), inputs)
    wanted = run(small, args, kwargs)
    found: dict[str, float | str] = {}
    for target in TARGETS:
        if target == "folder" and entry.family != "transformers":
            continue
        if target in WRITTEN_AS_GGUF and (entry.name not in WRITTEN_AS_GGUF[target] or LLAMA_CPP is None):
            continue
        if target == "gguf, uneven":
            keep = {g.name: np.arange(g.size) >= min(k, g.size - 1) for k, g in enumerate(graph.groups)}
            plan = sc.Plan.build(graph, keep, allocator="one unit more in each group")
            small = sc.apply(model, plan, graph=graph, example_inputs=inputs)
            wanted = run(small, args, kwargs)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            given = {f"{k:02}": v.numpy() for k, v in enumerate([*args, *kwargs.values()])}
            np.savez(folder / "x.npz", **given)
            (folder / "names").write_text(" ".join(kwargs))
            try:
                place = folder / ("m" if target == "folder" else f"m.{target.partition(',')[0]}")
                sc.export(small, place, inputs, own_code=target == "folder")
                found[target] = difference(elsewhere(folder, target), wanted)
            except (sc.SecateurError, RuntimeError, ValueError) as error:
                found[target] = f"{type(error).__name__}: {str(error)[:200]}".replace(name, "")
    return found


def main() -> None:
    """Export all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*")
    asked = parser.parse_args().names or NAMES
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    entries = {entry.name: entry for entry in reversed(ZOO)}
    known: dict[str, Any] = dict((read("exports") or {}).get("differences", {}))
    for name in asked:
        if not entries[name].available():
            print(f"{name}: skipped, {entries[name].family} is not installed")
            continue
        known[name] = exported(entries[name])
        print(name, known[name], flush=True)
        write("exports", {"allowed": ALLOWED, "differences": known})
    rows = [
        (name, *(f"{v:.1e}" if isinstance(v := each.get(t, "–"), float) else v[:40] for t in TARGETS))
        for name, each in known.items()
    ]
    print(table(("architecture", *TARGETS), rows))
    values = [v for each in known.values() for v in each.values()]
    agree = sum(isinstance(v, float) and v <= ALLOWED for v in values)
    print(f"\n{agree} of {len(values)} exports of {len(known)} architectures agree within {ALLOWED:.1e}")


if __name__ == "__main__":
    main()
