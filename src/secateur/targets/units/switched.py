"""Switches in a call of a pruned module: arguments such as ``train=True`` with values that no trace has had.

The first call with such a value is looked into. It goes on if it gives what the call without the value gives,
or runs the same operators where units are missing. Else it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.common.preserving import is_alike
from secateur.graph.inputs import Arguments, InputSpec, parameters_of

_KINDS = (bool, int, str)
"""The types of switches. A float changes numbers, and None stands for a tensor that is not there."""
_FREE = frozenset({"use_cache"})
"""Switches that are not looked into. A cache is returned too, but for the next call of the same module."""
_SEVERAL = 8
"""An argument with so many right values, as the number of a step, is a number and no switch."""

Switches = dict[str, Any]
"""Values of switches, by the name of the argument."""


class Known:
    """The values of switches that are known to be right.

    Attributes:
        values: By the name of the argument.
        together: Those that were looked into, several at once: names with values, as Python writes them.
    """

    def __init__(self, model: nn.Module, inputs: InputSpec | None) -> None:
        """Take the values of the calls that the trace has made of `model`; see `InputSpec.also`."""
        defaults = {p.name: p.default for p in parameters_of(model) if isinstance(p.default, _KINDS)}
        self.values: dict[str, list[Any]] = {}
        self.together: set[frozenset[tuple[str, str]]] = set()
        self.is_known = inputs is not None
        for spec in _every(inputs):
            for name, value in {**defaults, **spec.constants()}.items():
                if isinstance(value, _KINDS):
                    self.values.setdefault(name, []).append(value)

    def others(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Switches:
        """Return the switches of a call that have another value than those that are known."""
        if not self.is_known:
            return {}
        given = dict(kwargs)
        if any(isinstance(value, _KINDS) for value in args):
            given |= {p.name: value for p, value in zip(parameters_of(module), args, strict=False)}
        found = {
            name: value
            for name, value in given.items()
            if isinstance(value, _KINDS)
            and name not in _FREE
            and not any(is_alike(value, v) for v in self.values.get(name, []))
            and len({one for each in self.together for one in each if one[0] == name}) < _SEVERAL
        }
        return {} if not found or _written(found) in self.together else found

    def take(self, switches: Switches) -> None:
        """Note that these values are right together."""
        self.together.add(_written(switches))

    def usual(self, module: nn.Module, given: Arguments, switches: Switches) -> Arguments:
        """Return the arguments of a call with values that are known, in place of these switches."""
        args, kwargs = given
        parameters = parameters_of(module)
        mine = {p.name: p.default for p in parameters if p.name in switches and p.default is not p.empty}
        mine |= {name: self.values[name][0] for name in switches if self.values.get(name)}
        put = [mine.get(p.name, v) for p, v in zip(parameters, args, strict=False)]
        rest = {name: mine.get(name, v) for name, v in kwargs.items() if name in mine or name not in switches}
        return (*put, *args[len(parameters) :]), rest


def _every(inputs: InputSpec | None) -> Iterator[InputSpec]:
    if inputs is not None:
        yield inputs
        for spec in inputs.also:
            yield from _every(spec)


def _written(switches: Switches) -> frozenset[tuple[str, str]]:
    return frozenset((name, repr(value)) for name, value in switches.items())
