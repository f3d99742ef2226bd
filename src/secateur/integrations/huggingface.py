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
except ImportError:  # said when one is made: this module alone needs nothing
    TrainerCallback = object


class GradualPruning(TrainerCallback):  # type: ignore[misc]  # its package is not looked into
    """Prunes the model of a Trainer while it trains, and lets it resume.

    At the end of each step for which a round is due, the model, the optimizer's moments and
    DistributedDataParallel become smaller where they are. Fields of the model's configuration follow where
    all layers have one size, so that ``save_pretrained`` writes what ``from_pretrained`` reads; `sc.save`
    takes any sizes. Each checkpoint also gets ``pruning.json``, and
    ``trainer.train(resume_from_checkpoint=...)``, called on a trainer of the dense model, gives that the
    checkpoint's shapes before its tensors are loaded.

    Shares in the schedule are of ``max_steps``.

    Args:
        pruner: What to do when.

    Raises:
        ImportError: Transformers is not installed.

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
        """Become a callback of a trainer, and see to the shapes of what it resumes from.

        A Trainer tells its callbacks nothing of a checkpoint before it has loaded it, nor of what wraps the
        model: hence this, in place of ``Trainer(callbacks=...)``.

        Returns:
            Itself.

        Raises:
            SettingError: The trainer shards the model, or is to load the best model at the end: checkpoints
                from before the last round hold larger ones.
        """
        _check(trainer)
        self._trainer = trainer
        trainer.add_callback(self)

        def shape(folder: str, model: nn.Module | None) -> None:
            reshape(trainer.model_wrapped if model is None else model, read_shape(folder))

        before_loading(trainer, shape)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses a callback that `attach` has not been called on."""
        if self._trainer is None:
            raise SettingError(
                "huggingface.GradualPruning: expected attach(trainer) before train(), got a callback that "
                "knows no trainer. Call it in place of Trainer(callbacks=...)."
            )
        _check(self._trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prunes, if a round is due."""
        trainer = self._trainer
        if trainer is not None:
            self.pruner.advance(
                trainer.model_wrapped, trainer.optimizer, step=state.global_step, total=state.max_steps
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the shapes beside the tensors of a checkpoint."""
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
