"""Experts in `sc.trace`: find a model's experts, prove that they can be removed, and say what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.calibration.reading import Forward, Reading
from secateur.common.foreign import details, error_text
from secateur.common.models import device_of, evaluating, unwrap
from secateur.compat.counting import flop_counter
from secateur.errors import CaptureError, NothingToPruneError, SecateurError
from secateur.graph.inputs import InputSpec, batch_size, call_arguments
from secateur.targets.experts.blocks import Block, candidates
from secateur.targets.experts.graph import ExpertGraph, build, expert_parameters
from secateur.targets.experts.routing import Call, Routed, replaced, watching
from secateur.targets.experts.trial import Seen, tried


def trace(model: nn.Module, example_inputs: Any, *, forward: Forward | None = None) -> ExpertGraph:
    """The blocks whose experts may be removed, each tried, and what they cost: see `secateur.trace`.

    Their fewest experts are checked here, before any data is read.

    Raises:
        NothingToPruneError: There is no block with experts that may go.
        CaptureError: The forward pass fails.
    """
    model = unwrap(model)
    device = device_of(model)
    if forward is not None:
        example_inputs = Reading(model, forward).inputs(example_inputs)
    args, kwargs = call_arguments(example_inputs, device)
    choices = list(candidates(model))
    if not choices:
        raise NothingToPruneError(
            f"trace: expected {type(model).__name__} to hold a mixture of experts, got none: no list of "
            "equal modules, and no module with several [experts, ...] parameters, beside a matrix with a row "
            "for each. Leave granularity out for channels and heads."
        )
    with evaluating(model), torch.no_grad():
        macs, tokens = _count(model, [c[0] for c in choices], args, kwargs)
        if device.type == "meta":
            blocks = [c[0] for c in choices]
            left: list[tuple[Block, str]] = []
            unknown = [b.name for b in blocks if b.top_k is None]
            if unknown:
                raise CaptureError(
                    f"trace: expected {unknown[0]} to say how many experts a token uses, as top_k for "
                    "example, got nothing. Trace the model with weights instead of on the meta device."
                )
        else:
            blocks, left = _tried(model, choices, args, kwargs)
    if not blocks:
        reasons = "\n".join(f"{block.name} ({block.count}): {reason}" for block, reason in left)
        raise NothingToPruneError(
            f"trace: expected {type(model).__name__} to have experts that can be removed, found none.\n"
            f"{reasons}\nChange what a reason names, or leave granularity out for channels and heads."
        )
    samples = max(batch_size((args, kwargs)), 1)
    macs += _of_experts(model, [*blocks, *(block for block, _ in left)], tokens)
    return build(
        model,
        blocks,
        left,
        InputSpec.of(args, kwargs),
        macs=macs // samples,
        tokens=tokens // samples,
        proven=device.type != "meta",
    )


def _tried(
    model: nn.Module, choices: list[list[Block]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Block], list[tuple[Block, str]]]:
    """The blocks that passed their trial, with the first router that did; and the others, with reasons."""
    seen: dict[str, Seen | str] = {}

    def watch(call: Call, routed: Callable[[], Routed]) -> None:
        try:
            seen[call.block.experts] = Seen.of(call, routed())
        except SecateurError as error:
            seen[call.block.experts] = str(error)
        except Exception as error:  # whatever a wrong reading of a user's module leads to
            seen[call.block.experts] = f"its experts could not be watched ({error_text(error)})"

    with watching(model, [options[0] for options in choices], watch):
        model(*args, **kwargs)
    blocks, left = [], []
    for options in choices:
        found = seen.get(options[0].experts, "the example inputs do not reach it")
        results = [found] if isinstance(found, str) else [tried(model, block, found) for block in options]
        good = [result for result in results if isinstance(result, Block)]
        if good:
            blocks.append(good[0])
        else:
            left.append((options[0], str(results[0])))
    return blocks, left


def _count(
    model: nn.Module, blocks: list[Block], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int]:
    """MACs of the whole batch without its experts, and the tokens that a block reads in it.

    Experts are not run, so that this also works on the meta device.
    """
    tokens: dict[str, int] = {}
    counter = flop_counter()
    try:
        with (
            ExitStack() as undo,
            counter,
            sdpa_kernel(SDPBackend.MATH),
        ):  # fused attention is not counted everywhere
            for block in blocks:
                experts = model.get_submodule(block.experts)
                for module in [experts] if block.fused else experts.children():
                    undo.enter_context(replaced(module, lambda hidden, *_, **__: torch.zeros_like(hidden)))
                undo.enter_context(_tokens(model, block, tokens))
            model(*args, **kwargs)
    except Exception as error:
        raise CaptureError(
            f"trace: expected {type(model).__name__} to run on the example inputs, got "
            f"{error_text(error)}. Check them. On the meta device Transformers needs an attention_mask, and "
            "model.set_attn_implementation('eager').",
            details(error),
        ) from error
    return counter.get_total_flops() // 2, max(tokens.values(), default=0)


def _of_experts(model: nn.Module, blocks: list[Block], tokens: int) -> int:
    """MACs of the experts: a token costs as many as the matrices of those that it uses have entries."""
    total = 0
    for block in blocks:
        matrices = sum(p.numel() for _, p, _ in expert_parameters(model, block) if p.ndim == 2 + block.fused)
        total += tokens * (block.top_k or 1) * matrices // block.count
    return total


@contextmanager
def _tokens(model: nn.Module, block: Block, tokens: dict[str, int]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        if tensors:
            tokens[block.name] = tensors[0].numel() // tensors[0].shape[-1]

    handle = model.get_submodule(block.name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
