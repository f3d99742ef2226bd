"""The architectures that the library must trace, prune and verify, with random weights.

Nothing is downloaded. Weights are random but deterministic, and `settle` gives batch norms statistics
that fit them, so that activations neither vanish nor explode and no scale or shift is trivially 1 or 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from tests.zoo.importing import import_timm, import_torchvision

_RANDOM_FILLS = frozenset(
    {
        Tensor.normal_,
        Tensor.uniform_,
        # These announce themselves as a whole, and what they call is then not seen.
        nn.init.normal_,
        nn.init.uniform_,
        nn.init.trunc_normal_,
        nn.init.kaiming_normal_,
        nn.init.kaiming_uniform_,
        nn.init.xavier_normal_,
        nn.init.xavier_uniform_,
    }
)


class _DeferredFills(TorchFunctionMode):
    """Skips in-place random fills while a model is built, and remembers which tensors they were for.

    Initialising weights is most of what building a large model costs, and several models do it twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _RANDOM_FILLS:
            tensor = args[0] if args else (kwargs or {})["tensor"]
            self.tensors[id(tensor)] = tensor
            return tensor
        return func(*args, **(kwargs or {}))


def build(construct: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """`construct()` in eval mode, with deterministic weights; global random state is left alone.

    Weights are uniform with He's variance, which keeps activations of ReLU networks at one scale;
    scales and shifts of batch norms are spread around 1 and 0 (some constructors set them to 0).
    """
    deferred = _DeferredFills()
    with deferred:
        model = construct()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in deferred.tensors.values():
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 600
            bound = math.sqrt(6 / fan_in)
            tensor.uniform_(-bound, bound, generator=generator)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.uniform_(-0.2, 0.2, generator=generator)
    return model.eval()


@contextmanager
def _collecting_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the passes, whatever was there before
            norm.train()
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def settle(model: nn.Module, x: Tensor, passes: int = 2) -> nn.Module:
    """Sets `model`'s batch-norm statistics to their average over `passes` batches of `x`; returns `model`.

    Args:
        model: In eval mode; only its batch norms see training mode, so nothing is dropped at random.
        x: Images, half the side of those to come for speed; with much less the statistics do not carry
            over. [images, 3, side, side]
        passes: Into how many batches `x` is divided; each needs two images or more.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if norms:
        with torch.no_grad(), _collecting_statistics(norms):
            for batch in x.chunk(passes):
                model(batch)
    return model


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        name: As its library spells it.
        family: The library that defines it.
        options: What the constructor is given besides the name.
        side: Height and width of the example images.
    """

    name: str
    family: Literal["torchvision", "timm"]
    options: tuple[tuple[str, Any], ...] = ()
    side: int = 224

    def available(self) -> bool:
        """Whether the library that defines it can be imported here."""
        return self._library() is not None

    def make(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, with random weights and settled batch norms; the same for one seed."""
        library = self._library()
        if library is None:
            message = f"zoo: expected {self.family} to be installed for {self.name}. Do `make test`."
            raise ModuleNotFoundError(message, name=self.family)
        options = dict(self.options)
        if self.family == "torchvision":
            model = build(lambda: library.models.get_model(self.name, weights=None, **options), seed)
        else:
            model = build(lambda: library.create_model(self.name, pretrained=False, **options), seed)
        generator = torch.Generator().manual_seed(seed + 1)
        return settle(model, torch.randn(4, 3, 128, 128, generator=generator))

    def inputs(self, batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 2) -> tuple[Tensor, ...]:
        """Example images. [batch, 3, side, side]"""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, 3, self.side, self.side, generator=generator, dtype=dtype),)

    def _library(self) -> Any:
        return import_torchvision() if self.family == "torchvision" else import_timm()


ENTRIES: tuple[Entry, ...] = (
    Entry("vgg16_bn", "torchvision"),
    Entry("resnet18", "torchvision"),
    Entry("resnet50", "torchvision"),
    Entry("resnext50_32x4d", "torchvision"),
    Entry("densenet121", "torchvision"),
    Entry("mobilenet_v2", "torchvision"),
    Entry("mobilenet_v3_large", "torchvision"),
    Entry("efficientnet_b0", "torchvision"),
    Entry("regnet_y_400mf", "torchvision"),
    Entry("shufflenet_v2_x1_0", "torchvision"),
    Entry("squeezenet1_1", "torchvision"),
    # As its trained weights come: without the auxiliary heads, and not drawing its own slow initial weights.
    Entry("googlenet", "torchvision", (("aux_logits", False), ("init_weights", False))),
    Entry("mnasnet1_0", "torchvision"),
    Entry("hrnet_w18", "timm"),
    Entry("dpn68", "timm"),
    Entry("repvgg_a0", "timm"),
    Entry("ghostnet_100", "timm"),
)
"""The whole zoo; look one up by name with `entry`."""


def entry(name: str) -> Entry:
    """The entry with this name."""
    for candidate in ENTRIES:
        if candidate.name == name:
            return candidate
    raise KeyError(f"zoo: expected one of {[e.name for e in ENTRIES]}, got {name!r}.")
