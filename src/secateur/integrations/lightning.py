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
    except ImportError:  # `GradualPruning` raises the error when it is made, so that this import works
        Callback = object

KEY = "secateur"
"""The key of a checkpoint under which the model's shapes are stored."""


class GradualPruning(Callback):  # type: ignore[misc]  # its package is not looked into
    """Prunes the model of a Lightning Trainer while it trains, and makes resuming work.

    When a round is due after a batch, the model, the optimizers' moments and DistributedDataParallel are
    made smaller in place. Each checkpoint also holds the shapes. To resume, call
    ``trainer.fit(module, ckpt_path=...)`` (or ``validate`` or ``test``) with the dense module: it first gets
    the checkpoint's shapes, then its tensors.

    Works in trainers of ``lightning.pytorch`` and of ``pytorch_lightning``, in one process or with DDP.
    Fractions in the schedule are fractions of ``trainer.estimated_stepping_batches``.

    Args:
        pruner: Holds the schedule, and prunes.
        part: Path of the submodule to prune, for example ``"net"``. Default: the whole module, which is
            then called by its ``forward``.

    Raises:
        ImportError: If Lightning is not installed.

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
        """Make the module store its shapes in checkpoints, and read them before the tensors.

        The module's own checkpoint hooks are wrapped for this, and still run. The hooks of a callback
        would come too late: after the tensors are loaded, and never for checkpoints that hold only tensors.
        """
        part = self._part(pl_module)
        if stage == "fit":
            _check(trainer)

        for hook in (_on_load_checkpoint, _on_save_checkpoint):
            setattr(pl_module, hook.__name__.removeprefix("_"), partial(hook, pl_module, part))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune, if a round is due."""
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
    """Give a new dense module the shapes and tensors of a checkpoint, without a trainer.

    Args:
        module: A module made in the same way as the trained one. It is changed in place.
        checkpoint: The content of a checkpoint file, from ``torch.load(path, map_location="cpu")``.
        part: As for `GradualPruning`.

    Returns:
        The same module.

    Raises:
        ArtefactError: If it is not a Lightning checkpoint, or belongs to another model.
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
    """Give the module the checkpoint's shapes, then run its own hook."""
    reshape(part, checkpoint.get(KEY, {}))
    type(module).on_load_checkpoint(module, checkpoint)


def _on_save_checkpoint(module: Any, part: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Store the module's shapes in the checkpoint, then run its own hook."""
    checkpoint[KEY] = shape_state(part)
    type(module).on_save_checkpoint(module, checkpoint)


def _check(trainer: Any) -> None:
    kinds = {kind.__name__ for kind in type(trainer.strategy).__mro__}
    if not kinds & {"SingleDeviceStrategy", "DDPStrategy"}:
        raise SettingError(
            "lightning.GradualPruning: expected the whole model in each process, got "
            f"{type(trainer.strategy).__name__}. Train with strategy='auto' or 'ddp'."
        )
