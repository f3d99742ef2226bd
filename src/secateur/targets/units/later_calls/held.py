"""What a pruned module's code reads beside tensors, watched at each call: other values are looked into.

A user may set an attribute, an entry of a dictionary, a global or a submodule after pruning, and with it
choose code that no trace has seen. The first call with other values runs twice beside itself, on copies: with
the values from before and with the new ones. It goes on if both give the same, or run the same operators
where units are missing, but for such as work on each number by itself. Else it is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import get_ident
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.foreign import said
from secateur.common.outputs import tensors_of
from secateur.common.preserving import ATOMS, State, is_alike
from secateur.errors import InputError
from secateur.graph.inputs import InputSpec
from secateur.plan import Plan
from secateur.targets.units.compare import relative_difference, rounding_of
from secateur.targets.units.later_calls.holders import Change, Entry, entries_of
from secateur.targets.units.later_calls.operators import Cut, Operators
from secateur.targets.units.later_calls.switched import Known, Switches, named
from secateur.targets.units.later_calls.whole_calls import Turned, WholeCalls, is_right_for_other_values
from secateur.targets.units.module_form.exporting import exporting

Together = tuple[tuple[str, Any], ...]
"""Values by the names of what holds them, such as ``("model.head.pooled", True)``."""


Pass = tuple[Operators, list[Tensor]]
"""What a pass ran, and what it gave."""

MOST, FEW = 200, 8
"""The most kinds of calls that are remembered, and the most values that are tried alone for a message."""


class Held:
    """A hook that looks into calls with other values than those that were there when it was made.

    Attributes:
        right: Values that were tried together and are right, each with its name from the model on.
        cut: What was cut; None if that is not known.
        suspended: Whether nothing is looked into.
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
        self.switches = Known(model, inputs)
        self._busy: int | None = None  # the thread that looks into a call
        self.renew(model)

    def renew(self, model: nn.Module) -> None:
        """Take the present values as those that are known."""
        self.suspended = False
        self._entries, self._is_whole = entries_of(model), True
        self._accepted: list[Any] = []  # calls: of which kind, and with which values
        self._layers: list[Change] = []  # new layers with weights, while something else has changed too

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickles: not classes and globals, which are taken as they are where it is loaded."""
        own = [entry for entry in self._entries if not entry.is_shared]
        return self._copied() | {"_entries": own, "_is_whole": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> Held:
        """Copy it for a copy of the model, which sees the same classes and globals."""
        found = memo[id(self)] = type(self).__new__(type(self))
        vars(found).update(copy.deepcopy(self._copied(), memo))
        return found

    def _copied(self) -> dict[str, Any]:
        return vars(self) | {"_accepted": [], "_layers": [], "_busy": None}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check what the module's code reads, before a forward pass.

        Raises:
            InputError: With a new value, the code computes something for which removed units may be needed.
        """
        if self.suspended or torch.compiler.is_compiling() or self._busy == get_ident():
            return
        if self._busy is not None:  # other values stand there for the moment
            with seeded(0):
                pass
        if not self._is_whole:
            self._entries += [entry for entry in entries_of(module) if entry.is_shared]
            self._is_whole = True
        entries = [entry for entry in self._entries if not entry.is_same()]
        found = self._found(entries) if entries else []
        changes = self._unknown(found)
        switches = self.switches.others(args, kwargs, tensors=self.cut is not None)
        if not changes:
            self._layers = []
        if not changes and not switches:
            return
        values = [(change.entry, change.name, change.new) for change in found]
        others = [change for change in found if not any(change is one for one in changes)]
        given, spec = pytree.tree_flatten((args, kwargs))
        kind = spec, module.training, torch.is_grad_enabled(), *map(_kind, given)
        if self._is_known(kind, values):
            return
        with seeded(0):  # one thread at a time
            if self._is_known(kind, values):  # another thread was quicker
                return
            self._busy = get_ident()
            try:
                lasts = not switches or self._check_switches(module, (args, kwargs), switches)
                if changes:
                    self._check(module, changes, others, (args, kwargs))
                known = [one for one in self._accepted if _is_light(one) or _are_same(one[1], values)]
                self._accepted = [*known[-MOST:], *([(kind, values)] if lasts else [])]
            finally:
                self._busy = None

    def _is_known(self, kind: Any, values: Sequence[Any]) -> bool:
        return any(one == kind and _are_same(known, values) for one, known in self._accepted)

    def _found(self, entries: Sequence[Entry]) -> list[Change]:
        """Return what has changed, but for new layers with weights."""
        found = []
        for change in (change for entry in entries for change in entry.changes()):
            new = change.new
            if isinstance(new, nn.Module) and _has_weights(change.old, new):
                change.entry.accept(change.name, new)
                self._layers.append(change)
            else:
                found.append(change)
        return found

    def _unknown(self, found: list[Change]) -> list[Change]:
        """Return what is not known to be right together."""
        known = [{(name, repr(value)) for name, value in values} for values in self.right]
        named = [(change, (str(change), repr(change.new))) for change in found if known]
        most = max(([c for c, name in named if name in one] for one in known), key=len, default=[])
        return [change for change in found if not any(change is one for one in most)]

    def _check(self, module: nn.Module, changes: list[Change], others: list[Change], given: Any) -> None:
        """Let a call with these changes pass if it computes what it would without, as far as units go.

        Raises:
            InputError: It does not, or that cannot be seen.
        """
        try:
            after, ours = _tried(module, given, changes, None, self.cut)
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
        for change in _made_by_the_code(module, given, left):
            change.entry.accept(change.name, change.new)
        left = [change for change in left if change.is_new()]
        if left and not self._runs_the_same(module, given, left, others, (after, ours)):
            _refuse(module, _named_first(module, given, left, (after, ours), self.cut))

    def _check_switches(self, module: nn.Module, given: Any, switches: Switches) -> bool:
        """Let a call with arguments that no trace has had pass if it computes what it would without.

        Returns whether that holds for other values of its tensors too, and so for later calls.

        Raises:
            InputError: It does not, as far as units go.
        """
        usual = self.switches.usual(module, given, switches)
        before, after, wrong = None, None, None
        try:
            before = _tried(module, usual, [], None, self.cut)
        except Exception as error:
            rest = {name: value for name, value in switches.items() if value is not None}
            if len(rest) < len(switches):  # no drawn tensor fits, as pictures fit only ids that name them
                lasts = not rest or self._check_switches(module, given, rest)
                self.switches.take(switches)
                return lasts
            what = f"could not be compared with one as then ({said(error)})"
        try:
            after = _tried(module, given, [], None, self.cut)
        except Exception as error:
            wrong, what = error, f"raises {said(error)}"
            if before is None:  # these are no arguments that the module takes, and it says so itself
                return False
        if before is not None and after is not None and not before[0].runs_as(after[0]):
            with suppress(Exception), exporting(True, set()):  # as the trace ran the code
                exported = _tried(module, usual, [], None, self.cut)
                before = exported if exported[0].runs_as(after[0]) else before
        # What one call gives, as with a mask of ones, says nothing of what the next one gives.
        if before is None or after is None or not before[0].runs_as(after[0]):
            if before is not None and after is not None:
                what = "runs other operators, which may need units that were removed"
            got = ", ".join(f"{name}={value!r:.40}" for name, value in switches.items())
            raise InputError(
                f"{type(module).__name__}: expected arguments as when the model was traced, got {got}: "
                f"with that, the forward pass {what}. Give sc.trace such a call too (more_inputs=), and "
                f"prune again."
            ) from wrong
        lasts = is_right_for_other_values(
            lambda turned: _tried(module, given, [], None, self.cut, turned=turned)[0],
            before[0],
            after[0],
            FEW,
        )
        if lasts:
            self.switches.take(switches)
        return lasts

    def _runs_the_same(
        self, module: nn.Module, given: Any, left: list[Change], others: list[Change], new: Pass
    ) -> bool:
        """Whether a pass with values that are right gives the same, or runs the same operators.

        Such are those from before; with the other ones that changed and are right as they are, or as they
        were; with the layers from before too; and what was found to be right for one value alone.
        """
        one, whole = left[0], [*left, *others]
        tries = [(left, [change.old for change in left])]
        tries += [(whole, [change.old for change in whole])] if others else []
        if self._layers:  # as where layers take in what was beside them, and give the same
            whole = [*whole, *self._layers]
            tries.append((whole, [change.old for change in whole]))
        if len(left) == 1:
            alone = [values for values in self.right if len({repr(value) for _, value in values}) == 1]
            right = [v for k in alone for name, v in k if name == str(one) and repr(v) != repr(one.new)]
            tries += [(left, [value]) for value in right]
        return any(
            _is_same(module, given, some, values, new, self.cut) for some, values in tries
        ) or _is_same_by_module(module, given, whole, self.cut)


