"""One batch of calibration data: the model's arguments, the labels, and the loader's raw batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from secateur.calibration.padding import Padding, running
from secateur.calibration.reading import Reading, fresh
from secateur.calibration.samples import samples_apart
from secateur.errors import CalibrationError, SecateurError

IGNORED = -100
"""Label of a sample without a class. PyTorch's losses ignore it by default."""


def map_tensors(
    change: Callable[[Tensor], Tensor], value: Any, other: Callable[[Any], Any] = lambda value: value
) -> Any:
    """Rebuild nested mappings, lists and tuples, with `change` applied to tensors, `other` to the rest."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(change, v, other) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, v, other) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, v, other) for v in value)
    return other(value)


def held_tensors(value: Any) -> list[Tensor]:
    """The tensors in nested mappings, lists and tuples."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


@dataclass(frozen=True, eq=False)
class Batch:
    """One calibration batch, split into the model's arguments and labels.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model. Labels are among them only if the model cannot run without.
        labels: The labels, if they are a tensor or numbers; else None. [size, ...]
        raw: The batch as the user's loader gave it, on the right device. `loss_fn` receives this.
        size: Number of samples: the length of axis 0 of the first input tensor.
        index: Position of the batch in the pass, for messages.
        reading: The rules by which the raw batch was split.
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
        """Split a raw batch into arguments and labels. `Reading` lists the forms that a raw batch can have.

        Raises:
            CalibrationError: `raw` has none of these forms, holds no tensor, or holds no sample.

        Example:
            >>> batch = Batch.of((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])))
            >>> batch.size, len(batch.args), batch.labels
            (4, 1, tensor([0, 1, 0, 1]))
        """
        where = f"calibration batch {index}"
        reading = reading or Reading()
        taken = reading.take(raw, where)
        tensors = held_tensors((taken.args, taken.kwargs))
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
        """The arguments as example inputs: a mapping of keyword arguments, or a tuple of positional ones."""
        return self.kwargs or self.args

    @property
    def arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The positional and the keyword arguments of the model."""
        return self.args, self.kwargs

    @property
    def padding(self) -> Padding:
        """Which positions are padding, as the masks among the arguments say, by position or by name."""
        return Padding.of(self.reading.named(self.args, self.kwargs))

    def run(self, model: Callable[..., Any], *, labelled: bool = False) -> Any:
        """Call a model on this batch, in the way the user calls it, and return its output.

        Args:
            model: The model, or a function with the same signature.
            labelled: True: also pass labels to a model that computes its own loss.
        """
        with running(self.padding), self._said_if_unlike():
            if self.reading.forward is not None:
                return self.reading.forward(model, fresh(self.raw))
            extra = self.extra if labelled and self.extra is not None else {}
            also = {k: v for k, v in extra.items() if k not in self.kwargs}
            return model(*self.args, **self.kwargs, **also)

    def kinds(self) -> tuple[str, ...]:
        """What the input tensors are, whatever the number of samples: ``float32 [any, 3, 32, 32]``."""
        return tuple(
            f"{str(t.dtype).removeprefix('torch.')} [{', '.join(['any', *map(str, t.shape[1:])])}]"
            for t in held_tensors((self.args, self.kwargs))
        )

    @contextmanager
    def _said_if_unlike(self) -> Iterator[None]:
        """Say of what a model raises that the batch differs from the first one, if it does.

        Raises:
            CalibrationError: It does.
        """
        try:
            yield
        except SecateurError:
            raise
        except Exception as error:
            wanted, got = self.reading.kinds, self.kinds()
            if wanted is None or wanted == got:
                raise  # the user's own
            raise CalibrationError(
                f"calibration batch {self.index}: expected inputs like those of the first batch, "
                f"{', '.join(wanted)[:120]}, got {', '.join(got)[:120]}, and the model raised "
                f"{type(error).__name__} ({' '.join(str(error).split())[:120]}). Give batches of one kind."
            ) from error

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`; dtypes stay as they are."""

        def moved(value: Any) -> Any:  # a batch of graphs has its own `to`, which changes it: so copy first
            return copy(value).to(device) if callable(getattr(value, "to", None)) else value

        def plain(tensor: Tensor) -> Tensor:  # autograd refuses tensors made in inference mode: clone those
            return (tensor.clone() if tensor.is_inference() else tensor).to(device)

        raw = map_tensors(plain, self.raw, moved)
        same = all(
            a is b for a, b in zip(pytree.tree_leaves(raw), pytree.tree_leaves(self.raw), strict=False)
        )
        return self if same else Batch.of(raw, self.index, self.reading)

    @property
    def whole(self) -> bool:
        """Whether the batch cannot be cut into samples; see `secateur.calibration.samples`."""
        if self.reading.whole is None:
            self.reading.whole = not samples_apart(self)
        return self.reading.whole

    def cut(self, pieces: int) -> list[Batch]:
        """Cut the batch along axis 0 into at most `pieces` batches of nearly equal size, in order.

        A tensor whose axis 0 is not the number of samples goes to all pieces. A batch that cannot be cut is
        returned alone, unchanged.
        """
        pieces = 1 if self.whole else min(pieces, self.size)
        bounds = [self.size * i // pieces for i in range(pieces + 1)]
        return [self] if pieces == 1 else [self.samples(a, b) for a, b in pairwise(bounds)]

    def first(self, count: int) -> Batch:
        """The first `count` samples. All samples, if there are fewer or the batch cannot be cut."""
        return self if count >= self.size or self.whole else self.samples(0, count)

    def samples(self, start: int, stop: int) -> Batch:
        """Samples `start` to `stop`, as a batch. Tensors without an axis 0 of samples stay whole."""
        raw = self.raw
        if isinstance(raw, list | tuple) and len(raw) > 1 and self.labels is not None:
            raw = (*raw[:-1], self.labels)  # labels given as a list of numbers are cut as a tensor
        part = map_tensors(partial(_part, size=self.size, start=start, stop=stop), raw)
        return Batch.of(part, self.index, self.reading)

    def classes(self) -> Tensor:
        """The class of each sample. One-hot labels are turned into class indices.

        Returns:
            Class indices from 0, and `IGNORED` for samples without a class. int64 [size]

        Raises:
            CalibrationError: There are no labels, or they are neither one class index for each sample nor
                one-hot rows.
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
        """Raise CalibrationError if a floating input holds NaN or infinity, or if an input is not dense."""
        for tensor in held_tensors((self.args, self.kwargs)):
            if tensor.layout is not torch.strided or tensor.is_nested:
                got = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
                raise CalibrationError(
                    f"calibration batch {self.index}: expected dense tensors, got {got}. Wrap the model in a "
                    f"module that takes dense tensors (indices and values, or padded rows and a mask) and "
                    f"builds the other tensor from them."
                )
            if tensor.is_meta:
                raise CalibrationError(
                    f"calibration batch {self.index}: expected inputs that hold numbers, got a tensor on the "
                    "meta device. Make the data outside of torch.device('meta')."
                )
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"calibration batch {self.index}: expected finite inputs, got NaN or infinity in a "
                    f"tensor of shape {list(tensor.shape)}. Clean the data."
                )


def is_soft(labels: Tensor) -> bool:
    """Whether labels are one-hot or soft: no entry is negative, and the entries along axis 1 sum to 1.

    Example:
        >>> is_soft(torch.tensor([[0.0, 1.0], [0.5, 0.5]])), is_soft(torch.tensor([[0.0, 2.0]]))
        (True, False)
    """
    if labels.ndim < 2 or labels.shape[1] < 2 or labels.is_complex() or labels.dtype is torch.bool:
        return False
    total = labels.double().sum(1)
    return bool((labels >= 0).all()) and bool(((total - 1).abs() <= 1e-2).all())


def _part(tensor: Tensor, size: int, start: int, stop: int) -> Tensor:
    """Samples `start` to `stop` of a tensor whose axis 0 has `size` entries; any other tensor unchanged."""
    return tensor[start:stop] if tensor.ndim and len(tensor) == size else tensor


def _kinds(inputs: Any) -> str:
    values = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if isinstance(values, list | tuple):
        return "nothing" if not values else ", ".join(sorted({type(v).__name__ for v in values}))
    return type(inputs).__name__


def _as_tensor(labels: Any) -> Tensor | None:
    """Convert labels given as numbers to a tensor; None if that is impossible, as for a list of boxes."""
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        return None
