"""How the arguments of operators change when their tensors get smaller: one function for each family.

Only operators with sizes, positions or counts in their arguments are listed here. All others read shapes from
their tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from secateur.errors import ApplyError
from secateur.graph.kept import Mask
from secateur.graph.nodes import hint, is_open, where
from secateur.graph.rules.index import constant_positions
from secateur.graph.rules.select import positions_taken
from secateur.targets.units.tensors import groups_after

_TO_THE_END = 2**63 - 1
"""The ``end`` that PyTorch passes for ``x[start:]``."""


@dataclass
class Call:
    """One operator call that reads or gives a changed axis.

    Attributes:
        node: The node of the captured program.
        target: The operator to call.
        arguments: Its arguments by schema name, with nodes of the captured program.
        before: For the node of a tensor, which positions of each axis stay.
        after: The same for the output, or for each of several outputs.
        constant: The value of a node that is known without data; None for any other.
    """

    node: fx.Node
    target: Any
    arguments: dict[str, Any]
    before: Callable[[fx.Node], list[Mask]]
    after: list[Any]
    constant: Callable[[fx.Node], torch.Tensor | None]

    def integer(self, name: str, default: int = 0) -> int:
        """An integer argument. A symbolic one has its value in the capture."""
        value = self.arguments.get(name, default)
        return hint(value.meta["val"]) if isinstance(value, fx.Node) else int(value)

    def integers(self, name: str) -> list[int]:
        """A list of integers. Symbolic ones have their value in the capture."""
        return [hint(v.meta["val"]) if isinstance(v, fx.Node) else int(v) for v in self.arguments[name]]


@dataclass(frozen=True)
class Scaled:
    """A size that the program computes, and of which `new` of every `old` positions stay."""

    size: fx.Node
    new: int
    old: int

    def of(self, value: Any) -> Any:
        """Return the smaller size, from the computed value."""
        return value * self.new // self.old


Rewrite = Callable[[Call], None]


def _scaled(call: Call, size: fx.Node, mask: Mask) -> Scaled:
    """Scale a computed size, which is a multiple of a number. Each multiple has to lose the same positions.

    Raises:
        ApplyError: They lose different positions.
    """
    multiple = int(size.meta["val"].node.expr.as_coeff_Mul()[0])
    for lines in (mask.reshape(-1, multiple), mask.reshape(multiple, -1).T):
        if (lines == lines[0]).all():
            return Scaled(size, int(lines[0].sum()), multiple)
    raise ApplyError(
        f"apply: expected every multiple of the size {size.meta['val']} at {where(call.node)} to lose the "
        f"same positions, got others. Leave the group out of the plan."
    )


def _sizes(call: Call, name: str, masks: list[Mask], *, inferred: bool = False) -> None:
    """Write new sizes for the axes that are cut. `inferred`: whether one size may be -1, for the rest."""
    sizes = list(call.arguments[name])
    inferred = inferred and -1 not in [s for s in sizes if not isinstance(s, fx.Node)]
    for k, mask in enumerate(masks):
        if mask.all() or (isinstance(sizes[k], int) and sizes[k] == -1):
            continue
        if not isinstance(sizes[k], fx.Node):
            sizes[k] = int(mask.sum())
        elif inferred:
            sizes[k], inferred = -1, False
        else:
            sizes[k] = _scaled(call, sizes[k], mask)
    call.arguments[name] = sizes


def _fixed(call: Call, *values: Any, dim: int | None = None) -> None:
    """Refuse positions along a cut axis that are not constant.

    Raises:
        ApplyError: One of `values` is computed, or axis `dim` of the operand may have any length.
    """
    length = None if dim is None else call.arguments["self"].meta["val"].shape[dim]
    if is_open(length) or any(isinstance(v, fx.Node) for v in values):
        raise ApplyError(
            f"apply: expected constant positions at {where(call.node) or call.node}, got some that depend on "
            f"the size of the input. Leave the group out of the plan."
        )


def output_sizes(call: Call) -> None:
    """Change expand, zeros and the like: their sizes are those of the output."""
    name = next(n for n in ("size", "shape") if n in call.arguments)
    _sizes(call, name, call.after)


def reshaped_sizes(call: Call) -> None:
    """Change view and reshape: their sizes are those of the output, and one of them may be -1."""
    name = next(n for n in ("size", "shape") if n in call.arguments)
    _sizes(call, name, call.after, inferred=True)


def sizes_of_another(call: Call) -> None:
    """Change expand_as, view_as and reshape_as to calls with sizes, if the other tensor has wrong ones now.

    Raises:
        ApplyError: The sizes depend on the input, so they cannot be written down.
    """
    x, other = call.arguments["self"], call.arguments["other"]
    if [int(m.sum()) for m in call.after] == [int(m.sum()) for m in call.before(other)]:
        return
    shape, own = call.node.meta["val"].shape, x.meta["val"].shape
    name = str(call.target).split(".")[1].removesuffix("_as")
    sizes = [int(mask.sum()) for mask in call.after]
    opened = [k for k, size in enumerate(shape) if is_open(size)]
    new = len(shape) - len(own)
    if name == "expand":
        given = all(k >= new and hint(own[k - new]) == hint(shape[k]) for k in opened)
    else:
        given = len(opened) < 2
    if not given:
        raise ApplyError(
            f"apply: expected sizes known beforehand at {where(call.node) or call.node}, got some that "
            f"depend on the size of the input. Leave the group out of the plan, or use form='module'."
        )
    call.target = getattr(torch.ops.aten, name).default
    call.arguments = {"self": x, "size": [-1 if k in opened else size for k, size in enumerate(sizes)]}
    if name == "reshape":
        call.arguments["shape"] = call.arguments.pop("size")


def unflatten(call: Call) -> None:
    """Change unflatten: its sizes are those of the new axes."""
    dim = call.integer("dim") % len(call.before(call.arguments["self"]))
    _sizes(call, "sizes", call.after[dim : dim + len(call.arguments["sizes"])], inferred=True)


def repeat(call: Call) -> None:
    """Change repeat: an axis of size 1 is repeated once for each position of the result that stays."""
    source = call.before(call.arguments["self"])
    name = "repeats" if "repeats" in call.arguments else "dims"
    repeats = list(call.arguments[name])
    new = len(call.after) - len(source)
    for k, mask in enumerate(call.after):
        if not mask.all() and (k < new or len(source[k - new]) == 1):
            times = repeats[k]
            repeats[k] = _scaled(call, times, mask) if isinstance(times, fx.Node) else int(mask.sum())
    call.arguments[name] = repeats


def split(call: Call) -> None:
    """Change split and chunk to `split_with_sizes`, with the sizes that are left of the parts."""
    x = call.arguments["self"]
    masks = call.before(x)
    dim = call.integer("dim") % len(masks)
    if masks[dim].all():
        return
    _fixed(call, dim=dim)
    call.target = torch.ops.aten.split_with_sizes.default
    call.arguments = {"self": x, "split_sizes": [int(part[dim].sum()) for part in call.after], "dim": dim}


def take(call: Call) -> None:
    """Change slice and narrow, so that they take the same positions, as far as they stay."""
    x = call.arguments["self"]
    masks = call.before(x)
    dim = call.integer("dim") % len(masks)
    if masks[dim].all():
        return
    bounds = [call.arguments.get(n) for n in ("start", "end", "length", "step")]
    if positions_taken(call.node, len(masks[dim])).size == len(masks[dim]) and bounds[1] in (
        None,
        _TO_THE_END,
    ):
        return
    _fixed(call, *bounds, dim=dim)
    renumbered = np.cumsum(masks[dim]) - 1
    taken = positions_taken(call.node, len(masks[dim]))
    wanted = renumbered[taken[masks[dim][taken]]]
    if len(wanted) == 0 or wanted[-1] - wanted[0] == len(wanted) - 1:
        start = int(wanted[0]) if len(wanted) else 0
        call.target = torch.ops.aten.slice.Tensor
        call.arguments = {"self": x, "dim": dim, "start": start, "end": start + len(wanted), "step": 1}
    else:
        call.target = torch.ops.aten.index_select.default
        call.arguments = {"self": x, "dim": dim, "index": torch.as_tensor(wanted)}


def select(call: Call) -> None:
    """Change select: the position gets its number among those that stay."""
    masks = call.before(call.arguments["self"])
    dim = call.integer("dim") % len(masks)
    if masks[dim].all():
        return
    _fixed(call, call.arguments["index"], dim=dim)
    index = call.integer("index") % len(masks[dim])
    call.arguments["index"] = int(masks[dim][:index].sum())


def read(call: Call) -> None:
    """Change index and index_select: a constant index gets the new numbers of the positions that stay."""
    single = "index" in call.arguments
    indices = [call.arguments["index"]] if single else list(call.arguments["indices"])
    masks = call.before(call.arguments["self"])
    for k, node in enumerate(indices):
        dim = call.integer("dim") % len(masks) if single else k
        if node is None or masks[dim].all():
            continue
        _fixed(call, dim=dim)
        positions = constant_positions(call.constant(node), len(masks[dim]))
        if positions is None:
            raise ApplyError(
                f"apply: expected a constant index at {where(call.node) or call.node}, got one that is "
                f"computed. Leave the group out of the plan."
            )
        new = torch.as_tensor((np.cumsum(masks[dim]) - 1)[positions[masks[dim][positions]]])
        indices[k] = new
    call.arguments["index" if single else "indices"] = indices[0] if single else indices


def pad(call: Call) -> None:
    """Change pad: the amounts are the numbers of padded positions that stay."""
    source = call.before(call.arguments["self"])
    amounts = call.integers("pad")
    for k in range(len(amounts) // 2):
        dim = len(source) - 1 - k
        for side in (0, 1):
            n = amounts[2 * k + side]
            mask = call.after[dim] if n > 0 else source[dim]
            edge = mask[: abs(n)] if side == 0 else mask[len(mask) - abs(n) :]
            amounts[2 * k + side] = int(np.sign(n)) * int(edge.sum())
    # Axes that are not cut keep their amounts, which may be symbolic.
    given = list(call.arguments["pad"])
    for k in range(len(amounts) // 2):
        if not call.after[len(source) - 1 - k].all():
            _fixed(call, *given[2 * k : 2 * k + 2], dim=len(source) - 1 - k)
            given[2 * k : 2 * k + 2] = amounts[2 * k : 2 * k + 2]
    call.arguments["pad"] = given


def roll(call: Call) -> None:
    """Change roll: the shift is the number of positions that stay among those that move to the front."""
    masks = call.before(call.arguments["self"])
    shifts = list(call.arguments["shifts"])
    for k, (dim, shift) in enumerate(zip(call.integers("dims"), call.integers("shifts"), strict=True)):
        mask = masks[dim]
        if not mask.all():
            _fixed(call, shifts[k], dim=dim)
            shifts[k] = int(mask[len(mask) - shift % len(mask) :].sum()) if shift % len(mask) else 0
    call.arguments["shifts"] = shifts


def convolution(call: Call) -> None:
    """Change a convolution: it gets the number of groups that stay. A computed one stays computed."""
    groups, mask = call.integer("groups", 1), call.before(call.arguments["weight"])[0]
    left = groups_after(mask, groups) if groups > 1 else groups
    if left != groups:
        given = call.arguments["groups"]
        whole: Mask = np.any(mask.reshape(groups, -1), axis=1)
        call.arguments["groups"] = _scaled(call, given, whole) if isinstance(given, fx.Node) else left


def group_norm(call: Call) -> None:
    """Change a group norm: it gets the number of groups that stay."""
    call.arguments["num_groups"] = groups_after(
        call.before(call.arguments["input"])[1], call.integer("num_groups")
    )


def layer_norm(call: Call) -> None:
    """Change a layer norm: it gets the new shape that is normalised."""
    rank = len(call.arguments["normalized_shape"])
    _sizes(call, "normalized_shape", call.after[-rank:])


def squeeze(call: Call) -> None:
    """Change squeeze: it drops axes that had size 1 before, but not those that have size 1 now."""
    masks = call.before(call.arguments["self"])
    asked = call.arguments.get("dim", range(len(masks)))
    dims = {d % len(masks) for d in ([asked] if isinstance(asked, int) else asked)}
    call.target = torch.ops.aten.squeeze.dims
    call.arguments = {"self": call.arguments["self"], "dim": [k for k in sorted(dims) if masks[k].all()]}


def attention_scale(call: Call) -> None:
    """Write down the scale of an attention, which else follows from the size of the heads."""
    sizes = call.before(call.arguments["query"])[-1]
    if call.arguments.get("scale") is None and not sizes.all():
        call.arguments["scale"] = len(sizes) ** -0.5


def grouped_product(call: Call) -> None:
    """Check a grouped matrix product: its kernel only reads rows that start at a multiple of 16 bytes."""
    rows, weight = (call.arguments[name] for name in ("self", "mat2"))
    into, out = (int(mask.sum()) for mask in call.before(weight)[1:])
    stored = weight.meta["val"]
    bytes_each = stored.element_size()
    for length in (into, into if stored.stride()[1] == 1 else out):
        if length * bytes_each % 16:
            raise ApplyError(
                f"apply: expected rows of a multiple of 16 bytes at {call.node} ({rows.meta['val'].dtype}), "
                f"because its kernel reads no others, got {length} numbers. Plan with "
                f"Limits(round_to={16 // bytes_each}), or set the model's experts to 'batched_mm'."
            )


REWRITES: dict[str, Rewrite] = {
    "_grouped_mm.default": grouped_product,
    "scaled_dot_product_attention.default": attention_scale,
    **dict.fromkeys(
        ("view.default", "reshape.default", "_unsafe_view.default", "_reshape_alias.default"), reshaped_sizes
    ),
    **dict.fromkeys(("expand.default", "broadcast_to.default"), output_sizes),
    **dict.fromkeys(("expand_as.default", "view_as.default", "reshape_as.default"), sizes_of_another),
    **dict.fromkeys(("zeros.default", "ones.default", "full.default", "empty.memory_format"), output_sizes),
    **dict.fromkeys((f"{n}.{o}" for n in ("rand", "randn") for o in ("default", "generator")), output_sizes),
    **dict.fromkeys((f"randint.{o}" for o in ("default", "generator", "low", "low_generator")), output_sizes),
    "normal.float_float": output_sizes,
    **dict.fromkeys(
        ("new_zeros.default", "new_ones.default", "new_full.default", "new_empty.default"), output_sizes
    ),
    "unflatten.int": unflatten,
    **dict.fromkeys(("repeat.default", "tile.default"), repeat),
    **dict.fromkeys(("split.Tensor", "split.sizes", "split_with_sizes.default"), split),
    **dict.fromkeys(("chunk.default", "unsafe_chunk.default"), split),
    **dict.fromkeys(("tensor_split.sections", "tensor_split.indices"), split),
    **dict.fromkeys(("slice.Tensor", "narrow.default"), take),
    "select.int": select,
    **dict.fromkeys(("pad.default", "constant_pad_nd.default"), pad),
    **dict.fromkeys(("index.Tensor", "index_select.default"), read),
    "roll.default": roll,
    **dict.fromkeys((f"conv{n}d.{kind}" for n in (1, 2, 3) for kind in ("default", "padding")), convolution),
    **dict.fromkeys(
        ("conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input"), convolution
    ),
    "convolution.default": convolution,
    "group_norm.default": group_norm,
    **dict.fromkeys(("layer_norm.default", "rms_norm.default"), layer_norm),
    **dict.fromkeys(("squeeze.default", "squeeze.dim", "squeeze.dims"), squeeze),
}
"""ATen operator, without ``aten.`` -> the function that changes its arguments."""
