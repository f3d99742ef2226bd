"""Form ``graph``: the captured program with sliced tensors and recomputed constants.

It exists for every plan, because every operator that a rule let units pass through either reads its
shapes from its tensors or has a rewrite. Batch norm and dropout become modules again, so that
``train()`` and ``eval()`` mean what they say.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from secateur.apply.constants import Constants
from secateur.apply.copying import duplicate
from secateur.apply.tensors import cut, tensor_called
from secateur.collecting import uncollected
from secateur.errors import ApplyError
from secateur.graph.graph import Graph
from secateur.graph.inline import in_modes, modes_of
from secateur.graph.rules import operator_name
from secateur.graph.walk import lifted, tensor_of
from secateur.plan import Plan

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class FeatureDropout(nn.Dropout):
    """Dropout of whole maps, of any rank."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Zero each map with probability `p` while training."""
        return torch.feature_dropout(input, self.p, self.training)


DROPOUTS: dict[str, type[nn.modules.dropout._DropoutNd]] = {
    "dropout": nn.Dropout,
    "feature_dropout": FeatureDropout,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
"""Operators that capture fixes in evaluation mode, with the layers that they become again."""


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over axis 1 of an input of any rank."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Accept every rank: the captured program is known to fit."""


class Program(fx.GraphModule):
    """A captured program that runs as a module."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        """As torch copies it, without torch's warning of its own internals."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            return super().__deepcopy__(memo)


def smaller_program(model: nn.Module, graph: Graph, plan: Plan) -> fx.GraphModule:
    """A runnable module of the captured program after `plan`, with the model's parameter names.

    Args:
        model: The model that `graph` was traced from; its tensors are copied, never changed.
        graph: The trace.
        plan: The decision.

    Raises:
        ApplyError: If an operator's constants cannot follow.
    """
    return build_program(model, graph.program, Constants.of(graph, plan))


def build_program(model: nn.Module, program: ExportedProgram, constants: Constants) -> fx.GraphModule:
    """`smaller_program` for a program whose constants are known."""
    with uncollected():
        return _Builder(model, program, constants).build()


class _Builder:
    def __init__(self, model: nn.Module, program: ExportedProgram, constants: Constants) -> None:
        self.model, self.program, self.constants = model, program, constants
        self.device = next((t.device for t in program.state_dict.values()), torch.device("cpu"))
        self.root = nn.Module()
        self.out = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.names: dict[fx.Node, str] = {}

    def build(self) -> fx.GraphModule:
        program = self.program
        placeholders = list(lifted(program))
        for node, kind, _ in placeholders:
            if kind is InputKind.USER_INPUT:
                self.made[node] = self.out.placeholder(node.name)
        shared: dict[int, torch.Tensor] = {}
        for node, kind, name in placeholders:
            if kind in _STATE and name is not None:
                self._state(node, name, shared, persistent=name in program.state_dict)
            elif kind is not InputKind.USER_INPUT:
                raise ApplyError(f"apply: expected a program of tensors, got an input of kind {kind.name}.")
        for node in program.graph.nodes:
            if node.op == "call_function":
                self.made[node] = self._call(node)
                self.made[node].meta = {
                    k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")
                }
            elif node.op == "get_attr":
                self.made[node] = self._nested(str(node.target))
        self._output()
        module = Program(self.root, self.out, class_name=type(self.model).__name__)
        module.train(self.model.training)
        for path, layer in module.named_modules():  # some may be frozen in evaluation mode
            with contextlib.suppress(AttributeError):
                layer.training = self.model.get_submodule(path).training
        return module

    def _nested(self, name: str) -> fx.Node:
        """A region that capture keeps as a program of its own; what it touches is frozen, so it fits."""
        self.root.add_module(name, duplicate(self.program.graph_module.get_submodule(name)))
        return self.out.get_attr(name)

    def _state(self, node: fx.Node, name: str, shared: dict[int, torch.Tensor], *, persistent: bool) -> None:
        """Register a cut tensor under its own name, tied ones as one object."""
        try:
            tensor = tensor_called(self.model, name)
        except ApplyError:  # a constant that capture lifted out of forward()
            tensor = tensor_of(self.program, name)
        if id(tensor) not in shared:
            masks = self.constants.kept(node)
            removed = {k: np.flatnonzero(~m) for k, m in enumerate(masks) if not m.all()}
            smaller = cut(tensor, removed)
            if isinstance(tensor, nn.Parameter):
                smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
            shared[id(tensor)] = smaller
        self._register(name, shared[id(tensor)], persistent=persistent)
        self.names[node] = name

    def _register(self, name: str, tensor: torch.Tensor, *, persistent: bool) -> None:
        path, _, leaf = name.rpartition(".")
        holder = self._holder(path)
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(leaf, tensor)
        else:
            holder.register_buffer(leaf, tensor, persistent=persistent)

    def _holder(self, path: str) -> nn.Module:
        holder = self.root
        for part in path.split(".") if path else []:
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        return holder

    def _argument(self, argument: Any) -> Any:
        """The new program's counterpart of an argument; tensors of the model are fetched when first used."""
        if isinstance(argument, fx.Node):
            if argument not in self.made:
                self.made[argument] = self.out.get_attr(self.names[argument])
            return self.made[argument]
        if isinstance(argument, torch.Tensor):
            name = f"_position_{len(list(self.root.buffers(recurse=False)))}"
            self.root.register_buffer(name, argument.to(self.device), persistent=False)
            return self.out.get_attr(name)
        return argument

    def _map(self, arguments: Any) -> Any:
        if isinstance(arguments, list | tuple):
            return (
                type(arguments)(self._map(a) for a in arguments)
                if not isinstance(arguments, fx.Node)
                else arguments
            )
        if isinstance(arguments, dict):
            return {k: self._map(v) for k, v in arguments.items()}
        if isinstance(arguments, slice):
            return slice(self._map(arguments.start), self._map(arguments.stop), self._map(arguments.step))
        return self._argument(arguments)

    def _call(self, node: fx.Node) -> fx.Node:
        name, target = operator_name(node), cast(Any, node.target)
        if name == "aten.batch_norm.default" and (layer := self._batch_norm(node)):
            return self._emit(node, self.out.get_attr(layer), (self._argument(node.args[0]),))
        dropout = DROPOUTS.get(name.removeprefix("aten.").removesuffix(".default").rstrip("_"))
        if dropout is not None:
            layer = f"dropout_{node.name}"
            self.root.add_module(layer, dropout(float(node.args[1])))  # type: ignore[arg-type]
            return self._emit(node, self.out.get_attr(layer), (self._argument(node.args[0]),))
        call = self.constants.follow(node)
        if call is None:
            return self._emit(node, target, self._map(tuple(node.args)), self._map(dict(node.kwargs)))
        args, kwargs = [], {}
        positional = True  # until an argument is left out
        for argument in call.target._schema.arguments:
            if argument.name not in call.arguments:
                positional = False
            elif positional and not argument.kwarg_only:
                args.append(self._map(call.arguments[argument.name]))
            else:
                kwargs[argument.name] = self._map(call.arguments[argument.name])
        return self._emit(node, call.target, tuple(args), kwargs)

    def _emit(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        """A call in the modes of the captured one; `target` is an operator, or the node of a layer."""
        modes = modes_of(node)
        if modes:
            return self.out.call_function(in_modes, (modes, target, *args), kwargs)
        if isinstance(target, fx.Node):
            return self.out.call_module(str(target.target), args)
        return self.out.call_function(target, args, kwargs)

    def _batch_norm(self, node: fx.Node) -> str | None:
        """Turn the tensors of a batch-norm call, if they are one layer's, into a layer; returns its path."""
        given: tuple[Any, ...] = node.args
        tensors = dict(zip(("weight", "bias", "running_mean", "running_var"), given[1:5], strict=True))
        path = self.names.get(tensors["running_mean"], "").rpartition(".")[0]
        by_batch = given[5] is True  # even in evaluation mode
        if (
            by_batch
            or not path
            or any(t is not None and self.names.get(t) != f"{path}.{k}" for k, t in tensors.items())
        ):
            return None
        holder = self._holder(path)
        if not isinstance(holder, BatchNorm):
            features, momentum = len(holder.running_mean), self._momentum(path, given)  # type: ignore[arg-type]
            layer = BatchNorm(features, eps=float(given[7]), momentum=momentum)
            for name in ("running_mean", "running_var", "num_batches_tracked", *holder._buffers):
                layer.register_buffer(name, getattr(holder, name, None))
            for name in ("weight", "bias", *holder._parameters):
                layer.register_parameter(name, getattr(holder, name, None))
            for name, child in holder.named_children():
                layer.add_module(name, child)
            layer.affine = layer.weight is not None
            parent, _, leaf = path.rpartition(".")
            setattr(self._holder(parent), leaf, layer)
        return path

    def _momentum(self, path: str, given: tuple[Any, ...]) -> float | None:
        """The layer's own: capture writes 0 where it is None, an average over all batches."""
        layer = self.model.get_submodule(path)
        if isinstance(layer, nn.modules.batchnorm._NormBase):
            return layer.momentum
        return float(given[6])

    def _output(self) -> None:
        program = self.program
        output = program.graph.output_node()
        kinds = [spec.kind for spec in program.graph_signature.output_specs]
        outputs = cast(tuple[Any, ...], output.args[0])
        results = [r for r, kind in zip(outputs, kinds, strict=True) if kind is OutputKind.USER_OUTPUT]
        self.out.output(tuple(self._map(r) for r in results))
        spec = program.call_spec
        if spec.in_spec is None or spec.out_spec is None:
            raise ApplyError("apply: expected a captured program that knows its signature, got none.")
        args, kwargs = spec.in_spec.children()
        names = [f"arg_{i}" for i in range(args.num_children)] + list(kwargs.context)
        info = fx.graph._PyTreeInfo(names, spec.in_spec, spec.out_spec)
        self.out.set_codegen(fx.graph._PyTreeCodeGen(info))
