"""Say what quantising brought: a table of stages, and sentences."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from secateur.common.formatting import MINUS, milliseconds, percent

if TYPE_CHECKING:
    from secateur.pipeline.quantised import Loss, QuantisedFigures, Stage

TITLE = "Then quantised"
_NAMES = {
    "accuracy_drop": "drop",
    "loss_rise": "rise of the loss",
    "perplexity_rise": "rise of the perplexity",
}
_KINDS = {
    "int8": "Weights and activations have 8 bits",
    "int4": "The weights of matrix products have 4 bits, with a scale for every 32; all else is in 32 bits",
}


def titles(found: QuantisedFigures) -> tuple[str, ...]:
    """Return the column titles."""
    accurate = any(stage.accuracy is not None for stage in found.stages)
    timed = any(stage.seconds for stage in found.stages)
    return (
        "as an ONNX file",
        "MB",
        "of dense",
        *(("time", "of dense") if timed else ()),
        *(("accuracy",) if accurate else ()),
        found.stages[0].measure,
    )


def rows(found: QuantisedFigures) -> tuple[tuple[str, ...], ...]:
    """Return one row of cells for each stage."""
    return tuple(_cells(found, stage, len(titles(found))) for stage in found.stages)


def _cells(found: QuantisedFigures, stage: Stage, count: int) -> tuple[str, ...]:
    first = found.stages[0]
    cells = [stage.stage, f"{stage.file_bytes / 1e6:.3g}", percent(stage.file_bytes, first.file_bytes)]
    if any(each.seconds for each in found.stages):
        cells += [_time(stage), _time_of(stage, first)]
    if any(each.accuracy is not None for each in found.stages):
        cells.append("–" if stage.accuracy is None else f"{100 * stage.accuracy:.2f} %")
    return (*cells, f"{stage.loss:.4g}")


def _time(stage: Stage) -> str:
    return milliseconds(statistics.median(stage.seconds)) if stage.seconds else "–"


def _time_of(stage: Stage, first: Stage) -> str:
    if not stage.seconds or not first.seconds:
        return "–"
    return percent(statistics.median(stage.seconds), statistics.median(first.seconds))


def sentences(found: QuantisedFigures) -> tuple[str, ...]:
    """Explain the table."""
    samples = found.stages[-1].samples
    seen = f", whose ranges were observed on {found.calibrated:,} samples" if found.calibrated else ""
    one = f"{found.threads} thread" + ("" if found.threads == 1 else "s")
    timed = f"; the times are medians for a batch of {found.batch}, with {one}, in turn"
    lines = [
        f"{_KINDS[found.kind]}{seen}. All rows were run by {found.runtime} on {samples:,} samples"
        f"{timed if any(stage.seconds for stage in found.stages) else ''}.",
        f"The squared distance of the outputs to those of the model that was quantised is "
        f"{found.distance:.2g} of their size.",
    ]
    return (*lines, *(_sentence(found, each) for each in found.losses))


def _sentence(found: QuantisedFigures, loss: Loss) -> str:
    against = "the dense model" if len(found.stages) > 2 or found.stages[0].stage == "dense" else "the model"
    text = (
        f"{loss.measure[:1].upper()}{loss.measure[1:]}: {_NAMES.get(loss.bound, loss.bound)} of "
        f"{found.stages[-1].stage} against {against} {_amount(loss, loss.value)}{_unit(loss)} "
        f"({_interval(loss)})"
    )
    if loss.limit is None:
        return text + "."
    if not math.isfinite(loss.most):
        return f"{text}. Asked for at most {_amount(loss, loss.limit)}{_unit(loss)}: not confirmed."
    verdict = "confirmed" if loss.within else "not confirmed"
    return (
        f"{text}. Asked for at most {_amount(loss, loss.limit)}{_unit(loss)}: {verdict}, it is at most "
        f"{_amount(loss, loss.most)}{_unit(loss)}. The plan was chosen with the same samples, which "
        "this does not correct for."
    )


def _amount(loss: Loss, value: float) -> str:
    sign = MINUS if round(value, 6) < 0 else ""
    return f"{sign}{abs(100 * value):.2f}"


def _interval(loss: Loss) -> str:
    if not (math.isfinite(loss.low) and math.isfinite(loss.high)):
        return "the samples are too few for an interval"
    return f"{_amount(loss, loss.low)} to {_amount(loss, loss.high)}, {100 * loss.confidence:g} %"


def _unit(loss: Loss) -> str:
    return " points" if loss.bound == "accuracy_drop" else " %"


def lines(found: QuantisedFigures) -> Sequence[str]:
    """Return the table as lines of text."""
    from secateur.report.text import aligned  # which shows this table, too

    return aligned([titles(found), *rows(found)])


def text(found: QuantisedFigures) -> str:
    """Return the table and its explanation as text."""
    notes = (textwrap.wrap(each, 98) for each in sentences(found))
    return "\n".join([*lines(found), *(f"  {line}" for note in notes for line in note)])
