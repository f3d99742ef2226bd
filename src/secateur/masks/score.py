"""What each single weight is worth, gathered in one pass over the data."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.allocate.registry import Allocates
from secateur.calibration import Batch, Calibration, seeded
from secateur.errors import CalibrationError, ScoreError, SettingError
from secateur.masks.blocks import Chain
from secateur.masks.offload import input_device, stored
from secateur.masks.weights import Layer, Weights, layers_of
from secateur.models import evaluating, unwrap
from secateur.progress import bar
from secateur.score.combination import name_of
from secateur.score.loss import LossFn, default_loss
from secateur.score.scores import Scores


@dataclass(eq=False)
class Sums:
    """What one pass adds up, per weight: memory of a few times the weights', whatever the data.

    Attributes:
        samples: How many were seen.
        inputs: Sums of squares of what each weight multiplies, over samples and positions; by weight, in a
            shape that broadcasts to the weight's.
        positions: How many positions those are, by weight.
        gradient: Sums of the samples' gradients.
        squares: Sums of their squares.
    """

    samples: int = 0
    inputs: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """One way to say what a weight is worth; higher is worth more.

    Attributes:
        needs: Which of `Sums` it reads.
        value: (name, weight in float64, sums, seed) -> the scores, in the weight's shape.
    """

    needs: frozenset[str]
    value: Callable[[str, Tensor, Sums, int], Tensor]


def _magnitude(name: str, weight: Tensor, sums: Sums, seed: int) -> Tensor:
    """|w|."""
    return weight.abs()


def _wanda(name: str, weight: Tensor, sums: Sums, seed: int) -> Tensor:
    """|w|·rms(x)."""
    return weight.abs() * (sums.inputs[name] / sums.positions[name]).sqrt()


def _taylor(name: str, weight: Tensor, sums: Sums, seed: int) -> Tensor:
    """|w·dL/dw|."""
    return (weight * sums.gradient[name] / sums.samples).abs()


def _fisher(name: str, weight: Tensor, sums: Sums, seed: int) -> Tensor:
    """w²·mean of g² / 2."""
    return weight.square() * sums.squares[name] / (2 * sums.samples)


def _random(name: str, weight: Tensor, sums: Sums, seed: int) -> Tensor:
    """Uniform in [0, 1)."""
    drawn = np.random.default_rng([seed % 2**64, zlib.crc32(name.encode())]).random(tuple(weight.shape))
    return torch.from_numpy(drawn)


CRITERIA: Mapping[str, Criterion] = MappingProxyType(
    {
        "magnitude": Criterion(frozenset(), _magnitude),
        "wanda": Criterion(frozenset({"inputs"}), _wanda),
        "taylor": Criterion(frozenset({"gradient"}), _taylor),
        "snip": Criterion(frozenset({"gradient"}), _taylor),  # of single weights the two are one
        "fisher": Criterion(frozenset({"squares"}), _fisher),
        "random": Criterion(frozenset(), _random),
    }
)
"""Name -> criterion."""


def score(
    model: nn.Module,
    calibration: Any = None,
    criteria: str | Iterable[str] = "magnitude",
    *,
    loss_fn: LossFn | None = None,
    by_block: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    r"""Say what each maskable weight is worth, by every criterion asked for, in one pass over the data.

    - ``magnitude``: \|w\|.
    - ``wanda``: \|w\| times the root mean square of what the weight multiplies, over samples and positions
      (Sun et al. 2024, arXiv 2306.11695). Departures: the mean where the paper takes the sum, a factor for
      each layer, so that the score does not grow with the data; convolutions, whose weights multiply a map.
    - ``taylor``: \|w · dL/dw\|, L the mean loss over all samples: what zeroing the weight changes the loss
      by, to first order (Molchanov et al. 2017, arXiv 1611.06440). ``snip`` (Lee et al. 2019, arXiv
      1810.02340) is the same for single weights, up to a factor for the whole model.
    - ``fisher``: w² · mean over samples of (dL_s/dw)² / 2, the diagonal of the empirical Fisher information
      in place of the second derivative (Theis et al. 2018, arXiv 1801.05787). It takes a backward pass a
      sample.
    - ``random``: uniform in [0, 1), by the seed and the weight's name.

    The model comes back bitwise as it was. It is scored in evaluation mode, without key-value caches.

    Wanda's pass can be made block by block (`secateur.masks.blocks`): each block of a language model, or of
    any other chain of alike blocks, sees all the data before the next one does. What is held are the hidden
    states between two blocks, of all batches, and what one block computes for one batch; weights that are
    offloaded are fetched block by block. The scores are the same up to rounding.

    Args:
        model: Any module.
        calibration: What `Calibration.of` takes; None if no criterion reads data.
        criteria: Names of `CRITERIA`.
        loss_fn: As for `sc.score`.
        by_block: Make Wanda's pass block by block; None: where Accelerate has offloaded weights. A model
            that is no chain of blocks is run whole, and so is everything that takes gradients.
        seed: For shuffling loaders and ``random``.
        progress: Show a bar on a terminal.

    Returns:
        ``scores[criterion][weight]``, float64, in the order of ``weight.reshape(-1)``.

    Raises:
        SettingError: A criterion is unknown.
        CalibrationError: There is no data, or it cannot feed a criterion.
        ScoreError: A weight or a score is not finite, or the data never reach a layer.
    """
    model = unwrap(model)
    names = tuple(dict.fromkeys([criteria] if isinstance(criteria, str) else criteria))
    for name in names:
        if name not in CRITERIA:
            raise SettingError(
                f"criteria: expected names among {', '.join(CRITERIA)}, got {name!r}. Name one of these."
            )
    weights, layers = Weights.of(model), layers_of(model)
    needs = frozenset[str]().union(*(CRITERIA[name].needs for name in names))
    sums = Sums()
    if needs:
        if calibration is None:
            raise CalibrationError(
                f"masks: expected calibration data for {', '.join(n for n in names if CRITERIA[n].needs)}, "
                "got none. Do give some, or use magnitude."
            )
        data = Calibration.of(calibration, seed=seed, model=model)
        device = input_device(model)
        data = data if device is None else data.to(device)
        if by_block is None:
            by_block = any(p.is_meta for p in model.parameters())
        with seeded(seed), evaluating(model):
            chain = Chain.of(model, data) if by_block and needs == {"inputs"} else None
            if chain is not None:
                _gather_by_block(chain, layers, data, sums, progress)
            else:
                _gather(model, layers, data, needs, sums, loss_fn, progress)
    if "inputs" in needs:
        unseen = [name for name in layers if name not in sums.inputs]
        if unseen:
            raise ScoreError(
                f"masks: expected data at every layer, got none at {unseen[0]!r}. Use magnitude, or data "
                "that reach it."
            )
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    for group in weights.groups:
        weight = stored(layers[group.name][0]).detach().double()
        for name in names:
            found = CRITERIA[name].value(group.name, weight, sums, seed)
            values[name][group.name] = found.reshape(-1).cpu().numpy()
    return Scores(values, sums.samples, 0, seed, weights.fingerprint)


def _gather(
    model: nn.Module,
    layers: Mapping[str, list[Layer]],
    data: Calibration,
    needs: frozenset[str],
    sums: Sums,
    loss_fn: LossFn | None,
    progress: bool,
) -> None:
    """One pass that adds up what is needed."""
    with watched(layers, sums) if "inputs" in needs else _nothing():
        for batch in data.batches("Scoring weights", progress):
            sums.samples += batch.size
            if "gradient" in needs:
                _add(sums.gradient, _gradients(model, layers, batch, loss_fn), batch.size)
            elif "inputs" in needs:
                with torch.no_grad():
                    batch.run(model)
    if "squares" in needs:  # apart, so that single samples are not watched as well
        for batch in data.batches("Scoring weights, sample by sample", progress):
            for sample in batch.cut(batch.size):
                found = _gradients(model, layers, sample, loss_fn)
                _add(sums.squares, {name: g.square() for name, g in found.items()}, 1)


def _gather_by_block(
    chain: Chain, layers: Mapping[str, list[Layer]], data: Calibration, sums: Sums, progress: bool
) -> None:
    """What the layers read, block by block; then of what is before and behind the blocks."""
    with watched(layers, sums):
        for _ in bar(chain.blocks, "Scoring weights, block by block", progress):
            chain.advance()

        def count(output: Any, batch: Batch) -> None:
            sums.samples += batch.size

        chain.finish(data, count)


def _add(into: dict[str, Tensor], found: Mapping[str, Tensor], times: int) -> None:
    for name, value in found.items():
        into[name] = into[name] + times * value if name in into else times * value


def _gradients(
    model: nn.Module, layers: Mapping[str, list[Layer]], batch: Batch, loss_fn: LossFn | None
) -> dict[str, Tensor]:
    """Of a batch's mean loss; taken of aliases, so that the model's own gradients stay as they are."""
    aliases = {name: found[0].weight.detach().requires_grad_() for name, found in layers.items()}

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, aliases, args, kwargs)

    with torch.enable_grad():
        loss = (
            default_loss(batch.run(run, labelled=True), batch) if loss_fn is None else loss_fn(run, batch.raw)
        )
        found = torch.autograd.grad(loss, list(aliases.values()), allow_unused=True)
    return {
        name: torch.zeros_like(alias, dtype=torch.float64) if g is None else g.double()
        for (name, alias), g in zip(aliases.items(), found, strict=True)
    }


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def watched(layers: Mapping[str, list[Layer]], sums: Sums) -> Iterator[None]:
    """Add up what the layers read, while the block runs."""
    handles = []
    for name, found in layers.items():
        for layer in found:

            def see(module: nn.Module, args: tuple[Any, ...], name: str = name, layer: Layer = layer) -> None:
                squares, positions = squared_inputs(layer, args[0].detach())
                _add(sums.inputs, {name: squares}, 1)
                sums.positions[name] = sums.positions.get(name, 0) + positions

            handles.append(layer.register_forward_pre_hook(see))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def squared_inputs(layer: Layer, x: Tensor) -> tuple[Tensor, int]:
    """For each weight of a layer, the sum of squares of what it multiplies, and over how many positions.

    The sums have one row for all outputs where these read the same.

    A layer is linear in its weight, so the derivative of ``sum(layer(x²))`` by the weight is that sum,
    whatever stride, padding and dilation. One output of each group is enough: all multiply the same.
    """
    squares = x.double().square()
    if isinstance(layer, nn.Linear):
        rows = squares.reshape(-1, squares.shape[-1])
        return rows.sum(0)[None], len(rows)
    batched = squares if squares.ndim == layer.weight.ndim else squares[None]
    one = torch.ones_like(layer.weight[: layer.groups], dtype=torch.float64).requires_grad_()
    with torch.enable_grad():
        out = layer._conv_forward(batched, one, None)
        (found,) = torch.autograd.grad(out.sum(), one)
    positions = out.numel() // out.shape[1]
    return (
        found if layer.groups == 1 else found.repeat_interleave(layer.out_channels // layer.groups, 0)
    ), positions


def asked_of(rule: Allocates) -> tuple[str, ...]:
    """What the rule needs, by name."""
    names = tuple(name_of(asked) for asked in rule.signals)
    unknown = [name for name in names if name not in CRITERIA]
    if unknown:
        raise SettingError(
            f"prune: expected a rule that reads {', '.join(CRITERIA)} of single weights, got {unknown[0]!r}. "
            'Set its removal signal: removal="wanda", for example.'
        )
    return names
