"""Arguments in a call of a pruned module that no trace has had: a switch, or a tensor given or left out.

Switches are bools, numbers, strings, members of enumerations and functions, such as ``pooled=True``.
The tensor may be a mask. Entries of lists, tuples and mappings count like arguments, and so does how many a
list has. Whether a tensor requires a gradient, is not contiguous in memory, has numbers of another kind or
another number of axes is a switch too. The first such call is checked: it goes on if it runs the same
operators where units are missing as a call with known arguments. Else it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.common.preserving import is_alike
from secateur.graph.inputs import Arguments, InputSpec, parameters_of
from secateur.graph.leaf import Leaf, Place

_KINDS = (bool, int, float, str, Enum, torch.dtype)
"""The types of switches, with functions."""
_FREE = frozenset({"logits_to_keep", "return_dict", "use_cache", "past_key_values"})
"""Arguments of Transformers' `generate` that are not checked, since they are about the results alone. A cache
is a result too, but only for the next call of the same module.
"""
_SEVERAL = 8
"""An argument with this many right values, such as the number of a step, counts as a number and no switch."""


class Placeholder(Enum):
    """Stands for an argument that is a tensor, or a list, tuple or mapping."""

    TENSOR = "a tensor"
    CONTAINER = "a list, tuple or mapping"

    def __repr__(self) -> str:
        return self.value


TENSOR, CONTAINER = Placeholder.TENSOR, Placeholder.CONTAINER


def _number_kind(dtype: torch.dtype) -> str:
    if dtype is torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "int"


def _with_axes(tensor: Tensor, count: int) -> Tensor:
    """Merge the first axes of a tensor, or put axes of one position before them."""
    more = tensor.ndim - count
    return tensor.flatten(0, more) if more > 0 else tensor[(None,) * -more]


_STATES: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Tensor]]] = {
    ".requires_grad": (lambda tensor: tensor.requires_grad, Tensor.detach),
    ".is_contiguous()": (lambda tensor: not tensor.is_contiguous(), Tensor.contiguous),
}
"""States in which no tensor of a trace is: a test for each, and a function that undoes it."""

_FORMS: dict[str, tuple[Callable[[Leaf], Any], Callable[[Tensor], Any], Callable[[Tensor, Leaf], Tensor]]] = {
    ".dtype": (
        lambda leaf: _number_kind(getattr(torch, leaf.dtype)),
        lambda tensor: _number_kind(tensor.dtype),
        lambda tensor, leaf: tensor.to(getattr(torch, leaf.dtype)),
    ),
    ".ndim": (
        lambda leaf: len(leaf.shape),
        lambda tensor: tensor.ndim,
        lambda tensor, leaf: _with_axes(tensor, len(leaf.shape)),
    ),
}
"""What tensors of a trace have: of the description, of a tensor, and a function that gives it to a tensor."""

Switches = dict[str, Any]
"""Name of an argument, or of an entry such as ``masks.0`` -> the value of a switch, a `Placeholder`, or None
for what is left out."""


class KnownArguments:
    """The arguments with which a pruned module is known to be right.

    Attributes:
        values: Name of an argument -> its values in traces, as in `Switches`.
        together: Further arguments that were checked together: names with values, as Python writes them.
    """

    def __init__(self, model: nn.Module, inputs: InputSpec | None) -> None:
        """Take the arguments of the calls that the trace has made of `model`; see `InputSpec.also`."""
        parameters = parameters_of(model)
        self.values: dict[str, list[Any]] = {}
        self.together: set[frozenset[tuple[str, str]]] = set()
        self.inputs = inputs
        # Read once, since every call is checked.
        self._names = _positional(parameters)
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._leaves: dict[str, Leaf] = {}
        self._inside: dict[str, set[str]] = {}  # the entries of each container
        calls = [dict(self._of_trace(spec)) for spec in _every(inputs)]
        own = {p.name for p in parameters}
        self._may_lack = {name for name, default in self._defaults.items() if default is None}
        self._may_lack |= {name for name in self._leaves if _top(name) == name and name not in own}
        for call in calls:
            for name, value in {**self._defaults, **dict.fromkeys(self._left_out(call)), **call}.items():
                if value is None or isinstance(value, Placeholder) or _is_switch(value):
                    self.values.setdefault(name, []).append(value)

    def _of_trace(self, spec: InputSpec) -> Iterator[tuple[str, Any]]:
        for number, (name, leaf) in enumerate(spec.leaves().items()):
            # Where the description was made without the model, positional arguments have numbers for names.
            by_number = name == str(number) and number < len(self._names)
            yield from self._described(self._names[number] if by_number else name, leaf)

    def _described(self, name: str, leaf: Leaf) -> Iterator[tuple[str, Any]]:
        """Yield what `_entries` yields for an argument like this one."""
        if leaf.kind == "constant":
            yield name, leaf.value
            return
        self._leaves.setdefault(name, leaf)
        yield name, TENSOR if leaf.kind == "tensor" else CONTAINER
        if leaf.kind == "tensor":
            yield from ((f"{name}{form}", known(leaf)) for form, (known, _, _) in _FORMS.items())
        elif leaf.kind != "dict":
            yield f"len({name})", len(leaf.items)
        keys = leaf.keys or map(str, range(len(leaf.items)))
        for key, item in zip(keys, leaf.items, strict=True):
            self._inside.setdefault(name, set()).add(f"{name}.{key}")
            yield from self._described(f"{name}.{key}", item)

    def _left_out(self, given: Mapping[str, Any]) -> set[str]:
        """Return what a call lacks: arguments, and entries of the containers that it has."""
        return (self._may_lack.union(*(self._inside.get(name, ()) for name in given))) - given.keys()

    def unknown(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, tensors: bool) -> Switches:
        """Return what of a call is not known; tensors and what is in containers only with `tensors`."""
        if self.inputs is None:
            return {}
        given = dict(_entries(_by_name(self._names, (tuple(args), dict(kwargs)))))
        found = {}
        for name, value in {**given, **dict.fromkeys(self._left_out(given))}.items():
            known = self.values.get(name, [])
            if value is None:
                is_new = bool(known) and not any(v is None for v in known)
            elif isinstance(value, Placeholder):
                is_new = not any(v is value for v in known)
            else:
                is_new = _is_switch(value) and not any(is_alike(value, v) for v in known)
            is_new &= tensors or (_is_switch(value) and _top(name) == name)
            if is_new and _top(name) not in _FREE:
                found[name] = value
        found = {  # what a tensor is like says nothing where the trace had none
            name: value
            for name, value in found.items()
            if not (name.endswith(tuple(_FORMS)) and name.rpartition(".")[0] in found)
            and len({one for each in self.together for one in each if one[0] == name}) < _SEVERAL
        }
        return {} if not found or _written(found) in self.together else found

    def add(self, switches: Switches) -> None:
        """Note that these values are right together."""
        self.together.add(_written(switches))

    def with_known_values(self, module: nn.Module, given: Arguments, switches: Switches) -> Arguments:
        """Return the arguments of a call with known values in place of these switches."""
        args, kwargs = given
        arguments = named(module, given)
        new: dict[str, Any] = {}
        for name in dict.fromkeys(map(_top, switches)):
            value, of_it = arguments.get(name), [one for one in switches if _top(one) == name]
            if all(one.endswith((*_STATES, *(_FORMS if isinstance(value, Tensor) else ()))) for one in of_it):
                new[name] = _as_traced(value, self._leaves.get(name))
                continue
            known = self.values.get(name, [None])[0] if name in self.values else self._defaults.get(name, ...)
            new[name] = self._drawn(module, name, arguments) if isinstance(known, Placeholder) else known
        positional = [new.pop(name, value) for name, value in [*arguments.items()][: len(args)]]
        by_name = {k: value for k, value in (kwargs | new).items() if value is not ...}
        return tuple(value for value in positional if value is not ...), by_name

    def _drawn(self, module: nn.Module, name: str, given: Mapping[str, Any]) -> Any:
        """Draw a tensor or a container that the trace had, with the sizes of the tensors of the call."""
        tensors = {name: value for name, value in _nested(given) if isinstance(value, Tensor)}
        device = next((v.device for v in tensors.values()), "cpu")
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
        for spec in _every(self.inputs):
            if name not in spec.leaves():
                continue
            new = [v.shape for n, v in tensors.items() if n not in spec.tensors() and name in spec.tensors()]
            ndim = len(spec.tensors()[name].shape) if new else 0
            # A tensor with more axes may be what the model makes of it, as hidden states of ids.
            alike = [shape for shape in new if len(shape) >= ndim]
            shape = min(alike, key=len, default=())
            places = [place for axis in spec.open for place in axis.places if place[0] == name and shape]
            # Such as those of labels, from which a model makes the ids that are left out.
            sizes: dict[Place, int] = {place: shape[place[1]] for place in places}
            for axis in spec.open:
                for other, at in axis.places:
                    value = tensors.get(other)
                    if value is not None and at < value.ndim:
                        sizes |= dict.fromkeys(axis.places, value.shape[at])
            args, kwargs = spec.example(sizes=sizes, device=device, dtype=dtype)
            found = {**dict(zip(spec.names, args, strict=False)), **kwargs}[name]
            own: Any = type(given.get(name))
            is_named = isinstance(found, tuple) and len(getattr(own, "_fields", ())) == len(found)
            return own(*found) if is_named else found
        return None


def named(module: nn.Module, given: Arguments) -> dict[str, Any]:
    """Return the arguments of a call by name, those without a name by their number."""
    return _by_name(_positional(parameters_of(module)), given)


def are_axes(switches: Switches) -> bool:
    """Whether a call differs from known ones in the numbers of axes of its tensors, and in nothing else."""
    numbers = [name for name in switches if name.endswith(".ndim")]
    return bool(numbers) and all(name.endswith((".ndim", *_STATES)) for name in switches)


def _positional(parameters: Sequence[Parameter]) -> tuple[str, ...]:
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)


def _by_name(names: Sequence[str], given: Arguments) -> dict[str, Any]:
    args, kwargs = given
    numbers = map(str, range(len(names), len(args)))
    return {**dict(zip((*names, *numbers), args, strict=False)), **kwargs}


def _is_switch(value: Any) -> bool:
    return (isinstance(value, _KINDS) or callable(value)) and not isinstance(value, Placeholder)


def _top(name: str) -> str:
    """Return the argument that an entry is in: ``masks`` of ``masks.0`` and of ``len(masks)``."""
    return name.removeprefix("len(").removesuffix(")").partition(".")[0]


def _items(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return the entries of a container, with their names; none if it is none."""
    if isinstance(value, list | tuple):
        return [(f"{name}.{number}", one) for number, one in enumerate(value)]
    return [(f"{name}.{key}", one) for key, one in value.items()] if isinstance(value, Mapping) else []


