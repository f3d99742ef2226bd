"""Coverage: which parameters can be pruned, which cannot, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from secateur.graph.assemble import Assembled, slots_of
from secateur.graph.inputs import InputSpec
from secateur.graph.rules.op import Walk
from secateur.graph.walk import Tensor

Status = Literal["prunable", "protected", "frozen"]
"""``prunable``: units along some axis may be removed. ``protected``: the parameter reads the input, writes
the output, is mixed by an operator, or holds no units. ``frozen``: an operator prevents it, because it has no
rule or needs every position."""


@dataclass(frozen=True)
class ParameterCoverage:
    """One parameter.

    Attributes:
        name: In the state dict.
        size: Number of elements.
        status: Whether units of it may be removed.
        reasons: Why not: operator, module and source line. Empty if they may.
    """

    name: str
    size: int
    status: Status
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coverage:
    """All parameters, and the share of the model that may be pruned.

    Attributes:
        parameters: In order of first use.
        macs_share: Share of the MACs in operators with at least one prunable axis, in [0, 1].
        params_share: Share of the elements in parameters with the status ``prunable``, in [0, 1].
        inputs: Says which axes of the inputs may have other sizes, and why others may not.
    """

    parameters: tuple[ParameterCoverage, ...]
    macs_share: float
    params_share: float
    inputs: str

    def __str__(self) -> str:
        """The shares, each parameter that is not prunable with the reason, and the sizes that may vary."""
        lines = [
            f"{self.macs_share:.1%} of the MACs and {self.params_share:.1%} of the parameters lie in layers "
            f"with prunable units"
        ]
        lines += [f"{p.status}: {p.name}: {'; '.join(p.reasons)}" for p in self.parameters if p.reasons]
        return "\n".join([*lines, self.inputs])


def coverage_of(
    walk: Walk, assembled: Assembled, tensors: Sequence[Tensor], sizes: dict[str, int], inputs: InputSpec
) -> Coverage:
    """Say for every parameter whether and why it is prunable, protected or frozen.

    Args:
        walk: What the rules said about the program.
        assembled: The groups.
        tensors: The program's tensors.
        sizes: Number of elements of each parameter, by name.
        inputs: The inputs that the model takes.
    """
    left = {entry.group.name: entry.reason for entry in assembled.left}
    reasons = [left.get(group.name, "") for group in assembled.groups]  # by the number of the group
    frozen = walk.store.frozen_roots()
    found = []
    for tensor in tensors:
        if tensor.is_parameter:
            found.append(_parameter(tensor, walk, assembled, reasons, frozen, sizes[tensor.name]))
    prunable = np.concatenate(
        [np.full(group.size, not reason) for group, reason in zip(assembled.groups, reasons, strict=True)]
        or [np.zeros(0, dtype=bool)]
    )
    prunable_macs = all_macs = 0
    for contraction in walk.contractions:
        macs = contraction.factor
        is_prunable = False
        for axis in contraction.axes:
            macs *= len(axis)
            slots = slots_of(assembled, axis)
            is_prunable = is_prunable or bool(prunable[slots[slots >= 0]].any())
        all_macs += macs
        prunable_macs += macs if is_prunable else 0
    elements = sum(p.size for p in found)
    prunable_elements = sum(p.size for p in found if p.status == "prunable")
    macs_share = prunable_macs / all_macs if all_macs else 0.0
    params_share = prunable_elements / elements if elements else 0.0
    return Coverage(tuple(found), macs_share, params_share, inputs.describe())


def _parameter(
    tensor: Tensor,
    walk: Walk,
    assembled: Assembled,
    left: list[str],
    frozen: dict[int, int],
    size: int,
) -> ParameterCoverage:
    """Say for one parameter whether it is prunable, protected or frozen, and why.

    `left` has, for each group, why no unit of it may be removed; an empty text if units may.
    """
    protected: dict[str, None] = {}
    blocked: dict[str, None] = {}
    for axis in tensor.axes:
        for root in np.unique(walk.store.find(axis[axis > 0])).tolist():
            group = int(assembled.group_of[root])
            if group >= 0 and not left[group]:
                return ParameterCoverage(tensor.name, size, "prunable")
            if group >= 0:
                protected[left[group]] = None
            elif frozen.get(root, 0) < 0:
                reason = walk.reasons[frozen[root]]
                text = f"{reason.what} at {reason.where}" if reason.where else reason.what
                (protected if reason.what.startswith("model ") else blocked)[text] = None
    if blocked:
        return ParameterCoverage(tensor.name, size, "frozen", (*blocked, *protected))
    return ParameterCoverage(tensor.name, size, "protected", tuple(protected) or ("holds no units",))
