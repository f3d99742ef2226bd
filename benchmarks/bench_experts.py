"""Experts removed: equality, what it costs in perplexity, and the memory of rewriting a checkpoint.

    python -m benchmarks.bench_experts [equality] [quality] [merge] [scale] [--quick]

equality    sliced against a dense model that excludes the experts, in float64, for every family of `tests`
quality     a small Qwen2-MoE trained on tinyshakespeare (`benchmarks.moe_language_model`): rules and signals
            at the same total of experts, with and without repair, five draws of calibration data; about half
            an hour on one thread once the model is trained
merge       the same model: removed experts dropped, merged into others, and both refitted; the router's rows
            as they were, or fitted so that tokens of a removed expert go to its heir; and, with as many
            parameters, fewer neurons in every expert
scale       Qwen1.5-MoE-A2.7B's shape on the meta device; and a sharded checkpoint of its layout with smaller
            width, rewritten from a plan in a process of its own, whose peak memory is measured

Each writes a result file of its own: `experts_<part>.json`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import secateur as sc
from benchmarks import results
from benchmarks.characters import perplexity, text
from benchmarks.moe_language_model import STEPS, batches, library, trained
from secateur.allocators.base import Allocator
from secateur.allocators.emp import EMP
from secateur.allocators.global_ranking import Global
from secateur.targets.experts.graph import ExpertGraph
from secateur.targets.experts.merge import heirs

PARTS = ("equality", "quality", "merge", "scale")
SEEDS = (0, 1, 2, 3, 4)
SHARES = (0.75, 0.5)
SIGNALS = ("frequency", "reap", "expert_taylor", "random")
PROTECTS = {"expert_taylor": "reap"}
"""ToD's other signal: the Taylor signal, or this where that is the removal signal."""
SHAPE = {"num_hidden_layers": 24, "num_experts": 60, "num_experts_per_tok": 4}


def equality() -> list[dict[str, Any]]:
    """The largest relative difference over five random plans of each family."""
    from tests.targets.experts.models import FAMILIES, make, words

    rows = []
    for family in FAMILIES:
        model, ids = make(family), words(4, 16)
        graph = sc.trace(model, ids, granularity="expert")
        worst = 0.0
        for seed in SEEDS:
            rule, scores = Global(removal="random"), random_scores(graph, seed)
            plan = rule.allocate(graph, scores, sc.Budget(experts=0.7))
            small = sc.apply(model, plan, graph=graph)
            worst = max(worst, sc.verify(model, small, plan, ids).difference)
        rows.append({"family": family, "blocks": len(graph.blocks), "difference": worst})
    print("\nSliced against excluded, float64, largest relative difference over five plans")
    print(
        results.table(
            ("family", "blocks", "difference"),
            [(r["family"], r["blocks"], f"{r['difference']:.1e}") for r in rows],
        )
    )
    return rows


def random_scores(graph: ExpertGraph, seed: int) -> Mapping[str, Mapping[str, Any]]:
    """Scores that need no data."""
    return sc.score(graph, None, "random", seed=seed).values


RULES: Mapping[str, Callable[[str], Allocator]] = {
    "tod": lambda signal: sc.ToD(removal=signal, protection=PROTECTS.get(signal, "expert_taylor")),
    "emp": lambda signal: EMP(removal=signal),
    "global": lambda signal: Global(removal=signal),
    "uniform": lambda signal: sc.Uniform(removal=signal),
}


