"""Cost of every phase on networks of true size: predicted, and the model checked on small networks.

    python -m benchmarks.scale [model ...] [--rates FILE] [--predict-only]

Small networks are measured first, each in a process of its own with one thread, and predicted with the
rates that the same processes measured (`rates.py`); so are bytes between two processes. Then resnet50,
deit_b, llama_7b and qwen_moe are predicted from traces on the meta device. A full run takes about ten
minutes and writes `results/scale.json` and the tables of `docs/scale.md`; one of single models, or with
rates of another machine, only prints.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.scale import comparing, exchange, measuring, rates, tables
from benchmarks.scale.networks import LARGE, SMALL, small

SIGNALS = ("taylor", "wasserstein", "reconstruction")


def main() -> None:
    """Measures, predicts, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="model", help=f"default all: {', '.join(LARGE)}")
    parser.add_argument("--rates", type=Path, help="of another machine, as rates.py writes them")
    parser.add_argument("--predict-only", action="store_true", help="keep the measurements of the last run")
    asked = parser.parse_args()
    unknown = set(asked.models) - set(LARGE)
    if unknown:
        parser.error(f"expected models among {', '.join(LARGE)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    known = results.read("scale") or {}
    known.pop("environment", None)
    content: dict[str, Any] = {}
    whole = not asked.models and asked.rates is None
    if whole:
        content = known if asked.predict_only and known else checks()
        results.write("scale", content)
    elif asked.rates is not None:
        content["rates"] = rates.load(asked.rates)
    else:
        content["rates"] = known.get("rates") or rates.calibrate()
    content["predictions"] = {}
    for name in asked.models or LARGE:
        subject = LARGE[name]()
        found = content["predictions"][name] = comparing.predicted(name, subject, content["rates"])
        print(f"\n{found['name']}, predicted; weights take {tables.size(found['model_bytes'])}")
        print(results.table(tables.LARGE, tables.large(found)), flush=True)
        here = found["measured_here"]
        print("measured: " + ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in here.items()), flush=True)
        for signal, count in found.get("passes", {}).items():
            print(f"{signal} within {tables.size(comparing.LIMIT)}: {count} passes over the data", flush=True)
    if whole:
        results.write("scale", content)
        tables.write_page(content)


def checks() -> dict[str, Any]:
    """Small networks measured and predicted, and bytes between processes; prints as it goes."""
    found = {}
    for name in SMALL:
        found[name] = measuring.measured(name)
        print(f"measured {name}", flush=True)
    machine = rates.median([each["rates"] for each in found.values()])
    tried = [n for each in found.values() for n in each["dampings_tried"]]
    content: dict[str, Any] = {
        "rates": machine,
        "rates_of_each_run": {name: each["rates"] for name, each in found.items()},
        "dampings_tried": {"mean": sum(tried) / len(tried), "fits": len(tried)},
        "checks": {},
    }
    for name, each in found.items():
        rows = comparing.checked(name, each, machine)
        content["checks"][name] = {"rows": rows, "off": comparing.off(rows)}
    print(results.table(tables.CHECK, tables.check(content)))
    for name, each in content["checks"].items():
        print(f"{name}: off by more than {comparing.WIDE}: {', '.join(each['off']) or 'none'}")
    make = functools.partial(small, "resnet20")
    content["sent"] = {signal: exchange.measured(make, signal, 640) for signal in SIGNALS}
    print(results.table(tables.SENT, tables.sent(content)), flush=True)
    return content


if __name__ == "__main__":
    main()
