"""The result file of one network: written after every measurement, so that a run can be taken up again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.environment import environment
from benchmarks.frontier import peers

Run = dict[str, Any]


def path_of(network: str, folder: Path = results.FOLDER) -> Path:
    """Where a network's results are."""
    return folder / f"frontier_{network}.json"


def read(network: str, folder: Path = results.FOLDER) -> dict[str, Any] | None:
    """The results of a network; None if there are none."""
    path = path_of(network, folder)
    return json.loads(path.read_text()) if path.is_file() else None


class Store:
    """Results that are there already, and new ones.

    Args:
        network: Its name.
        about: What all runs share: the dense network's figures, numbers of images.
        folder: Where the file lies.

    Raises:
        SystemExit: The file was made with other numbers than `about`.
    """

    def __init__(self, network: str, about: Mapping[str, Any], folder: Path = results.FOLDER) -> None:
        self.path = path_of(network, folder)
        found = read(network, folder) or {
            "network": network,
            "sessions": [],
            **about,
            "runs": [],
            "tuned": [],
        }
        differing = [key for key, value in about.items() if found.get(key) != value]
        if differing:
            raise SystemExit(
                f"{self.path.name}: expected the same {', '.join(differing)} as now, got others. "
                "Do move the file away, or ask for what it was made with."
            )
        self.content: dict[str, Any] = found
        self._began = False

    def has(self, kind: str, **key: Any) -> bool:
        """Whether a run with these values is there.

        Args:
            kind: ``runs`` or ``tuned``.
            **key: What identifies it.
        """
        return any(all(run.get(k) == v for k, v in key.items()) for run in self.content[kind])

    def add(self, kind: str, run: Run) -> None:
        """Keeps a run, with the number of the session that made it, and writes the file whole."""
        if not self._began:
            versions = {package: peers.version(package) for package in peers.MODULES}
            self.content["sessions"].append({**environment(), "peers": versions})
            self._began = True
        self.content[kind].append({**run, "session": len(self.content["sessions"]) - 1})
        self.write()

    def forget_failures(self) -> None:
        """Drops what failed, so that it is tried again."""
        for kind in ("runs", "tuned"):
            self.content[kind] = [run for run in self.content[kind] if "error" not in run]

    def write(self) -> None:
        """Replaces the file at once; an interruption leaves the old one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(beside, self.path)