def quality(steps: int, seeds: Sequence[int], stretches: int, count: int) -> dict[str, Any]:
    """Perplexity of every rule and signal at the same number of experts, before and after repair.

    Args:
        steps: Of training.
        seeds: Of the calibration data, and of what is random.
        stretches: Of the test text, 128 characters each.
        count: Batches of calibration data, 32 stretches each; scores and repairs read the same.
    """
    model = trained(steps)
    train, test, _ = text()
    dense = perplexity(model, test, stretches)
    settings = {"steps": steps, "test_stretches": stretches, "calibration_batches": count, "dense": dense}
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        data = batches(train, count, seed + 1)
        graph = sc.trace(model, data[0], granularity="expert")
        begun = time.perf_counter()
        scores = sc.score(graph, data, SIGNALS, seed=seed, progress=False)
        scoring = time.perf_counter() - begun
        begun = time.perf_counter()
        for share, signal, (name, rule) in itertools.product(SHARES, SIGNALS, RULES.items()):
            plan = rule(signal).allocate(graph, scores, sc.Budget(experts=share), seed=seed)
            small = sc.apply(model, plan, graph=graph)
            repaired = sc.repair(small, model, data, graph=graph, seed=seed, progress=False)
            (entry,) = sc.record_of(repaired).repairs
            kept = [group.kept for group in plan.groups]
            runs.append({"seed": seed, "share": share, "signal": signal, "rule": name, "kept": kept,
                         "pruned": perplexity(small, test, stretches),
                         "repaired": perplexity(repaired, test, stretches),
                         "blocks_off": [entry["before"], entry["after"]]})  # fmt: skip
        print(f"seed {seed}: scored in {scoring:.0f} s, {time.perf_counter() - begun:.0f} s", flush=True)
    print(f"\nPerplexity a character, dense {dense:.3f}; mean ± standard deviation over {len(seeds)} seeds")
    rows = []
    for share, signal, stage in itertools.product(SHARES, SIGNALS, ("pruned", "repaired")):
        cells = []
        for name in RULES:
            found = [r[stage] for r in runs if (r["share"], r["signal"], r["rule"]) == (share, signal, name)]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            cells.append(f"{statistics.mean(found):.3f} ± {spread:.3f}")
        rows.append((f"{share:.0%}", signal, stage, *cells))
    print(results.table(("experts kept", "signal", "stage", "ToD", "EMP", "Global", "Uniform"), rows))
    return {**settings, "seeds": list(seeds), "runs": runs}


JUDGED = "as it was, prune"
"""The router as it was, by `sc.prune`, which keeps what the model's own loss on held-out text agrees with."""

METHODS: Mapping[str, Any] = {
    "drop": None,
    "drop, refit": "experts",
    "merge": "merge",
    "merge, refit": ["merge", "experts"],
}


def combined(
    small: torch.nn.Module, model: torch.nn.Module, graph: ExpertGraph, plan: sc.Plan, data: Any
) -> torch.nn.Module:
    """A copy in which the router's row of an heir stands for all that it took over.

    Its logit is fitted to the log of the sum of the exponentials of their logits, which softmax turns into
    the sum of their weights: by least squares over the tokens of four batches, each weighed by that sum.
    """
    small = copy.deepcopy(small)
    kept = {g.name: [e for e in range(g.size) if e not in set(g.removed)] for g in plan.groups if g.removed}
    blocks = [block for block in graph.blocks if block.name in kept]
    reads: dict[str, list[torch.Tensor]] = {}
    handles = [
        model.get_submodule(block.name).register_forward_pre_hook(
            lambda _, args, name=block.name: reads.setdefault(name, []).append(args[0].flatten(0, 1).double())
        )
        for block in blocks
    ]
    found = heirs(model, blocks, kept, sc.Calibration.of(data[:4]))
    for handle in handles:
        handle.remove()
    for block in found:
        x = torch.cat(reads[block.block.name])
        rows = model.get_submodule(block.block.router).weight.detach().double()
        logits = x @ rows.T
        for position, heir in enumerate(block.kept):
            members = [heir, *(r for r, its in block.heir.items() if its == heir)]
            wanted = logits[:, members].logsumexp(1)
            weight = (wanted - logits.logsumexp(1)).exp()[:, None]
            gram = x.T @ (weight * x)
            gram += 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            change = torch.linalg.solve(gram, x.T @ (weight[:, 0] * (wanted - logits[:, heir])))
            small.get_submodule(block.block.router).weight.data[position] = (rows[heir] + change).float()
    return small


