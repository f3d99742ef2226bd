"""Arguments in a call of a pruned module that no trace has had: a switch, or a tensor given or left out.

Switches are bools, whole numbers and strings, such as ``pooled=True``. The tensor may be a mask. Whether a
tensor requires a gradient, or is not contiguous in memory, is a switch too. The first such call is checked:
it goes on if it runs the same operators where units are missing as a call with known arguments. Else it is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from inspect import Parameter
from typing import Any

from torch import Tensor, nn

from secateur.common.preserving import is_alike
from secateur.graph.inputs import Arguments, InputSpec, parameters_of
from secateur.graph.leaf import Place

_KINDS = (bool, int, str)
"""The types of switches. A float changes numbers."""
_FREE = frozenset({"logits_to_keep", "return_dict", "use_cache"})
"""Switches of Transformers' `generate` that are not checked, since they are about the results alone. A cache
is a result too, but only for the next call of the same module.
"""
_SEVERAL = 8
"""An argument with this many right values, such as the number of a step, counts as a number and no switch."""


class Placeholder(Enum):
    """Stands for an argument that is a tensor."""

    TENSOR = "a tensor"

    def __repr__(self) -> str:
        return self.value


TENSOR = Placeholder.TENSOR

_STATES: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Tensor]]] = {
    ".requires_grad": (lambda tensor: tensor.requires_grad, Tensor.detach),
    ".is_contiguous()": (lambda tensor: not tensor.is_contiguous(), Tensor.contiguous),
}
"""States in which no tensor of a trace is: a test for each, and a function that undoes it."""

Switches = dict[str, Any]
"""Name of an argument -> the value of a switch, `TENSOR` for a tensor, None for a tensor that is left out."""


class KnownArguments:
    """The arguments with which a pruned module is known to be right.

    Attributes:
        values: Name of an argument -> its values in traces, as in `Switches`.
        together: Further arguments that were checked together: names with values, as Python writes them.
    """

    def __init__(self, model: nn.Module, inputs: InputSpec | None) -> None:
        """Take the arguments of the calls that the trace has made of `model`; see `InputSpec.also`."""
        parameters = parameters_of(model)
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        by_number = {str(number): p.name for number, p in enumerate(parameters)}
        self.values: dict[str, list[Any]] = {}
        self.together: set[frozenset[tuple[str, str]]] = set()
        self.inputs = inputs
        # Read once, since every call is checked.
        self._names = _positional(parameters)
        self._may_lack = frozenset(p.name for p in parameters if p.default is None)
        for spec in _every(inputs):
            given = {**spec.constants(), **dict.fromkeys(spec.tensors(), TENSOR)}
            # Where the description was made without the model, positional arguments have numbers for names.
            by_name = {by_number.get(name, name): value for name, value in given.items()}
            for name, value in {**defaults, **by_name}.items():
                if value is None or value is TENSOR or isinstance(value, _KINDS):
                    self.values.setdefault(name, []).append(value)

    def unknown(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, tensors: bool) -> Switches:
        """Return the arguments of a call that are not known; tensors and their states only with `tensors`."""
        if self.inputs is None:
            return {}
        given = _by_name(self._names, (tuple(args), dict(kwargs)))
        left_out = self._may_lack - given.keys()
        states = {
            f"{name}{state}": state == ".requires_grad"
            for name, value in given.items()
            for state, (is_in, _) in _STATES.items()
            if isinstance(value, Tensor) and is_in(value)
        }
        found = {}
        for name, value in {**given, **dict.fromkeys(left_out), **states}.items():
            value, known = TENSOR if isinstance(value, Tensor) else value, self.values.get(name, [])
            checked = {one for each in self.together for one in each if one[0] == name}
            if value is None:
                is_new = any(v is TENSOR for v in known) and not any(v is None for v in known)
            elif value is TENSOR:
                is_new = not any(v is TENSOR for v in known)
            else:
                is_new = isinstance(value, _KINDS) and not any(is_alike(value, v) for v in known)
            is_new &= tensors or (isinstance(value, _KINDS) and name not in states)
            if is_new and name not in _FREE and len(checked) < _SEVERAL:
                found[name] = value
        return {} if not found or _written(found) in self.together else found

    def add(self, switches: Switches) -> None:
        """Note that these values are right together."""
        self.together.add(_written(switches))

    def with_known_values(self, module: nn.Module, given: Arguments, switches: Switches) -> Arguments:
        """Return the arguments of a call with known values in place of these switches."""
        args, kwargs = given
        parameters, arguments = parameters_of(module), named(module, given)
        new = {p.name: p.default for p in parameters if p.name in switches and p.default is not p.empty}
        for name in switches:
            for value in self.values.get(name, [])[:1]:
                new[name] = self._drawn(name, arguments) if value is TENSOR else value
        for name, value in arguments.items():
            for state, (_, as_traced) in _STATES.items():
                if f"{name}{state}" in switches and name not in switches:
                    new[name] = value = as_traced(value)
        positional = [new.pop(name, value) for name, value in [*arguments.items()][: len(args)]]
        return tuple(positional), {k: value for k, value in kwargs.items() if k not in switches} | new

    def _drawn(self, name: str, given: Mapping[str, Any]) -> Any:
        """Draw a tensor that was left out, with the sizes of the other tensors of the call."""
        device = next((v.device for v in given.values() if isinstance(v, Tensor)), "cpu")
        for spec in _every(self.inputs):
            if name not in spec.tensors():
                continue
            sizes: dict[Place, int] = {}
            for axis in spec.open:
                for other, at in axis.places:
                    value = given.get(other)
                    if isinstance(value, Tensor) and at < value.ndim:
                        sizes |= dict.fromkeys(axis.places, value.shape[at])
            args, kwargs = spec.example(sizes=sizes, device=device)
            return {**dict(zip(spec.names, args, strict=False)), **kwargs}[name]
        return None


def named(module: nn.Module, given: Arguments) -> dict[str, Any]:
    """Return the arguments of a call by name, those without a name by their number."""
    return _by_name(_positional(parameters_of(module)), given)


def _positional(parameters: Sequence[Parameter]) -> tuple[str, ...]:
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)


def _by_name(names: Sequence[str], given: Arguments) -> dict[str, Any]:
    args, kwargs = given
    numbers = map(str, range(len(names), len(args)))
    return {**dict(zip((*names, *numbers), args, strict=False)), **kwargs}


def _every(inputs: InputSpec | None) -> Iterator[InputSpec]:
    if inputs is not None:
        yield inputs
        for spec in inputs.also:
            yield from _every(spec)


def _written(switches: Switches) -> frozenset[tuple[str, str]]:
    return frozenset((name, repr(value)) for name, value in switches.items())
