"""Attack every reader and every writer of files, and count what goes wrong.

``python -m benchmarks.attack_files`` makes hostile versions of a valid file of every kind, and reads each in
a process of its own with 5 seconds and 200 MB. It kills writers again and again, lets two of them race, and
lets them write where a file may not be that long, the disk is full, or another user owns the folder. The last
two need root, and a system that mounts a small disk in memory; else they are left out.
"""

from __future__ import annotations

import argparse
import collections
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import table, write
from secateur.errors import LONGEST, SecateurError
from tests.artefact.faults import litter
from tests.artefact.test_faults import WRITERS
from tests.helpers.hostile import READERS, hostile

SECONDS, MEGABYTES = 5, 200
FATES = ("refused", "loaded", "raw error", "long message", "dangerous")


def in_child(work: Callable[[], str]) -> tuple[int, str]:
    """Do work in a child process. Return how it ended, and the text that `work` returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.write(writing, work().encode("utf-8", "replace")[:4000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    return os.waitpid(child, 0)[1], said


def read_once(read: Callable[[Path], Any], folder: Path, size: int) -> str:
    """Read a hostile file within the limits, and say what happened."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (MEGABYTES << 20) + size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        read(folder)
    except SecateurError as error:
        return "refused" if len(str(error)) <= LONGEST else "long message"
    except MemoryError:
        return "dangerous: memory"
    except BaseException as error:
        return f"raw error: {type(error).__name__}: {str(error)[:200]}"
    return "loaded"


