"""Describe in sentences what was proven about a pruned model, and what was not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.report.data import Facts

MIXED = (
    "Some removed units were mixed with others by an operator without weights, such as a layer norm: what "
    "the others compute changes with the removal, on purpose, and only the measured accuracy says how much "
    "that costs."
)
"""Explains the removal of inexact groups."""

_REFERENCES = {
    "masked": "the dense model with the same units zeroed",
    "masked, experts excluded": (
        "the dense model with the same units zeroed, whose routers may not choose the removed experts,"
    ),
    "experts excluded": "the dense model whose routers may not choose the removed experts",
    "blocks bypassed": "the dense model in which the dropped blocks pass on what they read",
    "blocks bypassed, then masked": (
        "the dense model with the same units zeroed, in which the dropped blocks pass on what they read,"
    ),
    "products": "the dense model with the products of the two layers as weights",
    "graph": "the captured program with the same units cut out",
}


def paragraph(report: Facts) -> str:
    """Return what was proven about the report's model, at which input sizes, and what is not covered."""
    found = report.proof
    if report.asked.get("granularity") == "weight":
        return (
            "Before repair, the pruned model is the dense model with exactly the masked weights at zero: its "
            f"{found['outputs']} tensors were compared bit for bit."
        )
    return described(found)


def described(found: Mapping[str, Any]) -> str:
    """Describe a proof (`Facts.proof`) in sentences. What is not proven comes first."""
    return " ".join(_sentences(found))


def _sentences(found: Mapping[str, Any]) -> Iterator[str]:
    doubts, sizes = found.get("doubts") or (), found.get("sizes") or ()
    if doubts:
        yield f"Not proven: {'; '.join(doubts)}."
    if found["reference"] not in _REFERENCES:
        return
    yield _compared(found, sizes)
    if refused := found.get("refused"):
        yield f"The pruned model refuses to run at {'; '.join(refused)}, where the dense one runs."
    elif len(sizes) == 1:
        yield "Nothing was compared at other sizes."
    yield from _visible_tensors(found)
    if constant := found.get("constant"):
        which = ", ".join(str(number + 1) for number in constant)
        yield f"Output {which} is one number everywhere, which shows nothing."
    if found["reference"] == "graph":
        yield MIXED


def _compared(found: Mapping[str, Any], sizes: Sequence[str]) -> str:
    count = found["outputs"]
    outputs = "its output differs" if count == 1 else f"its {count} outputs differ"
    at = ""
    if len(sizes) == 1:
        at = f"at one size of its inputs ({sizes[0]}) "
    elif sizes:
        at = f"at {len(sizes)} sizes of its inputs ({'; '.join(sizes)}) "
    mode = " In training mode they agree as well." if found.get("training") else ""
    mode += " So do the gradients of the parameters." if found.get("gradients") else ""
    return (
        f"Before repair, the pruned model computes what {_REFERENCES[found['reference']]} computes: {at}in "
        f"float64 {outputs} by {found['difference']:.1e} relative (allowed: {found['tolerance']:.0e}).{mode}"
    )


def _visible_tensors(found: Mapping[str, Any]) -> Iterator[str]:
    """Say how many of the cut tensors change the output, so that the comparison can see an error there."""
    exercised = found.get("exercised") or {}
    if not exercised:
        return
    unseen, cancelled = found["not_exercised"], found["cancelled"]
    moved, stay = (sum(counts[i] for counts in exercised.values()) for i in (0, 1))
    seen = len(exercised) - len({*unseen, *cancelled})
    all_or_some = "All" if seen == len(exercised) else f"{seen} of the"
    yield (
        f"{all_or_some} {len(exercised)} tensors that were cut move the output, with {moved:,} of the "
        f"{stay:,} positions that they keep."
    )
    if others := found.get("other_weights"):
        yield (
            f"Of these, {len(others)} were seen only with random numbers added to the weights of both "
            f"models, because the model's own weights hide them."
        )
    if cancelled:
        yield f"No input can show {_listed(cancelled)}: what follows cancels them."


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
