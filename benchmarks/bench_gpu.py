"""What pruning takes on a CUDA device: minutes, its memory, and how much faster the pruned model is.

    python -m benchmarks.bench_gpu                     # what fits into five minutes; `make gpu` runs this
    python -m benchmarks.bench_gpu --minutes 60        # more layers and more texts
    SECATEUR_DEVICE=cpu python -m benchmarks.bench_gpu --quick   # that it runs; its figures mean nothing

Cases, in this order:

- ``latency``: ResNet-50 (torchvision) at 0.5 of its MACs and a Llama of 1.1 billion parameters at 0.7 of
  these, each in turn with the dense model; and that Llama's weights in the 2:4 format of the hardware.
- ``llama-1.1b``: random weights in float32, seven tenths of the block parameters stay: trace, score, apply,
  verify, refit.
- ``llama-8b``: the shape of Llama 3 8B in bfloat16, as many of its 32 layers as the time allows, at true
  width; the row says how many.
- ``llama-8b from files``: the same with the weights in files (`sc.map_weights`) and `sc.compute_on` the card.

Weights are random: they decide neither times nor memory. Texts have 2,048 tokens. Seconds are wall time with
the device idle at both ends; memory is the most that torch's allocator held. A case that fails or for which
no time is left has its reason in place of figures. Writes ``results/gpu.json``, with the name of the card.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import results
from benchmarks.bench_streaming import FRACTION, LLAMA, Phases, measure
from secateur.targets import weights as masks
from tests.zoo.importing import import_torchvision

DEVICE = torch.device(os.environ.get("SECATEUR_DEVICE", "cuda"))
LENGTH = 2048
LLAMAS: dict[str, dict[str, int]] = {
    "llama-1.1b": {**LLAMA, "num_hidden_layers": 22},
    "llama-8b": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
QUICK = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


class OnDevice(Phases):
    """Measures phases by wall time and by the memory of the device."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what runs inside."""
        _wait()
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats(DEVICE)
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait()
            seconds = time.perf_counter() - start
            most = torch.cuda.max_memory_allocated(DEVICE) if DEVICE.type == "cuda" else 0
            self.found[name] = {"seconds": round(seconds, 3), "bytes": most}
            print(f"  {name:7s} {seconds:8.2f} s  {most / 1e9:6.2f} GB", flush=True)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def llama(shape: dict[str, int], dtype: torch.dtype, folder: str | None = None) -> nn.Module:
    """A Llama with random weights, on the device. With a folder its weights are in files there instead."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, max_position_embeddings=LENGTH, use_cache=False)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(config).to(dtype).eval()
    if folder is None:
        return model
    model.save_pretrained(folder)
    with sc.empty_weights():
        empty = LlamaForCausalLM(config)
    return sc.map_weights(empty, folder)


def pruned_llama(
    name: str, dtype: torch.dtype, texts: int, layers: int, quick: bool, *, in_files: bool = False
) -> dict[str, Any]:
    """Prune a Llama of so many layers with so many texts, phase by phase."""
    shape = {**LLAMAS[name], **(QUICK if quick else {}), "num_hidden_layers": layers}
    length = 16 if quick else LENGTH
    with TemporaryDirectory() as folder, sc.compute_on(DEVICE if in_files else "cpu"):
        model = llama(shape, dtype, folder if in_files else None)
        ids = torch.randint(shape["vocab_size"], (texts, length), device=DEVICE)
        batches = [{"input_ids": part} for part in ids.split(2)]
        example = {"input_ids": ids[:2, :16].to(next(model.parameters()).device)}
        found, _ = measure(model, batches, example, phases=OnDevice())
        del model  # its files are deleted
    return {"layers": layers, "texts": [texts, length], "dtype": str(dtype), **found}


def resnet50_latency(quick: bool) -> dict[str, Any]:
    """ResNet-50 at half of its MACs against the dense one."""
    net = import_torchvision().models.resnet50().to(DEVICE).eval()
    images = torch.randn(2 if quick else 64, 3, 64 if quick else 224, 64 if quick else 224, device=DEVICE)
    graph = sc.trace(net, images[:2])
    return {"0.5 of MACs": against(net, smaller(net, graph, sc.Budget(macs=0.5)), images, quick)}


def llama_latency(quick: bool) -> dict[str, Any]:
    """A Llama at seven tenths of its parameters, and with 2:4 weights, against the dense one."""
    shape = {**LLAMAS["llama-1.1b"], **(QUICK if quick else {}), "num_hidden_layers": 2 if quick else 22}
    model = llama(shape, torch.float32 if DEVICE.type == "cpu" else torch.float16)
    ids = torch.randint(shape["vocab_size"], (2, 16 if quick else LENGTH), device=DEVICE)
    graph = sc.trace(model, {"input_ids": ids[:, :16]})
    small = smaller(model, graph, sc.Budget(params=FRACTION))
    return {
        "0.7 of parameters": against(model, small, {"input_ids": ids}, quick),
        "2:4": against(model, two_four(model), {"input_ids": ids}, quick),
    }


def smaller(model: nn.Module, graph: sc.Graph, budget: sc.Budget) -> nn.Module:
    """The model after a plan with the same share of each layer, in widths that the kernels like."""
    rule = sc.Uniform(removal="magnitude")
    scores = sc.score(graph, None, rule.signals, progress=False)
    return sc.apply(model, rule.allocate(graph, scores, budget, sc.Limits(round_to=8)), graph=graph)


def two_four(model: nn.Module) -> nn.Module:
    """The model with two of four weights in each row, in the format of the hardware where there is a card."""
    weights = sc.trace(model, granularity="weight")
    plan = sc.Pattern(2, 4).allocate(weights, sc.score(weights, progress=False))
    small = sc.apply(model, plan)
    if DEVICE.type == "cuda":
        masks.to_semi_structured(small)
    return small


def against(dense: nn.Module, small: nn.Module, inputs: Any, quick: bool) -> dict[str, Any]:
    """Both in turn, at the inputs' batch size."""
    found = sc.bench(dense, small, inputs, rounds=5 if quick else 30)
    print(found, flush=True)
    return found.to_dict()


