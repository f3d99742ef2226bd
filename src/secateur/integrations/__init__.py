"""Gradual pruning during training, with the user's own training loop or trainer.

The core (`Schedule`, `GradualPruner`, `shape_state`, `reshape`) needs only PyTorch. Each framework has a
module of its own, which imports it: `secateur.integrations.huggingface` and
`secateur.integrations.lightning`.
"""

from secateur.integrations.pruner import GradualPruner, Round
from secateur.integrations.schedule import Schedule
from secateur.integrations.shapes import read_shape, reshape, shape_state, write_shape

__all__ = ["GradualPruner", "Round", "Schedule", "read_shape", "reshape", "shape_state", "write_shape"]
