"""The markdown that docs/figures.md and the result folder carry, made from the result files alone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.frontier.summary import (
    AUTO,
    BEHIND,
    COLUMNS,
    COMES,
    OURS,
    OURS_BEHIND,
    POLISH,
    REFRESHED,
    REPAIRED,
    SEARCH,
    Row,
    best,
    contest,
    points,
    rows,
)
from benchmarks.frontier.summary import standard_error as error_of

Content = Mapping[str, Any]
WIDTH = 118
NONE = "–"

STAGES = {COMES: "as it comes", REFRESHED: "batch norms re-estimated", REPAIRED: "every layer refitted"}

KINDS = {
    AUTO: "`auto`", SEARCH: "`search`", POLISH: "`polish`", "fixed": "best single rule",
    "comes": "best peer, as it comes", "given": "best peer, batch norms re-estimated",
}  # fmt: skip
"""Titles of the columns, by the attributes of `summary.Contest`."""


def short(contents: Sequence[Content]) -> str:
    """What docs/figures.md shows: the best of each kind at every point of every network; who wins where."""
    if not contents:
        return "No results yet: `python -m benchmarks.frontier`"
    first = contents[0]
    ran = {run["rule"] for content in contents for run in content["runs"]}
    shown = {name: title for name, title in KINDS.items() if name not in (SEARCH, POLISH) or name in ran}
    heading = ("network, dense", "MACs", *shown.values())
    lines = [_line(heading), _line(["---"] * len(heading))]
    for content in contents:
        title = f"{content['network']}, {100 * content['dense_top1']:.1f}"
        for point in points(content):
            lines.append(_line((title, f"{point:g}", *_contest_cells(rows(content), point, shown))))
            title = ""
    tools = sorted({run["side"] for content in contents for run in content["runs"]} - {OURS})
    seeds = sorted({len({r["seed"] for r in content["runs"]}) for content in contents})
    draws = " or ".join(str(n) for n in seeds) + (" draw" if seeds == [1] else " draws")
    intro = (
        f"One shot, no training, {first['calibration_images']} calibration images, top-1 in % on "
        f"{first['test_images']} test images, mean ± standard deviation over {draws} of the calibration "
        "images; who is far behind the best of its kind at the first draw (a peer by "
        f"{BEHIND:g} points, a rule of ours by {OURS_BEHIND:g}) runs on that one only. Ours are refitted "
        "(`reconstruct`, no labels); `auto` is one call of `sc.prune`"
        f"{', and so is `search`' * (SEARCH in ran)}"
        f"{'; `polish` trains what `auto` gives, without labels' * (POLISH in ran)}; "
        f"the single rules are {_listing(_rules(contents))}. Peers: {_listing(tools) or 'none'}, each "
        "criterion, ranking and scope at the largest cost that it reaches within the budget. The best single "
        "rule and the best peer are chosen at each point by the test images themselves. In bold the highest "
        "mean."
    )
    outcome = " ".join([_peers_that_win(contents), _where_auto_leads(contents)]).strip()
    return "\n\n".join([_wrapped(intro), "\n".join(lines), _wrapped(outcome), *_after_tuning(contents)])


def full(contents: Sequence[Content]) -> str:
    """Every entrant at every point of every network, with costs, medians of seconds and failures."""
    parts = ["# Accuracy against MACs", short(contents)]
    for content in contents:
        parts.append(f"## {content['network']}\n\n![{content['network']}](frontier_{content['network']}.svg)")
        parts.append(_network(content))
        parts += [text for text in (_failures(content), _tuned(content)) if text]
    return "\n\n".join(parts) + "\n"


def _contest_cells(of: Sequence[Row], point: float, kinds: Iterable[str]) -> list[str]:
    found = contest(of, point)
    leader = best(found.all(), point)
    cells = []
    for kind in kinds:
        row = getattr(found, kind)
        if row is None:
            cells.append(NONE)
            continue
        text = str(row.cells[point])
        text = f"**{text}**" if row is leader else text
        name = (
            "" if row.rule in COLUMNS else f" ({row.rule if row.side == OURS else f'{row.side}, {row.rule}'})"
        )
        cells.append(text + name)
    return cells


def _network(content: Content) -> str:
    """Rows of one network: as pruned, and after repair, by entrant."""
    of, at = rows(content), points(content)
    leaders = {point: best(of, point) for point in at}
    heading = ["by", "rule", "stage", *(f"{p:g}" for p in at), "MACs reached", "parameters", "seconds"]
    lines = [_line(heading), _line(["---"] * len(heading))]
    for row in of:
        cells = [_bold(row, p, leaders[p]) if p in row.cells else NONE for p in at]
        there = [row.cells[p] for p in at if p in row.cells]
        costs = [
            ", ".join(f"{c.macs:.3f}" for c in there),
            ", ".join(f"{c.params:.3f}" for c in there),
            ", ".join(f"{c.seconds:.1f}" for c in there),
        ]
        lines.append(_line([row.side, row.rule, STAGES[row.stage], *cells, *costs]))
    return "\n".join(lines)


def _bold(row: Row, point: float, leader: Row | None) -> str:
    text = str(row.cells[point])
    return f"**{text}**" if row is leader else text


def _failures(content: Content) -> str:
    """What failed, once each message."""
    by_message: dict[tuple[str, str], list[str]] = {}
    for row in rows(content):
        for point, message in row.errors.items():
            names = by_message.setdefault((row.side, message), [])
            names.append(f"{row.rule} at {point:g}")
    if not by_message:
        return ""
    lines = [
        f"- {side}: `{message}` ({'; '.join(dict.fromkeys(names))})"
        for (side, message), names in by_message.items()
    ]
    return "Failed:\n\n" + "\n".join(lines)


def _tuned(content: Content) -> str:
    """Before and after the same fine-tuning."""
    if not content["tuned"]:
        return ""
    heading = ("by", "rule", "start", "MACs", "before", "after", "speed-up")
    lines = [_line(heading), _line(["---"] * len(heading))]
    for r in content["tuned"]:
        values = (
            (f"{100 * r['before']:.1f}", f"{100 * r['after']:.1f}", _speedup(r))
            if "error" not in r
            else (NONE, r["error"], NONE)
        )
        lines.append(_line((r["side"], r["rule"], STAGES[r["start"]], f"{r['point']:g}", *values)))
    return f"{_how_tuned(content)}:" + "\n\n" + "\n".join(lines)


def _how_tuned(content: Content) -> str:
    one = content["tuned"][0]
    return f"Fine-tuned alike for {one['epochs']} epochs over {one['images']} training images, one draw"


def _speedup(run: Content) -> str:
    middle, low, high = run["speedup"]
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _after_tuning(contents: Sequence[Content]) -> list[str]:
    """Of each network, the best of each kind after the same fine-tuning, with its speed-up."""
    tuned = [content for content in contents if content["tuned"]]
    if not tuned:
        return []
    heading = ("network, dense", "MACs", "`auto`", "best single rule", "best peer")
    lines = [_line(heading), _line(["---"] * len(heading))]
    ahead: list[str] = []
    for content in tuned:
        good = [r for r in content["tuned"] if "error" not in r]
        kinds = [
            [r for r in good if r["side"] == OURS and r["rule"] == AUTO],
            [r for r in good if r["side"] == OURS and r["rule"] != AUTO],
            [r for r in good if r["side"] != OURS],
        ]
        most = max(r["after"] for r in good)
        if any(r["after"] == most for r in kinds[2]):
            ahead.append(f"{content['network']} ({100 * most:.1f})")
        cells = []
        for kind in kinds:
            top = max(kind, key=lambda r: float(r["after"]), default=None)
            text = NONE if top is None else f"{100 * top['after']:.1f}"
            text = f"**{text}**" if top is not None and top["after"] == most else text
            if top is not None:
                text += f", {top['speedup'][0]:.2f}x" + (f" ({top['rule']})" if top["rule"] != AUTO else "")
            cells.append(text)
        title = f"{content['network']}, {100 * content['dense_top1']:.1f}"
        lines.append(_line((title, f"{content['tuned'][0]['point']:g}", *cells)))
    intro = (
        f"{_how_tuned(tuned[0])}, distilled from the dense network; top-1 in %, and how many times as many "
        "images a second as the dense network, 32 at a time, eager, one thread:"
    )
    outcome = (
        f"A peer is first, or level with the first, on {_listing(ahead)}." if ahead else "No peer is first."
    )
    return [_wrapped(intro), "\n".join(lines), _wrapped(outcome)]


def _peers_that_win(contents: Sequence[Content]) -> str:
    """Where the best peer's mean is above everything of ours."""
    places = []
    for content in contents:
        of = rows(content)
        for point in points(content):
            found = contest(of, point)
            leader = best(found.all(), point)
            if leader is not None and leader.side != OURS:
                ours = best([r for r in found.all() if r.side == OURS], point)
                behind = NONE if ours is None else f"{leader.cells[point].mean - ours.cells[point].mean:.1f}"
                places.append(
                    f"{content['network']} at {point:g} ({leader.side}, {leader.rule}, by {behind})"
                )
    return f"A peer wins on {_listing(places)}." if places else "No peer wins anywhere."


