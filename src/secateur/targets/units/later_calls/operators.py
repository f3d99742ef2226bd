"""The operators that a forward pass runs, without those that work on each number by itself.

Some operators read values in which units are missing. Others come after the layers that read the units, as a
pooling of results or a loss: in their values nothing is missing, so any code does there what it does in the
dense model.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph.executionpath import leaves
from secateur.graph.frames import Line
from secateur.graph.watchednumbers import watched
from secateur.targets.units.later_calls.axes import Axes, axes_after, varies
from secateur.targets.units.later_calls.operator_names import (
    ATTENTION,
    BY_CHANNEL,
    EQUAL,
    LAYOUT,
    NOISE,
    SAME,
    SELECTIONS,
    SUMS,
    TITLES,
    WHOLE_CALLS,
)

Cut = tuple[tuple[str, int, str, bool], ...]
"""Where units were removed: name of a tensor, axis, group, and whether the tensor reads its units."""


@dataclass(frozen=True)
class _State:
    """What is known of a tensor in a pass.

    Attributes:
        lacks: The groups of which units are missing in it.
        reads: The groups whose units it sums over, as a weight.
        is_weight: Whether it is a parameter or a buffer, or a view of one.
        order: What gives its units their order: the weights of layers, by the groups that they lack, or the
            results of calls, by name. Several if the tensor is their sum.
        axes: Where units may be missing, counted from the end; see `axes_after`.
    """

    lacks: frozenset[str] = frozenset()
    reads: frozenset[str] = frozenset()
    is_weight: bool = False
    order: frozenset[Any] = frozenset()
    axes: Axes = frozenset()


_FEW = 16
"""The most numbers of a tensor that are compared one by one."""
_NO_SIZES = (-100, 2**63 - 1)
"""Whole numbers that are no sizes: the label of ignored positions in a loss, and the end of an axis."""
_SMALL = 3
"""Whole numbers up to this one are taken for axes and counts, though a size may be a multiple of them."""

_WHOLE, _UNKNOWN = _State(), _State(frozenset({"unknown"}), axes=None)
_NEW = frozenset({"of a new weight"})
"""Stands for the units that are missing in the result of a weight that the earlier pass did not read."""
_NEW_WEIGHT = _State(_NEW, is_weight=True, axes=None)
_ANY = ("any",)
"""Stands for the name of a tensor in which no units are missing."""
_SIZED = frozenset({"counted"})
"""Stands for the units that are missing in a tensor as long as the number of units, as an `arange`."""


class _Safe:
    """The recorder of numbers that follow from sizes at which no units are missing. It records nothing."""

    prevails = False

    def note(self, *_: Any, **__: Any) -> None:
        """Ignore a comparison, since it does not depend on units."""


SAFE = _Safe()


class Operators(TorchDispatchMode):
    """Records the operators that run while this is active.

    An operator that works on each number of one tensor by itself, as activations do, treats every unit alike,
    whatever else was removed. It may also take tensors in which no units are missing, such as a mask. Such
    operators are left out, with two exceptions: one of these tensors may have a number for each unit, or the
    operator takes a number that follows from a size of the tensor; then removed units make a difference. The
    result of a batch norm counts as coming from where its input comes from, and the bias of a layer does not
    count, since a batch norm can be fused into a layer.

    Passes can be compared module by module, as where one layer takes the place of several that are added.
    What a changed module returns is then named after the module, if it has the same units in the same order
    as in the earlier pass. A weight that the earlier pass did not read, and that is whole, was added by the
    user, and the user answers for what it reads.

    Attributes:
        calls: The operators that are not left out, each with its whole numbers and switches, the shapes of
            its results, and where each of its tensors comes from: a parameter, an input, or an earlier call.
        missing: Those of `calls` that read values in which units are missing, or a number that may
            follow from the size of such values.
        inside: The running modules among those of `watch`.
        mixing: The modules of `watch` in which an operator ran that is not left out.
        ran: The modules of `watch` that ran.
        written: The changes whose value the pass itself has set.
        conditions: The lines of the user's code with conditions on values of tensors, and the outcomes.
        reads: The lines where the code takes such values in another way.
        contracts: Whether all operators in `missing` sum over the units or work on each number by itself, so
            that they treat units alike, whatever the number of axes.
        returns: What is known of the tensors that the changed modules returned, by path, call and number.
    """

    prevails = True
    """A number that follows from several sizes has the recorder of the one at which units are missing."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        cut: Cut | None = None,
        changed: Iterable[str] = (),
        earlier: Operators | None = None,
        *,
        shapes: bool = True,
        sizes: Iterable[int] = (),
        by_value: bool = True,
    ) -> None:
        """Prepare a pass.

        Args:
            model: The model that will run.
            inputs: Its arguments, by name.
            cut: Where units were removed; None if that is not known.
            changed: The paths of the modules by which passes are compared.
            earlier: The pass with which this one will be compared.
            shapes: Whether results of other sizes make an operator another one, or only those with another
                number of axes or with units along other ones.
            sizes: Sizes of the inputs of passes with which this one will be compared.
            by_value: Whether a plain number that may follow from a size counts as one. In a loss with its
                many numbers, one mostly does by chance. Numbers read off a tensor's shape count anyway.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Any] = []
        self.missing: list[Any] = []
        self.inside: list[nn.Module] = []
        self.mixing: list[nn.Module] = []
        self.ran: list[nn.Module] = []
        self.written: list[Any] = []
        self.conditions: list[tuple[Line, bool]] = []
        self.reads: set[Line] = set()
        self.returns: dict[Any, tuple[torch.Size, _State]] = {}
        self.contracts = True
        self._earlier, self._shapes, self._by_value = earlier, shapes, by_value
        self._read: set[str] = set()  # the weights that an operator took
        self._names: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        self._is_inside = False  # a call that is noted as one operator
        self.is_sized = False  # whether the running function takes a number that `sizes` watches
        self.line: Line = ("", 0)  # that runs
        self.explained: frozenset[Any] = frozenset()  # the numbers that it takes from other sizes
        tensors = {
            (name, number): leaf
            for name, value in inputs.items()
            for number, leaf in enumerate(leaves(value))
            if isinstance(leaf, Tensor)
        }
        self._input_sizes = {n for leaf in tensors.values() for n in leaf.shape} | {*sizes}
        self._states: dict[int, tuple[weakref.ref[Tensor], _State]] = {}
        self._written: list[tuple[Tensor, frozenset[str]]] = []
        self._shrunk: set[int] = set()
        at = {(name, axis) for name, axis, _, _ in cut or ()}
        named = [(n, axis, size) for n, p in model.named_parameters() for axis, size in enumerate(p.shape)]
        self._unchanged_sizes = {n for name, axis, n in named if (name, axis) not in at} | self._input_sizes
        self._cut_sizes = {n for name, axis, n in named if (name, axis) in at}  # of the axes that were cut
        self._knows_cut = cut is not None
        known = None if earlier is None else earlier._read | {name for name, *_ in cut or ()}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._name(tensor, name)
            is_new = known is not None and name not in known
            state = _NEW_WEIGHT if is_new else _State(is_weight=True)
            self._states[id(tensor)] = weakref.ref(tensor), state
        for name, axis, group, reads in cut or ():
            self._was_cut(model, name, axis, group, reads=reads)
        for place, leaf in tensors.items():
            self._name(leaf, place)
            self._states[id(leaf)] = weakref.ref(leaf), _WHOLE
        for path in changed:
            self._compare(path, model.get_submodule(path))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and note it."""
        result = func(*args, **(kwargs or {}))
        if not self._is_inside:
            self._note(func, leaves((args, kwargs)), [v for v in leaves(result) if isinstance(v, Tensor)])
        return result

    def as_one(self, func: Any, args: Any, kwargs: Any, given: list[Any]) -> Any:
        """Run a function, and note it as one operator with the arguments `given`."""
        self._is_inside = True
        try:
            result = func(*args, **kwargs)
        finally:
            self._is_inside = False
        self._note(func, given, [result])
        return result

    def _note(self, func: Any, given: list[Any], results: list[Tensor]) -> None:
        name = func._schema.name.partition("::")[2] if hasattr(func, "_schema") else func.__name__
        if name.lstrip("_").startswith(ATTENTION):  # a kernel, or all of it
            name, results = ATTENTION, results[:1]
            tensors = [v for v in given if isinstance(v, Tensor)]
            given = [*tensors[:3], *(v for v in tensors[3:] if self._state(v).lacks)]
        tensors = [v for v in given if isinstance(v, Tensor)]
        many = [v for v in tensors if v.numel() > 1 or v.ndim]
        names = [self._operand(v) for v in many]
        self._read |= {one for one in names if type(one) is str and one != "noise"}
        title = TITLES.get(name, name if name in {*WHOLE_CALLS, ATTENTION} else str(func))
        if name in SUMS:
            biases = [self._name_of(v) for v in tensors if v.ndim == 1 and self._state(v).is_weight]
            title, names = name.removeprefix("add"), [one for one in names if one not in biases]
        elif name == "embedding":
            names = names[:1]  # any rows of the table are alike
        by_number = name in SAME or torch.Tag.pointwise in getattr(func, "tags", ())
        whole_numbers = {v for v in given if type(v) is int} - self.explained
        sized = self.is_sized or ((by_number or not tensors) and self._sized(given))
        sized |= self._by_value and not (tensors or self._cut_sizes.isdisjoint(whole_numbers))
        sized &= name not in SAME
        states = ((one, self._state(v)) for v, one in zip(many, names, strict=False))
        cut = [one for one, state in states if one != "noise" and (state.lacks or state.reads)]
        lacking = sized | self._follow(func, name, given, results, sized=sized)
        whole = [one for one in names if one != "noise"]
        made: Any = None
        filled = [one for v, one in zip(many, names, strict=False) if v.numel()]
        if name in NOISE or (names and not whole):
            made = "noise"
        elif name == "cat" and len(filled) == 1:  # behind nothing, as where a cache is empty
            made = filled[0]
        elif name in SAME or (
            by_number and not (self.is_sized or self._sizes_in(given) or self._is_by_unit(tensors))
        ):
            carried = {*(cut if len(whole) > 1 else whole)}
            made = carried.pop() if len(carried) == 1 else None
        if made is None:
            settings = [v for v in given if type(v) in (int, bool, str)]
            if name == "select" and self._are_cut_alike(tensors[0], settings[0]):
                settings = settings[:1]
            if title == "view":
                settings = self._sizes_of_units(settings, results[0])
            settings += [v for v in (given if self.is_sized else self._sizes_in(given)) if type(v) is float]
            shapes = [tuple(v.shape) if self._shapes else (v.ndim, self._state(v).axes) for v in results]
            call = title, tuple(names), tuple(settings), tuple(shapes)
            self.calls.append(call)
            if lacking and not (name in SUMS and any(self._state(v) == _NEW_WEIGHT for v in tensors)):
                self.missing.append(call)
                at = {state.axes for v in many if (state := self._state(v)).lacks}
                aligned = name in LAYOUT or (by_number and len(at) <= 1)
                self.contracts &= not sized and (name in SUMS or BY_CHANNEL in name or aligned)
            self.mixing += self.inside
            for number, tensor in enumerate(results):
                by_channel = number == 0 and BY_CHANNEL in name
                self._name(tensor, names[0] if by_channel else (hash(call), number))
                if not (by_channel or by_number or name in SUMS) and (state := self._state(tensor)).lacks:
                    state = replace(state, order=frozenset({(hash(call), number)}))
                    self._states[id(tensor)] = weakref.ref(tensor), state
        elif sized:
            # Another whole tensor is no other operator, if the same line of code has the same number.
            alike = by_number and not (cut or self.is_sized)
            numbers = [v for v in given if type(v) in (int, float)]
            self.missing.append((str(func), self.line, *numbers) if alike else (str(func), made))
            self.contracts = False
        for tensor in results if made is not None else ():
            self._name(tensor, made)

    def sizes(self, tensor: Tensor, read: torch.Size) -> torch.Size:
        """Return the sizes of a tensor, as numbers that report what code does with cut sizes to `note`."""
        state = self._state(tensor)
        any_axis = state.axes is None
        return torch.Size(
            watched(n, self if any_axis or at in (state.axes or ()) else SAFE)  # type: ignore[arg-type]
            for at, n in enumerate(read, -len(read))
        )

    def replaced(self, tensor: Tensor, value: Tensor) -> None:
        """Note that a tensor takes the numbers of another one, as in ``tensor.data = value``."""
        self.calls.append(("data", self._name_of(tensor), self._name_of(value)))
        self.missing.append(self.calls[-1])
        self.contracts = False

    def note(self, place: Any, size: float, flips_at: float, outcome: int, *, period: int = 0) -> None:
        """Note a condition on a number that follows from a size at which units may be missing."""
        self.calls.append(("decided", place, flips_at, outcome))
        self.missing.append(self.calls[-1])
        self.contracts = False

    def _is_by_unit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a tensor in which no units are missing may have a number for each unit of another one."""
        states = [self._state(tensor) for tensor in tensors]
        cut = [state.axes for state in states if state.lacks or state.reads]
        axes = None if None in cut else frozenset[int]().union(*(one for one in cut if one is not None))
        whole = (v for v, one in zip(tensors, states, strict=True) if not (one.lacks or one.reads))
        return bool(cut) and any(varies(v, axes) for v in whole)

    def _sizes_of_units(self, sizes: list[Any], made: Tensor) -> list[Any]:
        """The sizes that a view is given, without those of axes at which no units can be missing."""
        axes = self._state(made).axes
        if axes is None or len(sizes) != made.ndim:
            return sizes
        return [size if axis in axes else -1 for axis, size in enumerate(sizes, -made.ndim)]

    def _are_cut_alike(self, tensor: Tensor, axis: int) -> bool:
        """Whether a tensor is a weight whose entries along an axis lack the same units, as of experts."""
        state = self._state(tensor)
        own = axis if axis < 0 else axis - tensor.ndim
        return state.is_weight and state.axes is not None and own not in state.axes

    def returned(self, outputs: Iterable[Tensor]) -> None:
        """Note the outputs of the pass in which units are missing, since the caller would miss them."""
        for tensor in outputs:
            if self._state(tensor).lacks:
                found = "returned", self._name_of(tensor)
                self.calls.append(found)
                self.missing.append(found)
                self.contracts = False

    def runs_as(self, other: Operators) -> bool:
        """Whether another pass ran the same operators, or at least no other ones where units are missing."""
        is_comparable = self.calls == other.calls or (self._knows_cut and other._knows_cut)
        return is_comparable and set(other.missing) <= set(self.missing)

    def _was_cut(self, model: nn.Module, name: str, axis: int, group: str, *, reads: bool) -> None:
        path, _, leaf = name.rpartition(".")
        try:
            tensor = getattr(model.get_submodule(path), leaf)
            _, state = self._states[id(tensor)]
        except (AttributeError, KeyError):  # the user has removed it
            return
        axes = None if state.axes is None else state.axes | {axis - tensor.ndim}
        lacks, read = (set(), {group}) if reads else ({group}, set())
        state = _State(state.lacks | lacks, state.reads | read, is_weight=True, axes=axes)
        self._states[id(tensor)] = weakref.ref(tensor), state

    def _follow(self, func: Any, name: str, given: list[Any], results: list[Tensor], *, sized: bool) -> bool:
        """Note in which results units are missing, and return whether they are missing in an argument.

        With a number that may follow from a size that shrank (`sized`), units also count as missing in a
        result that is made without tensors, or that has such a size.
        """
        tensors = [value for value in given if isinstance(value, Tensor)]
        states = [self._state(tensor) for tensor in tensors]
        lacks, reads = (
            frozenset[str]().union(*sets) for sets in ((s.lacks for s in states), (s.reads for s in states))
        )
        schema = getattr(func, "_schema", None)
        writes = bool(getattr(schema, "is_mutable", func.__name__ not in WHOLE_CALLS))
        order = frozenset[Any]().union(*(s.order for s in states if not s.is_weight))
        by_number = name in SAME or torch.Tag.pointwise in getattr(func, "tags", ())
        selects = name in SELECTIONS and bool(states[0].reads) and not any(s.lacks for s in states[1:])
        if (len(tensors) == 1 or selects) and states[0].is_weight and not writes:
            made = states[0]
        elif name in SUMS:
            of_weights = frozenset[str]().union(*(s.lacks for s in states if s.is_weight))
            others = frozenset[str]().union(*(s.lacks for s in states if not s.is_weight))
            if reads and others - _SIZED <= reads:  # a tensor as long as the units is summed over too
                others -= _SIZED
            by_weights = frozenset({of_weights} if of_weights else ())
            # Weights of one channel each leave the order as it is.
            order = by_weights if others & reads or of_weights == _NEW else by_weights | order
            made = _State((others - reads) | of_weights, order=order)
        else:
            made = _State(lacks | reads, order=order)
        shrunk = self._shrunk - self._unchanged_sizes
        for tensor in results:
            axes = axes_after(name, given, [s.axes for s in states], tensor.shape, by_number=by_number)
            made = replace(made, axes=axes if made.lacks or made.reads else frozenset())
            counts = sized and name not in EQUAL and not made.lacks
            if counts and (not tensors or shrunk.intersection(tensor.shape)):
                made = replace(made, lacks=_SIZED, axes=frozenset(range(-tensor.ndim, 0)))
            self._states[id(tensor)] = weakref.ref(tensor), made
            if not made.is_weight:
                (self._shrunk if made.lacks else self._unchanged_sizes).update(tensor.shape)
        if writes and made.lacks:  # other views of the same numbers have them too
            self._written += [(tensor, made.lacks) for tensor in results]
        return bool(lacks or reads)

    def _sized(self, given: Iterable[Any]) -> bool:
        """Whether a number among some arguments may follow from a size that shrank."""
        if not self._by_value:
            return False
        numbers, sizes = [*self._numbers(given)], self._shrunk - self._unchanged_sizes - {0, 1}
        whole = {abs(v) for v in numbers if type(v) is int and v not in _NO_SIZES}
        whole -= self._unchanged_sizes | {0, 1}
        computed = any(v % n == 0 or (v > _SMALL and n % v == 0) for v in whole for n in sizes)
        return computed or bool(_follows([*whole, *(v for v in numbers if type(v) is float)], sizes))

    def _numbers(self, given: Iterable[Any]) -> Iterator[Any]:
        """The plain numbers among some arguments, and those in small tensors that no operator made."""
        for value in given:
            if not isinstance(value, Tensor) and value not in self.explained:
                yield value
            elif not isinstance(value, Tensor):
                continue
            elif self._is_unknown(value) and value.numel() <= _FEW and not value.is_meta:
                yield from value.detach().flatten().tolist()

    def _is_unknown(self, tensor: Tensor) -> bool:
        """Whether no operator of this pass made a tensor, and it is no parameter, buffer or input."""
        found = self._states.get(id(tensor))
        return found is None or found[0]() is not tensor

    def _state(self, tensor: Tensor) -> _State:
        if self._is_unknown(tensor):
            return _UNKNOWN if tensor.numel() > _FEW else _WHOLE  # `_numbers` compares few numbers themselves
        state = self._states[id(tensor)][1]
        for other, lacks in self._written:
            if _share_memory(other, tensor):
                state = replace(state, lacks=state.lacks | lacks, axes=None)
        return state

    def _compare(self, path: str, module: nn.Module) -> None:
        """Name what a module returns after the module, if it has the same units as in the earlier pass."""
        calls = itertools.count()

        def ended(module: nn.Module, args: Any, output: Any) -> None:
            call = next(calls)
            for number, tensor in enumerate(v for v in leaves(output) if isinstance(v, Tensor)):
                place, state = (path, call, number), self._state(tensor)
                self.returns[place] = tensor.shape, state
                known = self.returns if self._earlier is None else self._earlier.returns
                shape, before = known.get(place, (None, state))
                same = (state.lacks, state.order) == (before.lacks, before.order)
                of_user = _NEW in state.order and state.order - {_NEW} <= before.order
                if (same or of_user) and tensor.shape == shape:
                    self._name(tensor, place)
                    self._states[id(tensor)] = weakref.ref(tensor), before
                    rest = [one for one in self._written if not _share_memory(one[0], tensor)]
                    self._written = [*rest, (tensor, before.lacks)]

        module.register_forward_hook(ended)

    def watch(self, module: nn.Module) -> None:
        """Record whether a module runs, and only with operators that are left out: see `works_by_number`."""

        def begin(*_: Any) -> None:
            self.ran.append(module)
            self.inside.append(module)

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(lambda *_: self.inside.remove(module))

    def works_by_number(self, module: nn.Module) -> bool:
        """Whether a module ran, and only operators in it that work on each number by itself."""
        return any(one is module for one in self.ran) and not any(one is module for one in self.mixing)

    def _sizes_in(self, given: Iterable[Any]) -> list[Any]:
        """The numbers that may follow from a size of a tensor, as in ``h / h.shape[-1] ** 0.5``."""
        shapes = [v.shape for v in given if isinstance(v, Tensor)]
        given = [v for v in given if isinstance(v, Tensor) or v not in self.explained]
        return _follows(given, {n for shape in shapes for n in (*shape, shape.numel())} - self._input_sizes)

    def _operand(self, tensor: Tensor) -> Any:
        """The name of an operator's argument. All floats in which no units are missing have one name.

        Whole numbers and bools have names of their own, since they may say where units go. So have weights.
        """
        name, state = self._name_of(tensor), self._state(tensor)
        is_named = state.lacks or state.reads or state.is_weight or not self._knows_cut
        return name if is_named or name == "noise" or not tensor.is_floating_point() else _ANY

    def _name(self, tensor: Tensor, name: Any) -> None:
        self._names[id(tensor)] = weakref.ref(tensor), name

    def _name_of(self, tensor: Tensor) -> Any:
        known = self._names.get(id(tensor))
        return None if known is None or known[0]() is not tensor else known[1]


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _follows(given: Iterable[Any], sizes: Iterable[int]) -> list[Any]:
    """The plain numbers that may follow from one of some sizes."""
    found: list[Any] = [v for v in given if type(v) in (int, float) and abs(v) not in (0, 1)]
    powers = [n**k for n in {*sizes} - {0, 1} for k in (1, -1, 0.5, -0.5)] if found else []
    return [v for v in found if any(math.isclose(abs(v), power) for power in powers)]
