"""`sc.rotate`: a transformer's stream in the axes of its second moments, what it computes unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration import Calibration, Forward
from secateur.common.models import device_of, evaluating, named_tensors, unwrap
from secateur.errors import SettingError, VerificationError
from secateur.graph.trace import trace
from secateur.targets.units.compare import double_copy, relative_difference, run_in_double
from secateur.targets.units.copying import duplicate
from secateur.targets.width.stream import Axis, Norm, Stream, find_stream

TOLERANCE = 1e-9


def rotate(
    model: nn.Module,
    calibration: Any,
    *,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    r"""A copy of a transformer that computes the same, with its residual stream in order of importance.

    An RMS norm gives :math:`x / \sqrt{\mathrm{mean}(x^2) + \epsilon}` times its weight. The first factor
    follows a rotation Q of x. So the weights of norms are put into the layers that read them, which leaves
    ones; then the layers that write the stream are multiplied by :math:`Q^T` and those that read it by Q. One
    Q for the whole model keeps additions exact. Its columns are the eigenvectors of the sum, over all norms,
    of :math:`\sum_t \hat x_t \hat x_t^T`, :math:`\hat x` being what a norm gives without its weight: the
    first units of the stream carry most of what layers read. `narrow` removes the last ones.

    A layer norm is an RMS norm of what has no mean. Here the writers lose their mean over the stream, and the
    eigenvectors (all but the one of the mean) are placed on Helmert's basis, whose j-th vector is
    :math:`(1, …, 1, -j, 0, …)`: the first k coordinates then hold the first k - 1 eigenvectors and a
    constant, which a layer norm over these k takes away. So the modules stay layer norms, with biases of 1,
    from which the readers make what came from the old biases.

    A tied embedding is untied, since the head takes the weight of the last norm: the copy has a head of its
    own, and ``config.tie_word_embeddings`` is False.

    Args:
        model: The dense model; it is left as it was.
        calibration: Anything that `Calibration.of` accepts. Labels are not needed.
        forward: As for `score`.
        seed: Seed for shuffling loaders.
        progress: Show a bar on a terminal.

    Returns:
        A model of the same classes. A float64 copy of it was compared with the dense one on a few samples.

    Raises:
        SettingError: There is no such stream, or something else acts on it: a norm behind an addition (BERT)
            or between a layer and the stream (Gemma 3), factors on what a block adds (LayerScale).
        VerificationError: The two differ by more than 1e-9, relative to the largest output.
    """
    model = unwrap(model)
    data = Calibration.of(calibration, seed=seed, forward=forward, model=model).plain.to(device_of(model))
    copy = untied(duplicate(model))
    args, kwargs = arguments_of(data)
    stream = find_stream(copy, trace(copy, kwargs or args, allow_inexact=True), args, kwargs)
    basis = _basis(copy, stream, data, progress)
    double = double_copy(copy)
    for each in (copy, double):
        _turn(each, stream, basis)
    difference = relative_difference(run_in_double(double, args, kwargs), run_in_double(model, args, kwargs))
    if not difference <= TOLERANCE:
        raise VerificationError(
            f"rotate: expected the rotated {type(model).__name__} to equal the dense one to {TOLERANCE:.1g} "
            f"relative in float64, got {difference:.3g}. Something else than norms followed by layers acts "
            "on the stream, as a norm behind an addition does (BERT). Prune units inside its blocks, or "
            "whole blocks, instead."
        )
    return copy


def arguments_of(data: Calibration) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with for the first two samples."""
    inputs = data.first().inputs
    if isinstance(inputs, Mapping):
        return (), {name: _few(value) for name, value in inputs.items()}
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return tuple(map(_few, given)), {}


def _few(value: Any) -> Any:
    return value[:2] if isinstance(value, Tensor) and value.ndim else value


def untied(model: nn.Module) -> nn.Module:
    """The model with a parameter of its own wherever an embedding shares one, in place."""
    seen: set[int] = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    changed = False
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                setattr(module, name, own)
                changed = True
    config: Any = getattr(model, "config", None)
    if changed and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    return model


def _basis(model: nn.Module, stream: Stream, data: Calibration, progress: bool) -> Tensor:
    """What turns the stream: new = basis.T @ old. [width, width] float64"""
    device = device_of(model)
    moments = torch.zeros(stream.width, stream.width, dtype=torch.float64, device=device)

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().reshape(-1, stream.width).double()
        if stream.centred:
            x = x - x.mean(1, keepdim=True)
        x = x / x.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)
        moments.addmm_(x.T, x)

    handles = [model.get_submodule(n.path).register_forward_pre_hook(hook) for n in stream.norms]
    try:
        with evaluating(model), torch.no_grad():
            for batch in data.batches("Rotating", progress):
                batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    if not float(moments.trace()) > 0:
        raise SettingError(
            "rotate: expected data that reach the stream, got zeros. Check the calibration data."
        )
    if not stream.centred:
        return _by_size(moments)
    plain = helmert(stream.width).to(device)  # an orthonormal basis of what has no mean
    return plain @ _by_size(plain.T @ moments @ plain) @ plain.T


def _by_size(matrix: Tensor) -> Tensor:
    """Eigenvectors as columns, that of the largest eigenvalue first."""
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors.flip(1)
    return vectors


def helmert(width: int) -> Tensor:
    """Orthonormal columns without a mean; the first k - 1 are zero behind row k. [width, width - 1]

    Example:
        >>> helmert(3).round(decimals=3)
        tensor([[ 0.7070,  0.4080],
                [-0.7070,  0.4080],
                [ 0.0000, -0.8160]], dtype=torch.float64)
    """
    j = torch.arange(1, width, dtype=torch.float64)
    rows = torch.arange(width, dtype=torch.float64)[:, None]
    raw = torch.where(rows < j, 1.0, torch.where(rows == j, -j, 0.0))
    unit: Tensor = raw / (j * (j + 1)).sqrt()
    return unit


@torch.no_grad()
def _turn(model: nn.Module, stream: Stream, basis: Tensor) -> None:
    """Fold the norms into their readers and turn the stream, in place."""
    tensors = named_tensors(model)
    turn = basis.to(device_of(model))
    for axis in stream.writers:
        change(tensors, axis, lambda t: t @ turn)
    for norm in stream.norms:
        factors = factors_of(model, norm, stream.width)
        bias = None if norm.bias is None else tensors[norm.bias].double()

        def read(t: Tensor, factors: Tensor = factors, bias: Tensor | None = bias) -> Tensor:
            turned = (t * factors) @ turn
            return turned if bias is None else turned + (t @ bias)[..., None] / stream.width

        for axis in norm.readers:
            change(tensors, axis, read)
        tensors[norm.weight].fill_(norm.neutral)
        if norm.bias is not None:
            tensors[norm.bias].fill_(1.0)


def factors_of(model: nn.Module, norm: Norm, width: int) -> Tensor:
    """What a norm multiplies by: its weight, and one more where a weight of 0 is neutral. [width]"""
    return named_tensors(model)[norm.weight].double() + (1.0 - norm.neutral)


def change(tensors: Mapping[str, Tensor], axis: Axis, function: Callable[[Tensor], Tensor]) -> None:
    """Put what a function makes of a tensor in its place; the stream is the last axis of what it gets."""
    tensor = tensors[axis.tensor]
    new = function(tensor.double().movedim(axis.axis, -1))
    tensor.copy_(new.movedim(-1, axis.axis).to(tensor.dtype))
