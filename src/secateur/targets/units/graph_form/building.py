"""Build a runnable program with smaller tensors from a captured one.

Constants in its calls are recomputed. Dtypes, devices and modes follow how the program is used, and are not
those of the capture.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from secateur.errors import ApplyError
from secateur.graph.binding import bound, given_by_name
from secateur.graph.inline import in_modes, modes_of
from secateur.graph.nodes import lifted, tensor_of
from secateur.graph.rules import operator_name
from secateur.targets.units.copying import duplicate
from secateur.targets.units.graph_form.accepts import signature_of
from secateur.targets.units.graph_form.alignment import Place, Source, Steps, arguments
from secateur.targets.units.graph_form.constants import Constants
from secateur.targets.units.graph_form.parts import Part
from secateur.targets.units.graph_form.pickling import pickled
from secateur.targets.units.graph_form.rewrites import Scaled
from secateur.targets.units.graph_form.sideeffects import generators_of
from secateur.targets.units.graph_form.variants import DEFAULT, Facts
from secateur.targets.units.tensors import cut, submodule_called, tensor_called

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over axis 1 of an input of any rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Accept every rank: the captured program is known to fit."""


def either(condition: bool, yes: Any, no: Any) -> Any:
    """Return `yes` if a condition is true, else `no`: for values that follow the training mode."""
    return yes if condition else no


def limit(dtype: torch.dtype, name: str, times: float) -> float:
    """Return a limit of a floating dtype, such as its smallest number, times a number."""
    return float(getattr(torch.finfo(dtype), name)) * times


def build(
    model: nn.Module, program: ExportedProgram, constants: Constants, facts: Facts
) -> tuple[nn.Module, fx.Graph]:
    """Build the program that a captured one becomes after a plan.

    Args:
        model: The dense model; its tensors are copied.
        program: Its captured program.
        constants: Says how the arguments of operators change with the plan.
        facts: Says which arguments depend on dtypes, devices and modes.

    Returns:
        A module that has the tensors under the model's names, and the graph that reads them.

    Raises:
        ApplyError: The arguments of some operator cannot be changed as the plan needs.
    """
    builder = _Builder(model, program, constants, facts)
    builder.build()
    return builder.root, builder.out


