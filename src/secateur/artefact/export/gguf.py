"""Write GGUF files, which llama.cpp and the programs that stand on it run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.artefact.export.trials import Trials
from secateur.common.models import device_of
from secateur.errors import ExportError, SettingError
from secateur.graph.inputs import Arguments
from secateur.targets.units.compare import run
from secateur.targets.units.copying import duplicate

IN_A_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Transformers' names of a layer's modules, and those of GGUF."""

OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}

NORMS = ("attn_q_norm", "attn_k_norm")
NEEDED = frozenset(IN_A_LAYER.values()) - {*NORMS}
TOKENIZER = "tokenizer."

OTHER = "No architecture of llama.cpp computes it. Export a Hugging Face folder or .onnx instead."

SIZES = ((1, 9), (2, 5), (1, 1), (1, 33))
"""Texts and tokens of the trials."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp reads a file.

    Attributes:
        name: Its name there.
        uneven: Layers may have different numbers of heads and neurons.
        normed: Queries and keys of each head are normalised.
        interleaved: Rotary pairs are neighbours; else they are half a head apart, as in Transformers.
        fused: Queries, keys and values are one matrix.
        tied: The word scores use the table of the words' vectors.
        biased: Linear layers may have a bias.
        scaled: Rotary frequencies may be scaled one by one.
    """

    name: str
    uneven: bool
    normed: bool
    interleaved: bool
    fused: bool
    tied: bool
    biased: bool
    scaled: bool


ARCHITECTURES = {
    found.name: found
    for found in (
        Architecture(
            "llama",
            uneven=False, normed=False, interleaved=True, fused=False, tied=False, biased=True, scaled=True,
        ),
        Architecture(
            "deci",
            uneven=True, normed=False, interleaved=True, fused=False, tied=False, biased=True, scaled=True,
        ),
        Architecture(
            "qwen3",
            uneven=False, normed=True, interleaved=False, fused=False, tied=False, biased=False, scaled=False,
        ),
        Architecture(
            "openelm",
            uneven=True, normed=True, interleaved=False, fused=True, tied=True, biased=False, scaled=False,
        ),
    )
}  # fmt: skip
"""Decoders with RMS norms, rotary positions and SwiGLU. The two that take uneven layers are DeciLM's and
OpenELM's, which compute what Llama and Qwen3 compute."""


def require_gguf() -> None:
    """Check that gguf is installed.

    Raises:
        SettingError: If it is not.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise SettingError(
            f"export: expected gguf, which writes and reads GGUF files, got {error}. "
            'Run pip install "secateur[export]".'
        ) from error


class Scores(nn.Module):
    """A language model that returns its word scores alone, [texts, tokens, words]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        """Return the scores after each token. [texts, tokens] -> [texts, tokens, words]."""
        return self.model(input_ids=ids, use_cache=False, return_dict=True).logits


