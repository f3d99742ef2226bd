"""Trials of removals: without some blocks, a model has to give what it gives with these bypassed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.calibration.randomness import seeded
from secateur.common.foreign import error_text
from secateur.common.models import evaluation_mode
from secateur.errors import SecateurError
from secateur.graph.inputs import Arguments
from secateur.measure.kernels import with_loop
from secateur.targets.blocks.block import Block, bypassing
from secateur.targets.blocks.counts import new_numbers
from secateur.targets.blocks.graph import Removal
from secateur.targets.blocks.remove import can_pass, without_blocks
from secateur.targets.units.compare import Way, doubled, relative_difference, run_doubled
from secateur.targets.units.doubling import all_double
from secateur.targets.units.module_form.configuration import quietly

if TYPE_CHECKING:
    from secateur.proof.proving import ArgumentSet

REMOVALS: tuple[Removal, ...] = ("delete", "pass")
"""How a list may lose blocks, in the order in which it is tried."""

TOLERANCE = 1e-9
_TOKENS = 3
"""New tokens of a language model that a trial generates."""


class Trials:
    """Tries removals on a float64 copy of a model.

    Args:
        model: The dense model in float64. It is not changed.
        sets: Inputs of each size; of each, the first that the model takes is used.
    """

    def __init__(self, model: nn.Module, sets: Sequence[Sequence[ArgumentSet]]) -> None:
        self._model = with_loop(model)
        self._sets = sets

    def best_removal(self, blocks: Sequence[Block]) -> tuple[Removal, list[Block], dict[str, str]]:
        """Find how one list can lose most of its blocks.

        First every other block is removed at once, then the others at once. If that fails, each block is
        removed alone.

        Returns:
            How the list loses blocks, the blocks that can be removed, and why the others cannot.
        """
        chosen: Removal = "delete"
        best: list[Block] = []
        why: dict[str, str] = {}
        for removal in REMOVALS:
            able = [block for block in blocks if removal == "delete" or can_pass(block)]
            reasons = {block.path: "it returns more than a stream" for block in blocks if block not in able}
            fault = self._fault_in_halves(removal, able)
            if fault:
                alone = {block.path: self.fault(removal, [block]) for block in able}
                reasons |= {path: why for path, why in alone.items() if why}
                able = [block for block in able if not alone[block.path]]
                if able and (fault := self._fault_in_halves(removal, able)):
                    reasons |= {block.path: fault for block in able}
                    able = []
            if removal == REMOVALS[0] or len(able) > len(best):
                chosen, best, why = removal, able, {**why, **reasons}
            if len(best) == len(blocks):
                break
        able_paths = {block.path for block in best}
        return chosen, best, {path: reason for path, reason in why.items() if path not in able_paths}

    def _fault_in_halves(self, removal: Removal, blocks: Sequence[Block]) -> str:
        """Return what goes wrong if every other block is removed, or the others; empty if nothing does."""
        faults = (self.fault(removal, some) for some in (blocks[::2], blocks[1::2]) if some)
        return next(filter(None, faults), "")

    def fault(self, removal: Removal, removed: Sequence[Block]) -> str:
        """Return what goes wrong where these blocks are removed; empty if nothing does."""
        try:
            small = carried_out(self._model, removed, {b.container: removal for b in removed}, shared=True)[0]
            return difference_of(self._model, small, removed, self._sets)[1]
        except SecateurError as error:
            return str(error)
        except Exception as error:  # a user's code may fail in any way
            return f"it failed without them ({error_text(error)})"


def carried_out(
    model: nn.Module, removed: Sequence[Block], removals: Mapping[str, Removal], *, shared: bool = False
) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """Remove blocks, and change the numbers that depend on how many there are.

    Returns:
        The smaller model, the paths of blocks that a `PassThrough` replaces, and the new numbers by path.
    """
    passing = [block.path for block in removed if removals.get(block.container) == "pass"]
    small = without_blocks(model, removed, passing, shared=shared)
    left = [block.path for block in removed if block.path not in passing]
    sizes = new_numbers(model, small, left) if left else {}
    if sizes:
        small = without_blocks(model, removed, passing, sizes, shared=shared)
    return small, passing, sizes


def difference_of(
    dense: nn.Module,
    small: nn.Module,
    removed: Sequence[Block],
    sets: Iterable[Sequence[ArgumentSet]],
    tolerance: float = TOLERANCE,
) -> tuple[float, str, tuple[str, ...], int]:
    """Compare a smaller model with the dense one whose removed blocks are bypassed.

    Both are in float64. Their outputs are compared for inputs of each size; if the model generates text, the
    logits of a few new tokens too, with caches. In training mode the smaller model has to run where the dense
    one does, and to return as many tensors of the same shapes; values are not compared there, since blocks
    draw random numbers.

    Returns:
        The largest relative difference, what went wrong (empty if nothing), the sizes at which both were
        compared, and the number of output tensors.
    """
    worst, outputs = 0.0, 0
    sizes: list[str] = []
    first: Arguments | None = None
    for options in sets:
        for title, args, kwargs in options:
            try:
                with bypassing(dense, removed):
                    wanted = run_doubled(dense, args, kwargs)
            except Exception:  # what the dense model refuses says nothing
                continue
            if not wanted:
                return worst, "no tensors are seen in what the model returns", (*sizes, title), 0
            if any(not bool(torch.isfinite(t).any()) for t in wanted if t.numel() and t.is_floating_point()):
                continue
            try:
                found = relative_difference(run_doubled(small, args, kwargs), wanted)
            except Exception as error:  # a user's code may fail in any way
                why = f"it failed without them at {title} ({error_text(error)})"
                return worst, why, (*sizes, title), outputs
            worst, outputs = max(worst, found), len(wanted)
            sizes.append(title)
            first = first or (args, kwargs)
            if not worst <= tolerance:
                why = f"leaving them out differs from bypassing them by {worst:.1g} at {title}"
                return worst, why, tuple(sizes), outputs
            break
    if first is None:
        return float("nan"), "the model runs on none of the inputs with blocks bypassed", (), 0
    for why in _further(dense, small, removed, first, tolerance):
        if why:
            return worst, why, tuple(sizes), outputs
    return worst, "", tuple(sizes), outputs


def _further(
    dense: nn.Module, small: nn.Module, removed: Sequence[Block], given: Arguments, tolerance: float
) -> Iterator[str]:
    yield _fault_in_training(dense, small, removed, given)
    with bypassing(dense, removed):
        wanted = _generated(dense, given)
    if isinstance(wanted, list):
        found = _generated(small, given)
        if isinstance(found, str):
            yield f"it generates no text without them ({found})"
        elif not relative_difference(found, wanted) <= tolerance:
            yield "text is generated otherwise than with them bypassed: caches count blocks"


def _fault_in_training(dense: nn.Module, small: nn.Module, removed: Sequence[Block], given: Arguments) -> str:
    run = Way(training=True)
    with seeded(0):
        try:
            with bypassing(dense, removed):
                wanted = run_doubled(dense, *given, way=run)
        except Exception:  # what the dense model cannot do, the smaller one need not
            return ""
        try:
            found = run_doubled(small, *given, way=run)
        except Exception as error:  # a user's code may fail in any way
            return f"it failed without them in training mode ({error_text(error)})"
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return "in training mode the model returns other tensors without them than with them bypassed"
    return ""


def _generated(model: nn.Module, given: Arguments) -> list[torch.Tensor] | str:
    """Return the logits of a few new tokens; or what the model says where it generates none."""
    able = getattr(model, "can_generate", None)
    args, kwargs = doubled(*given)
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not callable(able) or not able() or not isinstance(ids, torch.Tensor) or ids.is_floating_point():
        return "it has no such method"
    options = {
        "max_new_tokens": _TOKENS,
        "min_new_tokens": _TOKENS,
        "do_sample": False,
        "use_cache": True,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    try:
        with evaluation_mode(model), torch.no_grad(), quietly(), all_double():
            kept = {k: v for k, v in kwargs.items() if k in ("input_ids", "attention_mask")}
            return [*model.generate(*args[:1], **kept, **options).logits]  # type: ignore[operator]
    except Exception as error:  # a model's own code may fail in any way
        return error_text(error)
