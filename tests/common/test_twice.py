"""A name twice in one mapping is refused wherever mappings are read: readers differ in which one counts."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import secateur as sc
from secateur.common.reading import parse_json
from secateur.config.read import read_run
from secateur.config.yaml import parse_yaml
from tests.helpers.hostile import READERS


def _doubled(content: Any, path: tuple[Any, ...]) -> str:
    """The text of a JSON value in which the name at the end of a path comes twice."""
    if not path:
        return json.dumps(content)
    first, rest = path[0], path[1:]
    if isinstance(content, list):
        parts = [_doubled(v, rest) if k == first else json.dumps(v) for k, v in enumerate(content)]
        return f"[{', '.join(parts)}]"
    texts = {k: _doubled(v, rest) if k == first else json.dumps(v) for k, v in content.items()}
    entries = [f"{json.dumps(k)}: {text}" for k, text in texts.items()]
    if not rest:
        entries.append(f"{json.dumps(first)}: {json.dumps(content[first])}")
    return f"{{{', '.join(entries)}}}"


def _names(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of names in mappings; of a list, those in its first entry."""
    found = []
    if isinstance(content, dict):
        for name, value in content.items():
            found += [(*path, name), *_names(value, (*path, name))]
    elif isinstance(content, list) and content:
        found += _names(content[0], (*path, 0))
    return found


def _header(file: Path, text: str) -> None:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    file.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + raw[8 + length :])


HEADERS = ("tensors", "shard", "mapped")
TEXTS = ("record", "plan", "report", "configuration", "index", "shapes")


@pytest.mark.parametrize("name", [*HEADERS, *TEXTS])
def test_files(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    assert reader.json is not None
    reader.write(tmp_path)
    file = tmp_path / reader.file
    content = reader.json[0](file)
    paths = _names(content)
    before = file.read_bytes()
    for path in paths[:: max(1, len(paths) // 30)]:
        text = _doubled(content, path)
        put: Callable[[Path, str], Any] = _header if name in HEADERS else Path.write_text  # type: ignore[assignment]
        put(file, text)
        with pytest.raises(sc.SecateurError):
            reader.read(tmp_path)
        file.write_bytes(before)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": [{"a": 1, "c": 2, "a": 3}]}'])
def test_both_parsers(text: str) -> None:
    for parse in (parse_json, parse_yaml):
        with pytest.raises(ValueError, match="twice in one mapping"):
            parse(text)


def test_a_configuration_says_which(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nbudget:\n  macs: 0.5\nseed: 2\n")
    with pytest.raises(sc.SecateurError, match="seed twice in one mapping"):
        read_run(tmp_path / "run.yaml")