def _where_auto_leads(contents: Sequence[Content]) -> str:
    """Whether `auto` is first among those that do not train, or within one standard error of who is."""
    level, behind = 0, []
    for content in contents:
        of = rows(content)
        for point in points(content):
            found = contest(of, point)
            leader = best([r for r in found.all() if r is not found.polish], point)
            if found.auto is None or leader is None:
                continue
            lag = leader.cells[point].mean - found.auto.cells[point].mean
            if lag <= error_of(leader.cells[point], found.auto.cells[point]):
                level += 1
            else:
                behind.append(f"{content['network']} at {point:g} by {lag:.1f} ({leader.rule})")
    if not level + len(behind):
        return ""
    text = "Without training, `auto` is first, or within one standard error of the difference to the first, "
    text += f"at {level} of {level + len(behind)} points"
    return text + (f"; it is behind on {_listing(behind)}." if behind else ".")


def _rules(contents: Sequence[Content]) -> list[str]:
    """Our single rules."""
    runs = (run for content in contents for run in content["runs"])
    return list(dict.fromkeys(r["rule"] for r in runs if r["side"] == OURS and r["rule"] not in COLUMNS))


def _listing(words: Sequence[str]) -> str:
    """Joined by semicolons, since names have commas."""
    return "; ".join(words)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
