"""Convert masks to and from `torch.nn.utils.prune`, and 2:4 sparse weights to the format of the hardware."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import prune

from secateur.common.models import unwrap
from secateur.errors import SettingError
from secateur.graph.graph import fingerprint
from secateur.targets.units.copying import duplicate
from secateur.targets.weights.apply import masked_layers
from secateur.targets.weights.plan import MaskPlan
from secateur.targets.weights.weights import rest_of


def to_torch(model: nn.Module, plan: MaskPlan) -> nn.Module:
    """Put masks on a model in place with `torch.nn.utils.prune`. Masked weights stay zero in training.

    Each weight becomes ``weight_orig``, which is trained, times the buffer ``weight_mask``.
    ``torch.nn.utils.prune.remove`` makes them plain weights again.

    Returns:
        The model.

    Raises:
        PlanError: The plan was made for another model.
    """
    model = unwrap(model)
    for layer, name, keep in masked_layers(model, plan):
        prune.custom_from_mask(layer, name, keep)
    return model


def from_torch(model: nn.Module) -> MaskPlan:
    """Read the masks that `torch.nn.utils.prune` has put on a model. The model is not changed.

    Returns:
        A plan for the same model without masks: as it was before masking, and as it will be after
        ``torch.nn.utils.prune.remove``.

    Raises:
        SettingError: The model has no such masks.
    """
    model = unwrap(model)
    # Masked weights are products with autograd history, and deepcopy refuses those. So detach them first.
    made = (v for module in model.modules() for v in vars(module).values())
    plain = duplicate(model, {id(v): v.detach() for v in made if isinstance(v, torch.Tensor)})
    masks: dict[str, NDArray[np.bool_]] = {}
    for path, module in plain.named_modules():
        for name in [
            n.removesuffix("_mask") for n, _ in module.named_buffers(recurse=False) if n.endswith("_mask")
        ]:
            if f"{name}_orig" in dict(module.named_parameters(recurse=False)):
                mask: torch.Tensor = getattr(module, f"{name}_mask")
                masks[f"{path}.{name}" if path else name] = mask.cpu().numpy() != 0
                prune.remove(module, name)
    if not masks:
        raise SettingError(
            "from_torch: expected a model that torch.nn.utils.prune has masked, got none. Mask it first."
        )
    parameters, alone = rest_of(plain)
    return MaskPlan(fingerprint(plain), "torch.nn.utils.prune", masks, parameters=parameters, alone=alone)


def to_semi_structured(model: nn.Module) -> tuple[str, ...]:
    """Convert 2:4 sparse weights of linear layers, in place, to the format that sparse tensor cores multiply.

    Only weights in float16 or bfloat16 with a multiple of 32 rows and of 64 columns are converted. Others
    stay as they are.

    Returns:
        The names of the converted weights.

    Raises:
        SettingError: The weights are not on a CUDA device.
    """
    weights = [
        (path, layer)
        for path, layer in unwrap(model).named_modules()
        if isinstance(layer, nn.Linear) and is_two_four(layer.weight)
    ]
    if not all(layer.weight.is_cuda for _, layer in weights) or not torch.cuda.is_available():
        raise SettingError(
            "to_semi_structured: expected a model on a CUDA device of compute capability 8.0 or more, got "
            "one on another. Move it there."
        )
    found = []
    for path, layer in weights:
        rows, columns = layer.weight.shape
        if layer.weight.dtype in (torch.float16, torch.bfloat16) and rows % 32 == 0 and columns % 64 == 0:
            sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
            layer.weight = nn.Parameter(sparse, requires_grad=False)
            found.append(f"{path}.weight" if path else "weight")
    return tuple(found)


def is_two_four(weight: torch.Tensor) -> bool:
    """Whether each block of four consecutive entries of a row has at most two nonzero ones."""
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight.detach() != 0).reshape(len(weight), -1, 4).sum(-1) <= 2).all())
