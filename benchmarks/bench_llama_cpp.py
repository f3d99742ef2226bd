"""How fast a pruned SmolLM2-135M is in llama.cpp, with another number of heads and neurons in each layer.

    python -m benchmarks.bench_llama_cpp

Files in float16 with the dense model's tokenizer. Plans by magnitude, without data: only sizes matter here.
With multiples of 32 all heads stay. Each round times each model once: a prompt of 256 tokens, then 32 tokens
one by one, on one thread. Medians, and medians of the ratio to the dense model in the same round. `ideal` is
the ratio of the parameters that a token is multiplied with, the word scores included. Needs
`llama-cpp-python` beside what `benchmarks/smollm2.py` needs. Results: `benchmarks/results/llama_cpp.json`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from benchmarks import results
from benchmarks.smollm2 import PACKAGE, smollm2, windows

SHARES, PROMPT, NEW, ROUNDS = (0.8, 0.7, 0.5), 256, 32, 11
MULTIPLES = (1, 32)


def files(folder: Path) -> dict[str, tuple[Path, int]]:
    """Write the dense and the pruned models; return files and parameters by name."""
    model, tokenizer = smollm2()
    package = importlib.util.find_spec(PACKAGE)
    dense = next(Path(str(package and package.origin)).parent.rglob("*.gguf"))
    text = windows(tokenizer, 64)[:1]
    graph = sc.trace(model, text)
    scores = sc.score(graph, None, "magnitude")
    every = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for name, p in model.named_parameters() if "layers." in name)
    found = {"dense": (model, every)}
    for share, multiple in itertools.product(SHARES, MULTIPLES):
        budget = sc.Budget(params=every - round((1 - share) * blocks))
        plan = sc.Global(removal="magnitude").allocate(graph, scores, budget, sc.Limits(round_to=multiple))
        small = sc.apply(model, plan, graph=graph)
        found[f"{share}, multiples of {multiple}"] = small, sum(p.numel() for p in small.parameters())
    written = {}
    for name, (each, count) in found.items():
        done = sc.export(each.half(), folder / f"{name}.gguf", tokenizer=dense)
        written[name] = done.path, count
    return written


def timed(model: Any) -> tuple[float, float, str]:
    """Seconds of the prompt and of each new token, and the text."""
    prompt = model.tokenize(b"The river that runs through the old town " * 40)[:PROMPT]
    model.reset()
    start = time.perf_counter()
    model.eval(prompt)
    middle = time.perf_counter()
    text = []
    for _ in range(NEW):
        text.append(model.sample(temp=0.0))
        model.eval(text[-1:])
    return (
        middle - start,
        (time.perf_counter() - middle) / NEW,
        model.detokenize(text).decode(errors="replace"),
    )


def main() -> None:
    """Measure, print the table and write the result file."""
    warnings.simplefilter("ignore")
    if importlib.util.find_spec("llama_cpp") is None:
        print("Skipped: llama-cpp-python is not installed.")
        return
    import llama_cpp

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        written = files(Path(name))
        models = {}
        for key, (path, _) in written.items():
            models[key] = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
            stack.callback(models[key].close)
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in models}
        for turn in range(ROUNDS + 1):
            for key, model in models.items():
                prompt, token, text = timed(model)
                if turn:
                    times[key].append((prompt, token))
                elif key == "dense":
                    print(f"dense writes: {text!r}", file=sys.stderr)
        for key, (path, count) in written.items():
            own = list(zip(*times[key], strict=True))
            ratios = [
                statistics.median(d[k] / t[k] for d, t in zip(times["dense"], times[key], strict=True))
                for k in (0, 1)
            ]
            rows.append(
                {
                    "share": key,
                    "megabytes": path.stat().st_size / 1e6,
                    "prompt tokens/s": PROMPT / statistics.median(own[0]),
                    "new tokens/s": 1 / statistics.median(own[1]),
                    "prompt": ratios[0],
                    "new": ratios[1],
                    "ideal": written["dense"][1] / count,
                }
            )
    results.write("llama_cpp", {"version": llama_cpp.__version__, "rows": rows})
    titles = tuple(rows[0])
    print(results.table(titles, [(r["share"], *(f"{r[t]:.2f}" for t in titles[1:])) for r in rows]))


if __name__ == "__main__":
    main()
