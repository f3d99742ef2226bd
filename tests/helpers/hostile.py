"""Every reader of the library with a valid file, and hostile versions of that file."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import secateur as sc
from secateur.artefact.content import digest
from secateur.cli.inputs import read_plan
from secateur.cli.loading.archives import Archive
from secateur.cli.loading.arrays import arrays
from secateur.config.read import read_run
from secateur.integrations.shapes import read_shape, reshape, shape_state
from secateur.signals import storage
from secateur.signals.checkpoint import Checkpoint, Position, Saved
from secateur.signals.journal import Journal
from secateur.targets.experts.checkpoint import prune_checkpoint
from tests.report.reports import report

Change = Callable[[Path], None]
"""Makes the valid file of a reader hostile, in place."""


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


NET = make()
GRAPH = sc.trace(NET, torch.zeros(2, 4))
SCORES = sc.score(GRAPH, None, "magnitude")
PLAN = sc.Uniform(ratio=0.25).allocate(GRAPH, SCORES)
SMALL = sc.apply(NET, PLAN, graph=GRAPH)
ABOUT = {"model": "x"}
STEP = Journal(Path()).step("refit", "one")


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: What it reads.
        file: The file that is made hostile, in the folder that `write` fills.
        write: Makes the valid file.
        read: Reads it, and uses what was read.
        json: How the JSON text in the file is taken out and put back, with right checksums.
    """

    name: str
    file: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    json: tuple[Callable[[Path], Any], Callable[[Path, Any], None]] | None = None


def plain_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def write_plain(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def write_sealed_record(file: Path, content: Any) -> None:
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name != "record_sha256"}
        content["record_sha256"] = digest(content)
    write_plain(file, content)


