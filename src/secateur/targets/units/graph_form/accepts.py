"""The inputs that a captured program takes, and errors that say why it takes no others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from secateur.common.foreign import line_of
from secateur.errors import InputError
from secateur.graph.graph import Graph
from secateur.graph.inputs import Arguments, parameters_of
from secateur.graph.nodes import is_open, lifted
from secateur.targets.units.graph_form.variants import Facts, State

_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Leaf:
    """One input: a tensor, with its dtype and sizes, or a constant. Sizes may be symbolic expressions."""

    name: str
    dtype: torch.dtype | None = None
    sizes: tuple[Any, ...] = ()
    value: Any = None


@dataclass(frozen=True)
class Call:
    """Arguments of a call.

    Attributes:
        leaves: The arguments, flattened.
        casting: Whether autocast is on.
        key: Equal for two calls if the program takes both or neither.
    """

    leaves: list[Any]
    casting: bool
    key: Any


@dataclass(frozen=True)
class Accepts:
    """The arguments and dtypes for which a program computes what the model does.

    Attributes:
        name: The name of the model's class.
        parameters: The names of the positional arguments of the model's forward pass.
        defaults: The defaults of its arguments, as far as they are plain values.
        structure: How positional and keyword arguments are nested.
        leaves: The inputs, in order.
        conditions: The conditions that sizes must satisfy, each with the line of code that needs it.
        least: The smallest allowed value of each symbolic size.
        batch: The symbolic sizes that are the batch size.
        states: The allowed combinations: dtypes of parameters, dtypes of inputs, and whether autocast is on.
        refused: For some other combinations, the reason.
        one_sample: Whether the program also takes a single sample.
    """

    name: str
    parameters: tuple[str, ...]
    defaults: Mapping[str, Any]
    structure: Any
    leaves: tuple[Leaf, ...]
    conditions: tuple[tuple[Any, str], ...]
    least: Mapping[Any, int]
    batch: frozenset[Any]
    states: frozenset[State] = frozenset()
    refused: Mapping[State, str] = field(default_factory=dict, repr=False)
    one_sample: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        program: ExportedProgram,
        graph: Graph,
        lines: Mapping[Any, str],
    ) -> Accepts:
        """Describe the inputs of a program that was captured from `model`.

        Args:
            model: The dense model.
            program: The captured program.
            graph: The trace of the model.
            lines: The line of code behind each assumption about sizes, as far as known.
        """
        names = graph.inputs.tensors()
        batch_places = {place for axis in graph.inputs.open if axis.batch for place in axis.places}
        leaves: list[Leaf] = []
        batch: set[Any] = set()
        environment = None
        tensors = iter(names)
        for node, kind, _ in lifted(program):
            if kind is not InputKind.USER_INPUT:
                continue
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                leaves.append(Leaf(node.name, value=value))
                continue
            name = next(tensors)
            shape: tuple[Any, ...] = tuple(value.shape)  # symbols, although typed as integers
            sizes = [s.node.expr if is_open(s) else int(s) for s in shape]
            leaves.append(Leaf(name, value.dtype, tuple(sizes)))
            batch.update(s for k, s in enumerate(sizes) if (name, k) in batch_places)
            environment = next((s.node.shape_env for s in shape if is_open(s)), environment)
        symbols = {s for leaf in leaves for s in leaf.sizes if isinstance(s, sympy.Symbol)}
        conditions = [] if environment is None else _conditions(environment, symbols, lines)
        least = {s: int(r.lower) for s, r in program.range_constraints.items() if s in symbols}
        parameters, defaults = signature_of(model)
        structure = program.call_spec.in_spec
        return cls(
            type(model).__name__, parameters, defaults, structure, tuple(leaves), tuple(conditions), least,
            frozenset(batch),
        )  # fmt: skip

    def with_facts(self, facts: Facts) -> Accepts:
        """Add which dtypes are allowed, and whether a single sample is."""
        return replace(
            self, states=frozenset(facts.states), refused=facts.refused, one_sample=facts.one_sample
        )

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """Arrange arguments as in the capture, where some were passed by position and others by name.

        Raises:
            InputError: They are not the arguments of the capture.
        """
        positional, named = pytree.tree_unflatten([None] * self.structure.num_leaves, self.structure)
        count, order = len(positional), list(named)
        given = dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        first = list(args)[:count]
        for name in self.parameters[len(first) : count]:
            if name in given:
                first.append(given.pop(name))
        rest = {k: given[k] if k in given else self.defaults.get(k, _Missing) for k in order}
        captured = {*self.parameters[:count], *order}
        extra = [k for k, v in given.items() if k not in captured and not self._is_default(k, v)]
        missing = [k for k, v in rest.items() if v is _Missing]
        if len(first) != count or extra or missing or len(args) > max(count, len(self.parameters)):
            wanted = [*(self.parameters or ("?",))[:count], *(f"{k}=" for k in order)]
            got = [f"{len(args)} positional", *(f"{k}=" for k in kwargs)]
            raise InputError(
                f"{self.name}: expected the arguments it was captured with ({', '.join(wanted)}), got "
                f"{', '.join(got)}. Pass these, or take form 'module'."
            )
        return tuple(first), rest

    def _is_default(self, name: str, value: Any) -> bool:
        return name in self.defaults and type(value) in _PLAIN and value == self.defaults[name]

    def call(self, arguments: Arguments) -> Call:
        """Flatten the arguments of a call.

        Raises:
            InputError: They are nested in another way than in the capture.
        """
        leaves, structure = pytree.tree_flatten(arguments)
        if structure != self.structure:
            raise InputError(
                f"{self.name}: expected arguments of the structure it was captured with, "
                f"{self.structure}, got {structure}. Take form 'module'."
            )
        device = next((v.device.type for v in leaves if isinstance(v, torch.Tensor)), "cpu")
        casting = device != "meta" and torch.is_autocast_enabled(device)
        key = tuple((tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else v for v in leaves)
        return Call(leaves, casting, (key, casting, torch.get_default_dtype()))

    def check(self, call: Call, parameters: frozenset[torch.dtype]) -> None:
        """Make sure that the program and the model compute the same for these arguments.

        Args:
            call: A call, as `call` returns it.
            parameters: The dtypes of parameters with floats.

        Raises:
            InputError: It is not known that they do.
        """
        tensors = []
        for leaf, value in zip(self.leaves, call.leaves, strict=True):
            if (leaf.dtype is None) is isinstance(value, torch.Tensor) or (
                leaf.dtype is None and (type(value) is not type(leaf.value) or value != leaf.value)
            ):
                wanted = "a tensor" if leaf.dtype is not None else repr(leaf.value)
                got = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
                raise InputError(f"{self.name}: input {leaf.name}: expected {wanted}, got {got}. {OTHERWISE}")
            if isinstance(value, torch.Tensor):
                tensors.append((leaf, value))
        self._check_dtypes(tensors, parameters, casting=call.casting)
        self.check_sizes(tensors)

    def _check_dtypes(
        self, tensors: list[tuple[Leaf, torch.Tensor]], parameters: frozenset[torch.dtype], *, casting: bool
    ) -> None:
        """Refuse dtypes for which the program is not known to be right."""
        state = parameters, tuple(value.dtype for _, value in tensors), casting
        # `verify` computes everything in float64, whatever dtype the code names.
        doubled = torch.get_default_dtype() is torch.float64 and parameters <= {torch.float64}
        if state in self.states or doubled:
            return
        for leaf, value in tensors:
            floating = value.is_floating_point() and leaf.dtype is not None and leaf.dtype.is_floating_point
            if value.dtype != leaf.dtype and not floating:
                raise InputError(
                    f"{self.name}: input {leaf.name}: expected {leaf.dtype}, got {value.dtype}. {OTHERWISE}"
                )
        allowed = "; ".join(sorted(_described(s) for s in self.states))
        why = f" ({self.refused[state]})" if state in self.refused else ""
        raise InputError(
            f"{self.name}: expected dtypes in which the captured program is known to compute what the model "
            f"does: {allowed}; got {_described(state)}{why}. {OTHERWISE}"
        )

    def check_sizes(self, tensors: Sequence[tuple[Leaf, torch.Tensor]]) -> None:
        """Make sure that the program takes tensors of these sizes.

        Args:
            tensors: The tensors in order, each with its description.

        Raises:
            InputError: It does not.
        """
        found: dict[Any, tuple[int, str]] = {}
        for leaf, value in tensors:
            if value.ndim != len(leaf.sizes):
                raise InputError(
                    f"{self.name}: input {leaf.name}: expected {len(leaf.sizes)} axes, got {value.ndim}. "
                    f"{OTHERWISE}"
                )
            for axis, (size, got) in enumerate(zip(leaf.sizes, value.shape, strict=True)):
                place = f"axis {axis} of {leaf.name}"
                if isinstance(size, int) and size != got:
                    raise InputError(
                        f"{self.name}: input {leaf.name}, axis {axis}: expected {size}, the size that it was "
                        f"captured with, got {got}. {OTHERWISE}"
                    )
                if isinstance(size, sympy.Symbol) and found.setdefault(size, (got, place))[0] != got:
                    raise InputError(
                        f"{self.name}: expected {place} to be as long as {found[size][1]}, which is "
                        f"{found[size][0]}, got {got}. {OTHERWISE}"
                    )
        single = self.one_sample and all(found[s][0] == 1 for s in self.batch if s in found)
        numbers = {s: sympy.Integer(2 if single and s in self.batch else n) for s, (n, _) in found.items()}
        for size, number in numbers.items():
            if number < self.least.get(size, 2):
                raise InputError(
                    f"{self.name}: expected {found[size][1]} to be at least {self.least.get(size, 2)}, got "
                    f"{found[size][0]}: smaller ones may be computed in another way. {OTHERWISE}"
                )
        computed = [  # sizes that follow from others
            (sympy.Eq(size, got), "")
            for leaf, value in tensors
            for size, got in zip(leaf.sizes, value.shape, strict=True)
            if not isinstance(size, int | sympy.Symbol)
        ]
        for condition, line in (*self.conditions, *computed):
            if condition.xreplace(numbers) is not sympy.true:
                names = {s: sympy.Symbol(place) for s, (_, place) in found.items()}
                sizes = ", ".join(f"{place} is {n}" for n, place in found.values())
                raise InputError(
                    f"{self.name}: expected sizes for which {_written(condition.xreplace(names))}, as in the "
                    f"capture{f' ({line})' if line else ''}, got: {sizes}. {OTHERWISE}"
                )


OTHERWISE = "Take form 'module', or trace with inputs like these."


def _described(state: State) -> str:
    """Describe dtypes: ``float16 with inputs int64, float16``."""
    parameters, inputs, casting = state
    names = [
        ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)) for dtypes in (parameters, inputs)
    ]
    return f"{names[0] or 'no parameters'} with inputs {names[1]}{' under autocast' if casting else ''}"


def _written(condition: Any) -> str:
    """Write a relation with its sign in the middle: ``a <= b``."""
    if isinstance(condition, sympy.Rel):
        return f"{condition.lhs} {condition.rel_op} {condition.rhs}"
    return str(condition)


class _Missing:
    """Stands for an argument that is missing."""


def signature_of(model: nn.Module) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the names of the positional arguments of forward, and the defaults that are plain values."""
    found = parameters_of(model)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in found if p.kind in kinds)
    return names, {p.name: p.default for p in found if type(p.default) in _PLAIN}


def _conditions(environment: Any, symbols: set[Any], lines: Mapping[Any, str]) -> list[tuple[Any, str]]:
    """Return what the capture assumed about these symbols, and the line of code behind each assumption."""
    found = []
    for guard in environment.guards:
        condition = environment.replace(guard.expr)
        if condition is not sympy.true and condition.free_symbols <= symbols:
            place = getattr(getattr(guard, "sloc", None), "framework_loc", None)  # no public record
            line = lines.get(guard.expr) or line_of(place)
            found.append((getattr(condition, "canonical", condition), line))
    return found
