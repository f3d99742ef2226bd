"""Random numbers that several forward passes share, so that their outputs can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.calibration.randomness import generator_states, seeded
from secateur.graph.binding import all_by_name
from secateur.graph.nodes import draws_nothing
from secateur.targets.units.doubling import (
    Operators,
    all_double,
    calls_in_double,
    converted,
    names_shorter,
)

_PLAIN = {
    "bernoulli", "cauchy", "exponential", "geometric", "log_normal", "normal", "normal_functional", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "random", "uniform",
}  # fmt: skip
"""Operators whose random numbers depend only on shapes and settings, if no setting is a tensor."""


class Draws:
    """The random numbers of a forward pass, which later passes get again.

    The first pass draws from a fixed seed. Each later pass gets the same numbers, call by call. A pruned
    model and a dense one draw tensors of different sizes. Along the axes that differ, both then get one
    number for all positions. Two models that compute the same for all random numbers also do for these.

    Attributes:
        narrowed: Whether a pass drew a tensor of another size than an earlier pass. The earlier pass then had
            other numbers, and has to be run again.
        seed: The seed of the first pass.
        operators: What each operator needs; all passes that get this object use it.
        cast: Whether a pass in float64 cast to a shorter dtype outside of its Python code, as a scripted
            function does, or by an argument that is no dtype.
        unlike: What could not be shared, in words: two passes drew with different operators, ranks or numbers
            of draws, or with different sizes although the numbers depend on computed values. Empty if all
            was shared.

    Example:
        >>> draws = Draws()
        >>> with draws.shared():
        ...     small = torch.rand(2, 3)
        >>> with draws.shared():
        ...     large = torch.rand(2, 5)
        >>> bool((large == small[:, :1]).all()), draws.narrowed
        (True, True)
    """

    def __init__(self, seed: int = 0, operators: Operators | None = None) -> None:
        self.narrowed = False
        self.operators = Operators() if operators is None else operators
        self.cast = False
        self.unlike = ""
        self.seed = seed
        self._drawn: list[tuple[str, torch.Tensor]] = []  # by draw: the operator, and the shared numbers
        self._position = 0
        self._recorded = False

    @property
    def count(self) -> int:
        """The number of draws in a pass."""
        return len(self._drawn)

    @contextmanager
    def shared(self, *, double: bool = False) -> Iterator[None]:
        """Inside, run one forward pass. The global random state is restored afterwards.

        With `double`, operators get float64 wherever the model names a shorter dtype.
        """
        self._position = 0
        with (
            seeded(self.seed),
            calls_in_double() if double else nullcontext(),
            _Drawing(self, double=double),
        ):
            yield
        if self._position != len(self._drawn):
            self._differ(f"{len(self._drawn)} draws and {self._position}")
        self._recorded = True

    def in_double(self) -> AbstractContextManager[None]:
        """Inside, operators get float64 wherever a backward pass names a shorter dtype."""
        return all_double(self.operators)

    def same(self, name: str, fresh: torch.Tensor, *, fixed: bool = False) -> torch.Tensor:
        """Return the shared numbers for a draw.

        Args:
            name: The operator.
            fresh: The numbers that this pass drew. They are used in the first pass.
            fixed: Whether the sizes have to be the same in all passes.
        """
        self._position += 1
        if not self._recorded:
            self._drawn.append((name, fresh.clone()))
            return fresh
        if self._position > len(self._drawn):
            return fresh
        before, shared = self._drawn[self._position - 1]
        if before != name or shared.ndim != fresh.ndim or (fixed and shared.shape != fresh.shape):
            self._differ(f"{before} {list(shared.shape)} and {name} {list(fresh.shape)}")
            return fresh
        for axis, size in enumerate(fresh.shape):
            if shared.shape[axis] not in (1, size):
                shared = shared.narrow(axis, 0, 1)
                self.narrowed = True
        self._drawn[self._position - 1] = name, shared
        return fresh.copy_(shared)

    def restart(self, name: str, shape: torch.Size) -> None:
        """Seed the generator in the same way in all passes, for a draw that depends on computed values."""
        torch.manual_seed(self.seed + 1 + self._position)
        self.same(name, torch.zeros(shape, dtype=torch.bool), fixed=True)

    def _differ(self, what: str) -> None:
        """Note the first difference."""
        self.unlike = self.unlike or what


class NoDraws:
    """A far cheaper substitute for `Draws`, for passes in float64 that draw nothing. It notes if one draws.

    Nothing watches the operators. So each pass gets the numbers of the seed, whatever its sizes, and casts
    outside of Python code stay. A watched pass has shown before that the model does neither.

    Attributes:
        drew: Whether a pass drew random numbers.
        watched: The `Draws` for passes that draw.
        narrowed: False, as nothing has to be shared.
        unlike: Empty, for the same reason.
    """

    narrowed = False
    unlike = ""

    def __init__(self, watched: Draws) -> None:
        self.drew = False
        self.watched = watched

    @contextmanager
    def shared(self, *, double: bool = True) -> Iterator[None]:
        """As `Draws.shared`."""
        with seeded(self.watched.seed), calls_in_double() if double else nullcontext():
            before = generator_states()
            yield
            self.drew |= not all(map(torch.equal, before, generator_states()))

    def in_double(self) -> AbstractContextManager[None]:
        """As `Draws.in_double`."""
        return calls_in_double()


AnyDraws = Draws | NoDraws


class _Drawing(TorchDispatchMode):
    """Inside, every random operator gets its numbers from `Draws`."""

    def __init__(self, draws: Draws, *, double: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws, self._double, self._operators = draws, double, draws.operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        need, kwargs = self._operators[func], kwargs or {}
        if need is None:
            return func(*args, **kwargs)
        if self._double:
            self._draws.cast |= names_shorter(args, kwargs)
            func, args, kwargs = converted(func, args, kwargs)
        if not need.random:
            return func(*args, **kwargs)
        given = all_by_name(func, args, kwargs)
        if draws_nothing(given):
            return func(*args, **kwargs)
        # The state of a model's own generator is not shared between passes, so it is not used.
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


def _normal(draws: Draws, mean: Any, std: Any) -> torch.Tensor:
    like = mean if isinstance(mean, torch.Tensor) else std
    shape = torch.broadcast_shapes(*(v.shape for v in (mean, std) if isinstance(v, torch.Tensor)))
    noise = torch.randn(shape, dtype=like.dtype, device=like.device)
    drawn: torch.Tensor = mean + std * draws.same("normal", noise)
    return drawn


def _bernoulli(draws: Draws, probabilities: torch.Tensor) -> torch.Tensor:
    uniform = draws.same("uniform", torch.rand_like(probabilities))
    return (uniform < probabilities).to(probabilities.dtype)
