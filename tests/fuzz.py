"""Look for files that a reader does not survive: ``python -m tests.fuzz --minutes 10``, or ``make fuzz``.

Each round changes valid files of every kind: bytes, and values of their JSON with the checksums made right.
What raises anything but the library's own error of at most 600 characters is kept in ``tests/corpus``, by the
reader's name. `tests/artefact/test_corpus.py` reads it again for ever.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import tempfile
import time
import traceback
from pathlib import Path

from tests.artefact.test_hostile import outcome
from tests.helpers.hostile import READERS, Change, Reader, json_changes, raw_changes

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 5


def round_of(reader: Reader, valid: Path, seed: int) -> list[tuple[str, Change]]:
    """Some changes, which differ from seed to seed; every second one is made twice over."""
    changes = [*raw_changes(reader, valid, seed, 40), *json_changes(reader, valid)]
    chooser = random.Random(seed)
    found = []
    for name, change in chooser.sample(changes, min(40, len(changes))):
        other_name, other = chooser.choice(changes)

        def both(folder: Path, one: Change = change, two: Change = other) -> None:
            one(folder)
            try:
                two(folder)
            except Exception:  # the first one left nothing that the second one can change
                return

        found += [(name, change), (f"{name}; {other_name}", both)]
    return found


def main() -> None:
    """Run for some minutes, and exit with 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    end, seed, files, finds = time.monotonic() + 60 * asked.minutes, asked.seed, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for reader in READERS.values():
            (place / reader.name).mkdir()
            reader.write(place / reader.name)
        while time.monotonic() < end:
            seed += 1
            for reader in READERS.values():
                for what, change in round_of(reader, place / reader.name, seed):
                    case = place / "case"
                    shutil.copytree(place / reader.name, case)
                    change(case)
                    kept = (case / reader.file).read_bytes()
                    signal.alarm(SECONDS)
                    try:
                        said = outcome(reader, case)
                        why = "" if said is None or len(said) <= 600 else f"{len(said)} characters: {said}"
                    except BaseException:  # a hang, a crash, a raw error: all are finds
                        why = traceback.format_exc()
                    signal.alarm(0)
                    files += 1
                    if why:
                        finds += 1
                        target = CORPUS / reader.name / hashlib.sha256(kept).hexdigest()[:16]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(kept)
                        print(f"{reader.name}: {what}\n{why}\nkept in {target}\n", flush=True)
                    shutil.rmtree(case)
    print(f"{files:,} files, {finds} finds, seeds {asked.seed + 1} to {seed}")
    raise SystemExit(finds > 0)


def _alarm(number: int, frame: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, _alarm)
    main()
