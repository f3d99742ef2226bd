"""Prune models whose weights lie in files: processor time in dense passes, and memory.

    python -m benchmarks.bench_streaming smollm2
    python -m benchmarks.bench_streaming llama-1.1b
    python -m benchmarks.bench_streaming efficientnet
    python -m benchmarks.bench_streaming classes

``smollm2``: trained weights, 128 texts of 512 tokens, seven tenths of the block parameters stay; needs what
`benchmarks/smollm2.py` needs. ``llama-1.1b``: a Llama of 1.1 billion random weights in shards, 16 texts of
256 tokens; with ``--layers 3`` three of its 22 layers, at true width. ``efficientnet``: trained weights in
memory, 400 images of 224 px, seven tenths of the MACs; needs `benchmarks/imagenet.py`. ``classes``: the
U-Score alone, of a ResNet-50 with random weights, on 32 images of 64 px for each of 1,000 classes; its
temporary files take 54 GB. A pass is one run of the dense model over the data. Memory is sampled while a
phase runs; pages of files do not count, since the system may drop them. Writes
``results/streaming_<case>.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

import secateur as sc
from benchmarks.imagenet import efficientnet_lite0, load
from benchmarks.results import write
from benchmarks.smollm2 import perplexity, smollm2, windows
from tests.zoo.importing import import_torchvision

FRACTION = 0.7
LLAMA = {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
         "num_attention_heads": 32, "num_key_value_heads": 4}  # fmt: skip
"""The shape of the Llama that has 1.1 billion parameters with 22 layers."""


def private_bytes() -> int:
    """Memory of this process that no file holds: Linux tells it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class Phases:
    """Measures phases one after another.

    Attributes:
        found: By name: ``seconds`` of processor time and ``bytes``, the most memory while it ran.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        most, done = [private_bytes()], threading.Event()

        def sample() -> None:
            while not done.wait(0.02):
                most.append(max(most.pop(), private_bytes()))

        thread = threading.Thread(target=sample)
        thread.start()
        start = time.process_time()
        try:
            yield
        finally:
            seconds = time.process_time() - start
            done.set()
            thread.join()
            self.found[name] = {"seconds": round(seconds, 1), "bytes": most[-1]}
            print(f"{name:9s} {seconds:8.1f} s  {most[-1] / 1e9:5.2f} GB", flush=True)


def empty_llama(config: Any) -> nn.Module:
    """A Llama without values, but for the tables that its constructor makes."""
    from transformers import LlamaForCausalLM

    with sc.empty_weights():
        model = LlamaForCausalLM(config)
    return model.eval()


def save_smollm2(folder: Path, texts: int, length: int) -> None:
    """Write the trained weights, texts to calibrate with, and texts to measure with."""
    model, tokenizer = smollm2()
    model.save_pretrained(folder)
    ids = {
        "ids": windows(tokenizer, length)[:texts].contiguous(),
        "judged": windows(tokenizer, 256, second=True)[24:48].contiguous(),
    }
    save_file(ids, folder / "texts")


def save_llama(folder: Path, texts: int, length: int, layers: int = 22) -> None:
    """The same for a Llama of 1.1 billion random weights, a block at a time; no texts to measure with."""
    from transformers import LlamaConfig

    config = LlamaConfig(**LLAMA, num_hidden_layers=layers, use_cache=False)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    blocks: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in empty_llama(config).named_parameters():
        block = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        blocks.setdefault(block, {})[name] = tensor.shape
    places = {name: f"{block}.safetensors" for block, shapes in blocks.items() for name in shapes}
    for block, shapes in blocks.items():
        values = {
            name: torch.randn(shape, generator=generator) * 0.02 if len(shape) > 1 else torch.ones(shape)
            for name, shape in shapes.items()
        }
        save_file(values, folder / f"{block}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file({"ids": torch.randint(32000, (texts, length), generator=generator)}, folder / "texts")


CASES: dict[str, tuple[Any, int, int]] = {
    "smollm2": (save_smollm2, 128, 512),
    "llama-1.1b": (save_llama, 16, 256),
    "efficientnet": (None, 400, 0),
    "classes": (None, 32, 0),
}
CLASSES = 1000


def main() -> None:
    """Runs a case and writes what was measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--texts", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--layers", type=int, help="of llama-1.1b: so many of its 22 layers")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    import_torchvision()  # Transformers imports it where it is installed
    save, texts, length = CASES[chosen.case]
    if chosen.prepare is not None and save is not None:
        given = {} if chosen.layers is None else {"layers": chosen.layers}
        save(chosen.prepare, chosen.texts or texts, chosen.length or length, **given)
        return
    found: dict[str, Any]
    if chosen.case == "efficientnet":
        images = load(chosen.texts or texts)[0]
        found, _ = measure(efficientnet_lite0(), list(images.split(25)), images[:2])
    elif chosen.case == "classes":
        found = of_classes(chosen.texts or texts)
    else:
        found = from_files(chosen.case)
    if found:
        print(found)
        part = "" if chosen.layers is None else f"_{chosen.layers}_layers"
        write(f"streaming_{chosen.case}{part}", found)


