"""`sc.apply`: a plan and a model in, a new model out."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

from secateur.common.models import device_of, unwrap
from secateur.common.modes import require_plain_modes
from secateur.errors import ApplyError, SettingError
from secateur.graph.folding import folded
from secateur.graph.graph import Graph, fingerprint
from secateur.graph.trace import retrace
from secateur.measure.kernels import fast_path_note
from secateur.plan import Plan
from secateur.targets.granularity import by_granularity
from secateur.targets.units.accepts import OTHERWISE
from secateur.targets.units.masked import masked
from secateur.targets.units.program import Program, smaller_program
from secateur.targets.units.realise import proven_module, restricted, unrealisable
from secateur.targets.units.record import Record, attach, record_of
from secateur.targets.units.tensors import check_positions
from secateur.targets.units.traced import Traced

if TYPE_CHECKING:
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
    graph: Graph | ExpertGraph | None = None,
    on_unrealisable: Literal["graph", "leave"] = "graph",
    renormalise: bool | None = None,
) -> nn.Module:
    """Remove what a plan says.

    An expert goes with its rows of the router and of the router's biases. The numbers that repeat how many
    experts there are follow, in modules and, where all blocks keep the same number, in the configuration.
    The result computes what the dense model computes when the logits of the removed experts are -inf before
    softmax and top-k.

    Args:
        model: The dense model; it is left as it was.
        plan: The decision, made for a model with the same tensors. Masks of single weights become zeros.
        form: ``module``: the same classes and code with smaller tensors, compared with ``masked`` at every
            size that may vary; a size that the code holds as a number is mended at that call, in the modules
            that ``record_of(result).captured`` names. ``graph``: the captured program. ``masked``: the
            dense model with what consumes the removed units zeroed. ``auto``: a module where that
            comparison succeeds, else the program; `secateur.record_of(result).note` then says why.
            Experts leave a module, single weights a masked model, and take no other form.
        example_inputs: Inputs for the forward pass; made from the plan's shapes if not given.
        graph: The trace of this model, if at hand; it saves tracing again. For single weights it is needed
            if the result is to be repaired or saved.
        on_unrealisable: What ``auto`` does where a module cannot express some groups: return the
            program, or a module that leaves those groups whole (with the smaller plan in its record). Not
            for experts.
        renormalise: For experts alone: whether the weights of a token's experts are scaled to a sum of 1, in
            routers with a setting for that (``norm_topk_prob``); None leaves it as it is.

    Returns:
        A new model in the dense one's training mode; `secateur.record_of` says what was done.

    Raises:
        PlanError: If the plan was made for another model, or leaves a router too few experts.
        ApplyError: If the model cannot take the form asked for.
        SettingError: If `form` is unknown, or an option means nothing for what the plan removes.

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
    return Applier(model, cast("Graph | None", graph))(  # plans and graphs of others do not come here
        cast(Plan, plan), form, example_inputs=example_inputs, on_unrealisable=on_unrealisable
    )


class Applier:
    """Applies plans to one model. What it learns of the model for one plan serves the next ones too.

    Args:
        model: The dense model. It must not change while this object is in use.
        graph: Its trace, if at hand. Without it, the model is traced for each plan.
    """

    def __init__(self, model: nn.Module, graph: Graph | None = None) -> None:
        self._model, self._graph = unwrap(model), graph
        self._traced: dict[tuple[str, ...], Traced] = {}  # by the weights that are folded

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
        known = self._traced.get(plan.folded)
        model = folded(self._model, plan.folded) if known is None else known.model
        check_positions(model, plan)
        if form == "masked":
            return attach(masked(model, plan), Record(plan, "masked"))
        args, kwargs = plan.inputs.arguments(example_inputs, device_of(model))
        if self._graph is None:
            exact = all(g.exact for g in plan.groups)
            given = (args, kwargs)
            graph = retrace(self._model, plan.inputs, given, folds=plan.folded, allow_inexact=not exact)
            traced = Traced(model, graph)
        else:
            traced = self._traced.setdefault(plan.folded, known or Traced(model, self._graph))
            if example_inputs is None and not plan.inputs.drawn:
                args, kwargs = self._graph.captured_inputs()
        if form == "graph":
            return attach(_program(traced, plan), Record(plan, "graph", fast_path_note(model)))
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
    """The error for a model that neither form can hold."""
    return ApplyError(
        f"apply: expected a module or a captured program, got neither. {_reason(refused)} "
        f"{_advice(refused)}And for "
        f"{', '.join(groups[:3])}{', …' if groups[3:] else ''}: {_reason(failed)} {_advice(failed)}"
        f"Pass on_unrealisable='leave' to keep these groups whole.",
        f"{refused}\n{failed}",
    )


def _program(traced: Traced, plan: Plan) -> Program:
    """The captured program, if it takes what the model was traced with."""
    program = smaller_program(traced, plan)
    if why := program.refuses(plan.inputs).removesuffix(OTHERWISE):
        raise ApplyError(
            "apply: expected a captured program that takes inputs of the traced sizes, got one that does "
            f"not: {why}Trace with a batch of 2 or more."
        )
    return program


def _reason(error: ApplyError) -> str:
    """What an error says first, as a sentence of its own."""
    said = _sentences(error)[0]
    return said[:1].upper() + said[1:]


def _advice(error: ApplyError) -> str:
    """What an error says to do, if that is not to take the other form."""
    last = _sentences(error)[-1]
    return f"{last} " if "form=" not in last else ""


def _sentences(error: ApplyError) -> list[str]:
    return re.split(r"(?<=\.)\s+(?=[A-Z])", str(error).removeprefix("apply: "))