def _made_by_the_code(module: nn.Module, given: Any, left: Sequence[Change]) -> list[Change]:
    """Return those changes that a pass with the old values makes itself, as where it prepares something once.

    Such a pass may fail: what is prepared already, as hooks, is then prepared twice.
    """
    if not left:
        return []
    with _put(module, left, [change.old for change in left]), seeded(0):
        args, kwargs = pytree.tree_map(_copied, given)
        with suppress(Exception):
            module.forward(*args, **kwargs)
        return [change for change in left if change.is_there_again()]


def _is_same(
    module: nn.Module,
    given: Any,
    left: Sequence[Change],
    values: Sequence[Any],
    new: Pass,
    cut: Cut | None,
) -> bool:
    """Whether a pass with these values instead of the new ones gives the same, or runs the same operators."""
    try:
        before, theirs = _tried(module, given, left, values, cut)
    except Exception:  # the values from before may not go with these arguments
        return False
    return _are_alike(new, (before, theirs))


def _are_alike(new: Pass, known: Pass) -> bool:
    """Whether a pass gives what a known one gives, or runs the same operators where units are missing."""
    (after, ours), (before, theirs) = new, known
    return relative_difference(ours, theirs) <= rounding_of(theirs) or before.runs_as(after)


def _is_same_by_module(module: nn.Module, given: Any, changes: Sequence[Change], cut: Cut | None) -> bool:
    """Whether the passes before and after some changes run the same operators outside the modules changed.

    In them, layers with new weights may take the place of others.
    """
    owners = {str(change.entry.title).removesuffix("._modules").removeprefix("model.") for change in changes}
    paths = [path for path, _ in module.named_modules() if path in owners]
    try:
        before, _ = _tried(module, given, changes, [change.old for change in changes], cut, paths)
        after, _ = _tried(module, given, changes, None, cut, paths, before)
    except Exception:  # the values from before may not go with these arguments
        return False
    return before.runs_as(after)


