"""`sc.score` for single weights."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.calibration import Batch, Calibration, Forward, seeded
from secateur.calibration.padding import running_padding
from secateur.calibration.reading import StandIn
from secateur.common.models import evaluating
from secateur.common.offload import input_device, stored
from secateur.common.progress import bar
from secateur.errors import CalibrationError, ScoreError
from secateur.signals.loss import LossFn, check_reached, loss_of
from secateur.signals.onepass import errors_prefixed
from secateur.signals.scores import Scores
from secateur.signals.signal import Signal
from secateur.signals.units.combination import (
    Combination,
    SignalLike,
    listed,
    name_of,
    parse,
    with_combinations,
)
from secateur.targets.weights.blocks import Chain
from secateur.targets.weights.weights import Layer, Weights, layers_of


@dataclass(eq=False)
class Sums:
    """Sums over the data, by weight name. Their memory is a few times that of the weights.

    Attributes:
        samples: Number of samples.
        inputs: Sum of squares of the input that each weight multiplies, over samples and positions, in a
            shape that broadcasts to the weight's.
        positions: Number of samples × positions in `inputs`.
        gradient: Sum over samples of the loss gradient, in the weight's shape.
        squares: Sum over samples of the squared loss gradient, in the weight's shape.
    """

    samples: int = 0
    inputs: dict[str, Tensor] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """A way to score single weights. A higher score is worth more.

    Attributes:
        needs: Names of the attributes of `Sums` that it reads.
        value: Function (weight name, weight in float64, sums, seed) -> scores in the weight's shape.
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
        "snip": Criterion(frozenset({"gradient"}), _taylor),  # equal to Taylor for single weights
        "fisher": Criterion(frozenset({"squares"}), _fisher),
        "random": Criterion(frozenset(), _random),
    }
)
"""All criteria for single weights, by name."""


