"""Write a configuration file with a comment for every setting."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from secateur.config.setting import Setting, sections, settings

WIDTH = 100

HEAD = """\
# A run of secateur. Every command reads its part of this file:
#   secateur inspect --config {name}
#   secateur prune --config {name} --set budget.macs=0.4
# Take the # off a line without a blank after it to use it: it shows the default, or an example where there is
# none. Options of the command line win over --set, which wins over this file. Paths are relative to where the
# command is run.
"""


def commented(given: Mapping[str, Any], name: str = "secateur.yaml") -> str:
    """Return a YAML file that sets `given`, and lists every other setting in a comment.

    Args:
        given: The values to set, by path.
        name: The file's name, for its first lines.

    Example:
        >>> [line for line in commented({"budget.macs": 0.4}).splitlines() if "macs: " in line]
        ['  macs: 0.4', '  #macs: [0.8, 0.6, 0.4]']
    """
    about = sections()
    lines = [HEAD.format(name=name)]
    section = ""
    for path, setting in settings().items():
        inside, _, leaf = path.rpartition(".")
        if inside and inside != section:
            lines += [*([""] if section else []), f"# {about[inside]}", f"{inside}:"]
        elif section and not inside:
            lines.append("")
        section = inside
        lines += _lines(setting, leaf, "  " if inside else "", given)
        if not inside:
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _lines(setting: Setting, leaf: str, indent: str, given: Mapping[str, Any]) -> Iterator[str]:
    choices = f" One of {', '.join(setting.names)}." if setting.names else ""
    for line in textwrap.wrap(setting.help + choices, WIDTH, break_on_hyphens=False):
        yield f"{indent}# {line}"
    if setting.path in given:
        yield f"{indent}{leaf}: {_value(given[setting.path])}"
        return
    yield f"{indent}#{leaf}: {_value(setting.example)}"


def _value(value: Any) -> str:
    """Return the value as YAML. JSON is valid YAML; plain words are written without quotes."""
    if isinstance(value, str) and value.replace("_", "").isalnum() and value not in ("true", "false", "null"):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)
