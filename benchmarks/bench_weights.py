"""Which weights go, and how many of each layer, at equal sparsity.

    python -m benchmarks.bench_weights [--model resnet20 llama] [--sparsities ...] [--seeds N] [--images N]

Top-1 of ResNet-20 and perplexity of a small Llama: criteria by rules, each with the budget solved for the
sparsity, with and without repair; beside them EMP at β = 1, whose sparsity nobody chooses. The repair is
``variance`` for ResNet-20 and the second-order update of linear layers for the language model. Seeds choose
the calibration data. Every run and the medians go to `benchmarks/results/weights.json`. Data: see
`benchmarks/cifar.py`; the language model is trained here on tinyshakespeare.txt, by characters, and kept in
`benchmarks/cache`.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur as sc
from benchmarks import cifar, results
from benchmarks.resnet20 import trained as trained_resnet20
from secateur import masks
from secateur.allocate import EMP, ERK, LAMP, OWL, Budget, Global, Repairability, Uniform
from secateur.masks.prune import measured
from secateur.repair.sweep import sweep
from tests.zoo.importing import import_transformers

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
CRITERIA = ("magnitude", "wanda", "taylor")
RULES: dict[str, Callable[[str], Any]] = {
    "uniform": lambda c: Uniform(removal=c),
    "emp layer": lambda c: EMP(removal=c),
    "emp model": lambda c: EMP(scope="model", removal=c),
    "emp row": lambda c: EMP(scope="row", removal=c),
    "global": lambda c: Global(normalise="none", removal=c),
    "erk": lambda c: ERK(removal=c),
    "lamp": lambda c: LAMP(removal=c),
    "owl": lambda c: OWL(removal=c),
    "repairability": lambda c: Repairability(removal=c),
}
CACHE = Path(__file__).parent / "cache"


@dataclass(frozen=True)
class Case:
    """A trained model and how it is measured.

    Attributes:
        model: In evaluation mode.
        calibration: seed -> batches.
        measure: What is printed: top-1 in percent, or perplexity.
        repair: (masked model, dense model, plan, batches), in place.
        graph: The trace, where the repair needs it.
    """

    model: nn.Module
    calibration: Callable[[int], list[Any]]
    measure: Callable[[nn.Module], float]
    repair: Callable[[nn.Module, nn.Module, masks.MaskPlan, list[Any]], object]
    graph: sc.Graph | None = None


def resnet20(images: int) -> Case:
    """ResNet-20 on CIFAR-10."""
    model = trained_resnet20()
    graph = sc.trace(model, torch.zeros(2, 3, 32, 32))
    x, y = cifar.load("train", 8 * images)
    test = list(zip(*(t.split(250) for t in cifar.load("test")), strict=True))

    def batches(seed: int) -> list[Any]:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:images]
        return [(x[k], y[k]) for k in order.split(64)]

    def repair(small: nn.Module, dense: nn.Module, plan: masks.MaskPlan, data: list[Any]) -> object:
        return sweep("variance", small, graph, sc.Calibration.of(data))

    def measure(m: nn.Module) -> float:
        return 100 * float(sc.evaluate(m, test).accuracy or 0.0)

    return Case(model, batches, measure, repair, graph)


def llama(images: int, steps: int = 1500, length: int = 128) -> Case:
    """A small model of Llama's shape, by characters."""
    library: Any = import_transformers()
    if library is None:
        print("Skipped: transformers is not installed.")
        raise SystemExit(0)
    text = (cifar.require("tinyshakespeare.txt") / "tinyshakespeare.txt").read_text()
    letters = sorted(set(text))
    tokens = torch.tensor([letters.index(c) for c in text])
    train, test = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]
    torch.manual_seed(0)
    config = library.LlamaConfig(
        vocab_size=len(letters),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
        tie_word_embeddings=False,
    )
    model: Any = library.LlamaForCausalLM(config)

    def windows(source: Tensor, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(source) - length, (count,), generator=generator)
        return torch.stack([source[s : s + length] for s in starts.tolist()])

    def as_batches(found: Tensor) -> list[Any]:
        return [{"input_ids": part, "labels": part} for part in found.split(16)]

    weights = CACHE / f"llama-{steps}.safetensors"
    if weights.is_file():
        model.load_state_dict(load_file(weights))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for step in range(steps):
            part = windows(train, 16, step)
            optimizer.zero_grad()
            loss = model(input_ids=part, labels=part).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
        CACHE.mkdir(exist_ok=True)
        save_file(model.state_dict(), weights)
    judged = as_batches(windows(test, 64, 0))
    return Case(
        model.eval(),
        lambda seed: as_batches(windows(train, max(16, images // 8), 10**6 + seed)),
        lambda m: math.exp(min(sc.evaluate(m, judged).loss, 50.0)),
        lambda small, dense, plan, data: masks.surgeon(small, dense, plan, data),
    )


CASES: dict[str, Callable[[int], Case]] = {"resnet20": resnet20, "llama": llama}


def run(case: Case, criterion: str, rule: str, sparsity: float | None, seed: int) -> dict[str, Any]:
    """One line: what a rule and a criterion give at a sparsity; None: the rule decides."""
    data = case.calibration(seed)
    scores = masks.score(case.model, data, criterion, seed=seed, progress=False)
    made = measured(RULES[rule](criterion), case.model, data, scores)
    budget = None if sparsity is None else Budget(sparsity=sparsity)
    plan = masks.allocate(masks.Weights.of(case.model), scores, made, budget, seed=seed)
    small = masks.apply(case.model, plan, case.graph)
    before = case.measure(small)
    case.repair(small, case.model, plan, data)
    return {
        "criterion": criterion,
        "rule": rule,
        "asked": sparsity,
        "sparsity": plan.sparsity,
        "seed": seed,
        "pruned": before,
        "repaired": case.measure(small),
    }


def report(name: str, dense: float, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints the medians over seeds, and returns them."""
    keys = list(dict.fromkeys((r["asked"], r["criterion"], r["rule"]) for r in runs))
    medians = []
    for asked, criterion, rule in keys:
        same = [r for r in runs if (r["asked"], r["criterion"], r["rule"]) == (asked, criterion, rule)]
        middle = {k: statistics.median(r[k] for r in same) for k in ("sparsity", "pruned", "repaired")}
        medians.append({"asked": asked, "criterion": criterion, "rule": rule, **middle})
    rows = [
        [
            "β = 1" if m["asked"] is None else f"{m['asked']:.0%}",
            m["criterion"],
            m["rule"],
            f"{100 * m['sparsity']:.1f}",
            f"{m['pruned']:.2f}",
            f"{m['repaired']:.2f}",
        ]
        for m in medians
    ]
    print(f"\n{name}: dense {dense:.2f}\n")
    print(results.table(["asked", "criterion", "rule", "zero %", "pruned", "repaired"], rows))
    return medians


def main() -> None:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=list(CRITERIA))
    parser.add_argument("--rules", nargs="+", choices=tuple(RULES), default=list(RULES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=512, help="calibration images")
    parser.add_argument("--dry", action="store_true", help="write no result file")
    given = parser.parse_args()
    content: dict[str, Any] = {"arguments": vars(given), "models": {}}
    for name in given.model:
        case = CASES[name](given.images)
        dense = case.measure(case.model)
        wanted: list[tuple[float | None, str]] = [(s, r) for s in given.sparsities for r in given.rules]
        wanted += [(None, r) for r in given.rules if r.startswith("emp")]
        runs = [
            run(case, criterion, rule, sparsity, seed)
            for sparsity, rule in wanted
            for criterion in given.criteria
            for seed in range(given.seeds)
        ]
        medians = report(name, dense, runs)
        content["models"][name] = {"dense": dense, "runs": runs, "medians": medians}
    if not given.dry:
        results.write("weights", content)


if __name__ == "__main__":
    main()