def merging(steps: int, seeds: Sequence[int], stretches: int, count: int) -> dict[str, Any]:
    """Perplexity of dropping, merging and both, of two treatments of the router, and of inner sizes.

    Args:
        steps: Of training.
        seeds: Of the calibration data.
        stretches: Of the test text, 128 characters each.
        count: Batches of calibration data, 32 stretches each.
    """
    model = trained(steps)
    train, test, _ = text()
    dense = perplexity(model, test, stretches)
    runs: list[dict[str, Any]] = []
    for seed, share in itertools.product(seeds, SHARES):
        data = batches(train, count, seed + 1)
        graph = sc.trace(model, data[0], granularity="expert")
        scores = sc.score(graph, data, "reap", seed=seed, progress=False)
        plan = sc.Uniform(removal="reap").allocate(graph, scores, sc.Budget(experts=share), seed=seed)
        small = sc.apply(model, plan, graph=graph)
        for router, start in {
            "as it was": small,
            "combined": combined(small, model, graph, plan, data),
        }.items():
            for name, methods in METHODS.items():
                made = sc.repair(start, model, data, methods, graph=graph, seed=seed, progress=False)
                entries = sc.record_of(made).repairs
                runs.append({"seed": seed, "share": share, "router": router, "method": name,
                             "perplexity": perplexity(made, test, stretches),
                             "off": entries[-1]["after"] if entries else None,
                             "shares": [b["share"] for b in entries[0]["blocks"].values()]
                             if "merge" in name else None})  # fmt: skip
                print(f"merge: {runs[-1]}", file=sys.stderr, flush=True)
        for name in (
            "drop, refit",
            "merge, refit",
        ):  # on four fifths of the data; the rest judges by the loss
            result = sc.prune(
                model, data, sc.Budget(experts=share), sc.Uniform(removal="reap"), "expert",
                repair=METHODS[name], seed=seed, measure_latency=False, progress=False,
            )  # fmt: skip
            runs.append({"seed": seed, "share": share, "router": JUDGED, "method": name,
                         "perplexity": perplexity(result.model, test, stretches), "off": None,
                         "shares": None})  # fmt: skip
            print(f"merge: {runs[-1]}", file=sys.stderr, flush=True)
        others = [g.name for g in sc.trace(model, data[0]).groups if ".experts" not in g.name]
        result = sc.prune(
            model, data, sc.Budget(params=plan.predicted.params), sc.Uniform(removal="wanda"),
            repair="reconstruct", limits=sc.Limits(round_to=4, ignore=tuple(others)), seed=seed,
            measure_latency=False, progress=False,
        )  # fmt: skip
        runs.append({"seed": seed, "share": share, "router": "as it was", "method": "inner sizes, refit",
                     "perplexity": perplexity(result.model, test, stretches), "off": None,
                     "shares": None})  # fmt: skip
        print(f"merge: {runs[-1]}", file=sys.stderr, flush=True)
    print(f"\nPerplexity a character, dense {dense:.3f}; mean over {len(seeds)} seeds")
    rows = []
    for share, router in itertools.product(SHARES, ("as it was", JUDGED, "combined")):
        cells = []
        for name in (*METHODS, "inner sizes, refit"):
            found = [
                r["perplexity"]
                for r in runs
                if (r["share"], r["router"], r["method"]) == (share, router, name)
            ]
            cells.append(f"{statistics.mean(found):.3f}" if found else "")
        rows.append((f"{share:.0%}", router, *cells))
    print(results.table(("kept", "router", *METHODS, "inner sizes, refit"), rows))
    return {
        "steps": steps, "test_stretches": stretches, "calibration_batches": count, "dense": dense,
        "seeds": list(seeds), "runs": runs,
    }  # fmt: skip


def on_meta() -> tuple[dict[str, Any], sc.Plan]:
    """Qwen1.5-MoE-A2.7B's true shape without weights: trace and plan."""
    found = library()
    config = found.Qwen2MoeConfig(**SHAPE, hidden_size=2048, num_attention_heads=16, num_key_value_heads=16,
                                  moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
                                  vocab_size=151936, use_cache=False)  # fmt: skip
    with torch.device("meta"):
        model = found.AutoModelForCausalLM.from_config(config)
    model.set_attn_implementation("eager")
    ids = torch.ones(1, 128, dtype=torch.int64)
    begun = time.perf_counter()
    graph = sc.trace(model, {"input_ids": ids, "attention_mask": ids}, granularity="expert")
    traced = time.perf_counter()
    plan = sc.Uniform(removal="random").allocate(graph, random_scores(graph, 0), sc.Budget(experts=0.5))
    done = time.perf_counter()
    seconds = (traced - begun, done - traced)
    print("\nQwen1.5-MoE-A2.7B on the meta device: traced in {:.2f} s, planned in {:.2f} s".format(*seconds))
    print(*str(plan).splitlines()[-2:], sep="\n")
    return {
        "trace_seconds": seconds[0],
        "plan_seconds": seconds[1],
        "params": [plan.dense.params, plan.predicted.params],
        "macs_of_128_tokens": [plan.dense.macs, plan.predicted.macs],
    }, plan


