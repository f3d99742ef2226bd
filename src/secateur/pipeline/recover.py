"""`sc.recover`: a short, plain fine-tuning loop with distillation, for those who can train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.calibration import Batch, Calibration, Forward, seeded
from secateur.calibration.workers import living_workers
from secateur.common.accelerating import ProcessGroup
from secateur.common.caches import without_caches
from secateur.common.models import device_of, evaluating, unwrap
from secateur.common.modes import require_plain_modes
from secateur.common.seeds import seed_of
from secateur.common.training import Loop, Zeros
from secateur.errors import CalibrationError, SettingError
from secateur.repairs.repair import flush_subnormals
from secateur.signals.loss import LossFn, default_loss, logits_of, own_loss
from secateur.targets.units.copying import duplicate
from secateur.targets.units.record import attach, record_of


@living_workers()
@torch.inference_mode(False)
@torch.enable_grad()
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
    """Fine-tune a pruned model with labels, with the dense model as a teacher, or with both.

    The loss of a batch is ``distill * T**2 * KL(teacher || model) + (1 - distill) * loss`` (Hinton et al.
    2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531). KL is the divergence of the
    model's class probabilities from the teacher's. For both, the outputs are divided by the temperature T
    before the softmax over the classes. Without labels and `loss_fn` only the first term counts, and
    without a teacher only the second. The learning rate falls to zero along half a cosine. Weights that a
    mask set to zero stay zero.

    With several processes each one trains on every N-th batch, and all return the same model: they average
    their gradients in each step, and the statistics of batch norms at the end. If the number of batches is
    no multiple of N, some of the first batches are used twice in an epoch. A loader that Accelerate has
    prepared already gives each process its own share.

    Args:
        model: The pruned model that `apply` or `repair` returned. It is not changed.
        teacher: The dense model, or None to train on labels alone. If it is on another device than the
            training, it is copied there.
        loader: Anything that `Calibration.of` accepts. A loader that shuffles gives another order in each
            epoch, unless it has a generator of its own, which starts each epoch in the same state.
        epochs: Passes over the data, at least 1.
        learning_rate: Learning rate of the first step. It is not used if `optimizer` is given.
        distill: Share of the teacher's term in the loss, in [0, 1].
        temperature: The temperature T, above 0.
        optimizer: A function that makes an optimizer from the parameters. Default: SGD with Nesterov
            momentum 0.9 and weight decay 5e-4.
        loss_fn: As for `score`.
        forward: As for `score`.
        accelerator: An `accelerate.Accelerator` for one process or for data-parallel ones. It decides on
            the device, the precision, and how many batches make a step.
        seed: Seed for all random choices. It must be the same in every process.
        progress: Show a progress bar on a terminal.

    Returns:
        A new model with the record of `model`, on the device of `model`.

    Raises:
        SettingError: If a setting is out of range, or the accelerator splits the model among processes.
        ArtefactError: If `model` did not come from `apply`.
        CalibrationError: If there is neither a teacher nor a loss, or the loss is not finite.

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
    seed = seed_of(seed)
    processes = ProcessGroup.of(accelerator, loader)
    model = unwrap(model)
    require_plain_modes("recover", model)
    record = record_of(model)
    data = Calibration.of(loader, seed=seed, forward=forward, model=model)

    def copy() -> nn.Module:
        with without_caches(model, lambda: data.first().arguments):  # caches would keep values of old weights
            return duplicate(model)

    student = copy()
    loop = Loop(
        epochs,
        factor=lambda done: 0.5 * (1 + math.cos(math.pi * done)),
        title=lambda epoch, _: f"Epoch {epoch}",
        zeros=Zeros.of(student.parameters()) if record.form == "masked" else Zeros(),
    )
    trained = [p for p in student.parameters() if p.requires_grad]
    plain = optimizer(trained) if optimizer else _sgd(trained, learning_rate)
    wrapped, steps = (student, plain) if accelerator is None else accelerator.prepare(student, plain)
    device = device_of(student)
    objective = _Objective(_on_device(teacher, device), distill, temperature, loss_fn)
    with seeded(seed + processes.rank):
        wrapped.train()
        loop.run(
            lambda batch: objective(wrapped, batch),
            trained,
            plain,
            data.to_weights(device),
            processes,
            model=wrapped,
            prepared=steps,
            progress=progress,
        )
    processes.agree(student)
    flush_subnormals(student)
    result = copy()  # not the student: an Accelerator may have changed it
    result.load_state_dict(student.state_dict())
    return attach(result, record)


class _Objective:
    """The loss of one batch."""

    def __init__(
        self, teacher: nn.Module | None, distill: float, temperature: float, loss_fn: LossFn | None
    ) -> None:
        self.teacher, self.distill, self.temperature, self.loss_fn = teacher, distill, temperature, loss_fn

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch, a scalar.

        Raises:
            CalibrationError: There is neither a teacher nor a loss, or the loss is not finite.
        """
        task: Tensor | None = None
        calls: list[_Call] = []
        if self.loss_fn is not None:
            with _recorded_calls(model) as calls:
                task = own_loss(self.loss_fn, model, batch.raw)
        loss = task
        if self.teacher is not None or self.loss_fn is None:
            # The loss function's own call serves too: a second would count twice in batch norms.
            own = self.loss_fn is not None and batch.reading.forward is not None
            found = [call.output for call in calls if own or call.has_inputs_of(batch)]
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
                "Lower the learning rate, and check the model and the data."
            )
        return loss

    def _divergence(self, teacher: nn.Module, output: Any, batch: Batch) -> Tensor:
        """Return KL(teacher || model). Classes lie along axis 1; along the last one for language models."""
        with torch.no_grad(), evaluating(teacher):
            target = logits_of(batch.run(teacher))
        own = logits_of(output)
        if own is None or target is None or own.shape != target.shape:
            raise CalibrationError(
                "recover: expected model and teacher to return logits of one shape, got "
                f"{type(output).__name__}. Pass teacher=None, and loss_fn if there are no labels."
            )
        axis = -1 if own.ndim == 3 and not isinstance(output, Tensor) else 1
        ours, theirs = (
            F.log_softmax(v.to(torch.promote_types(v.dtype, torch.float32)) / self.temperature, axis)
            for v in (own, target)
        )
        each = (theirs.exp() * (theirs - ours)).sum(axis)
        return each.mean() * self.temperature**2


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a model: its arguments and its output."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    def has_inputs_of(self, batch: Batch) -> bool:
        """Whether the arguments are the same objects as the inputs of a batch."""
        kwargs = {k: v for k, v in self.kwargs.items() if k in batch.kwargs or k != "labels"}
        if len(self.args) != len(batch.args) or [*kwargs] != [*batch.kwargs]:
            return False
        ours, theirs = [*self.args, *kwargs.values()], [*batch.args, *batch.kwargs.values()]
        return all(a is b for a, b in zip(ours, theirs, strict=True))


@contextmanager
def _recorded_calls(model: nn.Module) -> Iterator[list[_Call]]:
    """Record the calls of a model inside the block."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(args, kwargs, output))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _on_device(teacher: nn.Module | None, device: torch.device) -> nn.Module | None:
    """Return the teacher if it is on the device, else a copy there."""
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
            raise SettingError(f"recover: expected {name} of {expected}, got {value}. Pass another value.")


def _sgd(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
