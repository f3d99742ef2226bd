"""Arguments in a call of a pruned module that no trace has had: a switch, or a tensor given or left out.

Switches are bools, whole numbers and strings, such as ``pooled=True``. A tensor may be a mask. Whether a
tensor requires a gradient, or lies apart in memory, is a switch too. The first such call is looked into. It
goes on if it gives what a call as in the trace gives, or runs the same operators where units are missing.
Else it is refused.
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
"""Switches that are not looked into: those of Transformers' `generate` about the results alone. A cache is
returned too, but for the next call of the same module.
"""
_SEVERAL = 8
"""An argument with so many right values, as the number of a step, is a number and no switch."""


class Stand(Enum):
    """What stands for an argument that is no switch."""

    TENSOR = "a tensor"

    def __repr__(self) -> str:
        return self.value


TENSOR = Stand.TENSOR

_STATES: dict[str, tuple[Callable[[Tensor], bool], Callable[[Tensor], Tensor]]] = {
    ".requires_grad": (lambda tensor: tensor.requires_grad, Tensor.detach),
    ".is_contiguous()": (lambda tensor: not tensor.is_contiguous(), Tensor.contiguous),
}
"""How a tensor may be other than in a trace: whether it is so, and the same numbers as in a trace."""

Switches = dict[str, Any]
"""Values by the name of the argument: of switches, `TENSOR` for a tensor, None where one is left out."""


class Known:
    """The arguments that are known to be right.

    Attributes:
        values: By the name of the argument; see `Switches`.
        together: What was looked into, several arguments at once: names with values, as Python writes them.
    """

    def __init__(self, model: nn.Module, inputs: InputSpec | None) -> None:
        """Take the arguments of the calls that the trace has made of `model`; see `InputSpec.also`."""
        parameters = parameters_of(model)
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        by_number = {str(number): p.name for number, p in enumerate(parameters)}
        self.values: dict[str, list[Any]] = {}
        self.together: set[frozenset[tuple[str, str]]] = set()
        self.inputs = inputs
        # Read once, since every call is looked at.
        self._names = _positional(parameters)
        self._may_lack = frozenset(p.name for p in parameters if p.default is None)
        for spec in _every(inputs):
            given = {**spec.constants(), **dict.fromkeys(spec.tensors(), TENSOR)}
            # Where the description was made without the model, positional arguments have numbers for names.
            known = {by_number.get(name, name): value for name, value in given.items()}
            for name, value in {**defaults, **known}.items():
                if value is None or value is TENSOR or isinstance(value, _KINDS):
                    self.values.setdefault(name, []).append(value)

    def others(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, tensors: bool) -> Switches:
        """Return the arguments of a call that are other than those that are known; `tensors`: these too."""
        if self.inputs is None:
            return {}
        given = _by_name(self._names, (tuple(args), dict(kwargs)))
        left_out = self._may_lack - given.keys()
        states = {
            f"{name}{state}": state == ".requires_grad"
            for name, value in given.items()
            for state, (is_so, _) in _STATES.items()
            if isinstance(value, Tensor) and is_so(value)
        }
        found = {}
        for name, value in {**given, **dict.fromkeys(left_out), **states}.items():
            value, known = TENSOR if isinstance(value, Tensor) else value, self.values.get(name, [])
            looked = {one for each in self.together for one in each if one[0] == name}
            if value is None:
                is_other = any(v is TENSOR for v in known) and not any(v is None for v in known)
            elif value is TENSOR:
                is_other = not any(v is TENSOR for v in known)
            else:
                is_other = isinstance(value, _KINDS) and not any(is_alike(value, v) for v in known)
            is_other &= tensors or (isinstance(value, _KINDS) and name not in states)
            if is_other and name not in _FREE and len(looked) < _SEVERAL:
                found[name] = value
        return {} if not found or _written(found) in self.together else found

    def take(self, switches: Switches) -> None:
        """Note that these values are right together."""
        self.together.add(_written(switches))

    def usual(self, module: nn.Module, given: Arguments, switches: Switches) -> Arguments:
        """Return the arguments of a call with values that are known, in place of these switches."""
        args, kwargs = given
        parameters, arguments = parameters_of(module), named(module, given)
        mine = {p.name: p.default for p in parameters if p.name in switches and p.default is not p.empty}
        for name in switches:
            for value in self.values.get(name, [])[:1]:
                mine[name] = self._drawn(name, arguments) if value is TENSOR else value
        for name, value in arguments.items():
            for state, (_, as_traced) in _STATES.items():
                if f"{name}{state}" in switches and name not in switches:
                    mine[name] = value = as_traced(value)
        put = [mine.pop(name, value) for name, value in [*arguments.items()][: len(args)]]
        return tuple(put), {name: value for name, value in kwargs.items() if name not in switches} | mine

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