def _nested(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each argument, each container before what is in it."""
    left = [*arguments.items()][::-1]
    while left:
        name, value = left.pop()
        yield name, value
        left += _items(name, value)[::-1]


def _entries(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what may be a switch of each argument, and of all that is in it, as in `Switches`."""
    for name, value in _nested(arguments):
        if isinstance(value, Tensor):
            yield name, TENSOR
            for state, (is_in, _) in _STATES.items():
                if is_in(value):
                    yield f"{name}{state}", state == ".requires_grad"
            yield from ((f"{name}{form}", of(value)) for form, (_, of, _) in _FORMS.items())
        elif isinstance(value, list | tuple | Mapping):
            yield name, CONTAINER
            if not isinstance(value, Mapping):
                yield f"len({name})", len(value)
        else:
            yield name, value


def _as_traced(value: Any, leaf: Leaf | None) -> Any:
    """Return a tensor, or all tensors of a container, in the state of those that the trace had."""

    def undone(tensor: Tensor) -> Tensor:
        for is_in, undo in _STATES.values():
            tensor = undo(tensor) if is_in(tensor) else tensor
        for known, of, undo_form in _FORMS.values():
            if leaf is not None and leaf.kind == "tensor" and of(tensor) != known(leaf):
                tensor = undo_form(tensor, leaf)
        return tensor

    return pytree.tree_map_only(Tensor, undone, value)


def _every(inputs: InputSpec | None) -> Iterator[InputSpec]:
    if inputs is not None:
        yield inputs
        for spec in inputs.also:
            yield from _every(spec)


def _written(switches: Switches) -> frozenset[tuple[str, str]]:
    return frozenset((name, repr(value)) for name, value in switches.items())
