"""What an expert is worth: one file a signal, by name in `SIGNALS`."""

from secateur.experts.signals.frequency import Frequency
from secateur.experts.signals.outputchange import OutputChange
from secateur.experts.signals.random import ExpertRandom
from secateur.experts.signals.reap import Reap
from secateur.experts.signals.routerweight import RouterWeight
from secateur.experts.signals.signal import Context, ExpertSignal, ExpertTally
from secateur.experts.signals.specialisation import Specialisation
from secateur.experts.signals.taylor import ExpertTaylor
from secateur.experts.signals.weightnorm import WeightNorm

SIGNALS: dict[str, type[ExpertSignal]] = {
    signal.name: signal
    for signal in (
        Frequency,
        RouterWeight,
        Reap,
        OutputChange,
        Specialisation,
        ExpertTaylor,
        WeightNorm,
        ExpertRandom,
    )
}

__all__ = ["SIGNALS", "Context", "ExpertSignal", "ExpertTally"]
