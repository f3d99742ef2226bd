"""Form ``graph``: the captured program with smaller tensors and recomputed constants.

It also works at other sizes, dtypes and devices, in training mode and with gradients, as far as captures
under these conditions run the same operators. Under other conditions it raises an error.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from secateur.common.collecting import uncollected
from secateur.errors import ApplyError
from secateur.graph.graph import Graph
from secateur.graph.inputs import InputSpec
from secateur.graph.modes import WITHOUT_GRADIENTS
from secateur.plan import Plan
from secateur.targets.units.graph_form.accepts import Accepts
from secateur.targets.units.graph_form.building import build
from secateur.targets.units.graph_form.constants import Constants
from secateur.targets.units.graph_form.narrowing import narrowed, refusal
from secateur.targets.units.graph_form.parts import KNOWN, FixedAttributes
from secateur.targets.units.graph_form.pickling import ACCEPTED, Pickled
from secateur.targets.units.graph_form.sideeffects import side_effects_of
from secateur.targets.units.graph_form.traced import Traced
from secateur.targets.units.graph_form.variants import Facts
from secateur.targets.units.tensors import removed_positions, submodule_called

_STATE = "secateur_program"


class Program(FixedAttributes, Pickled):
    """A captured program that runs as a module.

    It checks its arguments: see `accept`. It refuses training mode where that changes more than dropout and
    batch norm.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "Program") -> None:
        """Make a module that runs `graph` and has all tensors and submodules of `root`.

        Raises:
            ApplyError: One of them is called as a part of the program is.
        """
        for name in {*root._parameters, *root._buffers, *root._modules} & _TAKEN:
            raise ApplyError(
                f"apply: expected other names, got {name!r} in {class_name}: a captured program has an "
                f"attribute of its own with that name. Take form 'module', or rename yours."
            )
        super().__init__(root, graph, class_name=class_name)
        self._add_all(vars(root))

    def _add_all(self, attributes: Mapping[str, Any]) -> None:
        """Add all tensors and submodules. `fx.GraphModule` leaves out those that no operator reads."""
        for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            getattr(self, kind).clear()
            getattr(self, kind).update(attributes[kind])
        vars(self).update((k, v) for k, v in attributes.items() if isinstance(v, torch.Tensor))

    def accept(self, accepts: Accepts, eval_only: str) -> Program:
        """Check arguments from now on; refuse training mode if there is a reason `eval_only`."""
        self.meta[_STATE] = accepts, eval_only
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model does.

        Raises:
            InputError: The program is not known to be right for these arguments, sizes or dtypes.
        """
        accepts, _ = self.meta.get(_STATE, (None, ""))
        if accepts is not None:
            args, kwargs = accepts.bound(args, kwargs)
            if not torch.compiler.is_compiling():
                self._check(accepts, args, kwargs)
        return super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return a tensor or submodule.

        Raises:
            AttributeError: There is none; `hasattr` relies on this kind of error.
        """
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(
                f"{type(self).__name__}: expected an attribute of a captured program, got {name!r}. It is "
                f"the program of one forward pass: it has the model's tensors, not its methods and other "
                f"attributes. Unless you asked for form 'graph', secateur.record_of(model).note says why. "
                f"To keep the model's class, call sc.apply with on_unrealisable='leave', and sc.trace with "
                f"methods=[...] for further methods.",
                name=name,
                obj=self,
            ) from error

    def narrowed(self, spec: InputSpec) -> InputSpec:
        """Describe the inputs that both the dense model and this program take."""
        accepts, _ = self.meta.get(_STATE, (None, ""))
        return spec if accepts is None else narrowed(accepts, spec)

    def refuses(self, spec: InputSpec) -> str:
        """Say why the program refuses inputs of the traced sizes; empty if it takes them."""
        accepts, _ = self.meta.get(_STATE, (None, ""))
        return "" if accepts is None else refusal(accepts, spec, {})

    def _check(self, accepts: Accepts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check arguments, unless equal ones were checked before."""
        accepted = vars(self).setdefault(ACCEPTED, {})
        if not accepted:
            accepted["parameters"] = frozenset(p.dtype for p in self.parameters() if p.is_floating_point())
        call = accepts.call((args, kwargs))
        if call.key not in accepted:
            accepts.check(call, accepted["parameters"])
            accepted[call.key] = True

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop(ACCEPTED, None)  # dtypes may change
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> Program:
        """Switch to training or evaluation mode.

        Raises:
            ApplyError: In training mode, the model does something that is not in the program.
        """
        _, why = self.meta.get(_STATE, (None, ""))
        if mode and why:
            raise ApplyError(
                f"train: expected {type(self).__name__} to run the same operators in training mode, but "
                f"{why}. The captured program is right in evaluation mode only. Leave it in eval(), or take "
                f"form 'module'."
            )
        super().train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        """Copy the module with all tensors and submodules, and without a warning on PyTorch's internals."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            new = super().__deepcopy__(memo)
        if isinstance(new, Program):
            copied = copy.deepcopy(vars(self), memo)
            new._add_all(copied)
            vars(new).update((k, copied[k]) for k in (KNOWN,) if k in copied)
            type(new).__name__ = type(self).__name__  # each copy has its own class
        return new


_TAKEN = {*dir(Program), "meta"} - set(dir(nn.Module))


def smaller_program(traced: Traced, plan: Plan, *, may_stay_in_evaluation: bool = False) -> Program:
    """Make a module of the captured program after a plan. Its parameters have the names of the model's.

    Args:
        traced: The dense model and its trace. Tensors are copied, never changed.
        plan: The decision.
        may_stay_in_evaluation: Whether a program that only has evaluation mode may be returned in that mode
            if the model is in training mode.

    Raises:
        ApplyError: The arguments of an operator cannot be changed as needed, the plan has further methods,
            the model makes other calls without gradients or for other values, the forward pass draws random
            numbers that are not PyTorch's, or the model is in training mode, which the program does not have.
    """
    if plan.inputs.methods:
        raise ApplyError(
            f"apply: expected a plan without further methods, got one with the methods "
            f"{', '.join(plan.inputs.methods)}: a captured program has the forward pass only. Take form "
            f"'module', or trace without methods=."
        )
    if any(view.mode == WITHOUT_GRADIENTS for view in traced.graph.views):
        raise ApplyError(
            "apply: expected code that does the same with and without gradients, got code that asks "
            "torch.is_grad_enabled() or requires_grad: a captured program is right for one answer only. Take "
            "form 'module'."
        )
    if any(view.other_answer for view in traced.graph.views):
        raise ApplyError(
            "apply: expected code without conditions on values of tensors, got some: a captured program is "
            "right for one answer only. Take form 'module'."
        )
    if traced.graph.values:
        raise ApplyError(
            f"apply: expected code whose sizes do not depend on values of inputs, got some that depend on "
            f"{', '.join(traced.graph.values)}: a captured program is right for one value only. Take form "
            f"'module'."
        )
    model, found = traced.model, traced.captured
    constants, facts = Constants(found.kept(removed_positions(plan))), found.facts
    with uncollected():
        root, out = build(model, found.program, constants, facts)
        module = Program(root, out, class_name=type(model).__name__).accept(found.accepts, facts.eval_only)
    evaluating = facts.eval_only and may_stay_in_evaluation
    module.train(model.training and not evaluating)
    for path, layer in module.named_modules():
        dense = submodule_called(model, path)
        if dense is None:
            continue
        layer.training = dense.training and not evaluating  # the user may have set some to evaluation mode
        if isinstance(layer, FixedAttributes):
            layer.fix_attributes(dense)
    return module


def sliced_program(model: nn.Module, graph: Graph, plan: Plan) -> Program:
    """Make a module of the traced program after a plan, for evaluation at the traced sizes.

    Nothing more is captured, and the module does not check its arguments.

    Raises:
        ApplyError: The arguments of an operator cannot be changed as needed, or the forward pass draws random
            numbers that are not PyTorch's.
    """
    side_effects_of(model, graph.captured_inputs()).refuse()
    with uncollected():
        constants = Constants(graph.kept(removed_positions(plan)))
        root, out = build(model, graph.program, constants, Facts())
        return Program(root, out, class_name=type(model).__name__)
