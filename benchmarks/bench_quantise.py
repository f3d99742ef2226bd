"""Prune, then quantise: size, time and quality of dense, pruned, and pruned with few bits.

    python -m benchmarks.bench_quantise [JOB ...]

All stages are ONNX files run by ONNX Runtime with one thread, in turn. Times are the thread's processor time
of one pass, not the clock's, so that other programs on the machine count less; memory and caches are shared
with them all the same. Results: `benchmarks/results/quantise.json`.

- resnet20: CIFAR-10, 70 % of the MACs, 1,000 training images to prune and calibrate with, 3,000 to test with.
- efficientnet: EfficientNet-Lite0 and ImageNet pictures, 80 % of the MACs, 350 and 150 of them.
- resnet20_8, efficientnet_16: the same, with multiples of 8 and 16 channels in each layer.
- encoder: of the sizes of MiniLM-L6 with random weights and tokens, so only the distance to the dense outputs
  says something; 70 % of the MACs.
- smollm2: SmolLM2-135M, not pruned, the perplexity of WikiText-2 with weights of 4 bits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import secateur as sc
from benchmarks import cifar, imagenet
from benchmarks.results import read, table, write
from secateur.calibration import Calibration
from secateur.config.names import Quantisation
from secateur.pipeline.quantise import Quantised, Quantiser
from secateur.report.quantised import rows, titles

Job = tuple[nn.Module, list[Any], list[Any], sc.Budget | None, Quantisation]
MULTIPLES = {"resnet20_8": 8, "efficientnet_16": 16}


def processor_time(call: Callable[[], object]) -> float:
    """Seconds of processor time of this process for one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def batches(x: torch.Tensor, y: torch.Tensor, size: int) -> list[Any]:
    """Pairs of inputs and labels."""
    return list(zip(x.split(size), y.split(size), strict=True))


def resnet20() -> Job:
    """The network and its images."""
    from benchmarks.resnet20 import trained

    fit, test = cifar.load("train", 1000), cifar.load("test")
    return trained(), batches(*fit, 50), batches(*test, 100), sc.Budget(macs=0.7), "int8"


def efficientnet() -> Job:
    """The network and its pictures."""
    model = imagenet.efficientnet_lite0()
    fit, test = imagenet.load(350), imagenet.load(150, 350)
    return model, batches(*fit, 25), batches(*test, 25), sc.Budget(macs=0.8), "int8"


def encoder() -> Job:
    """An encoder of the sizes of MiniLM-L6, with random weights and tokens."""
    from tests.zoo.importing import import_transformers

    found: Any = import_transformers()
    torch.manual_seed(0)
    config = found.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
    )
    model = found.BertModel(config, add_pooling_layer=False).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (96, 128), generator=generator)
    given = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids.split(8)]
    return model, given[:8], given[8:], sc.Budget(macs=0.7), "int8"


def smollm2() -> Job:
    """The language model, and windows of text."""
    from benchmarks.smollm2 import smollm2 as load
    from benchmarks.smollm2 import windows

    model, tokenizer = load()
    test = windows(tokenizer, 256, second=True)[:8]
    data = [{"input_ids": ids, "labels": ids} for ids in test.split(2)]
    return model, data, data, None, "int4"


def measured(job: Job, multiple: int = 1) -> Quantised:
    """Prune, if there is a budget, and quantise."""
    model, fit, test, budget, kind = job
    quantiser = Quantiser.of(model, Calibration.of(test, model=model).first(), kind)
    made = []
    if budget is not None:
        result = sc.prune(
            model,
            fit,
            budget,
            "repair_aware",
            limits=sc.Limits(round_to=multiple),
            evaluation=test,
            measure_latency=False,
            progress=False,
        )
        print(str(result.report).split("\n\n")[1])
        made = [("pruned", result.model)]
    given = Calibration.of(fit, model=model), Calibration.of(test, model=model)
    return quantiser(made, *given, seconds_of=processor_time)


JOBS: dict[str, Callable[[], Job]] = {
    "resnet20": resnet20,
    "efficientnet": efficientnet,
    "encoder": encoder,
    "smollm2": smollm2,
    "resnet20_8": resnet20,
    "efficientnet_16": efficientnet,
}


def main() -> None:
    """Measure what was asked for, and write it beside what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("jobs", nargs="*", choices=[*JOBS, []], default=[])
    asked = parser.parse_args().jobs or [*JOBS]
    torch.set_num_threads(1)
    known = (read("quantise") or {}).get("jobs", {})
    for name in asked:
        done = measured(JOBS[name](), MULTIPLES.get(name, 1))
        print(f"\n{name}\n{table(titles(done.figures), rows(done.figures))}\n")
        known[name] = done.figures.model_dump()
        for stage in known[name]["stages"]:
            stage["median_seconds"] = statistics.median(stage["seconds"])
        write("quantise", {"jobs": known})


if __name__ == "__main__":
    main()
