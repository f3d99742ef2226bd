"""What a residual block is worth: one file a signal, by name in `SIGNALS`."""

from secateur.signals.blocks.magnitude import BlockMagnitude
from secateur.signals.blocks.outputchange import BlockOutputChange
from secateur.signals.blocks.random import BlockRandom
from secateur.signals.blocks.signal import BlockSignal, BlockTally, Context
from secateur.signals.blocks.streamchange import StreamChange
from secateur.signals.blocks.streamdistance import StreamDistance
from secateur.signals.blocks.taylor import BlockTaylor

SIGNALS: dict[str, type[BlockSignal]] = {
    signal.name: signal
    for signal in (
        BlockOutputChange,
        StreamChange,
        StreamDistance,
        BlockTaylor,
        BlockMagnitude,
        BlockRandom,
    )
}

__all__ = ["SIGNALS", "BlockSignal", "BlockTally", "Context"]
