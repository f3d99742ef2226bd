"""What an expert is worth: one file a signal, by name in `SIGNALS`."""

from secateur.signals.experts.frequency import Frequency
from secateur.signals.experts.outputchange import OutputChange
from secateur.signals.experts.random import ExpertRandom
from secateur.signals.experts.reap import Reap
from secateur.signals.experts.routerweight import RouterWeight
from secateur.signals.experts.signal import Context, ExpertSignal, ExpertTally
from secateur.signals.experts.specialisation import Specialisation
from secateur.signals.experts.taylor import ExpertTaylor
from secateur.signals.experts.weightnorm import WeightNorm

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
