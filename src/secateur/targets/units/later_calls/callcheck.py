"""A check of each call of a pruned module: does its code read other values than when the module was pruned?

A user may set an attribute, an entry of a dictionary, a global or a submodule after pruning, and with it
choose code that no trace has seen. At the first call with new values, the module also runs twice on copies:
with the old values and with the new ones. The call goes on if both runs give the same, or run the same
operators where units are missing; operators that work on each number by itself do not count. Else it is
refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.foreign import error_text
from secateur.common.preserving import ATOMS, is_alike
from secateur.errors import InputError
from secateur.graph.exporting import exporting
from secateur.graph.inputs import InputSpec
from secateur.plan import Plan
from secateur.targets.units.later_calls.comparedcalls import (
    FEW,
    Pass,
    decisive_first,
    is_same,
    is_same_by_module,
    made_by_the_code,
    run_once,
)
from secateur.targets.units.later_calls.operators import Cut
from secateur.targets.units.later_calls.switched import (
    CONTAINER,
    KnownArguments,
    Switches,
    are_axes,
    named,
)
from secateur.targets.units.later_calls.watchedvalues import Change, WatchedValues, watched_values
from secateur.targets.units.later_calls.whole_calls import (
    ForcedOutcomes,
    is_right_for_other_values,
)

Together = tuple[tuple[str, Any], ...]
"""Several values, each with its name from the model on, such as ``("model.head.pooled", True)``."""


MOST = 200
"""The most kinds of calls that are remembered."""


class CallCheck:
    """A hook that checks calls with other values than the present ones.

    Attributes:
        right: Values that were tried together and are right.
        cut: What was removed; None if that is not known.
        suspended: Whether no call is checked.
    """

    only_watches = True

    def __init__(
        self,
        model: nn.Module,
        right: Sequence[Together] = (),
        cut: Cut | None = None,
        inputs: InputSpec | None = None,
    ) -> None:
        self.right, self.cut = tuple(right), cut
        self._arguments = KnownArguments(model, inputs)
        self._checking: int | None = None  # the thread that checks a call
        self.renew(model)

    def renew(self, model: nn.Module) -> None:
        """Take the present values as the old ones."""
        self.suspended = False
        self._entries, self._is_whole = watched_values(model), True
        self._accepted: list[Any] = []  # calls that may go on: their kind, and their new values
        self._layers: list[Change] = []  # new layers with weights, while something else has changed too

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickles: not the values of classes and globals, which are read again after loading."""
        own = [entry for entry in self._entries if not entry.is_shared]
        return self._copied() | {"_entries": own, "_is_whole": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> CallCheck:
        """Copy the hook for a copy of the model, which has the same classes and globals."""
        found = memo[id(self)] = type(self).__new__(type(self))
        vars(found).update(copy.deepcopy(self._copied(), memo))
        return found

    def replace_values(self, own: Callable[[Any], Any]) -> None:
        """Take as old values what `own` returns for them, where the model gets new functions."""
        for entry in self._entries:
            for name, value in [] if entry.is_shared else [*entry.values.items()]:
                entry.accept(name, own(value))

    def _copied(self) -> dict[str, Any]:
        return vars(self) | {"_accepted": [], "_layers": [], "_checking": None}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the values that the module's code reads, and the arguments, before a forward pass.

        Raises:
            InputError: With a new value, the code computes something for which removed units may be needed.
        """
        if self.suspended or torch.compiler.is_compiling() or self._checking == get_ident():
            return
        if self._checking is not None:  # another thread has changed values for its check: wait for it
            with seeded(0):
                pass
        if not self._is_whole:
            self._entries += [entry for entry in watched_values(module) if entry.is_shared]
            self._is_whole = True
        entries = [entry for entry in self._entries if not entry.is_same()]
        found = self._changes(entries) if entries else []
        changes = self._not_proven(found)
        switches = self._arguments.unknown(args, kwargs, tensors=self.cut is not None)
        if not changes:
            self._layers = []
        if not changes and not switches:
            return
        values = [(change.entry, change.name, change.new) for change in found]
        proven = [change for change in found if not any(change is one for one in changes)]
        given, spec = pytree.tree_flatten((args, kwargs))
        kind = spec, module.training, torch.is_grad_enabled(), *map(_kind, given)
        if self._is_accepted(kind, values):
            return
        with seeded(0):  # one thread at a time
            if self._is_accepted(kind, values):  # another thread was quicker
                return
            self._checking = get_ident()
            try:
                lasts = not switches or self._check_switches(module, (args, kwargs), switches)
                if changes:
                    self._check(module, changes, proven, (args, kwargs))
                kept = [one for one in self._accepted if _is_light(one) or _are_same(one[1], values)]
                self._accepted = [*kept[-MOST:], *([(kind, values)] if lasts else [])]
            finally:
                self._checking = None

    def _is_accepted(self, kind: Any, values: Sequence[Any]) -> bool:
        return any(one == kind and _are_same(accepted, values) for one, accepted in self._accepted)

    def _changes(self, entries: Sequence[WatchedValues]) -> list[Change]:
        """Return what has changed, without new layers that have weights: these are accepted."""
        found = []
        for change in (change for entry in entries for change in entry.changes()):
            new = change.new
            if isinstance(new, nn.Module) and _has_weights(change.old, new):
                change.entry.accept(change.name, new)
                self._layers.append(change)
            else:
                found.append(change)
        return found

    def _not_proven(self, found: list[Change]) -> list[Change]:
        """Return the changes that remain without the largest set of new values in `right`."""
        right = [{(name, repr(value)) for name, value in values} for values in self.right]
        named = [(change, (str(change), repr(change.new))) for change in found if right]
        most = max(([c for c, name in named if name in one] for one in right), key=len, default=[])
        return [change for change in found if not any(change is one for one in most)]

    def _check(self, module: nn.Module, changes: list[Change], proven: list[Change], given: Any) -> None:
        """Compare a call with the same call without some changes.

        Args:
            module: The pruned module.
            changes: The changes to check.
            proven: Further changes that are right as they are.
            given: The arguments of the call.

        Raises:
            InputError: The call may compute something else where units are missing, or cannot be compared.
        """
        try:
            after, outputs = run_once(module, given, changes, None, self.cut)
        except Exception as error:  # the call may fail as well; else nothing would have looked into it
            _refuse(module, changes, error)
        for change in changes:
            if isinstance(change.new, nn.Module) and after.works_by_number(change.new):
                change.entry.accept(change.name, change.new)
        written = {id(change) for change in changes if any(change is one for one in after.written)}
        for change in changes:
            if id(change) in written:
                change.entry.forget(change.name)
        left = [change for change in changes if change.is_new() and id(change) not in written]
        for change in made_by_the_code(module, given, left):
            change.entry.accept(change.name, change.new)
        left = [change for change in left if change.is_new()]
        if left and not self._runs_the_same(module, given, left, proven, (after, outputs)):
            _refuse(module, decisive_first(module, given, left, (after, outputs), self.cut))

    def _check_switches(self, module: nn.Module, given: Any, switches: Switches) -> bool:
        """Compare a call with arguments that no trace has had with a call with known ones.

        Returns:
            Whether the call is right for all values of its tensors, so that later calls need no check.

        Raises:
            InputError: The call may compute something else where units are missing.
        """
        usual = self._arguments.with_known_values(module, given, switches)
        # Such as a batch with its labels, of which the module returns the loss.
        in_container = any(switches.get(name) is CONTAINER for name in named(module, given))

        def run(arguments: Any, forced: ForcedOutcomes | None = None) -> Pass:
            options: Any = {"forced": forced, "compared": (usual, given), "by_value": not in_container}
            return run_once(module, arguments, [], None, self.cut, **options)

        before, after, wrong = None, None, None
        try:
            before = run(usual)
        except Exception as error:
            rest = {name: value for name, value in switches.items() if value is not None}
            if len(rest) < len(switches):  # a drawn tensor may not fit, as pictures have to fit the ids
                lasts = not rest or self._check_switches(module, given, rest)
                self._arguments.add(switches)
                return lasts
            what = f"could not be compared with one as then ({error_text(error)})"
        try:
            after = run(given)
        except Exception as error:
            wrong, what = error, f"raises {error_text(error)}"
            if before is None:  # the module does not take these arguments, and its own error says so
                return False
        if before is not None and after is not None and not before[0].runs_as(after[0]):
            with suppress(Exception), exporting(True, set()):  # as the trace ran the code
                exported = run(usual)
                before = exported if exported[0].runs_as(after[0]) else before
        # What one call gives, as with a mask of ones, says nothing of what the next one gives.
        if (
            before is None
            or after is None
            or not (before[0].runs_as(after[0]) or (are_axes(switches) and after[0].contracts))
        ):
            if before is not None and after is not None:
                what = "runs other operators, which may need units that were removed"
            titles = (f"argument {name}" if name.isdigit() else name for name in switches)
            pairs = zip(titles, switches.values(), strict=True)
            got = ", ".join(f"{title}={value!r:.40}" for title, value in [*pairs][:FEW])
            raise InputError(
                f"{type(module).__name__}: expected arguments as when the model was traced, got {got}: "
                f"with that, the forward pass {what}. Give sc.trace such a call too (more_inputs=), and "
                f"prune again."
            ) from wrong
        lasts = is_right_for_other_values(
            lambda forced: run(given, forced)[0],
            before[0],
            after[0],
            FEW,
        )
        if lasts:
            self._arguments.add(switches)
        return lasts

    def _runs_the_same(
        self, module: nn.Module, given: Any, left: list[Change], proven: list[Change], new: Pass
    ) -> bool:
        """Whether a pass with values that are right gives what `new` gave, or runs the same operators.

        Values that are right are the old ones of `left`; the old ones of `proven` as well, and those of the
        new layers; and a value in `right` of the one flag that `left` is about.
        """
        one, whole = left[0], [*left, *proven]
        tries = [(left, [change.old for change in left])]
        tries += [(whole, [change.old for change in whole])] if proven else []
        if self._layers:  # for example, a batch norm was removed and its layer got other weights
            whole = [*whole, *self._layers]
            tries.append((whole, [change.old for change in whole]))
        if len(left) == 1:
            alone = [values for values in self.right if len({repr(value) for _, value in values}) == 1]
            right = [v for k in alone for name, v in k if name == str(one) and repr(v) != repr(one.new)]
            tries += [(left, [value]) for value in right]
        return any(
            is_same(module, given, some, values, new, self.cut) for some, values in tries
        ) or is_same_by_module(module, given, whole, self.cut)


def _has_weights(old: Any, new: nn.Module) -> bool:
    """Whether a module has weights of its own. Quantised layers have no parameters, but a state."""
    if next(new.parameters(), None) is not None:
        return True
    had = isinstance(old, nn.Module) and next(old.parameters(), None) is not None
    return had and bool(new.state_dict())


def _is_light(one: tuple[Any, Sequence[tuple[Any, Any, Any]]]) -> bool:
    """Whether what is remembered of a call keeps nothing large alive."""
    return all(type(value) in ATOMS for _, _, value in one[1])


def _kind(leaf: Any) -> Any:
    """Return what of an argument may decide which code runs: the shape and dtype, or the value."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)[:200]


def _are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(
        a[0] is b[0] and a[1] == b[1] and is_alike(a[2], b[2]) for a, b in zip(one, other, strict=True)
    )


def _refuse(module: nn.Module, changes: Sequence[Change], failed: Exception | None = None) -> NoReturn:
    """Raise the error for a call with these changes; `failed` is the error of a pass with them."""
    first = changes[0]
    old, new = (f"{value!r:.80}" if value is not ... else "nothing" for value in (first.before(), first.new))
    more = f" (and {len(changes) - 1} more have changed since)" if changes[1:] else ""
    what = "runs other operators, which may need units that were removed"
    if failed is not None:
        what = f"could not be tried ({error_text(failed)})"
    raise InputError(
        f"{type(module).__name__}: expected {first} to be {' '.join(old.split())}, as when the model was "
        f"pruned, got {' '.join(new.split())}{more}: with that, the forward pass {what}. Set it before "
        f"sc.trace and prune again, or set it back."
    ) from failed


def _cut_by(plan: Plan) -> Cut | None:
    """Return what a plan removes; None if it removes more than units."""
    pieces = [(group, piece) for group in plan.groups for piece in group.slices if piece.removed]
    if plan.granularity != "unit" or any(piece.role in ("block", "expert") for _, piece in pieces):
        return None
    return tuple((p.tensor, p.axis, group.name, p.role == "consume") for group, p in pieces)


def check_calls(small: nn.Module, plan: Plan, right: Sequence[Together] = ()) -> None:
    """Let a module that was pruned after a plan check calls with other values than it has now.

    Args:
        small: The pruned module.
        plan: The plan.
        right: See `CallCheck`.
    """
    cut = _cut_by(plan)
    for module in small.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, CallCheck):  # of an earlier pruning
                cut = None if cut is None or hook.cut is None or module is not small else (*cut, *hook.cut)
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    inputs = getattr(plan, "inputs", None)
    small.register_forward_pre_hook(CallCheck(small, right, cut, inputs), with_kwargs=True)
    if not hasattr(type(small), "__prepare_scriptable__"):
        vars(small)["__prepare_scriptable__"] = _Unwatched(small)


class _Unwatched:
    """Gives `torch.jit.script`, which compiles hooks too, the module without those that only watch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        """Return a module with the same tensors and submodules."""
        found = copy.copy(self.module)
        del found.__dict__["__prepare_scriptable__"]
        hooks = found._forward_pre_hooks
        found._forward_pre_hooks = type(hooks)(
            (number, hook) for number, hook in hooks.items() if not getattr(hook, "only_watches", False)
        )
        return found


def suspend(model: nn.Module) -> None:
    """Check no calls of a model for now, since it is about to be changed; see `resume`."""
    for hook in _checks_of(model):
        hook.suspended = True


def resume(model: nn.Module) -> None:
    """Check calls again. The present values of the changed model count as the old ones."""
    for hook in _checks_of(model):
        if hook.suspended:
            hook.cut = None  # more may be missing now
            hook.renew(model)


def _checks_of(model: nn.Module) -> list[CallCheck]:
    return [
        hook for m in model.modules() for hook in m._forward_pre_hooks.values() if isinstance(hook, CallCheck)
    ]
