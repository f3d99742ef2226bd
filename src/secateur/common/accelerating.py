"""Training in several processes: those of an `accelerate.Accelerator`, or of torch.distributed; or in one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.calibration import Batch, Calibration
from secateur.errors import SettingError

if TYPE_CHECKING:
    from secateur.signals.distributed import Team


@dataclass(frozen=True, eq=False)
class ProcessGroup:
    """The processes that train together.

    Attributes:
        accelerator: What prepared model and optimizer, or None.
        rank: Which process this is.
        size: How many share the batches.
        every: How many batches make a step.
        team: The processes of torch.distributed where there is no Accelerator, or None.
    """

    accelerator: Any = None
    rank: int = 0
    size: int = 1
    every: int = 1
    team: Team | None = None

    @classmethod
    def of_team(cls, team: Team) -> ProcessGroup:
        """The processes among which `sc.score` and `sc.repair` share batches."""
        return cls(None, team.rank, team.size, team=team)

    @classmethod
    def of(cls, accelerator: Any, loader: Any) -> ProcessGroup:
        """Read an Accelerator.

        Raises:
            SettingError: It shards models, or has others do the training.
        """
        if accelerator is None:
            return cls()
        kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
        if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):
            raise SettingError(
                "recover: expected an Accelerator with the whole model in each process, got "
                f"{kind}. Make one without it, or train with a loop of your own."
            )
        prepared = type(loader).__module__.partition(".")[0] == "accelerate"
        return cls(
            accelerator,
            accelerator.process_index,
            1 if prepared else accelerator.num_processes,
            accelerator.gradient_accumulation_steps,
        )

    def updates(self, count: int) -> int:
        """Steps an epoch of `count` batches."""
        return math.ceil(math.ceil(count / self.size) / self.every)

    def share(self, data: Calibration, count: int, desc: str, progress: bool) -> Iterator[tuple[Batch, bool]]:
        """This process's batches, as many as every other's, and whether a step follows."""
        rounds, done = math.ceil(count / self.size), 0
        for batch in self._batches(data, count, rounds, desc, progress and self.rank == 0):
            done += 1
            yield batch, done % self.every == 0 or done == rounds

    def _batches(
        self, data: Calibration, count: int, rounds: int, desc: str, progress: bool
    ) -> Iterator[Batch]:
        position = self.rank % self.size
        last = (rounds - 1) * self.size + position
        again = (last - count) % count if last >= count > 0 else None
        kept: Batch | None = None
        for batch in data.batches(desc, progress, lambda i: i % self.size == position or i == again):
            kept = batch if batch.index == again else kept
            if batch.index % self.size == position:
                yield batch
        if kept is not None:
            yield kept

    @contextmanager
    def gathering(self, model: nn.Module | None, update: bool) -> Iterator[None]:
        """A block whose gradients add up until a step follows; only then do processes exchange them."""
        if self.accelerator is None:
            yield
            return
        self.accelerator.sync_gradients = update
        try:
            with nullcontext() if update else self.accelerator.no_sync(model):
                yield
        finally:
            self.accelerator.sync_gradients = True

    def backward(self, loss: Tensor) -> None:
        """The gradient of a batch's loss, divided by the batches a step."""
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss)

    def together(self) -> AbstractContextManager[None]:
        """A block that fails in all processes if it fails in one; of an Accelerator in one alone."""
        return nullcontext() if self.team is None else self.team.together()

    @torch.no_grad()
    def average(self, parameters: Sequence[Tensor]) -> None:
        """Average the gradients over the processes; an Accelerator has done so already."""
        if self.team is None or self.team.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        whole = torch.cat([p.grad.reshape(-1).double() for p in parameters if p.grad is not None])
        whole = self.team.mean(whole)
        for parameter, mine in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = mine.reshape(parameter.shape).to(parameter.dtype)

    @torch.no_grad()
    def agree(self, model: nn.Module) -> None:
        """Average what each process has counted on its own share: floating buffers."""
        if self.accelerator is not None and self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, reduction="mean"))