def main() -> None:
    """Runs the cases while there is time, and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="stop starting cases after this time")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, nothing written")
    asked = parser.parse_args()
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        print("Skipped: needs a CUDA device.")
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start = time.monotonic()
    texts, quick = (16, asked.quick) if asked.minutes < 20 else (128, asked.quick)
    eight = 4 if asked.minutes < 60 else 32
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "latency of resnet50": lambda: resnet50_latency(quick),
        "latency of llama-1.1b": lambda: llama_latency(quick),
        "llama-1.1b": lambda: pruned_llama("llama-1.1b", torch.float32, texts, 2 if quick else 22, quick),
        "llama-8b": lambda: pruned_llama("llama-8b", torch.bfloat16, texts, 1 if quick else eight, quick),
        "llama-8b from files": lambda: pruned_llama(
            "llama-8b", torch.bfloat16, texts, 1 if quick else eight, quick, in_files=True
        ),
    }
    found: dict[str, Any] = {}
    for name, case in cases.items():
        print(name, flush=True)
        if time.monotonic() - start > 60 * asked.minutes:
            found[name] = {"skipped": f"{asked.minutes:g} minutes were over"}
            continue
        try:
            found[name] = case()
        except Exception as error:  # the next case may run: out of memory, no kernel for the card
            found[name] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            print(f"  {found[name]['failed']}", flush=True)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    card = torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else "none: the CPU"
    if asked.quick:
        print("--quick: not written")
        failed = [name for name, case in found.items() if "failed" in case]
        raise SystemExit(f"failed: {failed}" if failed else 0)
    results.write("gpu", {"card": card, "minutes": round((time.monotonic() - start) / 60, 1), "cases": found})


if __name__ == "__main__":
    main()