def gguf_trials(model: nn.Module) -> Trials:
    """Make texts without padding, and the scores for them of the model, in float32 as llama.cpp computes.

    Raises:
        ExportError: If the model is no causal language model of Transformers.
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model = duplicate(model).float()
    scores = Scores(model).eval()
    generator = torch.Generator().manual_seed(0)
    try:
        words = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        texts = [torch.randint(words, size, generator=generator).to(device_of(model)) for size in SIZES]
        trials: tuple[Arguments, ...] = tuple(((text,), {}) for text in texts)
        return Trials(model, trials, tuple(run(scores, *each) for each in trials))
    except Exception as error:  # the model's own
        raise _refused(model, f"{type(error).__name__} when it was called with token ids") from error


def write_gguf(model: nn.Module, path: Path, tokenizer: Path | None) -> None:
    """Write a model, in the dtype of its weights; vectors in float32.

    Args:
        model: A decoder of Transformers such as Llama, Mistral, Qwen2 or Qwen3.
        path: The file to write.
        tokenizer: A GGUF file of the dense model, whose tokenizer is copied. None: the file has none, and
            takes token ids.

    Raises:
        ExportError: If no architecture of llama.cpp has a place for one of the tensors, for its shape, or for
            the way positions are made; or the file of the tokenizer has another number of words.
    """
    import gguf

    layers, outside = _sorted(model)
    sizes = [_Sizes.of(model, number, layer) for number, layer in enumerate(layers)]
    architecture = _architecture(model, layers, outside, sizes)
    theta, factors = _rotary(model, sizes[0].head)
    if factors is not None and not architecture.scaled:
        raise _refused(model, f"scaled rotary frequencies, which {architecture.name} has no place for")
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_block_count(len(layers))
    writer.add_context_length(_context(config))
    writer.add_embedding_length(outside["token_embd.weight"].shape[1])
    writer.add_vocab_size(len(outside["token_embd.weight"]))
    writer.add_head_count(_one_or_each([s.queries for s in sizes]))
    writer.add_head_count_kv(_one_or_each([s.keys for s in sizes]))
    writer.add_feed_forward_length(_one_or_each([s.neurons for s in sizes]))
    writer.add_key_length(sizes[0].head)
    writer.add_value_length(sizes[0].head)
    writer.add_rope_dimension_count(sizes[0].head)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _copy_tokenizer(writer, tokenizer, len(outside["token_embd.weight"]))
    tensors: dict[str, Tensor] = dict(outside)
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        if architecture.interleaved:
            heads = {"attn_q": size.queries, "attn_k": size.keys}
            for name, tensor in layer.items():
                if (count := heads.get(name.partition(".")[0])) is not None:
                    layer[name] = interleave(tensor, count)
        if architecture.fused:
            parts = [layer.pop(f"{name}.weight") for name in ("attn_q", "attn_k", "attn_v")]
            layer["attn_qkv.weight"] = torch.cat(parts)
        tensors |= {f"blk.{number}.{name}": tensor for name, tensor in layer.items()}
    for name, tensor in tensors.items():
        kind = _kind(tensor)
        writer.add_tensor(name, gguf.quants.quantize(_numbers(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class _Sizes:
    """Heads of queries, heads of keys, numbers in a head, and neurons of a layer."""

    queries: int
    keys: int
    head: int
    neurons: int

    @classmethod
    def of(cls, model: nn.Module, number: int, layer: Mapping[str, Tensor]) -> _Sizes:
        """Read them from the tensors and the attention module.

        Raises:
            ExportError: If queries, keys and values have heads of different sizes, or a size is missing.
        """
        attention = next(
            module for name, module in model.named_modules() if name.endswith(f"layers.{number}.self_attn")
        )
        head = getattr(attention, "head_dim", None)
        rows = {name: len(layer[f"attn_{name}.weight"]) for name in "qkv"}
        if not isinstance(head, int) or rows["k"] != rows["v"] or any(n % head for n in rows.values()):
            raise _refused(
                model, f"heads of {head} and {rows} rows of queries, keys and values in layer {number}"
            )
        return cls(rows["q"] // head, rows["k"] // head, head, len(layer["ffn_up.weight"]))


def _sorted(model: nn.Module) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return the model's tensors under the names of GGUF: those of each layer, and the others.

    Raises:
        ExportError: If a tensor has no place, or a layer lacks one.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    outside: dict[str, Tensor] = {}
    config: Any = getattr(model, "config", None)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        inside = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\.(.+)", module)
        there = IN_A_LAYER.get(inside[2]) if inside else OUTSIDE.get(module.rpartition(".")[2])
        if there is None or kind not in ("weight", "bias"):
            raise _refused(model, f"{name}, which has no place in any")
        if inside:
            layers.setdefault(int(inside[1]), {})[f"{there}.{kind}"] = tensor
        elif not (there == "output" and tied):
            outside[f"{there}.{kind}"] = tensor
    ordered = [layers[number] for number in sorted(layers)]
    missing = {"token_embd.weight", "output_norm.weight"} - outside.keys()
    for layer in ordered:
        missing |= {f"{name}.weight" for name in NEEDED} - layer.keys()
    if missing or not ordered or sorted(layers) != [*range(len(layers))]:
        raise _refused(model, f"no {' and '.join(sorted(missing)) or 'layers'}")
    return ordered, outside


def _architecture(
    model: nn.Module,
    layers: Sequence[Mapping[str, Tensor]],
    outside: Mapping[str, Tensor],
    sizes: Sequence[_Sizes],
) -> Architecture:
    """Return the first architecture that has a place for everything."""
    if len({size.head for size in sizes}) > 1:
        raise _refused(model, "heads of different sizes in different layers")
    uneven = len(set(sizes)) > 1
    normed = any(f"{name}.weight" in layer for layer in layers for name in NORMS)
    biased = any(name.endswith("bias") for layer in layers for name in layer)
    for found in ARCHITECTURES.values():
        if (
            normed == found.normed
            and uneven <= found.uneven
            and biased <= found.biased
            and (found.tied <= ("output.weight" not in outside))
        ):
            return found
    asked = [
        ("layers of different widths", uneven),
        ("normalised queries and keys", normed),
        ("biases", biased),
        ("word scores with a matrix of their own", "output.weight" in outside),
    ]
    raise _refused(model, " together with ".join(name for name, there in asked if there))


def _rotary(model: nn.Module, head: int) -> tuple[float, Tensor | None]:
    """Return the base of the rotary frequencies, and what each is divided by; None: by 1.

    Raises:
        ExportError: If the frequencies are missing, or change with the length of the text.
    """
    config: Any = model.config
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = given.get("rope_type", "default")
    found = [tensor for name, tensor in model.named_buffers() if name.endswith("inv_freq")]
    if kind in ("dynamic", "longrope") or not found or found[0].numel() != head // 2:
        raise _refused(model, f"rotary positions of kind {kind!r}, or none")
    theta = float(given.get("rope_theta", getattr(config, "rope_theta", 10000.0)))
    plain = theta ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    factors = plain / found[0].detach().double().cpu()
    return theta, None if torch.allclose(factors, torch.ones_like(factors), atol=1e-5) else factors.float()


def _context(config: Any) -> int:
    """The longest text on which the model computes what the file says: within its window, if it has one."""
    longest = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    return min(longest, window) if isinstance(window, int) else longest


def _copy_tokenizer(writer: Any, source: Path, words: int) -> None:
    for field in opened(source).fields.values():
        if field.name.startswith(TOKENIZER):
            value = field.contents()
            if field.name == f"{TOKENIZER}ggml.tokens" and len(value) != words:
                raise ExportError(
                    f"export(tokenizer={source}): expected {words} words, as the model has, got "
                    f"{len(value)}. Name the GGUF file of the same dense model."
                )
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, value, field.types[0], inner)


def opened(path: Path) -> Any:
    """Open a GGUF file for reading.

    Raises:
        ExportError: If it is none.
    """
    import gguf

    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # numpy's, the reader's or the system's own
        raise ExportError(
            f"export: expected {path} to be a GGUF file, got {type(error).__name__}: {error}. Name another."
        ) from error


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Reorder the rows of queries or keys: rotary pairs half a head apart become neighbours.

    Args:
        tensor: A weight or bias. [heads * size, ...]
        heads: Number of heads.

    Example:
        >>> interleave(torch.arange(8), 2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _kind(tensor: Tensor) -> Any:
    from gguf import GGMLQuantizationType as Kind

    half = {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}
    return half.get(tensor.dtype, Kind.F32) if tensor.ndim > 1 else Kind.F32


def _numbers(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor.detach().cpu().float().numpy())


def _one_or_each(values: Sequence[int]) -> int | Sequence[int]:
    return values[0] if len(set(values)) == 1 else values


def _refused(model: nn.Module, got: str) -> ExportError:
    return ExportError(
        f"export: expected {type(model).__name__} to be a decoder that an architecture of llama.cpp "
        f"({', '.join(ARCHITECTURES)}) computes, such as Llama, Mistral, Qwen2 or Qwen3, got {got}. Export a "
        "Hugging Face folder or .onnx instead."
    )
