"""Find what depends on how a program was captured, by capturing the model in other variants.

A variant is training mode, another dtype, autocast or a single sample. If its capture runs the same
operators, the arguments that differ show what they depend on. If it runs others, the program cannot do what
the model does there, and refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from secateur.common.models import device_of
from secateur.common.preserving import preserved
from secateur.errors import CaptureError
from secateur.graph.capture import capture
from secateur.graph.graph import Graph
from secateur.graph.inputs import Arguments, samples_of
from secateur.graph.nodes import lifted, where
from secateur.graph.rules import operator_name
from secateur.targets.units.graph_form.alignment import (
    Difference,
    PathsDifferError,
    Place,
    Source,
    Steps,
    arguments,
)
from secateur.targets.units.graph_form.opened import Opened, TooMuchError, limited
from secateur.targets.units.graph_form.rehearsal import rehearsed
from secateur.targets.units.graph_form.sideeffects import side_effects_of

State = tuple[frozenset[torch.dtype], tuple[torch.dtype, ...], bool]
"""The dtypes of parameters with floats, the dtypes of the inputs, and whether autocast is on."""

Argument = tuple[int, Place]
"""An argument: the number of the call, and the place in its arguments."""

DEFAULT: Source = ("default", "")
"""The source that stands for PyTorch's default dtype."""

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LIMITS = ("min", "eps", "tiny", "max", "resolution")


@dataclass
class Facts:
    """What the arguments of a program's calls depend on, and what the program cannot do.

    Attributes:
        sources: Arguments whose true source only another capture shows.
        training: Arguments with another value in training mode, with that value.
        dtypes: Arguments that are the dtype of another value.
        limits: Arguments that are a limit of the dtype of another value, times a number.
        constants: Constants made in forward that have the dtype of another value, with their exact numbers.
        eval_only: Why the program cannot train; empty if it can.
        states: The dtypes for which the program is known to be right.
        refused: For other dtypes, why it is not.
        one_sample: Whether it is also right for a single sample.
        gradient: What changes the gradients of its operators, and where; empty if nothing does.
    """

    sources: dict[Argument, Source] = field(default_factory=dict)
    training: dict[Argument, Any] = field(default_factory=dict)
    dtypes: dict[Argument, Source] = field(default_factory=dict)
    limits: dict[Argument, tuple[Source, str, float]] = field(default_factory=dict)
    constants: dict[str, tuple[Source, torch.Tensor]] = field(default_factory=dict)
    eval_only: str = ""
    states: set[State] = field(default_factory=set)
    refused: dict[State, str] = field(default_factory=dict)
    one_sample: bool = False
    gradient: str = ""


@dataclass(frozen=True)
class _Variant:
    """How a model is captured. A dtype of None is that of the traced model."""

    training: bool = False
    parameters: torch.dtype | None = None
    inputs: torch.dtype | None = None
    default: torch.dtype | None = None
    autocast: bool = False
    single: bool = False


@dataclass
class _Capture:
    """A capture of a variant that runs the same operators as the program."""

    variant: _Variant
    state: State
    steps: Steps
    program: ExportedProgram
    differences: dict[Argument, Difference]


def find_facts(model: nn.Module, graph: Graph, opened: Opened | None = None) -> Facts:
    """Capture other variants of a model, and compare with the program of its trace, or with `opened`.

    Raises:
        ApplyError: The program has a random number fixed that the model draws anew at each call.
    """
    return _Search(model, graph, opened).run()


