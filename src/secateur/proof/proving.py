"""Comparisons of a pruned model with what it has to equal, and the words for one that fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.common.foreign import said
from secateur.common.models import named_tensors
from secateur.common.outputs import is_finite_somewhere
from secateur.errors import ArtefactError, InputError, VerificationError
from secateur.plan import Plan
from secateur.proof.diagnosis import Compared, Pair, cause, first_module, nudged
from secateur.proof.exercised import gradients
from secateur.targets.units.compare import (
    PLAIN,
    Double,
    Way,
    largest,
    relative_difference,
    run_both,
    run_in_double,
)
from secateur.targets.units.doubling import Operators
from secateur.targets.units.draws import AnyDraws, Draws, NoDraws
from secateur.targets.units.record import record_of
from secateur.targets.units.tensors import cut, removed_positions

ArgumentSet = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A title that gives the sizes, positional and keyword arguments."""

ROUGHER = 1e3
"""So many times larger than that of outputs is the tolerance of gradients."""
NUDGES = 4
"""Random changes of the last digits, which may show that a gradient hangs on these (a ReLU at zero)."""

Buffers = dict[str, torch.Tensor]
"""What a pass leaves in buffers, by name."""

Gradients = Mapping[str, torch.Tensor | None]
"""By name of the parameter; None where none reached it."""