def _named_first(
    module: nn.Module, given: Any, left: list[Change], new: Pass, cut: Cut | None
) -> list[Change]:
    """Put one first without which other operators run, so that the message names it."""
    for change in left[:FEW] if len(left) > 1 else ():
        with suppress(Exception):
            if not _tried(module, given, [change], [change.old], cut)[0].runs_as(new[0]):
                return [change, *(one for one in left if one is not change)]
    return left


def _has_weights(old: Any, new: nn.Module) -> bool:
    """Whether a module has weights of its own. Quantised layers have no parameters, but a state."""
    if next(new.parameters(), None) is not None:
        return True
    had = isinstance(old, nn.Module) and next(old.parameters(), None) is not None
    return had and bool(new.state_dict())


def _is_light(one: tuple[Any, Sequence[tuple[Any, Any, Any]]]) -> bool:
    """Whether what is remembered of a call keeps nothing large alive."""
    return all(type(value) in ATOMS for _, _, value in one[1])


def _tried(
    module: nn.Module,
    given: Any,
    changes: Sequence[Change],
    values: Sequence[Any] | None,
    cut: Cut | None,
    *by_module: Any,
    turned: Turned | None = None,
) -> tuple[Operators, list[Tensor]]:
    """Run a module on copies of arguments, with its new values or with others in place of these.

    `by_module`: the modules by which to compare, and the pass to compare with; see `Operators`.
    `turned`: outcomes that conditions shall have.
    """
    args, kwargs = pytree.tree_map(_copied, given)
    with _put(module, changes, values):
        operators = Operators(module, named(module, (args, kwargs)), cut, *by_module)
        for change in changes if values is None else ():
            if isinstance(change.new, nn.Module):
                operators.watch(change.new)
        with seeded(0), operators, WholeCalls(operators, turned):
            outputs = tensors_of(module.forward(*args, **kwargs))
        operators.returned(outputs)
        operators.written = [one for one in changes if values is None and one.is_overwritten()]
        return operators, [output.detach() for output in outputs]


