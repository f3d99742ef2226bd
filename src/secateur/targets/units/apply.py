"""`sc.apply`: make a new, pruned model from a model and a plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

from secateur.common.caches import without_caches
from secateur.common.models import device_of, unwrap
from secateur.common.modes import require_plain_modes
from secateur.errors import ApplyError, SettingError
from secateur.graph.folding import folded
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.inputs import Arguments
from secateur.graph.trace import retrace
from secateur.measure.kernels import fast_path_note
from secateur.plan import Plan
from secateur.targets.granularity import by_granularity
from secateur.targets.units.graph_form.accepts import OTHERWISE
from secateur.targets.units.graph_form.program import Program, smaller_program
from secateur.targets.units.graph_form.traced import Traced
from secateur.targets.units.later_calls.flagged import require_as_traced
from secateur.targets.units.masked import masked
from secateur.targets.units.module_form.realise import proven_module
from secateur.targets.units.module_form.unrealisable import restricted, unrealisable
from secateur.targets.units.record import Record, attach, record_of
from secateur.targets.units.spread import gathered
from secateur.targets.units.tensors import check_positions

if TYPE_CHECKING:
    from secateur.targets.blocks.graph import BlockGraph
    from secateur.targets.experts.graph import ExpertGraph
    from secateur.targets.weights.plan import MaskPlan

FORMS = ("auto", "module", "graph", "masked")


@by_granularity("plan")
def apply(
    model: nn.Module,
    plan: Plan | MaskPlan,
    form: Literal["auto", "module", "graph", "masked"] = "auto",
    *,
    example_inputs: Any = None,
    graph: Graph | ExpertGraph | BlockGraph | None = None,
    on_unrealisable: Literal["graph", "leave"] = "graph",
    renormalise: bool | None = None,
) -> nn.Module:
    """Remove what a plan says.

    A residual block leaves its list, and numbers of blocks follow. The result computes what the dense model
    computes if the block passes on what it reads.

    An expert is removed with its rows in the router and in the router's biases. Attributes with the number of
    experts change too, and so does the configuration, if all blocks keep equally many. The result computes
    what the dense model computes if the logits of the removed experts are -inf before softmax and top-k.

    Args:
        model: The dense model; it is left as it was.
        plan: The decision, made for a model with the same tensors. Masks of single weights become zeros.
        form: The form of the result. ``module``: the same classes and code with smaller tensors. It is
            compared with ``masked`` at every size that may vary. Calls with sizes that the code itself fixes
            are changed as they run; ``record_of(result).captured`` names their modules. ``graph``: the
            captured program. ``masked``: the dense model, with zeros in all weights that read removed units.
            ``auto``: a module if the comparison succeeds, else the program; ``record_of(result).note`` says
            why. Plans for experts always give a module, masks of single weights a masked model.
        example_inputs: Inputs for the forward pass; made from the plan's shapes if not given.
        graph: The trace of this model, if at hand; without it, the model is traced again. Masks of single
            weights need it if the result is to be repaired or saved.
        on_unrealisable: What ``auto`` does if a module cannot express some groups. ``graph`` returns the
            program; ``leave`` returns a module in which these groups stay whole, with the smaller plan in its
            record. Not for experts.
        renormalise: Only for experts: whether the weights of a token's experts are scaled to a sum of 1, in
            routers with a setting for that (``norm_topk_prob``). None leaves the setting as it is.

    Returns:
        A new model, in the training mode of the dense one. `secateur.record_of` says what was done.

    Raises:
        PlanError: The plan was made for another model, or leaves a router too few experts.
        ApplyError: The model cannot have the form that was asked for.
        SettingError: `form` is unknown, or an option means nothing for what the plan removes.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> sc.apply(net, plan)
        Sequential(
          (0): Linear(in_features=4, out_features=6, bias=True)
          (1): ReLU()
          (2): Linear(in_features=6, out_features=2, bias=True)
        )
        >>> sc.apply(net, plan, "masked")[0].weight.shape
        torch.Size([8, 4])
    """
    if form not in FORMS:
        raise SettingError(f"apply(form={form!r}): expected one of {', '.join(FORMS)}.")
    if on_unrealisable not in ("graph", "leave"):
        raise SettingError(f"apply(on_unrealisable={on_unrealisable!r}): expected 'graph' or 'leave'.")
    return Applier(model, cast("Graph | None", graph))(  # `by_granularity` sends other plans elsewhere
        cast(Plan, plan), form, example_inputs=example_inputs, on_unrealisable=on_unrealisable
    )


class Applier:
    """Applies plans to one model. What it learns of the model for one plan serves the next ones too.

    Args:
        model: The dense model. It must not change while this object is in use.
        graph: Its trace, if at hand. Without it, the model is traced for each plan.
    """

    def __init__(self, model: nn.Module, graph: Graph | None = None) -> None:
        self._model, self.graph = gathered(unwrap(model)), graph
        self._traced: dict[tuple[str, ...], Traced] = {}  # by the names of folded weights

    def __call__(
        self,
        plan: Plan,
        form: Literal["auto", "module", "graph", "masked"] = "auto",
        *,
        example_inputs: Any = None,
        on_unrealisable: Literal["graph", "leave"] = "graph",
    ) -> nn.Module:
        """Remove what a plan says; see `apply` for the arguments and errors."""
        require_plain_modes("apply", self._model)
        plan.check(fingerprint(self._model))

        def arguments() -> Arguments:
            return plan.inputs.arguments(example_inputs, device_of(self._model))

        with without_caches(self._model, arguments):
            return self._applied(plan, form, arguments, example_inputs is None, on_unrealisable)

    def _applied(
        self,
        plan: Plan,
        form: Literal["auto", "module", "graph", "masked"],
        arguments: Callable[[], Arguments],
        drawn: bool,
        on_unrealisable: Literal["graph", "leave"],
    ) -> nn.Module:
        """Remove what a plan says, while the model holds no caches.

        Args:
            plan: The decision.
            form: See `apply`.
            arguments: Gives arguments of the forward pass.
            drawn: Whether the user gave no example inputs.
            on_unrealisable: See `apply`.
        """
        known = self._traced.get(plan.folded)
        model = folded(self._model, plan.folded) if known is None else known.model
        check_positions(model, plan)
        if form == "masked" and plan.slices_known:
            return attach(masked(model, plan), Record(plan, "masked"))
        args, kwargs = arguments()
        if self.graph is None:
            exact = all(g.exact for g in plan.groups)
            given = (args, kwargs)
            graph = retrace(self._model, plan.inputs, given, folds=plan.folded, allow_inexact=not exact)
            traced = Traced(model, graph)
        else:
            if plan.folded not in self._traced:
                require_as_traced(model, self.graph)
            traced = self._traced.setdefault(plan.folded, known or Traced(model, self.graph))
            if drawn and not plan.inputs.drawn:
                args, kwargs = self.graph.captured_inputs()
        plan.check_graph(traced.graph)
        if form == "masked":
            return attach(masked(model, plan), Record(plan, "masked"))
        if form == "graph":
            return attach(_program(traced, plan), Record(plan, "graph", fast_path_note(model)))
        if traced.shared:
            raise ApplyError(
                f"apply: expected a copy of {type(model).__name__} to use its own layers, but it reads "
                f"{traced.shared[0]} of the model itself: something else refers to that layer, such as a "
                f"global or an object in a function's closure. Let forward() take it from self."
            )
        try:
            return proven_module(traced, plan, args, kwargs)
        except ApplyError as error:
            if form == "module":
                raise
            groups = unrealisable(traced, plan, args, kwargs)
            failed = error
            why = f"groups that need form 'graph': {', '.join(groups)}. {error}"
        if on_unrealisable == "graph":
            try:
                program = _program(traced, plan)
            except ApplyError as refused:
                raise _neither(groups, refused, failed) from failed
            return attach(program, Record(plan, "graph", f"{why} {fast_path_note(model)}".rstrip()))
        rest = restricted(plan, traced.graph, [g.name for g in plan.groups if g.name not in groups])
        small = proven_module(traced, rest, args, kwargs)
        found, whole = record_of(small), f"left whole: {why}"
        return attach(small, replace(found, note=f"{whole} {found.note}".rstrip(), whole=whole))


def _neither(groups: tuple[str, ...], refused: ApplyError, failed: ApplyError) -> ApplyError:
    """Make the error for a plan that neither a module nor a program can express."""
    return ApplyError(
        f"apply: expected a module or a captured program, got neither. {_reason(refused)} "
        f"{_advice(refused)}And for "
        f"{', '.join(groups[:3])}{', …' if groups[3:] else ''}: {_reason(failed)} {_advice(failed)}"
        f"Pass on_unrealisable='leave' to keep these groups whole.",
        f"{refused}\n{failed}",
    )


def _program(traced: Traced, plan: Plan) -> Program:
    """Make the captured program, and refuse one that does not take the traced inputs."""
    program = smaller_program(traced, plan)
    if why := program.refuses(plan.inputs).removesuffix(OTHERWISE):
        raise ApplyError(
            "apply: expected a captured program that takes inputs of the traced sizes, got one that does "
            f"not: {why}Trace with a batch of 2 or more."
        )
    return program


def _reason(error: ApplyError) -> str:
    """Return the first sentence of an error."""
    sentence = _sentences(error)[0]
    return sentence[:1].upper() + sentence[1:]


def _advice(error: ApplyError) -> str:
    """Return the advice of an error, unless that is to take the other form."""
    last = _sentences(error)[-1]
    return f"{last} " if "form=" not in last else ""


def _sentences(error: ApplyError) -> list[str]:
    return re.split(r"(?<=\.)\s+(?=[A-Z])", str(error).removeprefix("apply: "))
