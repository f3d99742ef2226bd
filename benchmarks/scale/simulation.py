"""A run on tensors without values: what it would compute, move and hold, seen operator by operator."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.scale.work import Work


class Meter(TorchDispatchMode):
    """Counts what runs inside it, on any device; on ``meta`` nothing is computed, whatever the sizes.

    Multiply-adds are those of `torch.utils.flop_counter`, by the type of the result; every operator that
    makes a new tensor or writes one moves the bytes of its arguments and results. Bytes held are those of
    the storages that operators made and that something still refers to, autograd's graph included; what a
    kernel allocates for itself and frees again is not seen.

    Attributes:
        live: Bytes held now of what was made inside.
        peak: Most bytes held so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._amounts: Counter[str] = Counter()
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and write down what it took."""
        given = [v for v in pytree.tree_leaves((args, kwargs or {})) if isinstance(v, Tensor)]
        for tensor in given:
            self._note(tensor, new=False)
        out = func(*args, **(kwargs or {}))
        made = [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]
        before = {id(v.untyped_storage()) for v in given}
        fresh = [v for v in made if id(v.untyped_storage()) not in before]
        for tensor in made:
            self._note(tensor, new=True)
        self._amounts["calls"] += 1
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            kind = "convolution" if "conv" in str(packet) else "matmul"
            self._amounts[f"{kind} {str(made[0].dtype).removeprefix('torch.')}"] += flops // 2
        if fresh or func._schema.is_mutable:
            self._amounts["bytes"] += sum(v.numel() * v.itemsize for v in [*given, *made])
        return out

    def work(self) -> Work:
        """What was counted so far."""
        return Work(dict(self._amounts), self.peak)

    def _note(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known() is storage:
            return
        size = storage.nbytes() if new else 0

        def freed(_: Any, key: int = key, size: int = size) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
