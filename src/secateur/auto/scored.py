"""Scores for all candidates at once, or what the data can feed of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from secateur.auto.auto import Auto
from secateur.calibration import Calibration
from secateur.errors import CalibrationError, ScoreError
from secateur.graph.graph import Graph
from secateur.score import Scores, score
from secateur.score.combination import Asked, name_of
from secateur.score.loss import LossFn


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores, and what there are none of.

    Attributes:
        scores: Of every signal that the data could feed.
        missing: For each other signal, why not.
    """

    scores: Scores
    missing: Mapping[str, str] = field(default_factory=dict)


def scored(
    auto: Auto, graph: Graph, data: Calibration, *, loss_fn: LossFn | None, seed: int, progress: bool
) -> Scored:
    """The scores of every signal that the candidates need; and for those that there are not, why."""
    wanted = {name_of(signal): signal for rule in auto.rules.values() for signal in rule.signals}

    def gathered(signals: Iterable[Asked]) -> Scores:
        return score(graph, data, tuple(signals), loss_fn=loss_fn, seed=seed, progress=progress)

    try:
        return Scored(gathered(wanted.values()))
    except (CalibrationError, ScoreError) as error:
        if len(wanted) < 2:
            return Scored(Scores({}, fingerprint=graph.fingerprint), dict.fromkeys(wanted, str(error)))
    found: list[Scores] = []
    missing: dict[str, str] = {}
    for name, signal in wanted.items():
        try:
            found.append(gathered([signal]))
        except (CalibrationError, ScoreError) as error:
            missing[name] = str(error)
    values = {name: part[name] for part in found for name in part.signals}
    samples, classes = (max((getattr(part, k) for part in found), default=0) for k in ("samples", "classes"))
    return Scored(Scores(values, samples, classes, seed, graph.fingerprint), missing)
