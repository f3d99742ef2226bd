"""The numeric proof: a pruned model computes what the masked dense one computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.apply.apply import apply
from secateur.apply.compare import relative_difference, run_in_double
from secateur.errors import VerificationError
from secateur.graph.graph import fingerprint
from secateur.models import device_of, unwrap
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

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> sc.verify(net, sc.apply(net, plan), plan).difference < 1e-9
        True
    """
    model = unwrap(model)
    plan.check(fingerprint(model))
    args, kwargs = plan.inputs.arguments(example_inputs, device_of(model))
    exact = all(group.exact or not group.removed for group in plan.groups)
    reference = "masked" if exact else "graph"
    expected = apply(model, plan, "masked" if exact else "graph", example_inputs=kwargs or args)
    wanted = run_in_double(expected, args, kwargs)
    got = run_in_double(small, args, kwargs)
    difference = relative_difference(got, wanted)
    if not difference <= tolerance:
        raise VerificationError(
            f"verify: expected the pruned {type(model).__name__} to equal the {reference} dense one to "
            f"{tolerance:.1g} relative in float64, got {difference:.3g} over {len(wanted)} outputs. "
            f"If it was repaired or trained after apply, verify before that; otherwise report this as a bug."
        )
    return Proof(difference, tolerance, reference, len(wanted))
