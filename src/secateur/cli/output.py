"""What commands write: files and folders that appear whole or not at all, also when one is interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from secateur.errors import SettingError

if TYPE_CHECKING:
    from torch import nn

    from secateur.report.report import Report


def folder_to_write(out: Path) -> Path:
    """Refuse now what cannot be written: better than after an hour of scoring. Nothing is made yet.

    Raises:
        SettingError: If nothing can be written there.
    """
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    why = "a file" if not nearest.is_dir() else "a read-only one" if not os.access(nearest, os.W_OK) else ""
    if why:
        raise SettingError(
            f"--out {out}: expected a folder that can be written to, got {why}"
            f"{'' if nearest == out else f' at {nearest}'}. Name another."
        )
    return out


def file_to_write(option: str, path: Path) -> Path:
    """Refuse now a file that cannot be written.

    Raises:
        SettingError: If its folder is missing or read-only, or it is a folder itself.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise SettingError(
            f"{option} {path}: expected a file in a folder that can be written to, got "
            f"{'a folder' if path.is_dir() else f'none at {path.parent}'}. Name another."
        )
    return path


@contextmanager
def folder_in_place(out: Path) -> Iterator[Path]:
    """A folder to write files into; they take their places in `out` together, if the block succeeds.

    A new folder appears at once, by one rename. In one that exists, files of the same names are replaced and
    all others are left alone: Ctrl-C then waits until all have been, a failure puts the old ones back, and a
    kill leaves the old model or the new one, because its two files change places as `secateur.save` does it.
    """
    there = out.is_dir()
    parent = out if there else out.parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = parent / f".{out.name or 'out'}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        with _undisturbed():
            if there:
                _replace(partial, out)
            else:
                os.replace(partial, out)
    finally:
        with _undisturbed():
            shutil.rmtree(partial, ignore_errors=True)


def _replace(new: Path, out: Path) -> None:
    """Put every file of `new` into `out`; if one fails, all are as they were."""
    kept = new / ".old"
    kept.mkdir()
    done: list[tuple[Path, Path | None]] = []
    try:
        for source, target in _moves(new, out):
            old = None
            if target.exists():
                old = kept / target.name
                _link(target, old)
            done.append((target, old))
            os.replace(source, target)
    except BaseException:
        for target, old in reversed(done):
            if old is None:
                target.unlink(missing_ok=True)
            elif old.exists():
                os.replace(old, target)
        raise


def _moves(new: Path, out: Path) -> list[tuple[Path, Path]]:
    """What is renamed to what, in order: the model first, its record by way of the name that readers know."""
    from secateur.artefact.save import RECORD, TENSORS, WAITING

    names = sorted(path.name for path in new.iterdir() if path.is_file())
    moves = []
    if RECORD in names and TENSORS in names:
        moves = [(new / RECORD, out / WAITING), (new / TENSORS, out / TENSORS), (out / WAITING, out / RECORD)]
    taken = {source.name for source, _ in moves}
    return moves + [(new / name, out / name) for name in names if name not in taken]


def _link(path: Path, other: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C inside the block takes effect behind it. Signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: caught.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt


def reload_code(import_line: str, out: Path) -> str:
    """Python that loads the model again; `import_line` defines `make_model`."""
    from secateur.report import sentences

    return sentences.loading(out.as_posix(), import_line)


def write_result(small: nn.Module, report: Report, out: Path, reload: str, *, make_model: str = "") -> Report:
    """Save the model and both reports, all or none; returns the report with the place in it.

    `make_model` is the line that defines ``make_model``: with it the report can be rendered again.
    """
    import secateur as sc
    from secateur.report.html import render

    report = report.model_copy(update={"artefact": out.as_posix(), "make_model": make_model})
    with folder_in_place(out) as folder:
        sc.save(small, folder)
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
        try:
            page = render(report, reload=reload)
        except SettingError as error:  # Jinja is missing: no reason to lose the model
            typer.echo(f"secateur: {out / 'report.html'} was not written. {error}", err=True)
        else:
            (folder / "report.html").write_text(page, encoding="utf-8")
    return report


def written(out: Path, reload: str) -> str:
    """Where the artefact is and how to read it, to end what a terminal shows."""
    return "\n".join([f"written to  {out}", "reload with", *(f"  {line}" for line in reload.splitlines())])
