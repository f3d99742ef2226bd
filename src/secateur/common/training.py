"""The training loop that `sc.recover` and the repair `polish` share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from secateur.calibration import Batch, Calibration
from secateur.common.accelerating import ProcessGroup
from secateur.common.precision import as_called

MEASURED = 20
"""The error is measured about this many times in a training."""

PATIENCE = 1 / 3
"""Share of a training without a better state after which it ends. The last steps are the smallest and help
most, so it never ends in the first two thirds."""


LOST = 1.25
"""If the error exceeds the smallest one by this factor, the steps are too large: training goes back to the
best state, and on with half the learning rate."""


STATE = frozenset({"step", "exp_avg", "exp_avg_sq"})
"""What Adam, the only optimizer whose state is kept, has of each parameter once it took a step."""


@dataclass(frozen=True, eq=False)
class Zeros:
    """Weights that a mask set to zero, and that training leaves there.

    Attributes:
        held: Tensors, and where each is zero.
    """

    held: Sequence[tuple[Tensor, Tensor]] = ()

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Zeros:
        """Find the zeros of weights. Biases and norms that happen to be zero are no mask."""
        found = ((t, t.detach() == 0) for t in tensors if t.ndim > 1)
        return cls([(t, zeros) for t, zeros in found if bool(zeros.any())])

    @torch.no_grad()
    def restore(self) -> None:
        """Set them to zero again."""
        for tensor, zeros in self.held:
            tensor.masked_fill_(zeros.to(tensor.device), 0)

    def hide(self) -> None:
        """Set their gradients to zero, which else would count in the norm of the gradient."""
        for tensor, zeros in self.held:
            if tensor.grad is not None:
                tensor.grad.masked_fill_(zeros.to(tensor.device), 0)


class Best:
    """Keeps the parameters with the smallest error.

    Attributes:
        start: The error before training.
        error: The smallest error so far.
    """

    def __init__(self, measure: Callable[[], float], parameters: Sequence[Tensor]) -> None:
        """Measure the parameters as they are.

        Args:
            measure: Returns the error of the parameters as they are. Lower is better.
            parameters: What training changes.
        """
        self._measure, self._parameters = measure, parameters
        self._found, self._measured = 0.0, 0.0  # shares of the training
        self.start = self.error = self._last = measure()
        self._values = [p.detach().clone() for p in parameters]

    def look(self, done: float) -> bool:
        """Measure, if it is time to.

        Args:
            done: Share of the training that is done.

        Returns:
            Whether more training is likely to be in vain.
        """
        if done < 1 and done - self._measured < 1 / MEASURED:
            return False
        self._measured, self._last = done, self._measure()
        if self._last < self.error or not math.isfinite(self.error):
            self.error, self._found = self._last, done
            self._values = [p.detach().clone() for p in self._parameters]
        return done > 1 - PATIENCE and done - self._found > PATIENCE

    def retreat(self) -> bool:
        """Put the best parameters back if the ones measured last are far worse. Return whether they were."""
        lost = not self._last <= LOST * self.error
        if lost:
            self._last = self.error
            self.restore()
        return lost

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters with the smallest error back."""
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.copy_(value)

    @property
    def numbers(self) -> list[float]:
        """All that it knows beside tensors."""
        return [self.start, self.error, self._last, self._found, self._measured]

    @property
    def values(self) -> Sequence[Tensor]:
        """The parameters with the smallest error."""
        return self._values

    def resume(self, numbers: Sequence[float], values: Sequence[Tensor]) -> None:
        """Go on from what another one knew: its `numbers` and `values`."""
        self.start, self.error, self._last, self._found, self._measured = numbers
        for mine, kept in zip(self._values, values, strict=True):
            mine.copy_(kept)


class Kept(Protocol):
    """Keeps the state of a training behind each pass, as a `secateur.signals.journal.Step` does."""

    def load(self, take: Callable[[Any, dict[str, Tensor]], Any]) -> Any:
        """Return what `take` makes of the notes and tensors that were saved; None if there are none."""

    def save(self, notes: Any, tensors: Mapping[str, Tensor]) -> None:
        """Keep notes, which JSON can say, and tensors."""


