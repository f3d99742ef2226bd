"""The result file as tables, on the terminal and on the page `docs/scale.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"

CHECK = ("network", "phase", "predicted", "measured", "ratio", "predicted MB", "measured MB", "ratio")
LARGE = ("phase", "multiply-adds", "time", "mostly", "memory", "sent by each further process")
SENT = ("signal", "on paper", "sent", "scores returned")


def check(content: Mapping[str, Any]) -> list[list[str]]:
    """Small networks: predicted and measured."""
    rows = []
    for name, found in content["checks"].items():
        for row in found["rows"]:
            held = (
                [f"{row[k] / 1e6:.0f}" for k in ("predicted_bytes", "measured_bytes")]
                + [f"{row['bytes_ratio']:.2f}"]
                if "bytes_ratio" in row
                else ["–", "–", "–"]
            )
            rows.append(
                [name, row["phase"], f"{row['predicted_seconds']:.2f} s", f"{row['measured_seconds']:.2f} s",
                 f"{row['seconds_ratio']:.2f}", *held]
            )  # fmt: skip
    return rows


def large(found: Mapping[str, Any]) -> list[list[str]]:
    """One network of true size."""
    return [
        [
            row["phase"],
            f"{row['products']:.1e}" if row["products"] else "–",
            duration(row["seconds"]),
            f"{row['dominant']} ({row['dominant_share']:.0%})",
            size(row["total_bytes"]),
            "–" if row["sent_bytes"] is None else size(row["sent_bytes"]),
        ]
        for row in found["phases"]
    ]


def sent(content: Mapping[str, Any]) -> list[list[str]]:
    """Bytes between two processes."""
    return [
        [signal, f"{row['predicted']:,}", f"{row['measured']:,}", f"{row['scores_returned']:,}"]
        for signal, row in content["sent"].items()
    ]


def duration(seconds: float) -> str:
    """In the unit that a person would use."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return (
                f"{seconds / length:.3g} {unit}"
                if seconds < 1000 * length
                else f"{seconds / length:,.0f} {unit}"
            )
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def size(count: int) -> str:
    """In bytes, kB, MB or GB."""
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.1f} {unit}" if count < 100 * length else f"{count / length:,.0f} {unit}"
    return f"{count} B"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the page."""
    lines = [" | ".join(headings), " | ".join("---" for _ in headings), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def page_tables(content: Mapping[str, Any]) -> dict[str, str]:
    """Every table of the page, by name."""
    found = {"check": markdown(CHECK, check(content)), "sent": markdown(SENT, sent(content))}
    rates = [[kind, f"{rate:.2g}"] for kind, rate in content["rates"].items()]
    found["rates"] = markdown(("work", "a second"), rates)
    networks = content["predictions"]
    found["passes"] = markdown(
        ("network", "signal", "passes"),
        [[n["name"], signal, str(k)] for n in networks.values() for signal, k in n.get("passes", {}).items()],
    )
    found["here"] = markdown(
        ("network", "trace", "allocate"),
        [
            [n["name"], *(f"{seconds:.2f}" for seconds in n["measured_here"].values())]
            for n in networks.values()
        ],
    )
    for name, network in networks.items():
        found[name] = markdown(LARGE, large(network))
    return found


def write_page(content: Mapping[str, Any], page: Path = PAGE) -> None:
    """Put every table between its marks on the page."""
    text = page.read_text(encoding="utf-8")
    for name, table in page_tables(content).items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        if mark:
            text = before + mark + "\n" + table + "\n\n" + rest[rest.index("<!-- end -->") :]
    page.write_text(text, encoding="utf-8")
