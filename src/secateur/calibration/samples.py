"""Find out whether a batch can be cut into samples that do not depend on each other.

Some batches must stay whole: boxes for a detector, the nodes and edges of a graph, pairs that a loss
compares. Equal lengths of axis 0 are no proof. So the model runs on a few samples, and again on the first
half of them. If samples are independent, the first half gets the same outputs both times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.models import device_of, evaluating, named_tensors
from secateur.common.outputs import close, tensors_of

if TYPE_CHECKING:
    from secateur.calibration.batch import Batch

FEW = 4
"""Number of samples in the test run. The first half of them runs again alone."""


@torch.no_grad()
def samples_apart(batch: Batch) -> bool:
    """Whether batches like this one can be cut into independent samples, as far as a test run shows."""
    raw = batch.raw
    if isinstance(raw, list | tuple) and batch.labels is None and _ends_with_labels(batch, raw):
        return False  # labels that are no tensor: boxes, or a text for each sample
    if batch.labels is not None and (batch.labels.ndim == 0 or len(batch.labels) != batch.size):
        return False
    if not isinstance(raw, Tensor | list | tuple) and not hasattr(raw, "items"):
        return False  # an object of the user's own class, for example a batch of graphs
    inputs = [v for v in pytree.tree_leaves((batch.args, batch.kwargs)) if isinstance(v, Tensor) and v.ndim]
    alike = all(len(v) == batch.size for v in inputs)
    model = batch.reading.model
    if model is None or batch.size < 2 or any(t.is_meta for t in named_tensors(model).values()):
        return alike or model is None
    few = min(FEW, batch.size)
    part = batch.samples(0, few)
    with evaluating(model):
        try:
            together, alone = (_outputs(b, model) for b in (part, part.samples(0, few // 2)))
        except Exception:  # a user's forward may fail in any way, for example on an index that was cut off
            return False
        pairs = [
            (a[: len(b)], b)
            for a, b in zip(together, alone, strict=False)
            if a.ndim and b.ndim and len(a) * (few // 2) == len(b) * few and a.shape[1:] == b.shape[1:]
        ]
        if not pairs:
            return alike
        if all(close(a, b) for a, b in pairs):
            return True
        # Outputs can also differ because the model draws random numbers. Then the test proves nothing.
        again = _outputs(part, model, seed=1)
        drawn = any(not close(a, b) for a, b in zip(together, again, strict=True) if a.shape == b.shape)
        return alike and drawn


def _ends_with_labels(batch: Batch, raw: Sequence[Any]) -> bool:
    """Whether the last entry is something else than an argument of the model."""
    if len(raw) < 2 or raw[-1] is None or (len(raw) > 2 and batch.reading.forward is not None):
        return False
    return not any(raw[-1] is argument for argument in batch.args)


def _outputs(batch: Batch, model: Any, seed: int = 0) -> list[Tensor]:
    device = device_of(model)
    with seeded(seed):
        found = batch.to(device).run(model)
    return [v for v in tensors_of(found) if v.is_floating_point()]