@contextmanager
def _put(module: nn.Module, changes: Sequence[Change], values: Sequence[Any] | None) -> Iterator[None]:
    """Inside, other values stand in place of the new ones; after it, the module is as it was before."""
    state = State(module, functions=True, parameters=module.training)
    try:
        for change, value in zip(changes, values or (), strict=False):
            change.put(value)
        yield
    finally:
        for change in changes if values is not None else ():
            change.put(change.new)
        state.restore()


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return copy.deepcopy(leaf)
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _kind(leaf: Any) -> Any:
    """Return what of an argument may choose the way of a pass: the shape and dtype, or the value."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)[:200]


def _are_same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(
        a[0] is b[0] and a[1] == b[1] and is_alike(a[2], b[2]) for a, b in zip(one, other, strict=True)
    )


def _refuse(module: nn.Module, changes: Sequence[Change], failed: Exception | None = None) -> NoReturn:
    """Raise the error for a call with these changes."""
    first = changes[0]
    old, new = (f"{value!r:.80}" if value is not ... else "nothing" for value in (first.before(), first.new))
    more = f" (and {len(changes) - 1} more are other than then)" if changes[1:] else ""
    what = "runs other operators, which may need units that were removed"
    if failed is not None:
        what = f"could not be tried ({said(failed)})"
    raise InputError(
        f"{type(module).__name__}: expected {first} to be {' '.join(old.split())}, as when the model was "
        f"pruned, got {' '.join(new.split())}{more}: with that, the forward pass {what}. Set it before "
        f"sc.trace and prune again, or set it back."
    ) from failed


def _cut_by(plan: Plan) -> Cut | None:
    """Say what a plan cuts; None if it removes more than units."""
    pieces = [(group, piece) for group in plan.groups for piece in group.slices if piece.removed]
    if plan.granularity != "unit" or any(piece.role in ("block", "expert") for _, piece in pieces):
        return None
    return tuple((p.tensor, p.axis, group.name, p.role == "consume") for group, p in pieces)


def hold(small: nn.Module, plan: Plan, right: Sequence[Together] = ()) -> None:
    """Let a module, pruned after a plan, look into calls with other values than it has now."""
    cut = _cut_by(plan)
    for module in small.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Held):  # of an earlier round
                cut = None if cut is None or hook.cut is None or module is not small else (*cut, *hook.cut)
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    inputs = getattr(plan, "inputs", None)
    small.register_forward_pre_hook(Held(small, right, cut, inputs), with_kwargs=True)
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
    """Look into no calls of a copy any more, since it is about to be changed; see `resume`."""
    for hook in _held(model):
        hook.suspended = True


def resume(model: nn.Module) -> None:
    """Take the values of a changed copy as those that are known."""
    for hook in _held(model):
        if hook.suspended:
            hook.cut = None  # more may be missing now
            hook.renew(model)


def _held(model: nn.Module) -> list[Held]:
    return [hook for m in model.modules() for hook in m._forward_pre_hooks.values() if isinstance(hook, Held)]