class Drawn(Dataset[tuple[torch.Tensor, int]]):
    """Random images of all classes in turn, each drawn anew when it is read."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        """So many images."""
        return self.images

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """An image [3, 64, 64] and its class."""
        generator = torch.Generator().manual_seed(index)
        return torch.randn(3, 64, 64, generator=generator) + index % CLASSES / CLASSES, index % CLASSES


def of_classes(images: int) -> dict[str, Any]:
    """Score a ResNet-50 by the U-Score, with so many images of each class."""
    torchvision = import_torchvision()
    model = torchvision.models.resnet50(num_classes=CLASSES).eval()
    data = DataLoader(Drawn(images * CLASSES), batch_size=50)
    phases = Phases()
    graph = sc.trace(model, next(iter(data))[0])
    signal = sc.signals.Wasserstein()
    with phases.phase("score"):
        sc.score(graph, data, signal, progress=False)
    return {
        "case": "classes",
        "images": images * CLASSES,
        "kept_bytes": sum(signal.held(graph, CLASSES).values()),
        "phases": phases.found,
    }


def from_files(case: str) -> dict[str, Any]:
    """Measure a model whose weights lie in files; nothing where the case is skipped."""
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: what it leaves in memory would count.
        command = [sys.executable, "-m", "benchmarks.bench_streaming", *sys.argv[1:], "--prepare", folder]
        subprocess.run(command, check=True)
        if not (Path(folder) / "texts").is_file():
            return {}  # the child has said why
        from transformers import AutoConfig

        model = sc.map_weights(empty_llama(AutoConfig.from_pretrained(folder)), folder)
        read = load_file(Path(folder) / "texts")
        # Two texts at a time, as it is traced: a batch of one would need a program of its own.
        batches = [{"input_ids": texts} for texts in read["ids"].split(2)]
        inputs = {"input_ids": read["ids"][:2, :16]}
        found, small = measure(model, batches, inputs, Path(folder) / "small")
        if "judged" in read:
            found["perplexity"] = [perplexity(m, read["judged"]) for m in (model, small)]
        return {"case": case, "texts": list(read["ids"].shape), **found}


def measure(
    model: nn.Module,
    batches: list[Any],
    inputs: Any,
    folder: Path | None = None,
    phases: Phases | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """Trace, score, apply, verify, refit and write a model; `FRACTION` of it stays.

    Args:
        model: It keeps that fraction of its blocks' parameters, or, without blocks, of its MACs.
        batches: To score and to refit with.
        inputs: To trace with.
        folder: Where to write it, if at all.
        phases: What measures; None: processor time and the memory of this process.

    Returns:
        What was measured, and the refitted model.
    """
    phases = Phases() if phases is None else phases
    with phases.phase("dense"), torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    with phases.phase("trace"):
        graph = sc.trace(model, inputs)
    with phases.phase("score"):
        scores = sc.score(graph, batches, "reconstruction", progress=False)
    blocks = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    budget = sc.Budget(macs=FRACTION)
    if blocks:
        budget = sc.Budget(params=1 - (1 - FRACTION) * blocks / graph.cost().params)
    plan = sc.RepairAware().allocate(graph, scores, budget)
    with phases.phase("apply"):
        small = sc.apply(model, plan, graph=graph)
    with phases.phase("verify"):
        proof = sc.verify(model, small, plan, inputs)
    with phases.phase("refit"):
        small = sc.repair(small, model, batches, ("reconstruct",), graph=graph, progress=False)
    if folder is not None:
        with phases.phase("write"):
            sc.save(small, folder)
    dense = phases.found["dense"]["seconds"]
    passes = {name: round(entry["seconds"] / dense, 2) for name, entry in phases.found.items()}
    return {
        "phases": phases.found,
        "passes": passes,
        "all_passes": round(sum(passes.values()) - 1, 2),
        "weights_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "most_bytes": max(entry["bytes"] for entry in phases.found.values()),
        "difference": proof.difference,
        "proven": proof.proven,
    }, small


if __name__ == "__main__":
    main()
