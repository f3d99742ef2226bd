"""Names of operators, by what they do with tensors in which units are missing."""

from __future__ import annotations

SAME = frozenset("alias clone detach _to_copy lift_fresh contiguous native_dropout".split())
"""Operators that return the numbers that they are given, or some of them."""
NOISE = frozenset(
    "bernoulli bernoulli_ rand rand_like randn randn_like normal_ uniform_ empty empty_like new_empty".split()
)
"""Operators of dropout and noise, which draw a number for each position."""
LAYOUT = frozenset("unsqueeze squeeze".split())
"""Operators that put in or take out axes of one position."""
SUMS = frozenset(
    "mm addmm bmm baddbmm mv addmv matmul linear convolution _convolution conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d _grouped_mm _scaled_mm addbmm dot".split()
)
"""Operators that sum over the units that a weight reads: in their results, no units are missing."""
SELECTIONS = frozenset("index index_select".split())
"""Operators that select entries of a tensor: of weights that read units, such as those of experts, too."""
EQUAL = frozenset("zeros ones full new_zeros new_ones new_full empty scalar_tensor".split())
"""Operators that make a tensor of equal numbers, however long it is."""
ATTENTION = "scaled_dot_product"
"""How the names of attention and of its kernels begin."""
WHOLE_CALLS = frozenset(
    "linear matmul scaled_dot_product_attention "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split()
)
"""Functions that count as one operator. Which ones they run depends on masks, and on the layout in memory."""
TITLES = dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), "view")
"""One name for operators of which PyTorch chooses one by the layout in memory."""
BY_CHANNEL = "batch_norm"
"""Part of the names of operators that work on each channel by itself, with weights for each."""
