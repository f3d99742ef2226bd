"""The inputs on which a written file is compared with the model, and what the model answers to them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.apply.compare import run
from secateur.apply.record import record_of
from secateur.errors import ArtefactError, SettingError
from secateur.foreign import details, said
from secateur.graph.inputs import Arguments, InputSpec, batch_size, call_arguments, resized
from secateur.graph.leaf import Place
from secateur.models import device_of
from secateur.preserving import preserved

Sizes = Mapping[Place, int]


def inputs_of(model: nn.Module, example_inputs: Any) -> tuple[Arguments, InputSpec]:
    """Arguments for a model, and what they may be otherwise.

    Args:
        model: The model.
        example_inputs: As for `trace`; drawn from the description in the model's plan if None.

    Raises:
        SettingError: If no inputs are given, and the model did not come from `apply`.
    """
    device = device_of(model)
    known = None
    with contextlib.suppress(ArtefactError):  # not pruned by secateur
        known = record_of(model).plan.inputs
    if example_inputs is None:
        if known is None:
            raise SettingError(
                f"export: expected example_inputs for a {type(model).__name__} that did not come from apply, "
                f"got none. Pass what the model is called with."
            )
        return known.example(device=device), known
    given = call_arguments(example_inputs, device)
    spec = InputSpec.of(*given, model)
    alike = known is not None and _ranks(known) == _ranks(spec)
    return given, known if known is not None and alike else spec


def _ranks(spec: InputSpec) -> list[tuple[str, int]]:
    return [(name, len(leaf.shape)) for name, leaf in spec.tensors().items()]


@dataclass(frozen=True, eq=False)
class Trials:
    """Inputs, and what a model answers.

    Attributes:
        model: What is compared with.
        arguments: Positional and keyword inputs of each trial; the first are the user's.
        wanted: The model's output tensors for each of them.
    """

    model: nn.Module
    arguments: tuple[Arguments, ...]
    wanted: tuple[list[torch.Tensor], ...]

    @classmethod
    def of(cls, model: nn.Module, given: Arguments, spec: InputSpec, sizes: Iterable[Sizes]) -> Trials:
        """The given inputs, then drawn ones of these sizes: ids over the vocabulary, masks with padding.

        Where the model takes no drawn inputs, the given ones are cropped or repeated.

        Args:
            model: What is run, as it is.
            given: The user's inputs.
            spec: What else it takes.
            sizes: For each drawn trial, the axes that are not as in `spec`.

        Raises:
            SettingError: If the model does not run on `given`.
        """
        arguments, wanted = [given], []
        with preserved(model):
            try:
                wanted.append(run(model, *given))
            except Exception as error:
                raise SettingError(
                    f"export: expected inputs that {type(model).__name__} takes, got {said(error)}. Pass "
                    f"example_inputs= on which it runs.",
                    details(error),
                ) from error
            for changes in sizes:
                drawn = spec.example(seed=1, device=device_of(model), sizes=changes)
                for trial in (drawn, resized(spec, given, changes)):
                    try:
                        wanted.append(run(model, *trial))
                    except Exception:  # a forward pass may refuse inputs in any way
                        continue
                    arguments.append(trial)
                    break
        return cls(model, tuple(arguments), tuple(wanted))

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes, each once."""
        return tuple(dict.fromkeys(map(batch_size, self.arguments)))


def captured_trials(model: nn.Module, given: Arguments, spec: InputSpec, *, dynamic: bool) -> Trials:
    """Inputs for a captured program: of the given sizes and, if it is `dynamic`, of one sample more."""
    own = InputSpec.of(*given)
    batch = batch_size(given)
    sizes: dict[Place, int] = {}
    more: dict[Place, int] = {}
    for name, leaf in zip(spec.tensors(), own.tensors().values(), strict=True):
        for axis, size in enumerate(leaf.shape):
            sizes[name, axis] = size
            more[name, axis] = size + 1 if axis == 0 and size == batch else size
    return Trials.of(model, given, spec, [sizes, more] if dynamic else [sizes])
