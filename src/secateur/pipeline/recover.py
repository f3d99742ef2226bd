"""`sc.recover`: a short, plain fine-tuning loop with distillation, for those who can train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.calibration import Batch, Calibration, Forward, seeded
from secateur.common.accelerating import ProcessGroup
from secateur.common.models import device_of, evaluating, unwrap
from secateur.common.modes import require_plain_modes
from secateur.errors import CalibrationError, SettingError
from secateur.repairs.repair import flush_subnormals
from secateur.signals.loss import LossFn, default_loss, logits_of
from secateur.targets.units.copying import duplicate
from secateur.targets.units.record import attach, record_of


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
    forward: Forward | None = None,
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

    Of several processes each trains on every N-th batch, and all return the same model: gradients are
    averaged, as are batch-norm statistics at the end. Where the batches do not come out even, the first
    ones serve twice. A loader that Accelerate has prepared gives each process its own share already.

    Args:
        model: What `apply` or `repair` returned; it is left as it was.
        teacher: The dense model, or None to train on labels alone; it is copied if it lives elsewhere
            than where training takes place.
        loader: What `Calibration.of` takes. A shuffling loader shuffles anew in each epoch, unless it has a
            generator of its own: that starts each epoch alike.
        epochs: Passes over the data, at least 1.
        learning_rate: Of the first step; unused if `optimizer` is given.
        distill: Share of the teacher in the loss, in [0, 1].
        temperature: Above 0.
        optimizer: Makes one from the parameters; SGD with Nesterov momentum 0.9 and weight decay 5e-4 if
            not given.
        loss_fn: As for `score`.
        forward: As for `score`.
        accelerator: An `accelerate.Accelerator` for one process or for data parallel ones. It says where to
            train, in what precision, and how many batches make a step.
        seed: Of everything that draws; the same in every process.
        progress: Show a bar on a terminal.

    Returns:
        A new model where `model` lives, with its record.

    Raises:
        SettingError: A setting is out of range, or the accelerator shards models.
        ArtefactError: If `model` did not come from `apply`.
        CalibrationError: There is neither a teacher nor a loss, or the loss is not finite.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> small = sc.apply(net, plan)
        >>> data = [torch.randn(20, 4) for _ in range(5)]  # without labels the teacher alone teaches
        >>> tuned = sc.recover(small, net, data, epochs=3, progress=False)
        >>> distance = [sc.evaluate(m, data, dense=net).loss for m in (small, tuned)]
        >>> distance[1] < distance[0]
        True
    """
    _check(epochs, distill, temperature)
    processes = ProcessGroup.of(accelerator, loader)
    model = unwrap(model)
    require_plain_modes("recover", model)
    record = record_of(model)
    student = duplicate(model)
    holes = _holes(student) if record.form == "masked" else []
    trained = [p for p in student.parameters() if p.requires_grad]
    plain = optimizer(trained) if optimizer else _sgd(trained, learning_rate)
    data = Calibration.of(loader, seed=seed, forward=forward, model=model)
    count = data.count() or data.repeats * sum(1 for _ in data.raw_batches())
    total = max(1, epochs * processes.updates(count))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        plain, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
    )
    wrapped, steps = (student, plain) if accelerator is None else accelerator.prepare(student, plain)
    device = device_of(student)
    data = data.to(device)
    objective = _Objective(_on(teacher, device), distill, temperature, loss_fn)
    with seeded(seed + processes.rank):
        wrapped.train()
        steps.zero_grad()
        for epoch in range(epochs):
            shuffled = replace(data, seed=data.seed + epoch)
            for batch, update in processes.share(shuffled, count, f"Epoch {epoch + 1}", progress):
                with processes.gathering(wrapped, update):
                    processes.backward(objective(wrapped, batch))
                    if update:
                        steps.step()
                        steps.zero_grad()
                if update and not getattr(steps, "step_was_skipped", False):
                    schedule.step()
                _punch(holes)
    processes.agree(student)
    flush_subnormals(student)
    result = duplicate(model)  # not the student: what prepared it may have left its marks on it
    result.load_state_dict(student.state_dict())
    return attach(result, record)


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
        task: Tensor | None = None
        calls: list[_Call] = []
        if self.loss_fn is not None:
            with _listening(model) as calls:
                task = self.loss_fn(model, batch.raw)
        loss = task
        if self.teacher is not None or self.loss_fn is None:
            # The loss function's own call serves too: a second would count twice in batch norms.
            own = self.loss_fn is not None and batch.reading.forward is not None
            found = [call.output for call in calls if own or call.has(batch)]
            output = found[0] if found else batch.run(model, labelled=True)
            if self.loss_fn is None and (batch.labels is not None or self.teacher is None):
                loss = task = default_loss(output, batch)
            if self.teacher is not None:
                loss = self._divergence(self.teacher, output, batch)
                if task is not None:
                    loss = self.distill * loss + (1 - self.distill) * task
        if loss is None or not bool(torch.isfinite(loss)):
            raise CalibrationError(
                f"recover, batch {batch.index}: expected a finite loss, got {loss}. "
                "Do lower the learning rate, and check the model and the data."
            )
        return loss

    def _divergence(self, teacher: nn.Module, output: Any, batch: Batch) -> Tensor:
        """KL of the teacher and the model: classes lie along axis 1, or the last of a language model's."""
        with torch.no_grad(), evaluating(teacher):
            wanted = logits_of(batch.run(teacher))
        got = logits_of(output)
        if got is None or wanted is None or got.shape != wanted.shape:
            raise CalibrationError(
                "recover: expected model and teacher to return logits of one shape, got "
                f"{type(output).__name__}. Do pass teacher=None, and loss_fn if need be."
            )
        axis = -1 if got.ndim == 3 and not isinstance(output, Tensor) else 1
        ours, theirs = (
            F.log_softmax(v.to(torch.promote_types(v.dtype, torch.float32)) / self.temperature, axis)
            for v in (got, wanted)
        )
        each = (theirs.exp() * (theirs - ours)).sum(axis)
        return each.mean() * self.temperature**2


@dataclass(frozen=True, eq=False)
class _Call:
    """What a model was given, and what it gave."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    def has(self, batch: Batch) -> bool:
        """Whether it was given the very inputs of a batch."""
        kwargs = {k: v for k, v in self.kwargs.items() if k in batch.kwargs or k != "labels"}
        if len(self.args) != len(batch.args) or [*kwargs] != [*batch.kwargs]:
            return False
        given, wanted = [*self.args, *kwargs.values()], [*batch.args, *batch.kwargs.values()]
        return all(a is b for a, b in zip(given, wanted, strict=True))


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[_Call]]:
    """The calls of a model inside the block."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args, kwargs, output))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _on(teacher: nn.Module | None, device: torch.device) -> nn.Module | None:
    """The teacher, or a copy of it, where the model is trained."""
    if teacher is None:
        return None
    teacher = unwrap(teacher)
    return teacher if device_of(teacher) == device else duplicate(teacher).to(device)


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