class _Builder:
    def __init__(
        self, model: nn.Module, program: ExportedProgram, constants: Constants, facts: Facts
    ) -> None:
        self.model, self.program, self.constants, self.facts = model, program, constants, facts
        self.steps = Steps(program)
        self.rules = _rules(facts)
        self.root = Part()
        self.out = fx.Graph()
        self.new: dict[fx.Node, Any] = {}  # node of the captured program -> node of the new one
        self.names: dict[fx.Node, str] = {}
        self.parts: dict[int, nn.Module] = {}  # by the module of the dense model that they stand for
        self.tied = _tied(model)  # for each tensor of several modules, its name by the path of the module
        self.fetched: dict[str, fx.Node] = {}  # by name
        self.reader: fx.Node | None = None  # the call whose arguments are being made
        self.plain: dict[fx.Node, str] = {}  # names of constants, which are not buffers
        self.fresh: set[fx.Node] = set()  # generators that forward makes in each call
        self.places: dict[torch.device, fx.Node] = {}  # by device: a tensor of the model or an input there
        self.positions = 0

    def build(self) -> None:
        for node, kind, _ in lifted(self.program):
            if kind is InputKind.USER_INPUT:
                self.new[node] = self.out.placeholder(node.name)
        shared: dict[int, torch.Tensor] = {}
        for node, kind, name in lifted(self.program):
            if kind in _STATE and name is not None:
                self._state(node, kind, name, shared)
            elif isinstance(generator := self.program.constants.get(name or ""), torch.Generator):
                path, _, leaf = str(name).rpartition(".")
                setattr(self._part_at(path), leaf, generator.clone_state())
                self.names[node] = str(name)
                if not _keeps(self.model, generator):
                    self.fresh.add(node)
            elif kind is not InputKind.USER_INPUT:
                raise ApplyError(f"apply: expected a program of tensors, got an input of kind {kind.name}.")
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and node not in self.plain:
                self.places.setdefault(value.device, node)
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.new[node] = made = self._call(node)
                made.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
            elif node.op == "get_attr":
                self.new[node] = self._nested(str(node.target))
        self._output()

    # Tensors

    def _state(self, node: fx.Node, kind: InputKind, name: str, shared: dict[int, torch.Tensor]) -> None:
        """Register a tensor, cut, under its own name. Tied tensors stay one object."""
        try:
            tensor = tensor_called(self.model, name)
        except ApplyError:  # a constant that forward() makes
            _, tensor = self.facts.constants.get(name, (None, tensor_of(self.program, name)))
        if id(tensor) not in shared:
            masks = self.constants.kept(node)
            removed = {k: np.flatnonzero(~m) for k, m in enumerate(masks) if not m.all()}
            smaller = cut(tensor, removed)
            if isinstance(tensor, nn.Parameter):
                smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
            shared[id(tensor)] = smaller
        path, _, leaf = name.rpartition(".")
        part, smaller = self._part_at(path), shared[id(tensor)]
        if kind is InputKind.CONSTANT_TENSOR:
            setattr(part, leaf, smaller)
            self.plain[node] = name
        elif isinstance(smaller, nn.Parameter):
            part.register_parameter(leaf, smaller)
        else:
            part.register_buffer(leaf, smaller, persistent=name in self.program.state_dict)
        self.names[node] = name

    def _part_at(self, path: str) -> nn.Module:
        """The part that stands for a module of the dense model. A module with several paths has one part."""
        found, so_far = self.root, ""
        for name in path.split(".") if path else []:
            so_far = f"{so_far}.{name}" if so_far else name
            if not hasattr(found, name):
                dense = submodule_called(self.model, so_far)
                new = Part() if dense is None else self.parts.setdefault(id(dense), Part())
                found.add_module(name, new)
            found = getattr(found, name)
        return found

    def _nested(self, name: str) -> fx.Node:
        """Register a nested program as it is: all that it reads is frozen."""
        nested = duplicate(self.program.graph_module.get_submodule(name))
        self.root.add_module(name, pickled(nested) if isinstance(nested, fx.GraphModule) else nested)
        return self.out.get_attr(name)

    # Arguments

    def _argument(self, argument: Any) -> Any:
        """Return the argument in the new program. Tensors of the model are read when first used."""
        if isinstance(argument, fx.Node):
            if (own := self._name_for_reader(argument)) is not None:
                if own not in self.fetched:
                    self.fetched[own] = self.out.get_attr(own)
                return self.fetched[own]
            if argument not in self.new:
                self.new[argument] = self._fetched(argument)
            return self.new[argument]
        if isinstance(argument, Scaled):
            product = self.out.call_function(operator.mul, (self._argument(argument.size), argument.new))
            return self.out.call_function(operator.floordiv, (product, argument.old))
        if isinstance(argument, torch.Tensor):
            name = f"_position_{self.positions}"
            self.positions += 1
            device = next((p for p in self.places if p.type != "meta"), argument.device)
            self.root.register_buffer(name, argument.to(device), persistent=False)
            return self.out.get_attr(name)
        if isinstance(argument, torch.device) and argument in self.places:
            return self._attribute(self._argument(self.places[argument]), "device")
        return argument

    def _name_for_reader(self, node: fx.Node) -> str | None:
        """The name by which the calling module itself has a tied tensor, if it has it by another one."""
        tied = self.tied.get(self.names.get(node, ""))
        if tied is None or self.reader is None:
            return None
        name = tied.get(_running(self.reader))
        return None if name == self.names[node] else name

    def _fetched(self, node: fx.Node) -> fx.Node:
        """Read a tensor of the model. A constant gets the model's device, and the dtype that it follows."""
        made = self.out.get_attr(self.names[node])
        if node in self.fresh:
            return self.out.call_method("clone_state", (made,))
        value = node.meta["val"]
        if node not in self.plain or value.device not in self.places:
            return made
        following, _ = self.facts.constants.get(self.plain[node], (None, None))
        dtype = value.dtype if following is None else self._dtype(following)
        device = self._attribute(self._argument(self.places[value.device]), "device")
        return self.out.call_method("to", (made, device, dtype))

    def _attribute(self, node: fx.Node, name: str) -> fx.Node:
        return self.out.call_function(getattr, (node, name))

    def _dtype(self, source: Source) -> fx.Node:
        """Return a node that gives the dtype of a value when the program runs."""
        if source == DEFAULT:
            return self.out.call_function(torch.get_default_dtype)
        return self._attribute(self._argument(self.steps.node_of[source]), "dtype")

    def _map(self, arguments: Any) -> Any:
        if isinstance(arguments, list | tuple) and not isinstance(arguments, fx.Node):
            return type(arguments)(self._map(a) for a in arguments)
        if isinstance(arguments, dict):
            return {k: self._map(v) for k, v in arguments.items()}
        if isinstance(arguments, slice):
            return slice(self._map(arguments.start), self._map(arguments.stop), self._map(arguments.step))
        return self._argument(arguments)

    def _following(self, node: fx.Node) -> dict[Place, Any]:
        """Return nodes that compute those arguments of a call that depend on how the program is run."""
        if node not in self.steps.number:
            return {}
        captured = dict(arguments(node))
        rules = self.rules.get(self.steps.number[node], {})
        return {place: self._value(node, captured[place], rule) for place, rule in rules.items()}

    def _value(self, node: fx.Node, captured: Any, rule: Rule) -> Any:
        if rule.source is None:
            path = _running(node)
            self._part_at(path)  # makes sure that the module exists
            flag = self.out.create_node("get_attr", f"{path}.training" if path else "training")
            if (captured, rule.training) == (False, True):
                return flag
            return self.out.call_function(either, (flag, rule.training, captured))
        if rule.limit is not None:
            return self.out.call_function(limit, (self._dtype(rule.source), *rule.limit))
        if rule.dtype:
            return self._dtype(rule.source)
        return self._argument(self.steps.node_of[rule.source])

    # Calls

    def _call(self, node: fx.Node) -> fx.Node:
        self.reader = node
        following = self._following(node)
        if operator_name(node) == "aten.batch_norm.default" and (layer := self._batch_norm(node)):
            return self._layer(node, layer, following.get(("input",), self._argument(node.args[0])))
        call = self.constants.follow(node)
        target, given = (node.target, None) if call is None else (call.target, call.arguments)
        if getattr(target, "_schema", None) is None:
            args, kwargs = self._map(tuple(node.args)), self._map(dict(node.kwargs))
            for place, value in following.items():
                args = _with(args, place, value)
            return self._emit(node, target, args, kwargs)
        if given is None:
            given = given_by_name(target, node.args, node.kwargs)
        mapped = self._map(given)
        for (name, *entries), value in following.items():
            mapped[name] = _with(mapped.get(name), tuple(entries), value)
        return self._emit(node, target, *bound(target, mapped))

    def _emit(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Add a call with the modes of the captured one. Arithmetic on sizes needs no modes."""
        modes = modes_of(node)
        if modes and isinstance(target, torch._ops.OpOverload):
            return self.out.call_function(in_modes, (modes, target, *args), kwargs)
        return self.out.call_function(target, args, kwargs)

    def _batch_norm(self, node: fx.Node) -> str | None:
        """Register a layer for a batch-norm call whose tensors belong to one layer, and return its path."""
        given: tuple[Any, ...] = node.args
        tensors = dict(zip(("weight", "bias", "running_mean", "running_var"), given[1:5], strict=True))
        path = self.names.get(tensors["running_mean"], "").rpartition(".")[0]
        by_batch = given[5] is True  # some layers do so even in evaluation mode
        # Others stay in evaluation mode while the model trains: those of a frozen backbone.
        follows = self.facts.eval_only or ("training",) in self.rules.get(self.steps.number.get(node, -1), {})
        if (
            by_batch
            or not follows
            or not path
            or any(t is not None and self.names.get(t) != f"{path}.{k}" for k, t in tensors.items())
        ):
            return None
        part = self._part_at(path)
        if not isinstance(part, BatchNorm):
            features = len(part.running_mean)  # type: ignore[arg-type]
            layer = BatchNorm(features, eps=float(given[7]), momentum=self._momentum(path, given))
            for name in ("running_mean", "running_var", "num_batches_tracked", *part._buffers):
                layer.register_buffer(name, getattr(part, name, None))
            for name in ("weight", "bias", *part._parameters):
                layer.register_parameter(name, getattr(part, name, None))
            for name, child in part.named_children():
                layer.add_module(name, child)
            layer.affine = layer.weight is not None
            for parent in list(self.root.modules()):
                parent._modules.update((k, layer) for k, child in parent._modules.items() if child is part)
        return path

    def _momentum(self, path: str, given: tuple[Any, ...]) -> float | None:
        """Return the momentum of the layer. It may be None, for which a capture writes 0."""
        layer = self.model.get_submodule(path)
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            return layer.momentum
        return float(given[6])

    def _layer(self, node: fx.Node, path: str, value: Any) -> fx.Node:
        modes = modes_of(node)
        if modes:
            return self.out.call_function(in_modes, (modes, self.out.get_attr(path), value))
        return self.out.call_module(path, (value,))

    def _output(self) -> None:
        """Add the outputs and the signature of the program."""
        program = self.program
        output = program.graph.output_node()
        results = cast(tuple[Any, ...], self._map(output.args[0]))
        for (_, *entries), value in self._following(output).items():
            results = _with(results, tuple(entries), value)
        kinds = [spec.kind for spec in program.graph_signature.output_specs]
        results = tuple(r for r, kind in zip(results, kinds, strict=True) if kind is OutputKind.USER_OUTPUT)
        if self.facts.gradient:
            why = (
                f"backward: expected operators with PyTorch's own gradients, but {self.facts.gradient}. The "
                f"captured program does not do that. Train form 'module'."
            )
            results = pytree.tree_map_only(
                fx.Node, lambda r: self.out.call_function(without_gradient, (r, why)), results
            )
        self.out.output(results)
        spec = program.call_spec
        if spec.in_spec is None or spec.out_spec is None:
            raise ApplyError("apply: expected a captured program that knows its signature, got none.")
        args, kwargs = pytree.tree_unflatten([None] * spec.in_spec.num_leaves, spec.in_spec)
        own, _ = signature_of(self.model)
        positions = own if len(own) >= len(args) else [f"arg_{i}" for i in range(len(args))]
        names = [*positions[: len(args)], *kwargs]
        info = fx.graph._PyTreeInfo(names, spec.in_spec, spec.out_spec)
        self.out.set_codegen(fx.graph._PyTreeCodeGen(info))


def _tied(model: nn.Module) -> dict[str, dict[str, str]]:
    """For each name of a parameter that several modules have: its names by the paths of these modules."""
    by_tensor: dict[int, dict[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), {})[name.rpartition(".")[0]] = name
    return {name: names for names in by_tensor.values() if len(names) > 1 for name in names.values()}


def _keeps(model: nn.Module, generator: torch.Generator) -> bool:
    """Whether a model, or its code, keeps a generator of random numbers between calls."""
    # A capture copies generators, so they are compared by their states.
    return any(torch.equal(own.get_state(), generator.get_state()) for own in generators_of(model))


@dataclass(frozen=True)
class Rule:
    """What an argument depends on.

    Attributes:
        source: The value that the argument is, or whose dtype decides it. None if the training mode does.
        dtype: Whether the argument is the dtype of `source`.
        limit: The name of a limit of that dtype, and a factor, if the argument is such a number.
        training: The value of the argument in training mode.
    """

    source: Source | None = None
    dtype: bool = False
    limit: tuple[str, float] | None = None
    training: Any = None


def _rules(facts: Facts) -> dict[int, dict[Place, Rule]]:
    """Return, for the arguments of each call, what they depend on."""
    found: dict[int, dict[Place, Rule]] = {}
    for (call, place), source in facts.sources.items():
        found.setdefault(call, {})[place] = Rule(source)
    for (call, place), source in facts.dtypes.items():
        found.setdefault(call, {})[place] = Rule(source, dtype=True)
    for (call, place), (source, name, times) in facts.limits.items():
        found.setdefault(call, {})[place] = Rule(source, limit=(name, times))
    for (call, place), value in facts.training.items():
        found.setdefault(call, {})[place] = Rule(training=value)
    return found


def _running(node: fx.Node) -> str:
    """Return the path of the innermost module that was running."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


def _with(container: Any, entries: Place, value: Any) -> Any:
    """Return an argument with another value at one entry of its lists."""
    if not entries:
        return value
    first, *rest = entries
    return type(container)(_with(v, tuple(rest), value) if k == first else v for k, v in enumerate(container))


class _NoGradient(torch.autograd.Function):
    """The identity, whose backward pass raises an error."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, why: str) -> torch.Tensor:
        ctx.why = why
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        raise ApplyError(ctx.why)


def without_gradient(value: Any, why: str) -> Any:
    """Return the value. A backward pass through it raises an ApplyError with the reason."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return _NoGradient.apply(value, why)  # type: ignore[no-untyped-call]
    return value
