"""`sc.recover`: a short, plain fine-tuning loop with distillation, for those who can train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.apply.copying import duplicate
from secateur.apply.record import attach, record_of
from secateur.calibration import Batch, Calibration, seeded
from secateur.errors import CalibrationError, SettingError
from secateur.models import device_of, evaluating, unwrap
from secateur.repair.repair import flush_subnormals
from secateur.score.loss import LossFn, default_loss, logits_of


def recover(
    model: nn.Module,
    teacher: nn.Module | None,
    loader: Any,
    *,
    epochs: int = 2,
    learning_rate: float = 0.01,
    distill: float = 0.9,
    temperature: float = 2.0,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    loss_fn: LossFn | None = None,
    accelerator: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Fine-tune a pruned model.

    Each batch's loss is ``distill * T^2 * KL(teacher || model) + (1 - distill) * loss``, with the outputs
    of both divided by the temperature T before the softmax over their classes (Hinton et al. 2015,
    Distilling the Knowledge in a Neural Network, arXiv 1503.02531); without labels and `loss_fn` the first
    term alone, without a teacher the second. The learning rate falls to zero along half a cosine. What a
    mask has set to zero stays zero.

    Args:
        model: What `apply` or `repair` returned; it is left as it was.
        teacher: The dense model, or None to train on labels alone.
        loader: What `Calibration.of` takes; a shuffling loader shuffles alike in every epoch.
        epochs: Passes over the data, at least 1.
        learning_rate: Of the first step; unused if `optimizer` is given.
        distill: Share of the teacher in the loss, in [0, 1].
        temperature: Above 0.
        optimizer: Makes one from the parameters; SGD with Nesterov momentum 0.9 and weight decay 5e-4 if
            not given.
        loss_fn: As for `score`.
        accelerator: An `accelerate.Accelerator`: it prepares model and optimizer and runs the backward pass.
        seed: Of everything that draws.
        progress: Show a bar on a terminal.

    Returns:
        A new model, with the record of the one that came in.

    Raises:
        SettingError: A setting is out of range.
        ArtifactError: If `model` did not come from `apply`.
        CalibrationError: There is neither a teacher nor a loss, or the loss is not finite.
    """
    _check(epochs, distill, temperature)
    record = record_of(model)
    student = duplicate(model)
    holes = _holes(student) if record.form == "masked" else []
    trained = [p for p in student.parameters() if p.requires_grad]
    steps = optimizer(trained) if optimizer else _sgd(trained, learning_rate)
    data = Calibration.of(loader, seed=seed)
    modes = [(module, module.training) for module in student.modules()]
    wrapped = student
    if accelerator is not None:
        wrapped, steps = accelerator.prepare(student, steps)
    data = data.to(device_of(student))
    count = data.count() or sum(1 for _ in data.raw_batches())
    total = max(1, epochs * count)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        steps, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
    )
    objective = _Objective(None if teacher is None else unwrap(teacher), distill, temperature, loss_fn)
    with seeded(seed):
        student.train()
        for epoch in range(epochs):
            for batch in data.batches(f"Epoch {epoch + 1}", progress):
                loss = objective(wrapped, batch)
                steps.zero_grad()
                loss.backward() if accelerator is None else accelerator.backward(loss)
                steps.step()
                schedule.step()
                _punch(holes)
    for module, mode in modes:
        module.training = mode
    flush_subnormals(student)
    return attach(student, record)


class _Objective:
    """The loss of one batch."""

    def __init__(
        self, teacher: nn.Module | None, distill: float, temperature: float, loss_fn: LossFn | None
    ) -> None:
        self.teacher, self.distill, self.temperature, self.loss_fn = teacher, distill, temperature, loss_fn

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """A scalar.

        Raises:
            CalibrationError: There is neither a teacher nor a loss, or the loss is not finite.
        """
        output = model(*batch.args, **batch.kwargs)
        task: Tensor | None = None
        if self.loss_fn is not None:
            task = self.loss_fn(model, batch.raw)
        elif batch.labels is not None or self.teacher is None:
            task = default_loss(output, batch)
        loss = task
        if self.teacher is not None:
            loss = self._divergence(output, batch)
            if task is not None:
                loss = self.distill * loss + (1 - self.distill) * task
        if loss is None or not bool(torch.isfinite(loss)):
            raise CalibrationError(
                f"recover, batch {batch.index}: expected a finite loss, got {loss}. "
                "Do lower the learning rate, and check the model and the data."
            )
        return loss

    def _divergence(self, output: Any, batch: Batch) -> Tensor:
        """KL of the teacher and the model: classes lie along axis 1, or the last of a language model's."""
        teacher = self.teacher
        if teacher is None:
            raise CalibrationError("recover: expected a teacher, got none. Do give one.")
        with torch.no_grad(), evaluating(teacher):
            wanted = logits_of(teacher(*batch.args, **batch.kwargs))
        got = logits_of(output)
        if got is None or wanted is None or got.shape != wanted.shape:
            raise CalibrationError(
                "recover: expected model and teacher to return logits of one shape, got "
                f"{type(output).__name__}. Do pass teacher=None, and loss_fn if need be."
            )
        axis = -1 if got.ndim == 3 and not isinstance(output, Tensor) else 1
        ours, theirs = (F.log_softmax(v.float() / self.temperature, axis) for v in (got, wanted))
        each = (theirs.exp() * (theirs - ours)).sum(axis)
        return each.mean() * self.temperature**2


def _check(epochs: int, distill: float, temperature: float) -> None:
    for name, value, fits, expected in (
        ("epochs", epochs, epochs >= 1, "at least 1"),
        ("distill", distill, 0 <= distill <= 1, "a share in [0, 1]"),
        ("temperature", temperature, temperature > 0, "a number above 0"),
    ):
        if not fits:
            raise SettingError(f"recover: expected {name} of {expected}, got {value}. Do correct it.")


def _sgd(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


def _holes(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Weights with zeros, and where these are; biases and norms that happen to be zero are no mask."""
    return [(p, p.detach() == 0) for p in model.parameters() if p.ndim > 1 and bool((p == 0).any())]


@torch.no_grad()
def _punch(holes: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, zeros in holes:
        parameter.masked_fill_(zeros.to(parameter.device), 0)
