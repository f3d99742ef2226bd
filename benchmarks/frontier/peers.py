"""The other tools that are here; one that is not installed is named and left out."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, metadata

from benchmarks.frontier.entrant import Entrant
from benchmarks.frontier.workload import Workload

MODULES = {"torch-pruning": "torch_pruning_peer", "network-pruner": "network_pruner_peer"}
"""By the name of the package that it needs."""


def entrants(workload: Workload, packages: Sequence[str] = tuple(MODULES)) -> list[Entrant]:
    """Everyone of these packages."""
    found: list[Entrant] = []
    for package in packages:
        if version(package) is None:
            print(f"{package} is not installed: left out. Run pip install --no-deps {package}.")
            continue
        module = import_module(f"benchmarks.frontier.{MODULES[package]}")
        found += module.entrants(workload)
    return found


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
