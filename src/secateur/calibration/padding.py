"""Which positions of a batch are padding: its masks say so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """The masks of a batch.

    Attributes:
        masks: For each mask, where a position is no padding. bool [samples, positions]
    """

    masks: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Padding:
        """Read the masks among a batch's arguments by name.

        In ``attention_mask``, as Transformers names it, padding is zero; in one of floats that are added to
        scores, it is negative. In ``key_padding_mask``, as PyTorch names it, it is True or minus infinity.
        Prefixes such as ``decoder_`` and ``src_`` are fine. Masks with other than two axes do not count.
        ``lengths`` (integers, one for each sample) say the same: what comes behind them is padding.

        Of a model with a decoder, only one side may have a mask. The other one's inputs have no padding then.
        """
        found: dict[str, Tensor] = {}
        for name, mask in arguments.items():
            if name.endswith(("lengths", "lens")):
                if (real := _within(mask, arguments.values())) is not None:
                    found[name] = real
            elif isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_meta:
                if name.endswith("attention_mask"):
                    found[name] = mask == 0 if _is_added(mask) else mask != 0
                elif name.endswith("key_padding_mask"):
                    found[name] = ~mask if mask.dtype is torch.bool else mask == 0
        if all(bool(real.all()) for real in found.values()):
            return cls()
        sides = {_is_decoder(name) for name in found}
        first = next(iter(found.values()))
        whole = [
            first.new_ones(value.shape[:2])
            for name, value in arguments.items()
            if isinstance(value, Tensor) and value.ndim > 1 and _is_decoder(name) not in sides
        ]
        return cls((*found.values(), *whole))

    def real(
        self, samples: int, positions: int, device: torch.device, *, turned: bool = False
    ) -> Tensor | None:
        """Whether each position of a value is no padding.

        Args:
            samples: Length of the value's first axis. Positions may come first, as inside
                `nn.MultiheadAttention`; where there are as many as samples, they are taken to come second.
            positions: How many positions each sample has. With one, the rows may be the positions of all
                samples, one sample after the other.
            device: Where the result will be.
            turned: Positions come first, for certain; rows go position by position.

        Returns:
            bool [samples, positions]; None if no mask fits, or if two that fit differ: then all count.
        """
        found: Tensor | None = None
        for mask in self.masks:
            plain, other = mask.shape == (samples, positions), mask.t().shape == (samples, positions)
            rows = positions == 1 and mask.numel() == samples
            first = (turned and (other or rows)) or (other and not plain)
            if first or plain or rows:
                real = (mask.t() if first else mask).reshape(samples, positions)
                if found is not None and not torch.equal(found, real):
                    return None
                found = real
        return None if found is None else found.to(device)

    def hide(self, value: Tensor) -> Tensor:
        """Set padding to zero in a value with an axis of positions, [samples, positions, ...]."""
        real = self.real(len(value), value.shape[1], value.device) if value.ndim > 2 else None
        if real is None:
            return value
        return value.masked_fill(~real.reshape(*real.shape, *[1] * (value.ndim - 2)), 0)

    def rows(self, count: int, device: torch.device) -> Tensor:
        """Number those rows of a matrix that are no padding, where rows are positions, sample by sample.

        Args:
            count: How many rows it has.
            device: Where the result will be.

        Returns:
            [rows that are no padding]; all, if no mask fits.
        """
        real = self.real(count, 1, device)
        return torch.arange(count, device=device) if real is None else real.reshape(-1).nonzero()[:, 0]

    def matrix(self, value: Tensor) -> Tensor:
        """Return a value [..., features] as a matrix, a row for each position that is no padding."""
        rows = value.reshape(-1, value.shape[-1])
        return rows if not self.masks else rows[self.rows(len(rows), rows.device)]


def _within(lengths: Any, values: Iterable[Any]) -> Tensor | None:
    """Return which positions of the first value [samples, positions, ...] that fits are within lengths.

    Returns:
        bool [samples, positions]; None if the lengths fit no value.
    """
    if isinstance(lengths, Sequence) and lengths and all(type(n) is int for n in lengths):
        lengths = torch.tensor(lengths)
    if not isinstance(lengths, Tensor) or lengths.is_meta or lengths.is_floating_point() or lengths.ndim != 1:
        return None
    for samples, positions in (v.shape[:2] for v in values if isinstance(v, Tensor) and v.ndim > 1):
        if samples == len(lengths) and 1 <= int(lengths.min()) and int(lengths.max()) <= positions:
            return torch.arange(positions, device=lengths.device) < lengths[:, None]
    return None


def _is_added(mask: Tensor) -> bool:
    """Whether a mask is added to scores: zero, and at padding minus infinity or far below zero."""
    return mask.is_floating_point() and bool((mask < 0).any())


def _is_decoder(name: str) -> bool:
    """Whether an input is the decoder's, by the names of Transformers and PyTorch."""
    return name.startswith(("decoder_", "tgt"))


NO_PADDING = Padding()

_RUNNING: ContextVar[Padding] = ContextVar("padding", default=NO_PADDING)


@contextmanager
def running(padding: Padding) -> Iterator[None]:
    """Inside, the model runs on a batch with this padding; hooks ask `running_padding` for it."""
    token = _RUNNING.set(padding)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def running_padding() -> Padding:
    """Return the padding of the batch that a model runs on just now."""
    return _RUNNING.get()