def score(
    graph: Weights,
    calibration: Any = None,
    signals: SignalLike | Iterable[SignalLike] = "magnitude",
    *,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    by_block: bool | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    r"""Score each maskable weight by one or more criteria, in one pass over the data: see `secateur.score`.

    - ``magnitude``: \|w\|.
    - ``wanda``: \|w\| times the root mean square of the input that the weight multiplies, over samples and
      positions. Source: Sun et al. 2024, arXiv 2306.11695. Departures from the paper: it takes the mean
      instead of the sum, which changes the scores of a layer by one factor and makes them independent of the
      amount of data; and it also scores convolutions.
    - ``taylor``: \|w · dL/dw\|, with L the mean loss over all samples. This is the first-order change of the
      loss if the weight is set to zero. Source: Molchanov et al. 2017, arXiv 1611.06440. ``snip`` (Lee et al.
      2019, arXiv 1810.02340) equals it for single weights, up to one factor for the whole model.
    - ``fisher``: w² · mean over samples of (dL_s/dw)² / 2. This is the second-order change of the loss, with
      the diagonal of the empirical Fisher information in place of the second derivative. Source: Theis et al.
      2018, arXiv 1801.05787. It needs one backward pass for each sample.
    - ``random``: uniform in [0, 1), from the seed and the weight's name.

    The pass for Wanda can go block by block through a chain of blocks, such as a language model (see
    `secateur.targets.weights.blocks`). Then memory holds the hidden states of all batches between two blocks,
    and the activations of one block for one batch. Offloaded weights are fetched once for each block. The
    scores are the same up to rounding.

    Returns:
        ``scores[criterion][weight name]``, float64 vectors in the order of ``weight.reshape(-1)``.

    Raises:
        CalibrationError: There is no data, or a criterion cannot use it.
        ScoreError: A criterion is unknown, a weight or a score is not finite, or no data reach a layer.
    """
    asked = listed(signals)
    model, names = graph.model, leaves(asked)
    layers = layers_of(model)
    needs = frozenset[str]().union(*(CRITERIA[name].needs for name in names))
    sums, repeats = Sums(), 1
    if needs:
        if calibration is None:
            raise CalibrationError(
                f"score: expected calibration data for {', '.join(n for n in names if CRITERIA[n].needs)}, "
                "got none. Pass at least one batch, or use magnitude."
            )
        data = Calibration.of(calibration, seed=seed, forward=forward, model=model)
        device, repeats = input_device(model), data.repeats
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
                f"score: expected data at every layer, got none at {unseen[0]!r}. Use magnitude, or data "
                "that reach it."
            )
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    for group in graph.groups:
        weight = stored(layers[group.name][0]).detach().double()
        for name in names:
            found = CRITERIA[name].value(group.name, weight, sums, seed)
            values[name][group.name] = found.reshape(-1).cpu().numpy()
    return with_combinations(Scores(values, sums.samples // repeats, 0, seed, graph.fingerprint), asked)


def leaves(asked: Iterable[SignalLike]) -> tuple[str, ...]:
    """The criteria that are asked for, or that what is asked for is made of.

    Raises:
        ScoreError: One is unknown.
    """
    names: list[str] = []
    for one in map(parse, asked):
        if isinstance(one, Combination):
            names += leaves(one.parts)
        elif one in CRITERIA or (isinstance(one, Signal) and one.name in CRITERIA and one == type(one)()):
            names.append(name_of(one))
        else:
            raise ScoreError(
                f"score: expected names among {', '.join(CRITERIA)} for single weights, got {one!r}. Name "
                "one of these."
            )
    return tuple(dict.fromkeys(names))


def _gather(
    model: nn.Module,
    layers: Mapping[str, list[Layer]],
    data: Calibration,
    needs: frozenset[str],
    sums: Sums,
    loss_fn: LossFn | None,
    progress: bool,
) -> None:
    """Run the whole model over the data and fill the needed `sums`; squares take a second pass."""
    with sum_inputs(layers, sums) if "inputs" in needs else nullcontext():
        for batch in data.batches("Scoring weights", progress):
            sums.samples += batch.size
            if "gradient" in needs:
                _add(sums.gradient, _gradients(model, layers, batch, loss_fn), batch.size)
            elif "inputs" in needs:
                with torch.no_grad():
                    batch.run(model)
    if "squares" in needs:  # outside `sum_inputs`, or its hooks would count each input twice
        for batch in data.batches("Scoring weights, sample by sample", progress):
            for sample in batch.cut(batch.size):
                found = _gradients(model, layers, sample, loss_fn)
                _add(sums.squares, {name: g.square() for name, g in found.items()}, 1)


def _gather_by_block(
    chain: Chain, layers: Mapping[str, list[Layer]], data: Calibration, sums: Sums, progress: bool
) -> None:
    """Sum the layers' inputs block by block, then those of the layers before and after the blocks."""
    with sum_inputs(layers, sums):
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
    """Gradients of a batch's mean loss, float64, by weight name.

    The gradients are taken of detached aliases of the weights, so the model's own ``.grad`` does not change.
    """
    aliases = {name: found[0].weight.detach().requires_grad_() for name, found in layers.items()}

    run = _WithAliases(model, aliases)
    with torch.enable_grad(), errors_prefixed(f"score, batch {batch.index}"):
        loss = loss_of(run, batch, loss_fn)
        found = torch.autograd.grad(loss, list(aliases.values()), allow_unused=True)
        check_reached(found)
    return {
        name: torch.zeros_like(alias, dtype=torch.float64) if g is None else g.double()
        for (name, alias), g in zip(aliases.items(), found, strict=True)
    }


class _WithAliases(StandIn):
    """The model, with other tensors in the place of its weights."""

    def __init__(self, model: nn.Module, aliases: Mapping[str, Tensor]) -> None:
        super().__init__(model)
        self._model, self._aliases = model, dict(aliases)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model, self._aliases, args, kwargs)


@contextmanager
def sum_inputs(layers: Mapping[str, list[Layer]], sums: Sums) -> Iterator[None]:
    """Add the squared inputs of all layer calls inside the ``with`` block to `sums`, through hooks."""
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
    """Sum the squares of the inputs that each weight of a layer multiplies.

    A convolution is linear in its weight. So the derivative of ``sum(layer(x²))`` by a weight is the sum of
    the squared inputs that it multiplies, for any stride, padding and dilation. All outputs of a group
    multiply the same inputs, so one output of each group is enough. Of a linear layer's, padding does not
    count.

    Returns:
        The sums, float64: [1, inputs, *kernel] if all outputs read the same inputs, else the weight's shape.
        Then the number of samples × positions.
    """
    squares = x.double().square()
    if isinstance(layer, nn.Linear):
        rows = running_padding().matrix(squares)
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
