"""Gradual pruning under the Trainer of Lightning."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from secateur.errors import ArtefactError, SettingError
from secateur.integrations.pruner import GradualPruner
from secateur.integrations.shapes import reshape, shape_state
from secateur.integrations.wrappers import refresh

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError:  # said when one is made: this module alone needs nothing
        Callback = object

KEY = "secateur"
"""The entry of a checkpoint that holds its shapes."""


class GradualPruning(Callback):  # type: ignore[misc]  # its package is not looked into
    """Prunes the model of a Trainer while it trains, and lets it resume.

    After each batch whose step makes a round due, the model, the optimizers' moments and
    DistributedDataParallel become smaller where they are. Each checkpoint also holds the shapes, and
    ``trainer.fit(module, ckpt_path=...)``, as ``validate`` and ``test``, called with the dense module, gives
    it those before the tensors are loaded.

    Works in trainers of ``lightning.pytorch`` and of ``pytorch_lightning``, in one process or with DDP.
    Shares in the schedule are of ``trainer.estimated_stepping_batches``.

    Args:
        pruner: What to do when.
        part: Path of the submodule to prune, ``"net"`` say; the module as a whole, called by its ``forward``,
            if not given.

    Raises:
        ImportError: Lightning is not installed.

    Example:
        ::

            pruner = GradualPruner(Schedule(sc.Budget(macs=0.5), 0.1, 0.6, rounds=5), calibration)
            trainer = Trainer(max_epochs=10, callbacks=[GradualPruning(pruner, part="net")])
            trainer.fit(module, loader)
    """

    def __init__(self, pruner: GradualPruner, part: str = "") -> None:
        if Callback is object:
            raise ImportError("lightning.GradualPruning: expected Lightning. Run pip install lightning.")
        self.pruner = pruner
        self.part = part

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Sees to it that shapes go into checkpoints, and come out of them before the tensors do.

        By the module's own hooks, which it keeps: callbacks are asked only after the tensors are loaded, and
        not at all about checkpoints of tensors alone.
        """
        part = self._part(pl_module)
        if stage == "fit":
            _check(trainer)

        for hook in (_on_load_checkpoint, _on_save_checkpoint):
            setattr(pl_module, hook.__name__.removeprefix("_"), partial(hook, pl_module, part))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prunes, if a round is due."""
        schedule = self.pruner.schedule
        done = self.pruner.advance(
            self._part(pl_module),
            trainer.optimizers,
            step=trainer.global_step,
            total=None if schedule.resolved else trainer.estimated_stepping_batches,
        )
        if done is not None and isinstance(trainer.strategy.model, DistributedDataParallel):
            refresh(trainer.strategy.model)

    def _part(self, pl_module: nn.Module) -> nn.Module:
        try:
            return pl_module.get_submodule(self.part)
        except AttributeError as error:
            raise SettingError(
                f"lightning.GradualPruning: expected part to be the path of a submodule, got {self.part!r}. "
                f"{error}"
            ) from error


def reshaped(module: nn.Module, checkpoint: dict[str, Any], part: str = "") -> nn.Module:
    """A module made anew, with a checkpoint's shapes and tensors, without a trainer.

    Args:
        module: Made like the one that was trained; changed in place.
        checkpoint: What ``torch.load(path, map_location="cpu")`` gives of a checkpoint's file.
        part: As for `GradualPruning`.

    Raises:
        ArtefactError: The checkpoint is none of Lightning, or belongs to another model.
    """
    if "state_dict" not in checkpoint:
        raise ArtefactError(
            f"lightning.reshaped: expected a checkpoint of Lightning, got entries {sorted(checkpoint)[:5]}. "
            "Pass what torch.load gives of its file."
        )
    reshape(module.get_submodule(part), checkpoint.get(KEY, {}))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def _on_load_checkpoint(module: Any, part: nn.Module, checkpoint: dict[str, Any]) -> None:
    """The module's own hook, once it has the checkpoint's shapes."""
    reshape(part, checkpoint.get(KEY, {}))
    type(module).on_load_checkpoint(module, checkpoint)


def _on_save_checkpoint(module: Any, part: nn.Module, checkpoint: dict[str, Any]) -> None:
    """The module's own hook, once the checkpoint has its shapes."""
    checkpoint[KEY] = shape_state(part)
    type(module).on_save_checkpoint(module, checkpoint)


def _check(trainer: Any) -> None:
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if not kinds & {"SingleDeviceStrategy", "DDPStrategy"}:
        raise SettingError(
            "lightning.GradualPruning: expected the whole model in each process, got "
            f"{type(trainer.strategy).__name__}. Train with strategy='auto' or 'ddp'."
        )
