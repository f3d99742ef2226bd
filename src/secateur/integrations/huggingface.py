"""Gradual pruning under the Trainer of Hugging Face Transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from secateur.compat.training import before_loading, output_folder
from secateur.errors import SettingError
from secateur.integrations.pruner import GradualPruner
from secateur.integrations.shapes import read_shape, reshape, write_shape

if TYPE_CHECKING:
    from transformers import Trainer

try:
    from transformers import TrainerCallback
except ImportError:  # `GradualPruning` raises the error when it is made, so that this import works
    TrainerCallback = object


class GradualPruning(TrainerCallback):  # type: ignore[misc]  # its package is not looked into
    """Prunes the model of a Transformers Trainer while it trains, and makes resuming work.

    When a round is due at the end of a step, the model, the optimizer's moments and
    DistributedDataParallel are made smaller in place. Fields of the model's configuration are changed too
    if all layers have the same size. Then ``save_pretrained`` writes a folder that ``from_pretrained``
    reads. (`sc.save` works for any sizes.)

    Each checkpoint also gets a file ``pruning.json``. To resume, call
    ``trainer.train(resume_from_checkpoint=...)`` on a trainer of the dense model: the model first gets the
    checkpoint's shapes, then its tensors.

    Fractions in the schedule are fractions of ``max_steps``.

    Args:
        pruner: Holds the schedule, and prunes.

    Raises:
        ImportError: If Transformers is not installed.

    Example:
        ::

            pruner = GradualPruner(Schedule(sc.Budget(macs=0.5), 0.1, 0.6, rounds=5), calibration)
            trainer = Trainer(model, args, train_dataset=data)
            GradualPruning(pruner).attach(trainer)
            trainer.train()
    """

    def __init__(self, pruner: GradualPruner) -> None:
        if TrainerCallback is object:
            raise ImportError(
                "huggingface.GradualPruning: expected Transformers. Run pip install transformers."
            )
        self.pruner = pruner
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> GradualPruning:
        """Register this callback with a trainer. Call this in place of ``Trainer(callbacks=...)``.

        It is needed because a Trainer tells its callbacks neither about a checkpoint before it is loaded,
        nor about the wrapper of the model.

        Returns:
            This object.

        Raises:
            SettingError: If the trainer shards the model, or would load the best model at the end:
                checkpoints from before the last round hold larger models.
        """
        _check(trainer)
        self._trainer = trainer
        trainer.add_callback(self)

        def shape(folder: str, model: nn.Module | None) -> None:
            reshape(trainer.model_wrapped if model is None else model, read_shape(folder))

        before_loading(trainer, shape)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise an error if `attach` has not been called."""
        if self._trainer is None:
            raise SettingError(
                "huggingface.GradualPruning: expected attach(trainer) before train(), got a callback that "
                "knows no trainer. Call it in place of Trainer(callbacks=...)."
            )
        _check(self._trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, if a round is due."""
        trainer = self._trainer
        if trainer is not None:
            self.pruner.advance(
                trainer.model_wrapped, trainer.optimizer, step=state.global_step, total=state.max_steps
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the model's shapes into the checkpoint's folder."""
        trainer = self._trainer
        if trainer is not None and args.should_save:
            write_shape(trainer.model, f"{output_folder(trainer)}/checkpoint-{state.global_step}")


def _check(trainer: Trainer) -> None:
    for name, wrong in (
        ("the whole model in each process", trainer.is_fsdp_enabled and "FSDP"),
        ("the whole model in each process", trainer.is_deepspeed_enabled and "DeepSpeed"),
        ("load_best_model_at_end=False", trainer.args.load_best_model_at_end and "True"),
    ):
        if wrong:
            raise SettingError(
                f"huggingface.GradualPruning: expected {name}, got {wrong}. Change the TrainingArguments."
            )
