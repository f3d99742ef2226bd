"""Units and experts in `sc.score`: each by its own signals, in pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from secateur.calibration import Forward
from secateur.errors import SettingError
from secateur.signals import Scores
from secateur.signals import score as score_units
from secateur.signals.experts.score import score as score_experts
from secateur.signals.loss import LossFn
from secateur.signals.units.combination import name_of
from secateur.targets.together.graph import UnitsAndExperts
from secateur.targets.together.rule import RULES, Pair, Together


def score(
    graph: UnitsAndExperts,
    calibration: Any = None,
    signals: Iterable[Pair | tuple[Any, Any]] | None = None,
    *,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """What each unit and each expert is worth: see `secateur.score`.

    Args:
        graph: The trace of both.
        calibration: As for `secateur.score`; it is read once for units and once for experts.
        signals: Pairs of a signal for units and one for experts: ``[("wasserstein", "reap")]``. None: those
            of ToD.
        loss_fn: As for `secateur.score`.
        forward: As for `secateur.score`.
        seed: As for `secateur.score`.
        progress: As for `secateur.score`.

    Returns:
        ``scores["wasserstein | reap"]`` with one vector for each group of units and each block of experts.

    Raises:
        SettingError: A signal is no pair.
        SecateurError: One of its kinds; see `secateur.score`.
    """
    pairs = Together.of(next(iter(RULES))).pairs if signals is None else tuple(map(_pair, signals))
    options: dict[str, Any] = {"loss_fn": loss_fn, "forward": forward, "seed": seed, "progress": progress}
    units = score_units(graph.units, calibration, [pair.unit for pair in pairs], **options)
    experts = score_experts(graph.experts, calibration, [pair.expert for pair in pairs], **options)
    return merged(pairs, units, experts)


def merged(pairs: Iterable[Pair], units: Scores, experts: Scores) -> Scores:
    """The scores of both, by the names of the pairs."""
    values = {p.name: {**units[name_of(p.unit)], **experts[name_of(p.expert)]} for p in pairs}
    return Scores(values, max(units.samples, experts.samples), units.classes, units.seed, units.fingerprint)


def _pair(asked: Any) -> Pair:
    if isinstance(asked, Pair):
        return asked
    if isinstance(asked, tuple) and len(asked) == 2:
        return Pair(*asked)
    raise SettingError(
        f"score: expected pairs of a signal for units and one for experts, got {asked!r}. "
        'Write [("magnitude", "frequency")], for example.'
    )
