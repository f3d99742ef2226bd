"""Multi-head attention whose number of heads may shrink: `nn.MultiheadAttention` without whole heads.

PyTorch's class computes the size of a head as ``embed_dim / num_heads``, so it cannot lose a head while its
inputs and outputs keep their width. `PrunedAttention` keeps the size of a head, and the shapes of its tensors
say how many heads there are. Its tensors, with `width` for the number of heads times `head_dim`:
``in_proj_weight`` [3 · width, embed_dim] (or ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight``
[width, inputs]), ``in_proj_bias`` [3 · width], ``bias_k`` and ``bias_v`` [1, 1, width],
``out_proj.weight`` [outputs, width].
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import handle_torch_function, has_torch_function

from secateur.errors import ApplyError

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
Stays = Callable[[str, int], NDArray[np.bool_]]
"""A function from (name of a tensor in the layer, axis) to the positions of the old axis that stay."""


class PrunedAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with fewer heads than ``embed_dim / head_dim``.

    Names of parameters, arguments and results are the same. There is no special kernel for evaluation mode
    (PyTorch's "fast path"); nested tensors work without one.

    Attributes:
        num_heads: The number of heads.
        head_dim: The size of each head.
        embed_dim: The width of the queries.
    """

    dense_class: type[nn.MultiheadAttention] = nn.MultiheadAttention
    """The class that the layer had before."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the outputs, and the attention weights if asked for; see `nn.MultiheadAttention`."""
        return multi_head_attention(
            query, key, value, self.head_dim, self.in_proj_weight, self.in_proj_bias,
            self.bias_k, self.bias_v, self.add_zero_attn, self.dropout,
            self.out_proj.weight, self.out_proj.bias, training=self.training,
            key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            q_proj_weight=self.q_proj_weight, k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight, average_attn_weights=average_attn_weights,
            is_causal=is_causal, batch_first=self.batch_first,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Describe the sizes that tensors do not show."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Say how to copy or pickle the layer: its class is made again from the class that it had before."""
        parts = super().__reduce_ex__(protocol)
        return (_blank, (self.dense_class,), *parts[2:])


def _blank(dense_class: type[nn.MultiheadAttention]) -> nn.MultiheadAttention:
    made = pruned_class(dense_class)
    return made.__new__(made)


_CLASSES: dict[Any, type[PrunedAttention]] = {nn.MultiheadAttention: PrunedAttention}


def pruned_class(dense_class: type[nn.MultiheadAttention]) -> type[PrunedAttention]:
    """Return the class that a layer of this class has once it is pruned.

    It has the methods of `dense_class`, then those of `PrunedAttention`. So a ``forward`` that the user wrote
    stays, and its ``super().forward`` calls that of `PrunedAttention`.
    """
    if dense_class not in _CLASSES:
        namespace = {"__module__": dense_class.__module__, "__doc__": dense_class.__doc__}
        bases = (dense_class, PrunedAttention)
        _CLASSES[dense_class] = type(dense_class.__name__, bases, {**namespace, "dense_class": dense_class})
    return _CLASSES[dense_class]


def resize(old: nn.MultiheadAttention, new: nn.MultiheadAttention, stays: Stays) -> None:
    """Set the sizes of a copied layer whose tensors were cut, so that it computes with fewer heads.

    Args:
        old: The dense layer.
        new: The copy with smaller tensors.
        stays: Says which positions were not cut.

    Raises:
        ApplyError: Something else than whole heads was cut.
    """
    packed = new.in_proj_weight is not None
    _check_heads(old, stays, ("in_proj_weight",) if packed else _SEPARATE)
    q, k, v = (new.in_proj_weight,) * 3 if packed else (getattr(new, name) for name in _SEPARATE)
    new.embed_dim, new.kdim, new.vdim = q.shape[1], k.shape[1], v.shape[1]
    new.num_heads = new.out_proj.weight.shape[1] // old.head_dim
    free_heads(new)


def follow_width(model: nn.Module) -> None:
    """Set ``d_model`` of each `nn.Transformer` to the width of its layers. It checks its inputs for that."""
    for module in model.modules():
        if isinstance(module, nn.Transformer):
            layers = (m for m in module.encoder.modules() if isinstance(m, nn.MultiheadAttention))
            module.d_model = next((layer.embed_dim for layer in layers), module.d_model)


def free_heads(layer: nn.MultiheadAttention) -> None:
    """Change a layer's class, in place, to one whose number of heads does not depend on its width."""
    own = type(layer)
    if not isinstance(layer, PrunedAttention) and is_parametrized(layer):
        # PyTorch made a class for this one layer, which holds the computed weights. It becomes a new one.
        held = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
        layer.__class__ = type(own.__name__, (pruned_class(own.__bases__[0]),), held)
    elif not isinstance(layer, PrunedAttention):
        layer.__class__ = pruned_class(own)
    # nn.TransformerEncoderLayer takes its fast path only if this is True. That path assumes that heads fill
    # the width. False is also correct: queries, keys and values differ in size from the inputs.
    layer._qkv_same_embed_dim = False


def _check_heads(layer: nn.MultiheadAttention, stays: Stays, inputs: tuple[str, ...]) -> None:
    """Raise ApplyError unless queries, keys, values and outputs keep the same whole heads."""
    own = dict(layer.named_parameters())
    axes = [("out_proj.weight", 1), *((name, 0) for name in inputs)]
    # A weight that a parametrization computes is no parameter itself, so it is left out here.
    masks = [stays(*axis).reshape(-1, layer.num_heads, layer.head_dim) for axis in axes if axis[0] in own]
    if not all((mask == masks[0][:1, :, :1]).all() for mask in masks):
        raise ApplyError(
            f"apply: expected whole heads of {type(layer).__name__} to go, the same of queries, keys and "
            f"values, got single ones of the {layer.head_dim} channels of a head. Remove whole heads."
        )


@torch.fx.wrap
def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Call `attend`. Like PyTorch's own function, this is one call for `torch.fx` and for function modes."""
    inputs = (query, key, value)
    if has_torch_function(inputs):
        found: tuple[Tensor, Tensor | None] = handle_torch_function(
            multi_head_attention, inputs, *inputs, *args, **kwargs
        )
        return found
    return attend(query, key, value, *args, **kwargs)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_dim: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `F.multi_head_attention_forward` for any number of heads, with ordinary operations.

    Arguments and results are the same, with two exceptions: `head_dim` takes the place of the embedding size
    and the number of heads, and `batch_first` is new. Nested tensors that `nn.TransformerEncoder` makes work
    too.
    """
    lengths = None
    if query.is_nested or key.is_nested or value.is_nested:
        masked = key_padding_mask is not None or attn_mask is not None
        if query is not key or key is not value or masked or need_weights or not batch_first:
            raise ValueError(
                "MultiheadAttention: expected one nested tensor as query, key and value, batch_first=True, "
                "need_weights=False and no mask. Use torch.nested.to_padded_tensor and key_padding_mask."
            )
        lengths = [len(sequence) for sequence in query.unbind()]
        query, key_padding_mask = _padded(query, lengths)
        key = value = query
    if is_causal and attn_mask is None:
        raise ValueError(
            "MultiheadAttention: expected attn_mask with is_causal=True, got None. Pass the causal mask."
        )
    batched = query.dim() == 3
    if not batched:
        alone = {id(x): x[None] for x in (query, key, value)}  # equal tensors stay the same object
        query, key, value = (alone[id(x)] for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    order = (0, 2, 1, 3) if batch_first or not batched else (1, 2, 0, 3)
    _require_equal_lengths(query, key, value, batch=order[0])
    weights = in_proj_weight if in_proj_weight is not None else (q_proj_weight, k_proj_weight, v_proj_weight)
    projected = _projected(query, key, value, weights, in_proj_bias)
    # [batch, heads, length, head_dim] each
    q, k, v = (t.unflatten(-1, (t.shape[-1] // head_dim, head_dim)).permute(order) for t in projected)
    hinted = is_causal and key_padding_mask is None and not need_weights
    mask = _merged(None if hinted else attn_mask, key_padding_mask, q, k.shape[2])
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([t, _as_position(b, t)], 2) for t, b in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    if mask is not None:
        mask = F.pad(mask, (0, int(bias_k is not None) + int(add_zero_attn)))
    dropout, found = dropout_p if training else 0.0, None
    if need_weights:
        scores = (q * math.sqrt(1.0 / head_dim)) @ k.transpose(-2, -1)
        found = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        heads = found @ v
        found = found.mean(1) if average_attn_weights else found
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hinted)
    back = (0, 2, 1, 3) if batch_first or not batched else (2, 0, 1, 3)
    out = F.linear(heads.permute(back).flatten(2), out_proj_weight, out_proj_bias)
    if lengths is not None:
        out = torch.nested.as_nested_tensor([o[:n] for o, n in zip(out, lengths, strict=True)])
    elif not batched:
        out, found = out[0], None if found is None else found[0]
    return out, found


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def head_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Return the size of a head in a call of `F.multi_head_attention_forward`."""
    given = _SIGNATURE.bind(*args, **kwargs).arguments
    return int(given["embed_dim_to_check"]) // int(given["num_heads"])


def has_head_size(size: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether `F.multi_head_attention_forward`, called with these arguments, has heads of this size."""
    given = _SIGNATURE.bind(*args, **kwargs).arguments
    width = given["out_proj_weight"].shape[1]
    stated = given["query"].shape[-1], given["embed_dim_to_check"], given["num_heads"] * size
    return bool(stated == (width, width, width))


def with_head_size(size: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Compute a call of `F.multi_head_attention_forward` with heads of this size.

    Raises:
        ApplyError: The call passes keys or values that are projected already.
    """
    given = dict(_SIGNATURE.bind(*args, **kwargs).arguments)
    if given.pop("static_k", None) is not None or given.pop("static_v", None) is not None:
        raise ApplyError(
            "apply: expected multi_head_attention_forward without static_k and static_v, got them. Leave the "
            "group alone (Limits(ignore=...))."
        )
    if given.pop("use_separate_proj_weight", False) and given.get("q_proj_weight") is not None:
        given["in_proj_weight"] = None
    del given["embed_dim_to_check"], given["num_heads"]
    return multi_head_attention(**given, head_dim=size)


def _require_equal_lengths(query: Tensor, key: Tensor, value: Tensor, batch: int) -> None:
    """Raise ValueError unless there is a value for each key, and one batch size, along the axis `batch`."""
    if key.shape[:2] != value.shape[:2] or query.shape[batch] != key.shape[batch]:
        raise ValueError(
            f"MultiheadAttention: expected keys and values of one length, and one batch size, got query "
            f"{list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}. Pass a value for each "
            "key."
        )


def _padded(nested: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Pad sequences to one tensor [batch, longest, inputs], and return a mask that is True for padding."""
    padded = torch.nested.to_padded_tensor(nested, 0.0)
    positions = torch.arange(padded.shape[1], device=padded.device)
    return padded, positions >= torch.tensor(lengths, device=padded.device)[:, None]


def _projected(
    query: Tensor, key: Tensor, value: Tensor, weights: Any, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute queries, keys and values, from one weight [3 · width, inputs] or from three weights."""
    packed = isinstance(weights, Tensor)
    if packed and query is key and key is value:
        return F.linear(query, weights, bias).chunk(3, -1)
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    parts = weights.chunk(3) if packed else weights
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True))


def _as_position(bias: Tensor, heads: Tensor) -> Tensor:
    """Shape a bias [1, 1, heads · head_dim] as one more position of keys or values, in every sample."""
    batch, count, _, size = heads.shape
    return bias.view(1, count, 1, size).expand(batch, -1, -1, -1)


def _merged(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    """Merge both masks to numbers that are added to the scores of queries and keys; None without masks."""
    batch, heads, length, _ = q.shape
    merged = None
    if attn_mask is not None:
        shape = (length, keys) if attn_mask.dim() == 2 else (batch * heads, length, keys)
        if attn_mask.shape != shape:
            raise ValueError(
                f"MultiheadAttention: expected attn_mask of shape [{length}, {keys}] or [batch · heads, "
                f"{length}, {keys}] with {batch} · {heads}, got {list(attn_mask.shape)}. Read num_heads of "
                f"this layer."
            )
        merged = _additive(
            attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads)), q.dtype
        )
    if key_padding_mask is not None:
        if key_padding_mask.shape != (batch, keys):
            raise ValueError(
                f"MultiheadAttention: expected key_padding_mask of shape [{batch}, {keys}], got "
                f"{list(key_padding_mask.shape)}. Mark each key with True where it is to be ignored."
            )
        padding = _additive(key_padding_mask, q.dtype)[:, None, None]
        merged = padding if merged is None else merged + padding
    return merged


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask into numbers: minus infinity where it is True."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)
