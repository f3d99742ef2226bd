"""A language model as a program that takes and returns the cache of keys and values."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.artefact.export.capturing import Captured, captured
from secateur.artefact.export.trials import Trials
from secateur.common.foreign import details, error_text
from secateur.common.models import device_of
from secateur.errors import ExportError, SettingError
from secateur.graph.inputs import Arguments
from secateur.targets.units.compare import run
from secateur.targets.units.graph_form.opened import TooMuchError, limited

SIZES = ((2, 3, 5), (1, 1, 9), (3, 4, 0), (1, 7, 0), (1, 1, 1), (2, 2, 17))
"""Samples, new tokens and tokens in the cache: of the capture, then of each comparison."""

OPEN = ("batch", "new tokens", "tokens in the cache")

CACHES = ("past_key_values", "cache")
"""What models call the argument; the second is that of Transformers from 5.24 on."""


class Decoder(nn.Module):
    """A causal language model of Transformers whose cache is an input and an output.

    Attributes:
        model: The model.
        positions: Whether it takes positions, which left-padded batches need.
        cache: The name of the argument that takes the cache.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.positions = "position_ids" in _parameters(model)
        self.cache = next((name for name in CACHES if name in _parameters(model)), "")

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, *rest: Any
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the model on new tokens.

        Args:
            input_ids: The new tokens. [batch, new]
            attention_mask: Zero at padding, of the cache and the new tokens. [batch, cached + new]
            rest: The positions of the new tokens [batch, new], if the model takes these; then keys and values
                of each layer, [batch, heads, cached, head size].

        Returns:
            The logits of the new tokens, and keys and values of each layer with the new tokens.
        """
        from transformers import DynamicCache

        *positions, past = rest
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        options = {"position_ids": positions[0]} if positions else {}
        options[self.cache] = cache
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            return_dict=True,
            **options,
        )
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def cached_program(model: nn.Module) -> tuple[Captured, Trials]:
    """Capture a causal language model of Transformers with its cache, and make inputs to compare it on.

    Inputs are ``input_ids``, ``attention_mask``, ``position_ids`` if the model takes them, and
    ``past_key_values.0.key``, ``past_key_values.0.value`` and so on. Outputs are ``logits``,
    ``present.0.key``, ``present.0.value`` and so on.

    Raises:
        SettingError: The model takes or returns no such cache.
        ExportError: Its code fixes the length of the text or of the cache.
        CaptureError: It cannot be captured.
    """
    decoder = Decoder(model).eval()
    shapes = _shapes(model)
    trials = [_arguments(decoder, shapes, *sizes, seed=k) for k, sizes in enumerate(SIZES)]
    given = trials[0]
    ahead = 2 + decoder.positions
    new = {(str(k), 1) for k in range(ahead)}
    past = {(str(ahead + k), 2) for k in range(2 * len(shapes))}
    try:
        with limited():
            found = captured(decoder, *given, new | past)
    except TooMuchError as error:
        raise ExportError(
            f"export(cache=True): expected {type(model).__name__} to take texts of any length, got sizes "
            "that are too complicated to capture. Export without cache=."
        ) from error
    if not found.open.issuperset(new | past):
        raise ExportError(
            f"export(cache=True): expected {type(model).__name__} to take texts and caches of any length, "
            "got code that fixes one. Export without cache=."
        )
    names = [f"{layer}.{kind}" for layer in range(len(shapes)) for kind in ("key", "value")]
    inputs = ("input_ids", "attention_mask", *(["position_ids"] if decoder.positions else []))
    found = dataclasses.replace(
        found,
        model=model,
        inputs=(*inputs, *(f"past_key_values.{name}" for name in names)),
        outputs=("logits", *(f"present.{name}" for name in names)),
    )
    return found, Trials(model, tuple(trials), tuple(run(decoder, *each) for each in trials))


def _parameters(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _shapes(model: nn.Module) -> list[tuple[int, int, torch.dtype]]:
    """Run the model on one token, and return heads, head size and dtype of each layer's cache."""
    refused = (
        "export(cache=True): expected a causal language model of Transformers that returns keys and values "
        f"of each layer, got {type(model).__name__}"
    )
    if isinstance(model, fx.GraphModule):
        raise SettingError(
            f"{refused} as a captured program, which has only the inputs of its trace. Take form 'module', "
            "or export it without cache=."
        )
    takes = _parameters(model)
    if not ({"input_ids", "attention_mask", "use_cache"} <= takes and takes & set(CACHES)):
        raise SettingError(f"{refused}, which takes no cache. Export it without cache=.")
    token = torch.ones(1, 1, dtype=torch.long, device=device_of(model))
    try:
        with torch.no_grad():
            cache = model(input_ids=token, attention_mask=token, use_cache=True).past_key_values
        return [(layer.keys.shape[1], layer.keys.shape[3], layer.keys.dtype) for layer in cache.layers]
    except Exception as error:  # the model's code, or a cache of another kind
        message = f"{refused} ({error_text(error)}). Export it without cache=."
        raise SettingError(message, details(error)) from error


def _arguments(
    decoder: Decoder,
    shapes: list[tuple[int, int, torch.dtype]],
    batch: int,
    new: int,
    cached: int,
    *,
    seed: int,
) -> Arguments:
    """Draw inputs: tokens of the whole vocabulary, padding on the left, and random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    device = device_of(decoder)
    words = decoder.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = torch.randint(words, (batch, new), generator=generator).to(device)
    mask = torch.ones(batch, cached + new, dtype=torch.long, device=device)
    mask[0, : cached // 2] = 0
    past = [
        tuple(torch.randn(batch, heads, cached, size, generator=generator).to(device, dtype) for _ in "kv")
        for heads, size, dtype in shapes
    ]
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, cached:]
    return (ids, mask, *([positions] if decoder.positions else []), past), {}
