"""One batch: what the model takes, its labels, and what the loader gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CalibrationError

LABEL_KEYS = ("labels", "label")
"""Keys of a mapping batch that hold its labels, in order of preference."""


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply `change` to every tensor in nested mappings, lists and tuples; leave the rest alone."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {k: map_tensors(change, v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(change, v) for v in value))
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, v) for v in value)
    return value


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
        kwargs: Keyword arguments of the model.
        labels: What the batch says the model should have answered, if it is a tensor. [size, ...]
        raw: What the user's loader gave, on the right device; `loss_fn` receives this.
        size: Number of samples: axis 0 of the first input tensor.
        index: Position of the batch in the pass, for messages.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None
    raw: Any
    size: int
    index: int = 0

    @classmethod
    def of(cls, raw: Any, index: int = 0) -> Batch:
        """Take `raw` apart.

        A tensor is the input. ``(inputs, labels)`` and ``(inputs,)`` hold the input first; `inputs` may be
        a list or tuple (several positional arguments) or a mapping (keyword arguments). A mapping holds
        keyword arguments, and its labels under ``labels`` or ``label``: ``labels`` also stays an argument,
        because models of that kind compute their loss from it, while ``label`` does not.

        Raises:
            CalibrationError: `raw` is none of these, holds no tensor, or holds no sample.

        Example:
            >>> batch = Batch.of((torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])))
            >>> batch.size, len(batch.args), batch.labels
            (4, 1, tensor([0, 1, 0, 1]))
        """
        where = f"calibration batch {index}"
        inputs: Any
        labels: Any = None
        if isinstance(raw, Mapping):
            inputs = {k: v for k, v in raw.items() if k != "label"}
            labels = next((raw[k] for k in LABEL_KEYS if k in raw), None)
        elif isinstance(raw, Tensor):
            inputs = (raw,)
        elif isinstance(raw, list | tuple) and len(raw) in (1, 2):
            inputs = raw[0]
            labels = raw[1] if len(raw) == 2 else None
        else:
            got = (
                f"{type(raw).__name__} of {len(raw)}" if isinstance(raw, list | tuple) else type(raw).__name__
            )
            raise CalibrationError(
                f"{where}: expected (inputs, labels), (inputs,), a tensor or a mapping, got {got}. "
                "Do wrap several inputs in a tuple of their own: ((a, b), labels)."
            )
        args: tuple[Any, ...]
        kwargs: Mapping[str, Any]
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        elif isinstance(inputs, list | tuple):
            args, kwargs = tuple(inputs), {}
        else:
            args, kwargs = (inputs,), {}
        tensors = _tensors((args, {k: v for k, v in kwargs.items() if k not in LABEL_KEYS}))
        if not tensors:
            raise CalibrationError(
                f"{where}: expected inputs that are tensors, got {_kinds(inputs)}. Do convert them, for "
                "instance in the loader's collate_fn."
            )
        if tensors[0].ndim == 0 or len(tensors[0]) == 0:
            raise CalibrationError(
                f"{where}: expected inputs with at least one sample along axis 0, got shape "
                f"{list(tensors[0].shape)}. Do put samples along axis 0."
            )
        if labels is not None and not isinstance(labels, Tensor):
            labels = _as_tensor(labels)
        return cls(args, kwargs, labels, raw, len(tensors[0]), index)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`; dtypes stay as they are."""
        if all(t.device == torch.device(device) for t in _tensors(self.raw)):
            return self
        return Batch.of(map_tensors(lambda t: t.to(device), self.raw), self.index)

    def cut(self, pieces: int) -> list[Batch]:
        """Cut along axis 0 into at most `pieces` batches of nearly equal size, in order.

        Tensors whose axis 0 is not the number of samples are shared by all pieces.
        """
        pieces = min(pieces, self.size)
        bounds = [self.size * i // pieces for i in range(pieces + 1)]
        return [
            Batch.of(map_tensors(partial(_part, size=self.size, start=a, stop=b), self.raw), self.index)
            for a, b in pairwise(bounds)
        ]

    def first(self, count: int) -> Batch:
        """The first `count` samples, or all where there are fewer."""
        part = partial(_part, size=self.size, start=0, stop=count)
        return Batch.of(map_tensors(part, self.raw), self.index)

    def classes(self) -> Tensor:
        """The class of each sample.

        Returns:
            int64 [size]

        Raises:
            CalibrationError: There are no labels, or they are not one non-negative integer a sample.
        """
        where = f"calibration batch {self.index}"
        labels = self.labels
        if labels is None:
            raise CalibrationError(
                f"{where}: expected labels, one class a sample, got none. Do give batches (inputs, labels)."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise CalibrationError(
                f"{where}: expected integer labels, got {labels.dtype}. "
                "Do give the index of each sample's class."
            )
        if labels.ndim != 1:
            raise CalibrationError(
                f"{where}: expected labels [{self.size}], one class a sample, got shape "
                f"{list(labels.shape)}. "
                "Do give the index of each sample's class."
            )
        if len(labels) != self.size:
            raise CalibrationError(
                f"{where}: expected {self.size} labels, one a sample, got {len(labels)}. "
                "Do check that inputs and labels belong together."
            )
        labels = labels.long()
        if int(labels.min()) < 0:
            raise CalibrationError(
                f"{where}: expected labels from 0, got label {int(labels.min())}. "
                "Do leave samples without a class out."
            )
        return labels

    def check_finite(self) -> None:
        """Raise CalibrationError if a floating input holds NaN or infinity."""
        for tensor in _tensors((self.args, self.kwargs)):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CalibrationError(
                    f"calibration batch {self.index}: expected finite inputs, got NaN or infinity in a "
                    f"tensor of shape {list(tensor.shape)}. Do clean the data."
                )


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
