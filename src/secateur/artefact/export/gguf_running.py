"""Run a GGUF file in PyTorch, from what the file says alone, to check it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.artefact.export.checking import Runs
from secateur.artefact.export.gguf import ARCHITECTURES, opened


def gguf_runner(path: Path) -> Runs:
    """Return a function that computes a file's word scores in float32: (ids,), {} -> [scores].

    It computes what llama.cpp computes for the file's architecture: RMS norms, rotary positions, attention
    with a causal mask, SwiGLU.
    """
    return _File(path).run


class _File:
    """A file that was read.

    Attributes:
        facts: Its keys without the architecture's name, and their values.
        tensors: Its tensors, in float32.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        read = opened(path)
        name = read.fields["general.architecture"].contents()
        self.architecture = ARCHITECTURES[name]
        self.facts = {field.name.removeprefix(f"{name}."): field.contents() for field in read.fields.values()}
        self.tensors: dict[str, Tensor] = {
            t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), np.float32))
            for t in read.tensors
        }

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the scores of texts of token ids [texts, tokens]."""
        (ids,) = args
        words = self.tensors["token_embd.weight"]
        stream = words[ids.cpu()]
        for layer in range(self.facts["block_count"]):
            stream = stream + self._attention(layer, self._normed(stream, f"blk.{layer}.attn_norm"))
            ahead = self._normed(stream, f"blk.{layer}.ffn_norm")
            gate, up = (self._linear(ahead, f"blk.{layer}.ffn_{name}") for name in ("gate", "up"))
            stream = stream + self._linear(F.silu(gate) * up, f"blk.{layer}.ffn_down")
        stream = self._normed(stream, "output_norm")
        return [stream @ self.tensors.get("output.weight", words).T]

    def _fact(self, name: str, layer: int) -> int:
        """A size of a layer: one for all layers, or one for each."""
        value = self.facts[name]
        return int(value[layer] if isinstance(value, list) else value)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _normed(self, x: Tensor, name: str) -> Tensor:
        eps = self.facts["attention.layer_norm_rms_epsilon"]
        return F.rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], eps)

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        """Attend to a text's earlier tokens. [texts, tokens, width], in and out."""
        counts = [self._fact(f"attention.head_count{kind}", layer) for kind in ("", "_kv", "_kv")]
        size = self.facts["attention.key_length"]
        if self.architecture.fused:
            parts = self._linear(x, f"blk.{layer}.attn_qkv").split([n * size for n in counts], -1)
        else:
            parts = tuple(self._linear(x, f"blk.{layer}.attn_{name}") for name in "qkv")
        queries, keys, values = (
            part.unflatten(-1, (heads, size)).transpose(1, 2)
            for part, heads in zip(parts, counts, strict=True)
        )
        if self.architecture.normed:
            queries = self._normed(queries, f"blk.{layer}.attn_q_norm")
            keys = self._normed(keys, f"blk.{layer}.attn_k_norm")
        queries, keys = self._turned(queries), self._turned(keys)
        found = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=counts[0] != counts[1]
        )
        return self._linear(found.transpose(1, 2).flatten(2), f"blk.{layer}.attn_output")

    def _turned(self, x: Tensor) -> Tensor:
        """Turn each rotary pair by its angle. [texts, heads, tokens, size], in and out."""
        size = self.facts["rope.dimension_count"]
        rates = self.facts["rope.freq_base"] ** -(torch.arange(0, size, 2).double() / size)
        rates = rates / self.tensors.get("rope_freqs.weight", torch.ones(()))
        angles = torch.arange(x.shape[2]).double()[:, None] * rates
        cos, sin = angles.cos().float(), angles.sin().float()
        pairs = (*x.shape[:-1], -1, 2) if self.architecture.interleaved else (*x.shape[:-1], 2, -1)
        axis = -1 if self.architecture.interleaved else -2
        first, second = x.reshape(pairs).unbind(axis)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], axis).reshape(x.shape)
