"""One batch: what the model takes, its labels, and what the loader gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.calibration.reading import Reading, fresh
from secateur.calibration.samples import samples_apart
from secateur.errors import CalibrationError

IGNORED = -100
"""The label of what has no class: what PyTorch's losses ignore by default."""


def map_tensors(
    change: Callable[[Tensor], Tensor], value: Any, other: Callable[[Any], Any] = lambda value: value
) -> Any:
    """Apply `change` to every tensor in nested mappings, lists and tuples, and `other` to all else there."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(change, v, other) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, v, other) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, v, other) for v in value)
    return other(value)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


@dataclass(frozen=True, eq=False)
class Batch:
    """One calibration batch, taken apart.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model; labels only where it cannot run without.
        labels: What the batch says the model should have answered, if it is a tensor. [size, ...]
        raw: What the user's loader gave, on the right device; `loss_fn` receives this.
        size: Number of samples: axis 0 of the first input tensor.
        index: Position of the batch in the pass, for messages.
        reading: How it was taken apart.
        extra: Labels as a keyword argument, for a model that computes its own loss.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None
    raw: Any
    size: int
    index: int = 0
    reading: Reading = field(default_factory=Reading)
    extra: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, raw: Any, index: int = 0, reading: Reading | None = None) -> Batch:
        """Take `raw` apart; `Reading` says what it may be.

        Raises:
            CalibrationError: `raw` is none of these, holds no tensor, or holds no sample.

        Example:
            >>> batch = Batch.of((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])))
            >>> batch.size, len(batch.args), batch.labels
            (4, 1, tensor([0, 1, 0, 1]))
        """
        where = f"calibration batch {index}"
        reading = reading or Reading()
        taken = reading.take(raw, where)
        tensors = _tensors((taken.args, taken.kwargs))
        if not tensors:
            given = taken.kwargs or taken.args
            raise CalibrationError(
                f"{where}: expected inputs that are tensors, got {_kinds(given)}. Convert them, for "
                "instance in the loader's collate_fn."
            )
        if tensors[0].ndim == 0 or len(tensors[0]) == 0:
            raise CalibrationError(
                f"{where}: expected inputs with at least one sample along axis 0, got shape "
                f"{list(tensors[0].shape)}. Put samples along axis 0."
            )
        labels = taken.labels
        if labels is not None and not isinstance(labels, Tensor):
            labels = _as_tensor(labels)
        return cls(taken.args, taken.kwargs, labels, raw, len(tensors[0]), index, reading, taken.extra)

    @property
    def inputs(self) -> Any:
        """The arguments as example inputs: a mapping of keyword ones, or a tuple of positional ones."""
        return self.kwargs or self.args

    def run(self, model: Callable[..., Any], *, labelled: bool = False) -> Any:
        """What a model gives on this batch, called the way the user calls it.

        Args:
            model: The model, or what stands in for it.
            labelled: Also give labels to a model that computes its own loss.
        """
        if self.reading.forward is not None:
            return self.reading.forward(model, fresh(self.raw))
        extra = self.extra if labelled and self.extra is not None else {}
        return model(*self.args, **self.kwargs, **{k: v for k, v in extra.items() if k not in self.kwargs})

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`; dtypes stay as they are."""

        def moved(value: Any) -> Any:  # a batch of graphs moves itself, and in place
            return copy(value).to(device) if callable(getattr(value, "to", None)) else value

        def plain(tensor: Tensor) -> Tensor:  # one made in inference mode serves no gradient
            return (tensor.clone() if tensor.is_inference() else tensor).to(device)

        raw = map_tensors(plain, self.raw, moved)
        same = all(
            a is b for a, b in zip(pytree.tree_leaves(raw), pytree.tree_leaves(self.raw), strict=False)
        )
        return self if same else Batch.of(raw, self.index, self.reading)

    @property
    def whole(self) -> bool:
        """Whether it cannot be cut into samples (`secateur.calibration.samples`)."""
        if self.reading.whole is None:
            self.reading.whole = not samples_apart(self)
        return self.reading.whole

    def cut(self, pieces: int) -> list[Batch]:
        """Cut along axis 0 into at most `pieces` batches of nearly equal size, in order.

        Tensors whose axis 0 is not the number of samples are shared by all pieces. A batch that cannot be cut
        comes back as it is.
        """
        pieces = 1 if self.whole else min(pieces, self.size)
        bounds = [self.size * i // pieces for i in range(pieces + 1)]
        return [self] if pieces == 1 else [self.samples(a, b) for a, b in pairwise(bounds)]

    def first(self, count: int) -> Batch:
        """The first `count` samples, or all where there are fewer or the batch cannot be cut."""
        return self if count >= self.size or self.whole else self.samples(0, count)

    def samples(self, start: int, stop: int) -> Batch:
        """Some of the samples; tensors whose axis 0 is not the number of samples stay as they are."""
        raw = self.raw
        if isinstance(raw, list | tuple) and len(raw) == 2 and self.labels is not None:
            raw = (raw[0], self.labels)  # which may have come as a list of numbers
        part = map_tensors(partial(_part, size=self.size, start=start, stop=stop), raw)
        return Batch.of(part, self.index, self.reading)

    def classes(self) -> Tensor:
        """The class of each sample, `IGNORED` for samples without one.

        Returns:
            int64 [size]

        Raises:
            CalibrationError: There are no labels, or they are neither one integer a sample, `IGNORED` or from
                0, nor one-hot.
        """
        where = f"calibration batch {self.index}"
        labels = self.labels
        if labels is None:
            raise CalibrationError(
                f"{where}: expected labels, one class a sample, got none. Pass batches (inputs, labels)."
            )
        if labels.ndim == 2 and len(labels) == self.size and is_soft(labels):
            if bool((labels.max(1).values != 1).any()):
                raise CalibrationError(
                    f"{where}: expected one class a sample, got soft labels {list(labels.shape)}. "
                    "Pass the index of each sample's class."
                )
            return labels.argmax(1)
        if labels.is_floating_point() or labels.is_complex():
            raise CalibrationError(
                f"{where}: expected integer labels, got {labels.dtype}. "
                "Pass the index of each sample's class."
            )
        if labels.ndim != 1:
            raise CalibrationError(
                f"{where}: expected labels [{self.size}], one class a sample, got shape "
                f"{list(labels.shape)}. "
                "Pass the index of each sample's class."
            )
        if len(labels) != self.size:
            raise CalibrationError(
                f"{where}: expected {self.size} labels, one a sample, got {len(labels)}. "
                "Check that inputs and labels belong together."
            )
        labels = labels.long()
        wrong = labels[(labels < 0) & (labels != IGNORED)]
        if len(wrong):
            raise CalibrationError(
                f"{where}: expected labels from 0, got label {int(wrong.min())}. "
                f"Leave samples without a class out, or label them {IGNORED}."
            )
        return labels

    def check_finite(self) -> None:
        """Raise CalibrationError if a floating input holds NaN or infinity."""
        for tensor in _tensors((self.args, self.kwargs)):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"calibration batch {self.index}: expected finite inputs, got NaN or infinity in a "
                    f"tensor of shape {list(tensor.shape)}. Clean the data."
                )


def is_soft(labels: Tensor) -> bool:
    """Whether labels are one-hot or soft: along axis 1 they add up to one, and none is negative.

    Example:
        >>> is_soft(torch.tensor([[0.0, 1.0], [0.5, 0.5]])), is_soft(torch.tensor([[0.0, 2.0]]))
        (True, False)
    """
    if labels.ndim < 2 or labels.shape[1] < 2 or labels.is_complex() or labels.dtype is torch.bool:
        return False
    total = labels.double().sum(1)
    return bool((labels >= 0).all()) and bool(((total - 1).abs() <= 1e-2).all())


def _part(tensor: Tensor, size: int, start: int, stop: int) -> Tensor:
    """Some samples of a tensor that has them along axis 0; any other as it is."""
    return tensor[start:stop] if tensor.ndim and len(tensor) == size else tensor


def _kinds(inputs: Any) -> str:
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if isinstance(values, list | tuple):
        return "nothing" if not values else ", ".join(sorted({type(v).__name__ for v in values}))
    return type(inputs).__name__


def _as_tensor(labels: Any) -> Tensor | None:
    """Labels given as numbers; None for what is no tensor at heart, such as a list of boxes."""
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