_REWRITE = """
import json, sys
from secateur.targets.experts.checkpoint import prune_checkpoint
from secateur.plan import Plan

def memory(field):  # Linux; getrusage would count the memory of the process that started this one
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

plan = Plan.from_json(sys.argv[2])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = memory("VmRSS")
prune_checkpoint(sys.argv[1], plan, sys.argv[3])
print(json.dumps([before, memory("VmHWM")]))
"""


def checkpoint(width: int, plan: sc.Plan) -> dict[str, Any]:
    """A synthetic checkpoint in the published one's layout, rewritten, and the peak of the memory."""
    inner = width * 1408 // 2048
    rng = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        dense, small = Path(place) / "dense", Path(place) / "small"
        dense.mkdir()
        weight_map, shards = {}, 8
        for shard in range(shards):
            tensors = {}
            for layer in range(shard * 3, shard * 3 + 3):
                prefix = f"model.layers.{layer}.mlp"
                tensors[f"{prefix}.gate.weight"] = torch.randn(60, width, generator=rng).bfloat16()
                for expert in range(60):
                    for name, shape in (
                        ("gate", (inner, width)),
                        ("up", (inner, width)),
                        ("down", (width, inner)),
                    ):
                        tensors[f"{prefix}.experts.{expert}.{name}_proj.weight"] = torch.randn(
                            *shape, generator=rng
                        ).bfloat16()
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            save_file(tensors, dense / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
        (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (dense / "config.json").write_text(json.dumps({"model_type": "qwen2_moe", **SHAPE}))
        plan.to_json(Path(place) / "plan.json")
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", _REWRITE, dense, Path(place) / "plan.json", small],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - begun
        before, peak = json.loads(done.stdout.splitlines()[-1])
        sizes = [f.stat().st_size for f in dense.glob("*.safetensors")]
        after = [f.stat().st_size for f in small.glob("*.safetensors")]
    found = {
        "checkpoint_bytes": sum(sizes),
        "largest_shard_bytes": max(sizes),
        "pruned_bytes": sum(after),
        "memory_before_bytes": before,
        "peak_memory_bytes": peak,
        "peak_over_largest_shard": (peak - before) / max(sizes),
        "seconds": seconds,
    }
    print(
        f"\nCheckpoint of {sum(sizes) / 1e9:.2f} GB in {shards} shards of at most {max(sizes) / 1e6:.0f} "
        "MB, rewritten to "
        f"{sum(after) / 1e9:.2f} GB in {seconds:.1f} s; peak memory {(peak - before) / 1e6:.0f} MB above "
        "what Python and "
        f"torch take, {found['peak_over_largest_shard']:.2f} shards"
    )
    return found


def main() -> None:
    """Runs what was asked for, prints the tables and writes the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"default all: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="small, no result file")
    parser.add_argument("--steps", type=int, help="of training")
    asked = parser.parse_args()
    library()
    for part in asked.parts or PARTS:
        found: dict[str, Any]
        if part == "equality":
            found = {"families": equality()}
        elif part == "quality":
            steps = asked.steps or (20 if asked.quick else STEPS)
            sizes = (SEEDS[:1], 8, 1) if asked.quick else (SEEDS, 160, 4)
            found = quality(steps, *sizes)
        elif part == "merge":
            steps = asked.steps or (20 if asked.quick else STEPS)
            found = merging(steps, *((SEEDS[:1], 8, 1) if asked.quick else (SEEDS[:1], 40, 4)))
        elif part == "scale":
            meta, plan = on_meta()
            found = {"meta": meta, "checkpoint": checkpoint(128 if asked.quick else 768, plan)}
        else:
            parser.error(f"expected one of {', '.join(PARTS)}, got {part}")
        if not asked.quick:
            results.write(f"experts_{part}", found)


if __name__ == "__main__":
    main()
