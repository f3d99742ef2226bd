"""Multi-head attention whose heads may be fewer and smaller than those of `nn.MultiheadAttention`.

PyTorch's class computes the size of a head as ``embed_dim / num_heads``, so it cannot lose a head, or a
channel of each head, while its inputs and outputs keep their width. `PrunedAttention` has its own number of
heads, its own size of queries and keys in a head, and its own size of values. Its tensors, with `width` for
the number of heads times `head_dim`, and `values` for the number of heads times `v_head_dim`:
``in_proj_weight`` [2 · width + values, embed_dim] (or ``q_proj_weight`` and ``k_proj_weight``
[width, inputs], ``v_proj_weight`` [values, inputs]), ``in_proj_bias`` [2 · width + values],
``bias_k`` [1, 1, width], ``bias_v`` [1, 1, values], ``out_proj.weight`` [outputs, values].
"""

from __future__ import annotations

import inspect
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
    """`nn.MultiheadAttention` whose number of heads and sizes of heads do not depend on its width.

    Names of parameters, arguments and results are the same. There is no special kernel for evaluation mode
    (PyTorch's "fast path"); nested tensors work without one.

    Attributes:
        num_heads: The number of heads.
        head_dim: The size of queries and keys in each head.
        v_head_dim: The size of values in each head.
        head_scale: What products of queries and keys are multiplied by. It follows from the dense head size.
        embed_dim: The width of the queries.
    """

    dense_class: type[nn.MultiheadAttention] = nn.MultiheadAttention
    """The class that the layer had before."""
    v_head_dim: int
    head_scale: float

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
            query, key, value, self.num_heads, self.head_scale, self.in_proj_weight, self.in_proj_bias,
            self.bias_k, self.bias_v, self.add_zero_attn, self.dropout,
            self.out_proj.weight, self.out_proj.bias, training=self.training,
            key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            q_proj_weight=self.q_proj_weight, k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight, average_attn_weights=average_attn_weights,
            is_causal=is_causal, batch_first=self.batch_first,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Describe the sizes that tensors do not show."""
        values = f", v_head_dim={self.v_head_dim}" if self.v_head_dim != self.head_dim else ""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}{values}"

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
    """Set the sizes of a copied layer whose tensors were cut, so that it computes with what is left of heads.

    Args:
        old: The dense layer.
        new: The copy with smaller tensors.
        stays: Says which positions were not cut.

    Raises:
        ApplyError: Heads were left of different sizes, or different heads of queries, keys and values.
    """
    free_heads(new)
    packed = new.in_proj_weight is not None
    q, k, v = (new.in_proj_weight,) * 3 if packed else (getattr(new, name) for name in _SEPARATE)
    values = new.out_proj.weight.shape[1]
    new.embed_dim, new.kdim, new.vdim = q.shape[1], k.shape[1], v.shape[1]
    new.num_heads = _heads_left(old, stays)
    new.head_dim = ((len(q) - values) // 2 if packed else len(q)) // new.num_heads
    new.v_head_dim = values // new.num_heads


def follow_width(model: nn.Module) -> None:
    """Set ``d_model`` of each `nn.Transformer` to the width of its layers. It checks its inputs for that."""
    for module in model.modules():
        if isinstance(module, nn.Transformer):
            layers = (m for m in module.encoder.modules() if isinstance(m, nn.MultiheadAttention))
            module.d_model = next((layer.embed_dim for layer in layers), module.d_model)


def free_heads(layer: nn.MultiheadAttention) -> None:
    """Change a layer's class, in place, to one whose heads do not depend on its width."""
    own = type(layer)
    if not isinstance(layer, PrunedAttention):
        layer.v_head_dim, layer.head_scale = layer.head_dim, layer.head_dim**-0.5
    if not isinstance(layer, PrunedAttention) and is_parametrized(layer):
        # PyTorch made a class for this one layer, which holds the computed weights. It becomes a new one.
        members = {k: v for k, v in vars(own).items() if k not in ("__dict__", "__weakref__")}
        layer.__class__ = type(own.__name__, (pruned_class(own.__bases__[0]),), members)
    elif not isinstance(layer, PrunedAttention):
        layer.__class__ = pruned_class(own)
    # nn.TransformerEncoderLayer takes its fast path only if this is True. That path assumes that heads fill
    # the width. False is also correct: queries, keys and values differ in size from the inputs.
    layer._qkv_same_embed_dim = False


def _heads_left(layer: nn.MultiheadAttention, stays: Stays) -> int:
    """Return the number of heads left. ApplyError unless all keep the same channels of queries and values."""
    heads, size = layer.num_heads, layer.head_dim
    size_v = layer.v_head_dim if isinstance(layer, PrunedAttention) else size
    own = dict(layer.named_parameters())
    # A weight that a parametrization computes is no parameter itself, so it is left out here.
    masks = [(stays("out_proj.weight", 1), size_v)] if "out_proj.weight" in own else []
    masks += [
        (stays(name, 0), s) for name, s in zip(_SEPARATE, (size, size, size_v), strict=True) if name in own
    ]
    if "in_proj_weight" in own:
        parts = np.split(stays("in_proj_weight", 0), [heads * size, 2 * heads * size])
        masks += zip(parts, (size, size, size_v), strict=True)
    found = [mask.reshape(heads, n) for mask, n in masks]
    left = [np.any(mask, axis=1) for mask in found]
    alike = (np.array_equal(m, np.outer(left[0], np.any(m, axis=0))) for m in found)
    if not all(alike) or any(not np.array_equal(own, left[0]) for own in left):
        raise ApplyError(
            f"apply: expected {type(layer).__name__} to keep the same heads of queries, keys and values, and "
            f"the same channels in each of these {heads} heads, got others. Remove whole heads, or a channel "
            f"of all heads."
        )
    return int(left[0].sum()) if left else layer.out_proj.weight.shape[1] // size_v


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
    num_heads: int,
    scale: float,
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

    Arguments and results are the same, with three exceptions: there is no embedding size, since the sizes of
    heads follow from the weights; `scale`, which queries are multiplied by, and `batch_first` are new. Nested
    tensors that `nn.TransformerEncoder` makes work too.
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
    projected = _projected(query, key, value, weights, in_proj_bias, out_proj_weight.shape[1])
    # [batch, heads, length, head_dim] each; of values, v_head_dim
    q, k, v = (t.unflatten(-1, (num_heads, t.shape[-1] // num_heads)).permute(order) for t in projected)
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
        scores = (q * scale) @ k.transpose(-2, -1)
        found = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
        heads = found @ v
        found = found.mean(1) if average_attn_weights else found
    else:
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hinted, scale=scale)
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
    del given["embed_dim_to_check"]
    given["num_heads"] = given["out_proj_weight"].shape[1] // size
    return multi_head_attention(**given, scale=size**-0.5)


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
    query: Tensor, key: Tensor, value: Tensor, weights: Any, bias: Tensor | None, values: int
) -> Sequence[Tensor]:
    """Compute queries, keys and values, from one weight [2 · width + values, inputs] or from three."""
    packed = isinstance(weights, Tensor)
    width = (len(weights) - values) // 2 if packed else len(weights[0])
    sizes = [width, width, values]
    if packed and query is key and key is value:
        return torch.split(F.linear(query, weights, bias), sizes, -1)
    biases = (None,) * 3 if bias is None else bias.split(sizes)
    parts = weights.split(sizes) if packed else weights
    return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), parts, biases, strict=True))


def _as_position(bias: Tensor, heads: Tensor) -> Tensor:
    """Shape a bias [1, 1, heads · size] as one more position of keys or values, in every sample."""
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