def header_of(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return found


def write_header(file: Path, header: Any) -> None:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    record = file.with_name("secateur.json")
    if record.exists():  # of an artefact: somebody who knows how seals it again
        content = plain_json(record)
        content["tensors_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        write_sealed_record(record, content)


def content_of(file: Path) -> Any:
    return json.loads(header_of(file)["__metadata__"]["secateur"])


def write_content(file: Path, content: Any) -> None:
    """Put another header into a file of `secateur.signals.storage`, with the right checksum."""
    from safetensors.torch import load_file

    tensors, text = load_file(file), json.dumps(content)
    save_file(tensors, file, metadata={"secateur": text, "sha256": storage._digest(text, tensors)})


def _write_experts(folder: Path) -> None:
    model = folder / "moe"
    model.mkdir()
    tensors = {f"model.layers.0.mlp.experts.{e}.w.weight": torch.randn(4, 4) for e in range(4)}
    save_file(tensors | {"model.layers.0.mlp.gate.weight": torch.randn(4, 4)}, model / "a.safetensors")
    names = [*tensors, "model.layers.0.mlp.gate.weight"]
    index = {"metadata": {"total_size": 320}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    write_plain(model / "model.safetensors.index.json", index)
    write_plain(model / "config.json", {"num_experts": 4})


def _read_experts(folder: Path) -> Any:
    data = json.loads(PLAN.to_json())
    data["groups"] = [
        {
            "name": "model.layers.0.mlp",
            "size": 4,
            "exact": False,
            "removed": [1],
            "slices": [
                {
                    "tensor": "model.layers.0.mlp.gate.weight",
                    "axis": 0,
                    "role": "produce",
                    "removed": [1],
                }
            ],
        }
    ]
    return prune_checkpoint(folder / "moe", sc.Plan.from_json(json.dumps(data)), folder / "out")


def _read_artefact(folder: Path) -> Any:
    loaded = sc.load(folder / "a", make)
    return loaded(torch.zeros(1, 4))


def _read_plan(folder: Path) -> Any:
    plan = read_plan(str(folder / "plan.json"))
    str(plan)
    return [sc.apply(NET, plan, form) for form in ("module", "masked")], plan


def _read_scores(folder: Path) -> Any:
    scores = sc.Scores.load(folder / "scores")
    repr(scores)
    return sc.Uniform(ratio=0.25).allocate(GRAPH, scores)


def _read_masks(folder: Path) -> Any:
    plan = sc.MaskPlan.load(folder / "masks")
    str(plan)
    return sc.apply(NET, plan)


def _read_report(folder: Path) -> Any:
    found = sc.Report.from_json(folder / "report.json")
    return str(found), found.to_markdown(), found.to_html(folder / "page.html"), found.to_json()


def _write_checkpoint(folder: Path) -> None:
    saved = Saved(Position(), {"taylor": {"sums": torch.zeros(3)}}, {"taylor": {"0": np.zeros(8)}})
    Checkpoint(folder / "run", 0, ABOUT).save(saved)


def _read_shapes(folder: Path) -> Any:
    reshape(make(), read_shape(folder))


PICTURES = {b"fine_labels": [1, 2], b"data": np.zeros((2, 3072), np.uint8)}


def _house_numbers() -> bytes:
    """A file of MATLAB with two pictures, one array as it is and one packed."""

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack("<II", kind, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0")

    def matrix(name: bytes, shape: tuple[int, ...], content: bytes) -> bytes:
        flags, sizes = struct.pack("<II", 9, 0), struct.pack(f"<{len(shape)}i", *shape)
        return element(14, element(6, flags) + element(5, sizes) + element(1, name) + element(2, content))

    packed = zlib.compress(matrix(b"X", (32, 32, 3, 2), bytes(32 * 32 * 3 * 2)))
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    return header + struct.pack("<II", 15, len(packed)) + packed + matrix(b"y", (2, 1), b"\1\x0a")


STORED = (content_of, write_content)
MASKS = {name: np.ones(tuple(p.shape), bool) for name, p in NET.named_parameters() if p.ndim == 2}

READERS = {
    reader.name: reader
    for reader in (
        Reader(
            "record",
            "a/secateur.json",
            lambda f: sc.save(SMALL, f / "a"),
            _read_artefact,
            (plain_json, write_sealed_record),
        ),
        Reader(
            "tensors",
            "a/model.safetensors",
            lambda f: sc.save(SMALL, f / "a"),
            _read_artefact,
            (header_of, write_header),
        ),
        Reader(
            "plan",
            "plan.json",
            lambda f: PLAN.to_json(f / "plan.json"),
            _read_plan,
            (plain_json, write_plain),
        ),
        Reader("scores", "scores", lambda f: SCORES.save(f / "scores"), _read_scores, STORED),
        Reader(
            "masks",
            "masks",
            lambda f: sc.MaskPlan(GRAPH.fingerprint, "hand", MASKS).save(f / "masks"),
            _read_masks,
            STORED,
        ),
        Reader(
            "finished step",
            STEP.name,
            lambda f: Journal(f).step("refit", "one").save({"near": 0.5}, {"w": torch.ones(3)}),
            lambda f: (
                Journal(f).step("refit", "one").load(lambda notes, found: (float(notes["near"]), found))
            ),
            STORED,
        ),
        Reader(
            "checkpoint",
            "run",
            _write_checkpoint,
            lambda f: Checkpoint(f / "run", 0, ABOUT).load(),
            STORED,
        ),
        Reader(
            "report",
            "report.json",
            lambda f: report(artefact="small", make_model="import net").to_json(f / "report.json"),
            _read_report,
            (plain_json, write_plain),
        ),
        Reader(
            "configuration",
            "run.yaml",
            lambda f: write_plain(f / "run.yaml", {"seed": 1, "budget": {"macs": 0.5}, "input": ["1x4"]}),
            lambda f: read_run(f / "run.yaml"),
            (plain_json, write_plain),
        ),
        Reader(
            "arrays",
            "x.npz",
            lambda f: np.savez(f / "x.npz", x=np.zeros((4, 3), np.float32), y=np.arange(4)),
            lambda f: arrays("--data", f / "x.npz", 2, 0),
        ),
        Reader(
            "cifar",
            "train",
            lambda f: (f / "train").write_bytes(pickle.dumps(PICTURES, protocol=2)),
            lambda f: Archive("--data", "cifar100", False, f).read(),
        ),
        Reader(
            "house numbers",
            "train_32x32.mat",
            lambda f: (f / "train_32x32.mat").write_bytes(_house_numbers()),
            lambda f: Archive("--data", "svhn", False, f).read(),
        ),
        Reader(
            "index",
            "moe/model.safetensors.index.json",
            _write_experts,
            _read_experts,
            (plain_json, write_plain),
        ),
        Reader("shard", "moe/a.safetensors", _write_experts, _read_experts, (header_of, write_header)),
        Reader(
            "mapped",
            "w.safetensors",
            lambda f: save_file({k: v.clone() for k, v in NET.state_dict().items()}, f / "w.safetensors"),
            lambda f: sc.map_weights(make(), f / "w.safetensors"),
            (header_of, write_header),
        ),
        Reader(
            "shapes",
            "pruning.json",
            lambda f: write_plain(f / "pruning.json", shape_state(SMALL)),
            _read_shapes,
            (plain_json, write_plain),
        ),
    )
}

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    0.5,
    1e308,
    2**31,
    2**63,
    10**30,
    "",
    "nan",
    "../../../etc/passwd",
    "\x1b[2J\u202e\x00\n",
    "F8_E4M3",
    "C64",
    "I8",
    "x" * 5000,
    [],
    {},
    [0],
    [[0]],
    [-1, 2**40],
    [65536, 65536],
    {"a": 1},
    {"__class__": "x"},
)
"""What is put in the place of each value of a JSON text."""


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values of a JSON text."""
    yield path
    if isinstance(content, dict):
        for name, value in content.items():
            yield from places(value, (*path, name))
    elif isinstance(content, list):
        for number, value in enumerate(content[:3]):
            yield from places(value, (*path, number))


def changed(content: Any, path: tuple[Any, ...], value: Any, *, delete: bool = False) -> Any:
    """A JSON text with another value at a path, or without it."""
    if not path:
        return value
    found = copy.deepcopy(content)
    holder = found
    for part in path[:-1]:
        holder = holder[part]
    if delete:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return found


def json_changes(reader: Reader, valid: Path) -> Iterator[tuple[str, Change]]:
    """One change for each value and each odd one, with the checksums made right."""
    if reader.json is None:
        return
    take, put = reader.json
    content = take(valid / reader.file)
    for path in places(content):
        name = ".".join(map(str, path)) or "all"
        for value in ODD:
            other = changed(content, path, value)
            yield f"{name} = {str(value)[:20]!r}", lambda f, other=other: put(f / reader.file, other)  # type: ignore[misc]
        if path:
            other = changed(content, path, None, delete=True)
            yield f"no {name}", lambda f, other=other: put(f / reader.file, other)  # type: ignore[misc]


def raw_changes(reader: Reader, valid: Path, seed: int, count: int) -> Iterator[tuple[str, Change]]:
    """Bytes that are flipped, cut, doubled or random."""
    raw = (valid / reader.file).read_bytes()
    generator = np.random.default_rng(seed)

    def bytewise(data: bytes) -> Change:
        return lambda f: (f / reader.file).write_bytes(data) and None

    for number in range(count):
        at = int(generator.integers(0, max(len(raw), 1)))
        length = int(generator.integers(1, 9))
        noise = generator.bytes(length)
        kind = number % 5
        if kind == 0:
            data = raw[:at] + noise + raw[at + length :]
        elif kind == 1:
            data = raw[:at]
        elif kind == 2:
            data = raw[:at] + raw[at:] * 2
        elif kind == 3:
            data = raw[:at] + noise + raw[at:]
        else:
            data = raw[:at] + bytes([raw[at] ^ (1 << int(generator.integers(0, 8)))]) + raw[at + 1 :]
        yield f"bytes {kind} at {at}", bytewise(data)


def _replace(make_it: Callable[[Path], Any]) -> Callable[[Reader], Change]:
    def of(reader: Reader) -> Change:
        def change(folder: Path) -> None:
            (folder / reader.file).unlink()
            make_it(folder / reader.file)

        return change

    return of


def _sparse(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(1 << 40)


def _with_more(reader: Reader) -> Change:
    """A tensor of a terabyte more behind the others, all of it a hole."""

    def change(folder: Path) -> None:
        file = folder / reader.file
        raw = file.read_bytes()
        if raw[8:9] != b"{":  # of another format
            _sparse(file)
            return
        header = header_of(file)
        end = max((e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"), default=0)
        header["more"] = {"dtype": "U8", "shape": [1 << 40], "data_offsets": [end, end + (1 << 40)]}
        text = json.dumps(header).encode()
        body = raw[len(raw) - end :]
        file.write_bytes(struct.pack("<Q", len(text)) + text + body)
        with file.open("r+b") as opened:
            opened.truncate(8 + len(text) + end + (1 << 40))

    return change


def _text(text: str | bytes) -> Callable[[Reader], Change]:
    data = text.encode() if isinstance(text, str) else text
    return lambda reader: lambda folder: (folder / reader.file).write_bytes(data) and None


def _bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (64, 1 << 20)}
        )
        with archive.open("x.npy", "w", force_zip64=True) as member:
            member.write(header.getvalue())
            for _ in range(64):
                member.write(bytes(1 << 22))


ANYWHERE: dict[str, Callable[[Reader], Change]] = {
    "a pipe": _replace(os.mkfifo),
    "a folder": _replace(Path.mkdir),
    "endless zeros": _replace(lambda p: p.symlink_to("/dev/zero")),
    "endless noise": _replace(lambda p: p.symlink_to("/dev/urandom")),
    "a link to itself": _replace(lambda p: p.symlink_to(p)),
    "a link to nothing": _replace(lambda p: p.symlink_to("nowhere")),
    "a terabyte of holes": _replace(_sparse),
    "a terabyte more": _with_more,
    "nothing": _replace(lambda p: None),
    "empty": _text(""),
    "deep lists": _text("[" * 200_000),
    "deep mappings": _text('{"a":' * 100_000),
    "closed deep lists": _text("[" * 5000 + "]" * 5000),
    "many lists": _text("[" + "[]," * 3_000_000 + "[]]"),
    "many digits": _text('{"format": ' + "9" * 100_000 + "}"),
    "many digits of a fraction": _text('{"format": 0.' + "9" * 100_000 + "}"),
    "an exponent": _text('{"format": 1e999999999}'),
    "NaN": _text('{"format": NaN}'),
    "not UTF-8": _text(b"\xff\xfe\x00{"),
    "aliases": _text("a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
    )),
    "a tag": _text("!!python/object/apply:os.system ['true']"),
    "an odd integer": _text("seed: !!int ''"),
    "sixties": _text("seed: " + ":".join(["59"] * 50_000)),
    "a header of all memory": _text(struct.pack("<Q", 2**63) + b"{}"),
    "a header behind the end": _text(struct.pack("<Q", 1 << 20) + b"{}"),
    "overlapping tensors": _text(
        struct.pack("<Q", 138)
        + (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
        ).ljust(138)
        + bytes(12)
    ),
    "a packed gigabyte": _replace(_bomb),
    "a pickle": _text(b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94."),
    "a zip of nothing": _text(b"PK\x05\x06" + bytes(18)),
}  # fmt: skip
"""Hostile files for any reader."""


def hostile(reader: Reader, valid: Path, *, seed: int = 0, count: int = 40) -> Iterator[tuple[str, Change]]:
    """All hostile versions of one reader's file, each with a name."""
    yield from ((name, of(reader)) for name, of in ANYWHERE.items())
    yield from raw_changes(reader, valid, seed, count)
    yield from json_changes(reader, valid)