class Comparisons:
    """Comparisons of a pruned model with its reference, and what they have shown so far.

    Attributes:
        reference: ``masked`` or ``graph``.
        sizes: Titles of the argument sets on which both agree, in evaluation mode and with their own weights.
        refused: Why the last set that was left out says nothing: what the dense model said, or that it
            returned no finite number.
        program_refused: Titles of sets that the dense model takes, and a captured program refuses.
        worst: The largest difference so far.
    """

    def __init__(self, plan: Plan, tolerance: float, reference: str) -> None:
        self.reference = reference
        self.sizes: list[str] = []
        self.refused = ""
        self.program_refused: list[str] = []
        self.worst = 0.0
        self._plan, self._tolerance = plan, tolerance
        self._seen: list[list[tuple[float, float]]] = []
        self._operators = Operators()
        self._quick: set[Way] = set()  # in which no operator has to be watched

    def compare(
        self,
        pair: Pair,
        arguments: ArgumentSet,
        way: Way = PLAIN,
        *,
        only_here: Sequence[str] = (),
        seed: int = 0,
    ) -> AnyDraws | None:
        """Compares on one argument set. In training mode buffers are compared too, such as running means.

        Args:
            pair: The models.
            arguments: The argument set.
            way: How both are run.
            only_here: Parameters that evaluation does not read.
            seed: Of random numbers in the forward pass.

        Returns:
            These random numbers; None where the dense model does not run or returns no finite number, where
            training mode draws numbers that two models cannot share, or where weights other than the user's
            differ by no more than rounding does.

        Raises:
            VerificationError: If the two differ, or only the pruned model fails.
        """
        title, args, kwargs = arguments
        title += str(way) if pair.own_weights else " with random numbers added to all weights"
        try:
            left: tuple[Buffers, Buffers] = ({}, {})
            draws, got, wanted = self._run_both(pair, args, kwargs, seed, way, left)
            if way.training and draws.unlike:
                return None
        except Exception as error:  # a user's forward may fail in any way
            try:
                run_in_double(pair.reference, args, kwargs, Draws(seed), way)
            except Exception as refused:
                self.refused = f"{title}: {said(refused)}"
                return None
            if way.answer is not None and isinstance(error, InputError):  # which no values may lead to
                return None
            if self.sizes and is_program(pair.small):  # it may say no, as long as it says so
                if title not in self.program_refused:
                    self.program_refused.append(title)
                return None
            unread = f", where {listed(only_here)} are read" if only_here else ""
            raise VerificationError(
                f"verify: expected the pruned {type(pair.model).__name__} to run where the dense one does, "
                f"got {said(error)} at {title}{unread}. A size in its code, or a tensor that its trace "
                f"did not see, did not follow. Leave out the group that the error names, with "
                f"limits=sc.Limits(ignore=...), and report this as a bug."
            ) from error
        difference = relative_difference(got, wanted)
        found = Compared(pair, self._plan, args, kwargs, draws, difference, way)
        if not found.difference <= self._tolerance:
            if not pair.own_weights and found.rounding():
                return None
            raise VerificationError(self._message(found, title, got, wanted))
        if not is_finite_somewhere(wanted):
            self.refused = f"outputs that are not finite at {title}"
            return None
        self._compare_buffers(pair, title, *left)
        self.worst = max(self.worst, found.difference)
        if pair.own_weights and way == PLAIN and title not in self.sizes:
            self.sizes.append(title)
        self._seen.append([_extremes(t) for t in wanted])
        return draws

    def _run_both(
        self,
        pair: Pair,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        seed: int,
        way: Way,
        left: tuple[Buffers, Buffers],
    ) -> tuple[AnyDraws, list[torch.Tensor], list[torch.Tensor]]:
        """The random numbers, and what both return.

        Where a watched pass of the pruned model neither draws nor casts below Python code, the later ones of
        the same way are not watched. Where these fail, differ or draw, they are; and where that fails or
        differs, new copies run.

        In training mode, `left` takes what the passes leave in the buffers of both.

        Raises:
            Exception: Whatever a forward pass raises.
        """
        mine, other = left if way.training else (None, None)
        ours = partial(pair.ours.run, way=way, buffers=mine)
        theirs = partial(pair.theirs.run, way=way, buffers=other)
        draws = Draws(seed, self._operators)
        unwatched = NoDraws(draws)
        with suppress(Exception):
            got = ours(args, kwargs, unwatched if way in self._quick else draws)
            if not (draws.count or draws.cast):
                wanted = theirs(args, kwargs, unwatched)
                if not unwatched.drew and relative_difference(got, wanted) <= self._tolerance:
                    self._quick.add(way)
                    return unwatched, got, wanted
                got = ours(args, kwargs, draws)
            wanted = theirs(args, kwargs, draws)
            if draws.narrowed:
                got = ours(args, kwargs, draws)
            if relative_difference(got, wanted) <= self._tolerance:
                return draws, got, wanted
        draws = Draws(seed, self._operators)
        ours = partial(run_in_double, pair.small, way=way, buffers=mine)
        theirs = partial(run_in_double, pair.reference, way=way, buffers=other)
        got, wanted = run_both(ours, theirs, args, kwargs, draws)
        return draws, got, wanted

    def _compare_buffers(self, pair: Pair, title: str, ours: Buffers, theirs: Buffers) -> None:
        """Compares what one pass in training mode left in the buffers of both models.

        One that no state dict holds may be made by the pass, of units that the plan does not know in it.

        Raises:
            VerificationError: If they differ.
        """
        removed, held = removed_positions(self._plan), named_tensors(pair.small) if ours else {}
        for name, buffer in ours.items():
            wanted = theirs.get(name)
            if wanted is None:
                continue
            if wanted.shape != buffer.shape:
                wanted = cut(wanted, removed.get(name, {}))
            if wanted.shape != buffer.shape and name not in held:
                continue
            difference = relative_difference([buffer], [wanted])
            if not difference <= ROUGHER * self._tolerance:
                raise VerificationError(
                    f"verify: expected training to leave in buffer {name} of the pruned "
                    f"{type(pair.model).__name__} what it leaves in the masked dense one, got a relative "
                    f"difference of {difference:.3g} at {title}. What updates it mixes or counts units. Let "
                    f"it treat each unit by itself, or leave out the group with limits=sc.Limits(ignore=...)."
                )

    def compare_gradients(
        self, pair: Pair, arguments: ArgumentSet, draws: AnyDraws, ours: Gradients, way: Way = PLAIN
    ) -> bool:
        """Compares gradients of the pruned model, which a backward pass gave, with those of the reference.

        Two models that agree for all weights have the same gradients, unless a backward pass of the user's
        own says otherwise.

        Returns:
            Whether they could be compared. Not where the backward pass of the reference fails, nor where its
            gradients hang on the last digits.

        Raises:
            VerificationError: If they differ.
        """
        title, args, kwargs = arguments
        if draws.unlike:
            return False
        removed = removed_positions(self._plan)
        try:
            _, theirs = gradients(pair.theirs, args, kwargs, draws, way)
            if not _different(ours, theirs, removed, ROUGHER * self._tolerance):
                return True
            new = (
                gradients(Double(model), args, kwargs, draws, way) for model in (pair.small, pair.reference)
            )
            (_, ours), (_, theirs) = new
            differ = _different(ours, theirs, removed, ROUGHER * self._tolerance)
            for seed in range(NUDGES):
                _, nudge = gradients(
                    Double(nudged(pair.reference, 1e-12, seed), own=True), args, kwargs, draws, way
                )
                own = _different(nudge, theirs, {}, 0.0)
                differ = {name: by for name, by in differ.items() if own.get(name, 0.0) < 0.1 * by}
        except Exception:  # a user's backward may fail in any way
            return False
        if not differ:
            return False
        first, *rest = differ
        more = f", and for {len(rest)} more, the last of them {rest[-1]}" if rest else ""
        raise VerificationError(
            f"verify: expected the gradients of the pruned {type(pair.model).__name__} to equal those of the "
            f"masked dense one to {ROUGHER * self._tolerance:.1g} relative in float64, got "
            f"{differ[first]:.3g} for {first}{more} at {title}{way}. A backward pass of your own mixes or "
            f"counts units. Let it treat each unit by itself, or leave out the group before it, with "
            f"limits=sc.Limits(ignore=...)."
        )

    @property
    def constant(self) -> list[bool]:
        """For each output, whether it was one number everywhere, in all comparisons."""
        return [
            min(low for low, _ in found) == max(high for _, high in found)
            and (len(found) > 1 or found[0] == (0.0, 0.0))
            for found in zip(*self._seen, strict=False)
        ]

    def _message(
        self, found: Compared, title: str, got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
    ) -> str:
        path, kind = first_module(found), type(found.pair.model).__name__
        return (
            f"verify: expected the pruned {kind} to equal the {self.reference} dense one "
            f"to {self._tolerance:.1g} relative in float64, got {found.difference:.3g} at {title}"
            f"{_where(got, wanted, self._tolerance)}"
            + (f"; what {path} returns is the first to differ. " if path else ". ")
            + cause(found)
        )


