"""Random numbers that several forward passes share, so that what they compute can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.calibration.randomness import seeded

_PLAIN = {
    "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "normal_functional", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "random", "uniform",
}  # fmt: skip
"""Operators whose numbers depend on shapes and settings only, where no setting is a tensor."""


class Draws:
    """The random numbers of a forward pass, for other passes to draw again.

    The first pass draws from a fixed seed. Each later one gets the same numbers, call by call. Where two
    passes draw tensors of different sizes, as a pruned and a dense model do, both get numbers that are
    constant along the axes that differ: two models that agree for all numbers agree for these.

    Attributes:
        narrowed: Whether a pass met a larger or smaller draw than those before it, which therefore drew other
            numbers and have to be run again.
        unlike: What cannot be shared: another operator, rank or number of draws, or other sizes where the
            numbers depend on what the model computed. Empty if all was shared.

    Example:
        >>> draws = Draws()
        >>> with draws.shared():
        ...     small = torch.rand(2, 3)
        >>> with draws.shared():
        ...     large = torch.rand(2, 5)
        >>> bool((large == small[:, :1]).all()), draws.narrowed
        (True, True)
    """

    def __init__(self, seed: int = 0) -> None:
        self.narrowed = False
        self.unlike = ""
        self._seed = seed
        self._known: list[tuple[str, torch.Tensor]] = []
        self._position = 0
        self._recorded = False

    @property
    def count(self) -> int:
        """Number of draws in a pass."""
        return len(self._known)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """One forward pass; the global random state is as before afterwards."""
        self._position = 0
        with seeded(self._seed), _Drawing(self):
            yield
        if self._position != len(self._known):
            self._differ(f"{len(self._known)} draws and {self._position}")
        self._recorded = True

    def same(self, name: str, fresh: torch.Tensor, *, fixed: bool = False) -> torch.Tensor:
        """What this pass gets instead of its `fresh` numbers; `fixed`: no other size will do."""
        self._position += 1
        if not self._recorded:
            self._known.append((name, fresh.clone()))
            return fresh
        if self._position > len(self._known):
            return fresh
        before, known = self._known[self._position - 1]
        if before != name or known.ndim != fresh.ndim or (fixed and known.shape != fresh.shape):
            self._differ(f"{before} {list(known.shape)} and {name} {list(fresh.shape)}")
            return fresh
        for axis, size in enumerate(fresh.shape):
            if known.shape[axis] not in (1, size):
                known = known.narrow(axis, 0, 1)
                self.narrowed = True
        self._known[self._position - 1] = name, known
        return fresh.copy_(known)

    def restart(self, name: str, shape: torch.Size) -> None:
        """Starts the generator from what all passes share, for numbers that depend on computed values."""
        torch.manual_seed(self._seed + 1 + self._position)
        self.same(name, torch.zeros(shape, dtype=torch.bool), fixed=True)

    def _differ(self, what: str) -> None:
        self.unlike = self.unlike or what


class _Drawing(TorchDispatchMode):
    """Hands the numbers of every random operator to `Draws`."""

    def __init__(self, draws: Draws) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        expected = func._schema.arguments
        given = {a.name: a.default_value for a in expected if a.has_default_value()}
        given |= dict(zip((a.name for a in expected), args, strict=False)) | kwargs
        if _draws_nothing(given):
            return func(*args, **kwargs)
        # A model's own generator has a state that no other pass shares.
        args, kwargs = pytree.tree_map_only(torch.Generator, lambda _: None, (args, kwargs))
        name = func._schema.name.removeprefix("aten::")
        kind, in_place = name.removesuffix("_"), name.endswith("_")
        settings = [v for k, v in given.items() if isinstance(v, torch.Tensor) and k != "self"]
        if kind == "normal" and settings:
            return _normal(self._draws, given["mean"], given["std"])
        if kind == "bernoulli" and not isinstance(given.get("p"), int | float):
            drawn = _bernoulli(self._draws, given.get("p", given["self"]))
            return given["self"].copy_(drawn) if in_place else drawn
        if kind == "native_dropout":
            keep = 1 - given["p"]
            mask = _bernoulli(self._draws, torch.full_like(given["input"], keep))
            return given["input"] * mask / (keep or 1.0), mask.bool()
        if kind in _PLAIN and not settings:
            if not in_place:
                return self._draws.same(kind, func(*args, **kwargs))
            fresh = func(torch.empty_like(args[0]), *args[1:], **kwargs)
            return args[0].copy_(self._draws.same(kind, fresh))
        first = next((v for v in given.values() if isinstance(v, torch.Tensor)), torch.zeros(0))
        self._draws.restart(kind, first.shape)
        return func(*args, **kwargs)


def _draws_nothing(given: dict[str, Any]) -> bool:
    """Whether an operator's settings turn off what is random in it: dropout inside attention, for example."""
    return given.get("dropout_p") == 0 or given.get("training") is False or given.get("train") is False


def _normal(draws: Draws, mean: Any, std: Any) -> torch.Tensor:
    like = mean if isinstance(mean, torch.Tensor) else std
    shape = torch.broadcast_shapes(*(v.shape for v in (mean, std) if isinstance(v, torch.Tensor)))
    noise = torch.randn(shape, dtype=like.dtype, device=like.device)
    drawn: torch.Tensor = mean + std * draws.same("normal", noise)
    return drawn


def _bernoulli(draws: Draws, probabilities: torch.Tensor) -> torch.Tensor:
    uniform = draws.same("uniform", torch.rand_like(probabilities))
    return (uniform < probabilities).to(probabilities.dtype)
