"""The record of how a pruned model was made, which the model carries with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import fx, nn

from secateur.errors import ArtefactError
from secateur.graph.wording import ANY, CHOICES
from secateur.plan import Plan
from secateur.targets.units.graph_form.program import Program
from secateur.targets.units.later_calls.callcheck import resume
from secateur.targets.units.later_calls.flagged import Refused

Form = Literal["module", "graph", "masked"]

_ATTRIBUTE = "_secateur_record"


@dataclass(frozen=True)
class Record:
    """How a pruned model was made.

    Attributes:
        plan: The decision that was applied.
        form: The form of the model.
        note: Why form ``auto`` did not return a module, or which of its modules are mended.
        repairs: What repair tried, in order, as plain data.
        sizes: New values of attributes in form ``module``, by path, except those of PyTorch's own layers.
        captured: Paths of modules in form ``module`` with calls that are mended
            (`secateur.targets.units.module_form.mended`).
        takes: One sentence on which sizes of the inputs may change, and which must stay; and one on how far
            other choices of the code were tried.
        stand_ins: By path of a dropped block in whose place a module passes the stream on: the argument that
            holds the stream, and what each entry of a returned tuple is (`secateur.targets.blocks.block`).
        flags: In form ``module``, flags that have to keep known values, because removed units are needed
            with others.
        numbers: Where units went behind blocks, new values of numbers that repeat how many blocks there are,
            or which one a block is; elsewhere `sizes` has them.
        whole: The part of the note on what was left whole, and why. It is not saved.
    """

    plan: Plan
    form: Form
    note: str = ""
    repairs: tuple[dict[str, Any], ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)
    captured: tuple[str, ...] = ()
    takes: str = ""
    stand_ins: dict[str, list[int | str]] = field(default_factory=dict)
    flags: tuple[Refused, ...] = ()
    numbers: dict[str, Any] = field(default_factory=dict)
    whole: str = field(default="", compare=False)


def attach(model: nn.Module, record: Record) -> nn.Module:
    """Attach a record to a model, with `takes` filled in; deep copies keep it. Return the model."""
    record = replace(record, takes=_takes(model, record))
    if isinstance(model, fx.GraphModule):
        model.meta[_ATTRIBUTE] = record  # a copy of it keeps `meta`, but no foreign attributes
    else:
        object.__setattr__(model, _ATTRIBUTE, record)
        resume(model)
    return model


def _takes(model: nn.Module, record: Record) -> str:
    if record.form == "masked":
        return ANY
    if isinstance(model, Program):
        sentence = model.narrowed(record.plan.inputs).sentence(program=True)
    else:
        sentence = record.plan.inputs.sentence()
    tried = record.plan.inputs.open or record.plan.inputs.fixed
    return f"{sentence} {CHOICES}" if tried else sentence


def record_of(model: nn.Module) -> Record:
    """Return the record that `apply` attached to a model.

    Raises:
        ArtefactError: The model does not come from `apply`.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> small = sc.apply(net, plan)
        >>> sc.record_of(small).form, sc.record_of(small).plan == plan
        ('module', True)
    """
    record = getattr(model, _ATTRIBUTE, None)
    if isinstance(model, fx.GraphModule):
        record = model.meta.get(_ATTRIBUTE)
    if not isinstance(record, Record):
        raise ArtefactError(
            f"expected a model that secateur.apply returned, got a plain {type(model).__name__}. "
            f"Apply a plan first."
        )
    return record


def with_repairs(model: nn.Module, repairs: list[dict[str, Any]]) -> nn.Module:
    """Add what repair tried to the model's record; return the model."""
    record = record_of(model)
    return attach(model, replace(record, repairs=(*record.repairs, *repairs)))


def with_note(model: nn.Module, note: str) -> nn.Module:
    """Add a sentence to the note in the model's record; return the model."""
    record = record_of(model)
    return attach(model, replace(record, note=" ".join(filter(None, (record.note, note)))))
