"""Read YAML without what makes a short text large or its values odd: aliases, tags, depth, names twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

DEPTH = 16
"""The most lists and mappings in each other."""

LONGEST = 4096
"""The most characters of one scalar."""


class _Loader(yaml.SafeLoader):
    """PyYAML's own, which refuses these while it reads, before values are made."""

    depth = 0

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            names = Counter(self.construct_object(key) for key, _ in node.value)
            raise ValueError(f"{str(names.most_common(1)[0][0])[:40]} twice in one mapping{node.start_mark}")
        return found

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"the alias {str(event.anchor)[:40]}{event.start_mark}")
        for what in ("anchor", "tag"):
            if (named := getattr(event, what, None)) is not None:
                raise ValueError(f"the {what} {str(named)[:40]}{event.start_mark}")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > LONGEST:
            raise ValueError(f"more than {LONGEST} characters{event.start_mark}")
        self.depth += 1
        if self.depth > DEPTH:
            raise ValueError(f"more than {DEPTH} lists and mappings in each other{event.start_mark}")
        found = super().compose_node(parent, index)
        self.depth -= 1
        return found


def parse_yaml(text: str) -> Any:
    r"""Parse one YAML document of plain values.

    Raises:
        ValueError: It is malformed, or has an alias, an anchor, a tag, a long scalar, too much depth, or a
            name twice in one mapping.

    Example:
        >>> parse_yaml("budget: {macs: 0.5}")
        {'budget': {'macs': 0.5}}
        >>> parse_yaml("a: &x [1]\nb: *x")
        Traceback (most recent call last):
        ValueError: the anchor x  in "<unicode string>", line 1, column 4:
            a: &x [1]
               ^
    """
    try:
        return yaml.load(text, _Loader)  # derived from the safe one
    except yaml.YAMLError as error:
        raise ValueError(error) from error
    except (LookupError, AttributeError, TypeError, OverflowError) as error:  # of PyYAML, about odd scalars
        raise ValueError(f"a value that YAML cannot hold ({type(error).__name__})") from error