@dataclass(frozen=True, eq=False)
class Loop:
    """How long to train, and what goes with each step.

    Attributes:
        passes: Passes over the data; None: until the time is over.
        factor: Share of the training that is done, in [0, 1] -> factor of the learning rate.
        title: (number of the pass from 1 on, smallest error so far) -> what the progress bar says.
        spent: Share of the time that is over; the same in every process.
        zeros: What stays zero.
        clip: The gradient of a step is scaled down to this norm. None: it stays as it is.
        best: Keeps the best parameters. None: the last ones stay.
        kept: Keeps the state behind each pass, so that a killed training goes on there. None: nothing does.
    """

    passes: int | None
    factor: Callable[[float], float]
    title: Callable[[int, float], str]
    spent: Callable[[], float] = lambda: 0.0
    zeros: Zeros = field(default_factory=Zeros)
    clip: float | None = None
    best: Best | None = None
    kept: Kept | None = None

    @as_called()
    def run(
        self,
        loss_of: Callable[[Batch], Tensor],
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        data: Calibration,
        processes: ProcessGroup,
        *,
        model: nn.Module | None = None,
        prepared: Optimizer | None = None,
        progress: bool = False,
    ) -> int:
        """Train, in place.

        Args:
            loss_of: Returns the loss of a batch.
            parameters: What is trained.
            optimizer: Changes them.
            data: Each pass has another seed, so that shuffling and views differ.
            processes: The processes that share the batches.
            model: The model as an Accelerator wrapped it.
            prepared: The optimizer as an Accelerator wrapped it.
            progress: Show a progress bar on a terminal.

        Returns:
            The number of passes that were begun.
        """
        count = data.count() or data.repeats * sum(1 for _ in data.raw_batches())
        total = math.inf if self.passes is None else max(1, self.passes * processes.updates(count))
        done, late, scale, before = 0.0, False, 1.0, 0.0

        def factor(step: int) -> float:
            nonlocal done, late
            spent = before + self.spent()
            done, late = min(1.0, max(step / total, spent)), spent >= 1
            return scale * self.factor(done)

        schedule = LambdaLR(optimizer, factor)
        steps = optimizer if prepared is None else prepared
        steps.zero_grad()
        begun = 0
        if self.kept is not None:
            take = partial(self._resumed, parameters, optimizer)
            if (found := self.kept.load(take)) is not None:
                begun, schedule.last_epoch, done, scale, before = found
        for k in itertools.count(begun) if self.passes is None else range(begun, self.passes):
            begun = k + 1
            title = self.title(begun, math.nan if self.best is None else self.best.error)
            finite = True
            for batch, update in processes.share(replace(data, seed=data.seed + k), count, title, progress):
                with processes.gathering(model, update):
                    with processes.together():
                        processes.backward(loss_of(batch))
                    if update:
                        finite = self._step(steps, parameters, processes)
                self.zeros.restore()
                if finite and update and not getattr(steps, "step_was_skipped", False):
                    schedule.step()
                if late or not finite:
                    break
            if not finite or (self.best is not None and self.best.look(done)) or late:
                break
            if self.best is not None and self.best.retreat():
                scale /= 2
                optimizer.state.clear()
            if self.kept is not None:
                numbers = [begun, schedule.last_epoch, done, scale, before + self.spent()]
                self._keep(self.kept, parameters, optimizer, numbers)
        if self.best is not None:
            self.best.restore()
        return begun

    def _keep(
        self, kept: Kept, parameters: Sequence[Tensor], optimizer: Optimizer, numbers: Sequence[float]
    ) -> None:
        """Keep the parameters, the best ones, the optimizer's state, the random state, and numbers."""
        own = optimizer.state_dict()
        tensors = {f"now.{k}": tensor for k, tensor in enumerate(parameters)}
        tensors |= {f"state.{k}.{name}": t for k, each in own["state"].items() for name, t in each.items()}
        tensors["random"] = torch.get_rng_state()
        notes = {"numbers": numbers, "rates": [group["lr"] for group in own["param_groups"]]}
        if self.best is not None:
            notes["best"] = self.best.numbers
            tensors |= {f"best.{k}": tensor for k, tensor in enumerate(self.best.values)}
        kept.save(notes, tensors)

    @torch.no_grad()
    def _resumed(
        self,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        notes: Any,
        tensors: Mapping[str, Tensor],
    ) -> tuple[int, int, float, float, float]:
        """Take over what `_keep` kept; return the numbers.

        Raises:
            LookupError, RuntimeError, TypeError, ValueError: It was kept by another training.
        """
        begun, steps, done, scale, before = (float(number) for number in notes["numbers"])
        own = optimizer.state_dict()
        for group, rate in zip(own["param_groups"], notes["rates"], strict=True):
            group["lr"] = float(rate)
        own["state"] = {k: {} for k in range(len(parameters))}
        for name, tensor in tensors.items():
            if name.startswith("state."):
                _, number, part = name.split(".")
                if tensor.ndim and tensor.shape != parameters[int(number)].shape:
                    raise ValueError(f"{name[:80]} {list(tensor.shape)}")
                own["state"][int(number)][part] = tensor
        if any(part and set(part) != STATE for part in own["state"].values()):
            raise ValueError(f"a state of an optimizer that does not hold {', '.join(sorted(STATE))}")
        optimizer.load_state_dict(own)
        now = self._like(parameters, tensors, "now")
        if self.best is not None:
            self.best.resume([*map(float, notes["best"])], self._like(parameters, tensors, "best"))
        for parameter, value in zip(parameters, now, strict=True):
            parameter.copy_(value)
        torch.set_rng_state(tensors["random"])
        return int(begun), int(steps), float(done), float(scale), float(before)

    @staticmethod
    def _like(parameters: Sequence[Tensor], tensors: Mapping[str, Tensor], kind: str) -> list[Tensor]:
        """Tensors that were kept of each parameter. One of another shape would be spread out silently."""
        found = [tensors[f"{kind}.{k}"] for k in range(len(parameters))]
        for tensor, parameter in zip(found, parameters, strict=True):
            if (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype):
                raise ValueError(f"{kind} {list(tensor.shape)} of {tensor.dtype}")
        return found

    def _step(self, optimizer: Optimizer, parameters: Sequence[Tensor], processes: ProcessGroup) -> bool:
        """Change the parameters. Return whether the gradient is finite; where it is not, nothing changes."""
        processes.average(parameters)
        self.zeros.hide()
        if self.clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip)
            if not bool(torch.isfinite(norm)):
                return False
        optimizer.step()
        optimizer.zero_grad()
        return True
