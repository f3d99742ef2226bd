"""What each unit is worth: signals, and the single pass that gathers them."""

from secateur.score.activation import Activation
from secateur.score.apoz import APoZ
from secateur.score.batchnorm_scale import BatchNormScale
from secateur.score.combination import Combination, Product, RankSum
from secateur.score.fisher import Fisher
from secateur.score.geometric_median import GeometricMedian
from secateur.score.magnitude import L1, L2, Magnitude
from secateur.score.random import Random
from secateur.score.rank import Rank
from secateur.score.reconstruction import Reconstruction
from secateur.score.scores import Scores
from secateur.score.scoring import score
from secateur.score.signal import Context, Signal, Step, SumTally, Tally
from secateur.score.snip import Snip
from secateur.score.taylor import Taylor
from secateur.score.taylor_sample import TaylorSample
from secateur.score.wasserstein import Wasserstein

__all__ = [  # noqa: RUF022 grouped by what a reader looks for
    # The verb and its result
    "score",
    "Scores",
    # Signals of the weights
    "Magnitude",
    "L1",
    "L2",
    "BatchNormScale",
    "GeometricMedian",
    "Random",
    # Signals of the activations
    "Wasserstein",
    "Activation",
    "APoZ",
    "Rank",
    "Reconstruction",
    # Signals of the loss
    "Taylor",
    "TaylorSample",
    "Fisher",
    "Snip",
    # Made of other signals
    "Combination",
    "Product",
    "RankSum",
    # For a signal of one's own
    "Context",
    "Signal",
    "Step",
    "SumTally",
    "Tally",
]
