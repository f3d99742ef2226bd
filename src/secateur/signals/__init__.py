"""What each unit is worth: signals, and the single pass that gathers them."""

from secateur.signals.scores import Scores
from secateur.signals.scoring import score
from secateur.signals.signal import Context, Signal, Step, SumTally, Tally
from secateur.signals.units.activation import Activation
from secateur.signals.units.apoz import APoZ
from secateur.signals.units.batchnorm_scale import BatchNormScale
from secateur.signals.units.combination import Combination, Product, RankSum
from secateur.signals.units.fisher import Fisher
from secateur.signals.units.fluctuation import Fluctuation
from secateur.signals.units.geometric_median import GeometricMedian
from secateur.signals.units.magnitude import L1, L2, Magnitude
from secateur.signals.units.random import Random
from secateur.signals.units.rank import Rank
from secateur.signals.units.reconstruction import Reconstruction
from secateur.signals.units.snip import Snip
from secateur.signals.units.taylor import Taylor
from secateur.signals.units.taylor_sample import TaylorSample
from secateur.signals.units.wanda import Wanda
from secateur.signals.units.wasserstein import Wasserstein

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
    "Fluctuation",
    "Wanda",
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