def attack_readers(most: int, place: Path) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Count the fates of hostile files by reader; list those that are neither refused nor loaded."""
    counts, bad = {}, []
    for reader in READERS.values():
        valid = place / f"{reader.name}-valid"
        valid.mkdir()
        reader.write(valid)
        cases = list(hostile(reader, valid))
        step = max(1, len(cases) // most)
        found: collections.Counter[str] = collections.Counter()
        for name, change in [*cases[:68], *cases[68::step]]:
            folder = place / "case"
            shutil.copytree(valid, folder)
            change(folder)
            file = folder / reader.file
            regular = file.is_file() and not file.is_symlink()
            size = min(file.stat().st_size, 1 << 30) if regular else 0
            status, said = in_child(lambda r=reader, f=folder, s=size: read_once(r.read, f, s))
            fate = said.partition(":")[0] if status == 0 else "dangerous"
            found[fate] += 1
            if fate not in ("refused", "loaded"):
                bad.append(f"{reader.name}: {name}: {said or f'ended by {status}'}")
            shutil.rmtree(folder)
        counts[reader.name] = {fate: found[fate] for fate in FATES}
    return counts, bad


def attack_writers(kills: int, place: Path) -> dict[str, dict[str, int]]:
    """Kill each writer at random instants, in chains of up to five, and count losses and litter."""
    generator, counts = np.random.default_rng(0), {}
    signals = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
    for name, writer in WRITERS.items():
        folder = place / f"kills-{name.replace(' ', '-')}"
        folder.mkdir()
        begin = time.perf_counter()
        writer.write(folder, 0)
        length = time.perf_counter() - begin
        found = {"kills": 0, "lost": 0, "litter": 0}
        while found["kills"] < kills:
            for _ in range(int(generator.integers(1, 6))):
                # A signal before `try` would let the child go on as if it were the parent.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                child = os.fork()
                if child == 0:
                    try:
                        signal.signal(signal.SIGINT, signal.default_int_handler)
                        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                        for k in range(1, 1000):
                            writer.write(folder, k % 4)
                    finally:
                        os._exit(1)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
                time.sleep(float(generator.uniform(0, 3 * length)))
                os.kill(child, signals[int(generator.integers(0, 3))])
                os.waitpid(child, 0)
                found["kills"] += 1
                try:
                    writer.read(folder)
                except Exception as error:
                    found["lost"] += 1
                    print(name, "lost:", error)
                    writer.write(folder, 0)
            writer.write(folder, 0)
            found["litter"] += len(litter(folder))
        counts[name] = found
    return counts


def race(reads: int, place: Path) -> dict[str, dict[str, int]]:
    """Two writers and one reader of one path: count reads, and those that found neither version."""
    counts = {}
    for name, writer in WRITERS.items():
        if name in ("folder", "file with data"):  # read by other programs, two files one after the other
            continue
        folder = place / f"race-{name.replace(' ', '-')}"
        folder.mkdir()
        writer.write(folder, 0)
        children = []
        for k in (1, 2):
            child = os.fork()
            if child == 0:
                try:
                    while True:
                        writer.write(folder, k)
                finally:
                    os._exit(1)
            children.append(child)
        broken = 0
        for _ in range(reads):
            try:
                broken += writer.read(folder) not in (0, 1, 2)
            except Exception as error:
                broken += 1
                print(name, "broken:", error)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        counts[name] = {"reads": reads, "broken": broken}
    return counts


def hinder(tries: int, place: Path) -> dict[str, dict[str, int]]:
    """Let each writer meet a place where it cannot write, and count what it said and left.

    ``refused``: an error of the library, with the path and the free space. ``written``: there was room.
    ``unclear``: any other end. ``lost``: neither the old version nor the new one is there.
    """
    generator, counts = np.random.default_rng(0), {}
    for kind, prepare in _HINDRANCES.items():
        found = dict.fromkeys(("tries", "refused", "written", "unclear", "lost", "litter"), 0)
        for name, writer in WRITERS.items():
            folder = place / f"{kind} {name}".replace(" ", "-")
            folder.mkdir()
            with prepare(folder) as act:
                if act is None:
                    continue
                for _ in range(tries):
                    writer.write(folder, 0)
                    share = float(generator.random())
                    status, said = in_child(lambda w=writer, f=folder, a=act, s=share: _hindered(w, f, a, s))
                    fate = said.partition(":")[0] if status == 0 else "unclear"
                    found["tries"] += 1
                    found[fate] += 1
                    if fate == "unclear":
                        print(kind, name, said or f"ended by {status}")
                    for file in folder.glob("fill*"):
                        file.unlink()
                    try:
                        found["lost"] += writer.read(folder) not in (0, 1)
                    except Exception as error:
                        found["lost"] += 1
                        print(kind, name, "lost:", error)
                    writer.write(folder, 0)
                    found["litter"] += len(litter(folder))
        counts[kind] = found
    return counts


def _hindered(writer: Any, folder: Path, act: Callable[[Path, float], None], share: float) -> str:
    """Write version 1 under a hindrance, in a child process, and say what happened."""
    act(folder, share)
    try:
        writer.write(folder, 1)
    except SecateurError as error:
        clear = len(str(error)) <= LONGEST and str(folder) in str(error) and "bytes are free" in str(error)
        return "refused" if clear else f"unclear: {error}"
    except BaseException as error:
        return f"unclear: {type(error).__name__}: {str(error)[:200]}"
    return "written"


def _limit_length(folder: Path, share: float) -> None:
    most = max(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * most), int(share * most)))


def _fill(folder: Path, share: float) -> None:
    free, most = (
        shutil.disk_usage(folder).free,
        sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
    )
    with (folder / "fill").open("wb") as file:
        file.write(bytes(max(0, free - int(2 * share * most))))


def _be_nobody(folder: Path, share: float) -> None:
    os.setuid(65534)


@contextmanager
def _small_disk(folder: Path) -> Iterator[Callable[[Path, float], None] | None]:
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield _fill
    finally:
        subprocess.run(["umount", str(folder)], check=True)


_HINDRANCES: dict[str, Callable[[Path], Any]] = {
    "a limit on the length of files": lambda folder: nullcontext(_limit_length),
    "a full disk": _small_disk,
    "another user's folder": lambda folder: nullcontext(None if os.getuid() else _be_nobody),
}


def main() -> None:
    """Run all attacks, print tables and write ``results/attack_files.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=250, help="about so many hostile files a reader")
    parser.add_argument("--kills", type=int, default=120, help="kills of each writer")
    parser.add_argument("--reads", type=int, default=1000, help="reads of each kind while two write")
    parser.add_argument(
        "--hindered", type=int, default=15, help="writes of each kind at each place that hinders"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)  # another user may look, but not write
        files, bad = attack_readers(asked.files, place)
        print(table(("reader", *FATES), [(name, *found.values()) for name, found in files.items()]))
        print("\n".join(bad))
        kills = attack_writers(asked.kills, place)
        print(
            table(("writer", "kills", "lost", "litter"), [(n, *found.values()) for n, found in kills.items()])
        )
        races = race(asked.reads, place)
        print(table(("file", "reads", "broken"), [(n, *found.values()) for n, found in races.items()]))
        hindered = hinder(asked.hindered, place)
        titles = ("hindrance", "tries", "refused", "written", "unclear", "lost", "litter")
        print(table(titles, [(n, *found.values()) for n, found in hindered.items()]))
    totals = {fate: sum(found[fate] for found in files.values()) for fate in FATES}
    write(
        "attack_files",
        {
            "hostile": files,
            "totals": totals,
            "bad": bad,
            "kills": kills,
            "races": races,
            "hindered": hindered,
        },
    )


if __name__ == "__main__":
    main()
