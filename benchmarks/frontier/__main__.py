"""Accuracy against MACs: secateur's rules, Torch-Pruning and network-pruner in one script.

    python -m benchmarks.frontier [network ...] [--points 0.8 0.68 0.58 0.5] [--seeds 5]
    python -m benchmarks.frontier resnet20 --rules auto --peers        # only what is named
    python -m benchmarks.frontier resnet20 --tune                     # and fine-tune the best alike
    python -m benchmarks.frontier --tables | --full | --plots | --update | --check

All get the same trained network, calibration images (a draw for each seed), test images and counter of MACs.
Results are written after every measurement to `benchmarks/results/frontier_<network>.json`; what is there is
not run again. Peers are installed by hand: `pip install --no-deps torch-pruning==1.6.1 network-pruner==2.16`.
"""

from __future__ import annotations

import argparse
import sys
import warnings

from benchmarks import results
from benchmarks.frontier import ours, peers, plots, report, store, tables
from benchmarks.frontier.run import run
from benchmarks.frontier.tuning import tune
from benchmarks.frontier.workload import EFFICIENTNET, Workload
from benchmarks.small_networks import CACHE, NAMES

POINTS = {"resnet20": (0.8, 0.68, 0.58, 0.5), EFFICIENTNET: (0.8, 0.7, 0.5)}
OTHERS = (0.7, 0.5)
TUNED_AT = {"resnet20": 0.58}
QUICK = CACHE / "frontier_quick"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="network",
                        help=f"default all: {', '.join(NAMES)}; by name alone: {EFFICIENTNET}")  # fmt: skip
    parser.add_argument(
        "--points", nargs="+", type=float, help="shares of the MACs; default 4 or 2, by network"
    )
    parser.add_argument("--seeds", type=int, default=5, help="draws of calibration images")
    parser.add_argument("--images", type=int, help="calibration images")
    parser.add_argument("--rules", "--ours", nargs="*", metavar="RULE",
                        help=f"of ours, by name or its first word, or all: {'; '.join(ours.RULES)}; "
                             f"default {'; '.join(ours.DEFAULT)}")  # fmt: skip
    parser.add_argument("--peers", nargs="*", choices=tuple(peers.MODULES), help="packages; none for none")
    parser.add_argument("--tune", action="store_true", help="fine-tune the best of each kind alike, one seed")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument("--quick", action="store_true",
                        help="one seed and point, few images; results in benchmarks/cache")  # fmt: skip
    say = parser.add_mutually_exclusive_group()
    say.add_argument("--tables", action="store_true", help="print what docs/figures.md shows")
    say.add_argument("--full", action="store_true", help="print every entrant's row")
    say.add_argument("--plots", action="store_true", help="draw every network")
    say.add_argument(
        "--update",
        action="store_true",
        help="write docs/figures.md's part, the full tables and plots",
    )
    say.add_argument(
        "--check", action="store_true", help="fail unless docs/figures.md and the full tables are up to date"
    )
    return parser.parse_args()


def measure(asked: argparse.Namespace) -> None:
    """Runs what was asked for, network by network; plots and prints each."""
    folder = QUICK if asked.quick else results.FOLDER
    for name in asked.networks or NAMES:
        work = Workload.of(name, 200 if asked.quick else asked.images, 500 if asked.quick else None)
        found = store.Store(name, about(work), folder)
        if asked.retry:
            found.forget_failures()
        entrants = ours.entrants(work, asked.rules)
        entrants += peers.entrants(work, tuple(peers.MODULES) if asked.peers is None else asked.peers)
        points = asked.points or POINTS.get(name, OTHERS)
        run(
            work,
            found,
            entrants,
            points[-1:] if asked.quick else points,
            range(1 if asked.quick else asked.seeds),
        )
        if asked.tune:
            settings = {"images": 2000, "epochs": 1} if asked.quick else {}
            tune(work, found, entrants, TUNED_AT.get(name, OTHERS[-1]), **settings)
        if found.content["runs"]:
            plots.draw(found.content, folder)
            print(tables.full([found.content]))


def about(work: Workload) -> store.Run:
    """What all runs on a network share."""
    return {
        "dense_top1": work.top1(work.model),
        "dense_macs": work.dense_macs,
        "dense_params": work.dense_params,
        "calibration_images": work.images,
        "test_images": work.test_images,
    }


def written(update: bool) -> int:
    """Writes the part of docs/figures.md, the tables and the plots, or says which are stale."""
    if update:
        report.update()
    stale = report.stale()
    print(f"not up to date: {', '.join(stale)}. Do --update." if stale else "up to date")
    return 1 if stale else 0


def main() -> int:
    """Measures, or prints and compares what was measured."""
    asked = arguments()
    warnings.simplefilter("ignore")
    known = (*NAMES, EFFICIENTNET)
    if unknown := set(asked.networks) - set(known):
        print(
            f"expected networks among {', '.join(known)}, got {', '.join(sorted(unknown))}.", file=sys.stderr
        )
        return 2
    try:
        asked.rules = ours.DEFAULT if asked.rules is None else ours.named(asked.rules)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    networks = asked.networks or NAMES
    if asked.check or asked.update:
        try:
            return written(asked.update)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    if asked.plots:
        for content in report.contents(networks):
            print(plots.draw(content).name)
    elif asked.tables:
        print(tables.short(report.contents(networks)))
    elif asked.full:
        print(tables.full(report.contents(networks)))
    else:
        measure(asked)
    return 0


if __name__ == "__main__":
    sys.exit(main())
