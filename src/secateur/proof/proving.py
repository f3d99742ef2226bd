"""Compare a pruned model with its reference, and make the error message if they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from secateur.common.foreign import error_text
from secateur.common.models import named_tensors
from secateur.common.outputs import is_finite_somewhere
from secateur.errors import ArtefactError, InputError, VerificationError
from secateur.plan import Plan
from secateur.proof.diagnosis import Compared, Pair, cause, first_module, perturbed_weights
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
"""The tolerance of gradients is this many times that of outputs."""
PERTURBATIONS = 4
"""Number of random changes of the last digits. They show if a gradient depends on these (a ReLU at zero)."""

Buffers = dict[str, torch.Tensor]
"""Values of buffers after a pass, by name."""

Gradients = Mapping[str, torch.Tensor | None]
"""Gradients by parameter name; None if no gradient reached it."""


class Comparisons:
    """Compares a pruned model with its reference on many inputs, and collects the results.

    Attributes:
        reference: ``masked`` or ``graph``.
        sizes: Titles of the argument sets on which both agree, in evaluation mode and with their own weights.
        refused: Why the last skipped argument set was skipped: the dense model's error, or that its outputs
            are not finite.
        program_refused: Titles of sets that the dense model accepts, and the captured program refuses.
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
        self._unwatched: set[Way] = set()  # ways in which no operator has to be watched

    def compare(
        self,
        pair: Pair,
        arguments: ArgumentSet,
        way: Way = PLAIN,
        *,
        only_here: Sequence[str] = (),
        seed: int = 0,
    ) -> AnyDraws | None:
        """Compare on one argument set. In training mode, buffers such as running means are compared, too.

        Args:
            pair: The models.
            arguments: The argument set.
            way: How both models run.
            only_here: Parameters that evaluation mode does not read.
            seed: Seed of random numbers in the forward pass.

        Returns:
            These random numbers; None if nothing could be compared: the dense model does not run or returns
            no finite number, training mode draws numbers that the models cannot share, or with weights
            other than the user's the outputs differ by rounding only.

        Raises:
            VerificationError: The two differ, or only the pruned model fails.
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
                self.refused = f"{title}: {error_text(refused)}"
                return None
            if way.answer is not None and isinstance(error, InputError):  # perhaps no values lead there
                return None
            if self.sizes and is_program(pair.small):  # a captured program may refuse sizes
                if title not in self.program_refused:
                    self.program_refused.append(title)
                return None
            unread = f", where {listed(only_here)} are read" if only_here else ""
            raise VerificationError(
                f"verify: expected the pruned {type(pair.model).__name__} to run where the dense one does, "
                f"got {error_text(error)} at {title}{unread}. A size in its code, or a tensor that its trace "
                f"did not see, was not changed. Leave out the group that the error names, with "
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
        """Run both models. Return the random numbers, and the outputs of both.

        Watching operators is slow. If a watched pass of the pruned model neither draws random numbers nor
        casts below Python code, later passes in the same way are not watched. If such a pass fails, differs
        or draws, the models run again, watched. If that fails or differs, new copies of the models run.

        In training mode, the buffers of both models after the pass are put into `left`.

        Raises:
            Exception: Whatever a forward pass raises.
        """
        mine, other = left if way.training else (None, None)
        ours = partial(pair.ours.run, way=way, buffers=mine)
        theirs = partial(pair.theirs.run, way=way, buffers=other)
        draws = Draws(seed, self._operators)
        unwatched = NoDraws(draws)
        with suppress(Exception):
            got = ours(args, kwargs, unwatched if way in self._unwatched else draws)
            if not (draws.count or draws.cast):
                wanted = theirs(args, kwargs, unwatched)
                if not unwatched.drew and relative_difference(got, wanted) <= self._tolerance:
                    self._unwatched.add(way)
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
        """Compare the buffers of both models after a pass in training mode.

        A buffer of another shape is skipped if no state dict holds it: the pass may have made it, and the
        plan does not know which units it has.

        Raises:
            VerificationError: They differ.
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
        """Compare gradients of the pruned model with those of the reference.

        Two models that agree for all weights have the same gradients, unless the user's code has a backward
        pass of its own.

        Returns:
            Whether they could be compared: the backward pass of the reference runs, and its gradients do not
            depend on the last digits.

        Raises:
            VerificationError: They differ.
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
            for seed in range(PERTURBATIONS):
                _, nudge = gradients(
                    Double(perturbed_weights(pair.reference, 1e-12, seed), own=True), args, kwargs, draws, way
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
        """For each output, whether all its entries were the same number in all comparisons."""
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
            + (f"; the output of {path} is the first that differs. " if path else ". ")
            + cause(found)
        )


def _different(
    ours: Gradients,
    theirs: Gradients,
    removed: Mapping[str, Mapping[int, NDArray[np.int64]]],
    tolerance: float,
) -> dict[str, float]:
    """Return the parameters whose gradients differ by more than the tolerance, and by how much.

    Differences are relative to the largest entry of a gradient. Gradients below 1e-12 of the largest one are
    ignored: they are only rounding errors, as those of a bias before a norm.
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
    except ArtefactError:  # the model is inside a class of the user's own
        return False


def listed(names: Sequence[str], most: int = 3) -> str:
    """Join names, such as ``a, b, c and 4 more``."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _where(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], tolerance: float) -> str:
    """Say which of several outputs differ, or that their shapes do; empty for a single output."""
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
