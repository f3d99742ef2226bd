"""Units with experts or blocks in `sc.score`: each by its own signals, in pairs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from secateur.calibration import Forward
from secateur.errors import SettingError
from secateur.signals import Scores
from secateur.signals import score as score_units
from secateur.signals.blocks.score import score as score_blocks
from secateur.signals.experts.score import score as score_experts
from secateur.signals.loss import LossFn
from secateur.signals.units.combination import name_of
from secateur.targets.together.graph import Joined
from secateur.targets.together.rule import Pair, Together, What


def score(
    graph: Joined,
    calibration: Any = None,
    signals: Iterable[Pair | tuple[Any, Any]] | None = None,
    *,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """What each unit, and each expert or block, is worth: see `secateur.score`.

    Args:
        graph: The trace of both.
        calibration: As for `secateur.score`; it is read once for units and once for the others.
        signals: Pairs of a signal for units and one for experts or blocks: ``[("wasserstein", "reap")]``.
            None: those of ToD for experts, of RepairAware for blocks.
        loss_fn: As for `secateur.score`.
        forward: As for `secateur.score`.
        seed: As for `secateur.score`.
        progress: As for `secateur.score`.

    Returns:
        ``scores["wasserstein | reap"]`` with one vector for each group of units, and of experts or blocks.

    Raises:
        SettingError: A signal is no pair.
        SecateurError: One of its kinds; see `secateur.score`.
    """
    what = graph.others.granularity
    default = Together.of("tod" if what == "expert" else "repair_aware", what)
    pairs = default.pairs if signals is None else tuple(_pair(asked, what) for asked in signals)
    options: dict[str, Any] = {"loss_fn": loss_fn, "forward": forward, "seed": seed, "progress": progress}
    units = score_units(graph.units, calibration, [pair.unit for pair in pairs], **options)
    score_others: Any = score_experts if what == "expert" else score_blocks
    others = score_others(graph.others, calibration, [pair.other for pair in pairs], **options)
    return merged(pairs, units, others)


def merged(pairs: Iterable[Pair], units: Scores, others: Scores) -> Scores:
    """The scores of both, by the names of the pairs."""
    values = {p.name: {**units[name_of(p.unit)], **others[name_of(p.other)]} for p in pairs}
    return Scores(values, max(units.samples, others.samples), units.classes, units.seed, units.fingerprint)


def _pair(asked: Any, what: What) -> Pair:
    if isinstance(asked, Pair):
        return asked
    if isinstance(asked, tuple) and len(asked) == 2:
        return Pair(*asked)
    example = "frequency" if what == "expert" else "output_change"
    raise SettingError(
        f"score: expected pairs of a signal for units and one for {what}s, got {asked!r}. "
        f'Write [("magnitude", "{example}")], for example.'
    )
