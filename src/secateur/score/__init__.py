"""What each unit is worth: signals, and the single pass that gathers them."""

from secateur.score.magnitude import Magnitude
from secateur.score.scores import Scores
from secateur.score.scoring import score
from secateur.score.signal import Context, Signal, Step, Tally
from secateur.score.taylor import Taylor
from secateur.score.wasserstein import Wasserstein

__all__ = [  # noqa: RUF022 grouped by what a reader looks for
    # The verb and its result
    "score",
    "Scores",
    # Signals
    "Magnitude",
    "Taylor",
    "Wasserstein",
    # For a signal of one's own
    "Context",
    "Signal",
    "Step",
    "Tally",
]
