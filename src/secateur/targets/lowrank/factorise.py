"""`sc.factorise`: each linear layer as two, what the model computes unchanged."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.calibration import Calibration, Forward, seeded
from secateur.common.foreign import details, error_text
from secateur.common.models import device_of, evaluating, unwrap
from secateur.errors import CaptureError, NothingToPruneError
from secateur.targets.lowrank.basis import bases, basis_of_weight
from secateur.targets.lowrank.layers import replaceable
from secateur.targets.lowrank.pair import dense_of, filled_pair, pairs_of, replace_modules
from secateur.targets.units.compare import relative_difference
from secateur.targets.units.copying import duplicate

M = TypeVar("M", bound=nn.Module)

_ALLOWED = 0.1
_OTHER = "factorise: expected the model to compute the same with two layers in the place of each, got"
_REMEDY = "Its code asks what its layers are, or for their parameters. Leave granularity out, or change it."


def factorise(
    model: M,
    calibration: object = None,
    *,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
) -> M:
    r"""A copy that computes the same, in which linear layers are two layers with directions between them.

    A layer gives :math:`y = W x + b`. Let :math:`U` hold the principal axes of its outputs on the data, the
    eigenvectors of :math:`W C W^\top`, where C is the second moment of the inputs about their mean; about 0
    for a layer without a bias, in which nothing could take up a mean. Then

    .. math:: y = U \, U^\top W (x - \bar x) + W \bar x + b ,

    which is two layers. If only the first r columns of U stay, the mean squared error is the sum of the
    eigenvalues that went. No other pair of rank r is better on these data: it is the truncated singular value
    decomposition of :math:`W C^{1/2}`, without an inverse of C.

    With all directions a pair costs more than its layer. `sc.trace` with granularity ``rank`` finds them, and
    `sc.apply` puts the layer itself back wherever no direction goes.

    Layers that share their weight, have hooks or are of a class of their own stay as they are, and so do
    those that no data reach.

    Source: activation-aware singular value decompositions, ASVD (Yuan et al. 2023, arXiv 2312.05821) and
    SVD-LLM (Wang et al. 2024, arXiv 2403.07378), whose truncation is the same; Departure: principal axes of
    the outputs in place of a Cholesky factor of C, and the mean goes into the bias.

    Args:
        model: The dense model; it is left as it was.
        calibration: Anything that `Calibration.of` takes. Labels are not read. None: as if all inputs of a
            layer were independent, with mean 0 and variance 1, which is the plain decomposition of W.
        forward: As for `score`.
        seed: Seed for shuffling loaders.
        progress: Show a progress bar on a terminal.

    Raises:
        NothingToPruneError: No layer can be two layers and save something.
        CalibrationError: There is no data, or what a layer reads is not finite.
        CaptureError: On the first batch the copy does not compute the same: the code asks for a layer's kind.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> pairs = factorise(net, [torch.randn(20, 8)], progress=False)
        >>> type(pairs[0]).__name__, pairs[0].rank
        ('LowRank', 8)
        >>> x = torch.randn(3, 8)
        >>> torch.allclose(pairs(x), net(x), atol=1e-5)
        True
    """
    model = cast("M", unwrap(model))
    known = [path for path, pair in pairs_of(model).items() if dense_of(pair) is None]
    if known:
        raise NothingToPruneError(
            f"factorise: expected a model whose layers are whole, got one whose {known[0]} is of low rank "
            "already. Prune the dense model to a lower rank, or prune units."
        )
    copy = duplicate(model)
    layers, reasons = replaceable(copy)
    data = None
    if layers and calibration is not None and device_of(model).type != "meta":
        data = Calibration.of(calibration, seed=seed, forward=forward, model=model)
        found = bases(copy, layers, data, progress=progress)
        reasons |= {path: "no data reach it" for path in layers if path not in found}
    else:
        found = {path: basis_of_weight(layer) for path, layer in layers.items()}
    if not found:
        listed = "; ".join(f"{path}: {why}" for path, why in [*reasons.items()][:3])
        raise NothingToPruneError(
            f"factorise: expected {type(model).__name__} to have a linear layer that two layers can replace, "
            f"got none. {listed or 'it has no linear layer'}. Leave granularity out for channels and heads."
        )
    pairs = {path: filled_pair(layers[path], b.directions, b.mean) for path, b in found.items()}
    replace_modules(copy, pairs)
    if data is not None:
        _check_equal(copy, model, data)
    return copy


def _check_equal(copy: nn.Module, model: nn.Module, data: Calibration) -> None:
    """Refuse a model whose code does something else once its layers are pairs.

    All directions are there, so only rounding may differ, which is far below what is allowed.
    """
    batch = data.to(device_of(model)).first()
    outputs: list[list[Tensor]] = []
    for each in (copy, model):
        try:
            with evaluating(each), seeded(0), torch.no_grad():
                leaves = pytree.tree_leaves(batch.run(each))
        except Exception as error:
            if each is model:
                raise
            raise CaptureError(f"{_OTHER} {error_text(error)}. {_REMEDY}", details(error)) from error
        outputs.append([t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()])
    same = [a.shape for a in outputs[0]] == [b.shape for b in outputs[1]]
    difference = relative_difference(*outputs) if same else float("inf")
    if difference > _ALLOWED:
        raise CaptureError(f"{_OTHER} outputs that differ by {difference:.3g} relative. {_REMEDY}")
