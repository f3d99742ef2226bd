"""The numeric proof: a pruned model computes what the masked dense one computes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from secateur.apply.apply import apply
from secateur.apply.compare import relative_difference, run
from secateur.errors import VerificationError
from secateur.graph.graph import fingerprint
from secateur.graph.inputs import call_arguments
from secateur.graph.trace import unwrap
from secateur.plan import Plan


@dataclass(frozen=True)
class Proof:
    """What was compared and how close it came.

    Attributes:
        difference: Largest relative difference over all outputs.
        tolerance: What it had to stay under.
        reference: ``masked`` for exact plans, ``graph`` where a removed group is inexact.
        outputs: Number of output tensors compared.
    """

    difference: float
    tolerance: float
    reference: str
    outputs: int


def verify(
    model: nn.Module, small: nn.Module, plan: Plan, example_inputs: Any = None, *, tolerance: float = 1e-9
) -> Proof:
    """Compare a pruned model with the masked dense one, in float64, on real inputs.

    Verify before repair: a repaired model differs from the masked one on purpose.

    Args:
        model: The dense model. Neither it nor `small` is changed; copies are compared.
        small: What `apply` returned.
        plan: The plan in between.
        example_inputs: As for `trace`; random ones of the traced shapes if not given.
        tolerance: Largest accepted relative difference, max|a - b| / max|b|.

    Returns:
        The difference found.

    Raises:
        VerificationError: If the outputs differ by more.
        PlanError: If the plan is for another model.
    """
    model = unwrap(model)
    plan.check(fingerprint(model))
    device = next((t.device for t in model.state_dict().values()), torch.device("cpu"))
    args, kwargs = (
        plan.inputs.example(device=device) if example_inputs is None else call_arguments(example_inputs)
    )
    args, kwargs = _double(args), _double(kwargs)
    dense = copy.deepcopy(model).double()
    exact = all(group.exact or not group.removed for group in plan.groups)
    reference = "masked" if exact else "graph"
    given = args if not kwargs else kwargs
    wanted = run(apply(dense, plan, "masked" if exact else "graph", example_inputs=given), args, kwargs)
    got = run(_in_double(small), args, kwargs)
    difference = relative_difference(got, wanted)
    if not difference <= tolerance:
        raise VerificationError(
            f"verify: expected the pruned {type(model).__name__} to equal the {reference} dense one to "
            f"{tolerance:.1g} relative in float64, got {difference:.3g} over {len(wanted)} outputs. "
            f"If it was repaired or trained after apply, verify before that; otherwise report this as a bug."
        )
    return Proof(difference, tolerance, reference, len(wanted))


def _in_double(model: nn.Module) -> nn.Module:
    """A float64 copy; constants of a captured program that name float32 follow."""
    double = copy.deepcopy(model).double()
    if isinstance(double, fx.GraphModule):
        for node in double.graph.nodes:
            if node.kwargs.get("dtype") is torch.float32:
                node.kwargs = {**node.kwargs, "dtype": torch.float64}
            node.args = tuple(torch.float64 if a is torch.float32 else a for a in node.args)
        double.recompile()
    return double


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double()
    if isinstance(value, dict):
        return {k: _double(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_double(v) for v in value)
    return value
