"""How far class scores are from the dense ones: the divergence of the classes' probabilities.

A shift of all scores of a position changes no probability, and a language model scores tens of thousands of
words of which few are likely. The squared distance counts all of them alike; the divergence counts what the
model would say.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.nn import functional as F

from secateur.calibration import Batch
from secateur.errors import CalibrationError
from secateur.signals.loss import logits_of

_ENTRIES = 1 << 22
"""Numbers that are compared at a time: the scores of one text may take hundreds of megabytes."""


def divergence(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence KL(wanted || got) of each position, at least in float32.

    Args:
        got: Scores. [..., classes]
        wanted: The dense model's scores; minus infinity excludes a class. [..., classes]

    Returns:
        One number for each position, 0 or more. [...]
    """
    if got.dtype.itemsize < 4:
        got, wanted = got.float(), wanted.float()
    mine, theirs = F.log_softmax(got, -1), F.log_softmax(wanted, -1)
    return (theirs.exp() * (theirs - mine).masked_fill(theirs.isneginf(), 0.0)).sum(-1)


def reads_and_writes_words(inputs: Iterable[object], output: object) -> bool:
    """Whether an output is called `logits` and scores the classes of each token of a text that was given.

    Args:
        inputs: What the model was given. Tokens are whole numbers, [texts, tokens].
        output: What it returned. Its `logits` have [texts, tokens, classes].
    """
    scores = None if isinstance(output, Tensor) else logits_of(output)
    if scores is None or scores.ndim != 3:
        return False
    wanted = [str(size) for size in scores.shape[:2]]  # as text: sizes may be symbols, which are not compared
    texts = (v for v in inputs if isinstance(v, Tensor) and not v.is_floating_point())
    return any([str(size) for size in text.shape] == wanted for text in texts)


def class_scores(output: object) -> Tensor:
    """Return the class scores of an output."""
    scores = logits_of(output)
    if scores is None:
        raise CalibrationError(
            "polish: expected one output, or one called logits, whose divergence can be measured, got "
            f"{type(output).__name__}. Set divergence=False."
        )
    return scores


def diverged(mine: Tensor, theirs: Tensor, batch: Batch) -> list[float]:
    """Return the mean divergence of each sample's positions that are no padding, 0 where all are. [samples]

    Args:
        mine: Class scores of any model. [samples, ..., classes]
        theirs: Those of the dense model.
        batch: What both models were given.
    """
    real = batch.padding.real(len(mine), mine.shape[1], mine.device) if mine.ndim > 2 else None
    found = []
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if real is not None:
            a, b = a[real[number]], b[real[number]]
        a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
        step = max(1, _ENTRIES // a.shape[1])
        pieces = zip(a.split(step), b.split(step), strict=True)
        found.append(sum(float(divergence(*pair).double().sum()) for pair in pieces) / max(1, len(a)))
    return found