class _Search:
    def __init__(self, model: nn.Module, graph: Graph, opened: Opened | None) -> None:
        self.model, self.graph = model, graph
        self.axes = () if opened is None else opened.axes
        self.program = opened.program if opened is not None and self.axes else graph.program
        self.base = Steps(self.program)
        self.facts = Facts()
        self.inputs = [
            n.meta["val"]
            for n, kind, _ in lifted(self.program)
            if kind is InputKind.USER_INPUT and isinstance(n.meta.get("val"), torch.Tensor)
        ]
        self.stored = {
            name: n.meta["val"].dtype
            for n, kind, name in lifted(self.program)
            if kind in (InputKind.PARAMETER, InputKind.BUFFER) and name is not None
        }
        self.parameters = {
            n.meta["val"].dtype
            for n, kind, _ in lifted(self.program)
            if kind is InputKind.PARAMETER and n.meta["val"].is_floating_point()
        }
        self.found: list[_Capture] = []
        with self._in(_Variant()) as given:
            self.rehearsal = rehearsed(model, given)

    def run(self) -> Facts:
        seen = side_effects_of(self.model, self.graph.captured_inputs())
        seen.refuse()
        self.facts.states.add(self.state(_Variant()))
        self._training()
        self.facts.gradient = self.facts.gradient or seen.gradient
        uniform = self.parameters | {v.dtype for v in self.inputs if v.is_floating_point()}
        variants = [_Variant(parameters=dtype, inputs=dtype) for dtype in _FLOATS if uniform != {dtype}]
        variants.append(_Variant(autocast=True))
        differing = variants
        if not self._names_dtypes():
            differing = [variant for variant in variants if not self._makes_same_calls(variant)]
        captured = {variant: self._capture(variant) for variant in differing}
        if any(isinstance(found, _Capture) for found in captured.values()):
            captured = {variant: captured.get(variant) or self._capture(variant) for variant in variants}
        self._dtypes_differ(captured)
        self.facts.states |= {self.state(variant) for variant in variants if variant not in captured}
        if self.graph.static_batch is None:
            self.facts.one_sample = isinstance(self._capture(_Variant(single=True)), _Capture)
        return self.facts

    def _dtypes_differ(self, captured: dict[_Variant, _Capture | str]) -> None:
        """Compare captures in other dtypes, and find the arguments that follow the dtype."""
        for variant, found in captured.items():
            self._note(variant, found)
        if any(self._constants(self.program)):
            self._note(variant := _Variant(default=torch.float64), self._capture(variant))
        if any(isinstance(d.first, torch.dtype | float) for c in self.found for d in c.differences.values()):
            self._mixed()
        self._follow()

    def _names_dtypes(self) -> bool:
        """Whether the program converts to a dtype of floats, or holds numbers that forward made."""
        values = (v for node in self.base.nodes for _, v in arguments(node))
        return (
            any(v.is_floating_point or v.is_complex for v in values if isinstance(v, torch.dtype))
            or any(operator_name(node) == "aten.type_as.default" for node in self.base.nodes)
            or any(self._constants(self.program))
        )

    def _makes_same_calls(self, variant: _Variant) -> bool:
        """Whether a variant of the model makes the same calls. Then its capture would be the same too."""
        if self.rehearsal is None:
            return False
        with self._in(variant) as given:
            other = rehearsed(self.model, given, training=variant.training)
        return other is not None and other.calls == self.rehearsal.calls

    def _training(self) -> None:
        """Compare a capture in training mode. Note which arguments follow that mode, or why it is refused."""
        seen = side_effects_of(self.model, self.graph.captured_inputs(), training=True)
        self.facts.gradient = seen.gradient
        if seen.drawn or seen.kept:
            self.facts.eval_only = seen.drawn or seen.kept
            return
        variant = _Variant(training=True)
        if self._makes_same_calls(variant):
            return
        found = self._capture(variant)
        if isinstance(found, str):
            self.facts.eval_only = found
            return
        for argument, difference in found.differences.items():
            if isinstance(difference.second, torch.dtype | fx.Node) or isinstance(difference.first, fx.Node):
                self.facts.eval_only = f"it computes something else at {self._line(argument)}"
            self.facts.training[argument] = difference.second

    def _note(self, variant: _Variant, found: _Capture | str) -> bool:
        """Note a capture in another dtype. Return whether it runs the same operators."""
        state = self.state(variant)
        if isinstance(found, str):
            self.facts.refused[state] = found
            return False
        self.found.append(found)
        self.facts.states.add(state)
        return True

    def _mixed(self) -> None:
        """Capture with parameters in one dtype and inputs in another, since models may convert them."""
        if not self.parameters or not any(v.is_floating_point() for v in self.inputs):
            return
        low = torch.bfloat16 if self.parameters != {torch.bfloat16} else torch.float32
        own = [state for state in self.facts.states if not state[2]]
        for variant in (_Variant(parameters=low), _Variant(inputs=low)):
            if self._note(variant, self._capture(variant)):
                for state in own:  # if one mixed pair works, each pair of the known dtypes works
                    traced = self.state(_Variant())
                    pair = (state[0], traced[1]) if variant.parameters else (traced[0], state[1])
                    self.facts.states.add((*pair, False))

    def state(self, variant: _Variant) -> State:
        """Return the dtypes of a variant."""
        parameters = {variant.parameters} if variant.parameters and self.parameters else self.parameters
        inputs = (
            variant.inputs if variant.inputs is not None and v.is_floating_point() else v.dtype
            for v in self.inputs
        )
        return frozenset(parameters), tuple(inputs), variant.autocast

    @contextmanager
    def _in(self, variant: _Variant) -> Iterator[Arguments]:
        """Inside, the model runs as a variant. Yields the arguments of its call."""
        device = device_of(self.model)

        def given(value: torch.Tensor) -> torch.Tensor:
            dtype = variant.inputs if value.is_floating_point() else None
            return value.to(device, dtype or value.dtype)

        args, kwargs = pytree.tree_map_only(torch.Tensor, given, self.graph.captured_inputs())
        if variant.single:
            args, kwargs = samples_of((args, kwargs), [0])
        casting: Any = nullcontext()
        if variant.autocast and device.type != "meta":
            casting = torch.autocast(device.type, torch.bfloat16)
        with ExitStack() as stack:
            stack.enter_context(converted(self.model, self.stored, variant.parameters))
            stack.enter_context(default_dtype(variant.default))
            stack.enter_context(casting)
            if variant.training:
                _without_counts(self.model)
            yield args, kwargs

    def _capture(self, variant: _Variant) -> _Capture | str:
        """Capture a variant. Return the capture if it runs the same operators, else the reason, in words."""
        try:
            with self._in(variant) as (args, kwargs), limited() if self.axes else nullcontext():
                program = capture(
                    self.model, args, kwargs, also=self.axes, exact=variant.single, training=variant.training
                ).program
        except CaptureError as error:
            return str(error)
        except TooMuchError:
            return "its sizes are too complicated"
        steps = Steps(program)
        base = self.base
        if self.axes and variant.single:  # captured for fixed sizes, as the trace was
            base = Steps(self.graph.program)
        try:
            differences, true = base.compare(steps)
        except PathsDifferError as error:
            return f"it takes another path at {error}"
        found = {(d.call, d.place): d for d in differences}
        numbers = {k: d for k, d in found.items() if not isinstance(d.first, torch.dtype)}
        if variant.single and numbers:
            return f"it computes something else at {self._line(next(iter(numbers)))}"
        for argument, source in true.items() if base is self.base else ():
            before = self.facts.sources.get(argument)
            if before is None or source in self.base.operands_returned_by(self.base.node_of[before]):
                self.facts.sources[argument] = source
        return _Capture(variant, self.state(variant), steps, program, found)

    def _line(self, argument: Argument) -> str:
        node = self.base.nodes[argument[0]]
        return where(node) or node.name

    # What follows a dtype

    def _follow(self) -> None:
        """Find what each argument depends on that differs between dtypes."""
        for argument in dict.fromkeys(a for c in self.found for a in c.differences):
            node = self.base.nodes[argument[0]]
            seen = [c.differences.get(argument) for c in self.found]
            own = next(d.first for d in seen if d is not None)
            values = [own, *(own if d is None else d.second for d in seen)]
            if all(isinstance(v, torch.dtype) for v in values):
                anchor = self._anchor(node, tuple(values))
                if anchor is not None:
                    self.facts.dtypes[argument] = anchor
                    continue
            elif all(isinstance(v, float) for v in values):
                limit = self._limit(node, values)
                if limit is not None:
                    self.facts.limits[argument] = limit
                    continue
            self._refuse([d is not None for d in seen], self._line(argument))
        for name, tensor in self._constants(self.program):
            self._constant(name, tensor)

    def _refuse(self, which: list[bool], line: str) -> None:
        for other, differs in zip(self.found, which, strict=True):
            if differs:
                self.facts.states.discard(other.state)
                self.facts.refused[other.state] = f"it computes something else at {line}"

    def _constants(self, program: ExportedProgram) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the constants with floats that forward makes."""
        for _, kind, name in lifted(program):
            if kind is InputKind.CONSTANT_TENSOR and name is not None:
                tensor = program.constants[name]
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    yield name, tensor

    def _constant(self, name: str, tensor: torch.Tensor) -> None:
        """Find the value whose dtype a constant of forward has, or refuse dtypes in which it differs."""
        others = [dict(self._constants(c.program)).get(name) for c in self.found]
        dtypes = (tensor.dtype, *(tensor.dtype if t is None else t.dtype for t in others))
        differs = [t is None or not _same_numbers(tensor, t) for t in others]
        line = f"the constant {name} made in forward"
        if any(differs):
            self._refuse(differs, line)
        if len(set(dtypes)) > 1:
            reader = next(iter(self._node(name).users))
            anchor = self._anchor(reader, dtypes)
            if anchor is None:
                self._refuse([d != tensor.dtype for d in dtypes[1:]], line)
                return
            exact = next((t for t in others if t is not None and t.dtype is torch.float64), tensor)
            self.facts.constants[name] = anchor, exact.detach()

    def _node(self, name: str) -> fx.Node:
        return self.base.node_of["tensor", name]

    def _anchor(self, node: fx.Node, dtypes: tuple[torch.dtype, ...]) -> Source | None:
        """Return the nearest value before a call that has these dtypes, one for each capture; else None."""
        before = range(self.base.number.get(node, len(self.base.nodes)) - 1, -1, -1)
        operands = [self.base.sources[n] for n in node.all_input_nodes if n in self.base.sources]
        calls: list[Source] = [("call", k) for k in before]
        rest = [s for s in self.base.node_of if s[0] != "call"]
        for source in (*operands, *calls, *rest):
            constant = source[0] == "tensor" and source[1] not in self.stored
            if not constant and self._dtypes(source) == dtypes:
                return source
        default = (
            torch.get_default_dtype(),
            *(c.variant.default or torch.get_default_dtype() for c in self.found),
        )
        return DEFAULT if default == dtypes else None

    def _dtypes(self, source: Source) -> tuple[Any, ...]:
        """Return the dtype of a value in the trace and in each capture."""
        nodes = [self.base.node_of[source], *(c.steps.node_of.get(source) for c in self.found)]
        return tuple(getattr(node.meta.get("val"), "dtype", None) if node else None for node in nodes)

    def _limit(self, node: fx.Node, values: list[float]) -> tuple[Source, str, float] | None:
        """Return the limit of a dtype that a number is a multiple of in every capture, and the factor."""
        for name in _LIMITS:
            for own in _FLOATS:
                factor = values[0] / getattr(torch.finfo(own), name)
                found = [
                    next((d for d in _FLOATS if _close(v, factor * getattr(torch.finfo(d), name))), None)
                    for v in values
                ]
                dtypes = tuple(d for d in found if d is not None)
                if len(dtypes) == len(found) and (anchor := self._anchor(node, dtypes)) is not None:
                    return anchor, name, factor
        return None


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def _same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two constants hold the same numbers, as far as their dtypes can."""
    if a.shape != b.shape or a.is_meta or b.is_meta:
        return a.shape == b.shape
    low = min((a.dtype, b.dtype), key=lambda d: torch.finfo(d).bits)
    tolerance = 4 * torch.finfo(low).eps
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=0, equal_nan=True)


@contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, PyTorch has another default dtype."""
    before = torch.get_default_dtype()
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def converted(
    model: nn.Module, stored: dict[str, torch.dtype], dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Inside, the parameters and buffers of a model have another dtype. Their values do not matter here.

    Args:
        model: The model; it is restored afterwards.
        stored: The dtype of each tensor by name.
        dtype: A dtype for all tensors with floats, in place of `stored`.
    """
    with preserved(model):
        made: dict[int, torch.Tensor] = {}
        for path, module in model.named_modules():
            own = [*module.named_parameters("", recurse=False), *module.named_buffers("", recurse=False)]
            for name, tensor in own:
                wanted = dtype or stored.get(f"{path}.{name}" if path else name, tensor.dtype)
                if tensor.is_floating_point() and tensor.dtype != wanted:
                    setattr(module, name, made.setdefault(id(tensor), _empty(tensor, wanted)))
        yield


def _without_counts(model: nn.Module) -> None:
    """Turn off the average over all batches in batch norms: a capture cannot have the number of batches."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is None:
            module.momentum = 0.1


def _empty(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    new = torch.empty_like(tensor, dtype=dtype)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