def _different(
    ours: Gradients,
    theirs: Gradients,
    removed: Mapping[str, Mapping[int, NDArray[np.int64]]],
    tolerance: float,
) -> dict[str, float]:
    """The parameters whose gradients differ by more, relative to the largest entry, and by how much.

    Of gradients that are all rounding, as in front of a norm, nothing can be said: an entry counts from
    1e-12 of the largest of all.
    """
    sizes: dict[str, float] = {}
    apart: dict[str, float] = {}
    for name in ours:
        a, b = ours[name], theirs.get(name)
        if name not in theirs or (a is None and b is None):
            continue
        cuts = removed.get(name, {})
        if b is not None:
            a = torch.zeros_like(cut(b, cuts)) if a is None else a
            a, b = cut(a, cuts) if a.shape == b.shape else a, cut(b, cuts)
        elif a is not None:
            b = torch.zeros_like(a)
        if a is not None and b is not None and a.shape == b.shape and a.numel():
            sizes[name], apart[name] = largest(b), largest(a - b)
    least = 1e-12 * max(sizes.values(), default=0.0)
    return {
        name: by / max(sizes[name], least, 1e-300)
        for name, by in apart.items()
        if not by <= max(tolerance * sizes[name], least)
    }


def _extremes(output: torch.Tensor) -> tuple[float, float]:
    """The smallest and the largest number in an output."""
    real = torch.view_as_real(output.resolve_conj()) if output.is_complex() else output
    numbers = real.double()[torch.isfinite(real)]
    return (float(numbers.min()), float(numbers.max())) if numbers.numel() else (0.0, 0.0)


def is_program(model: nn.Module) -> bool:
    """Whether a pruned model is of form ``graph``."""
    try:
        return record_of(model).form == "graph"
    except ArtefactError:  # a class of the user's own around it
        return False


def listed(names: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 4 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _where(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], tolerance: float) -> str:
    """Which of several outputs differ, or that their shapes do."""
    shapes = [[list(t.shape) for t in outputs] for outputs in (got, wanted)]
    if shapes[0] != shapes[1]:
        ours, theirs = (listed(list(map(str, found))) for found in shapes)
        return f", because it returns {ours} and not {theirs}"
    if len(got) == 1:
        return ""
    differ = [
        str(i)
        for i, (a, b) in enumerate(zip(got, wanted, strict=True))
        if not relative_difference([a], [b]) <= tolerance
    ]
    return f" in {len(differ)} of {len(got)} outputs (number {listed(differ)})"
