"""Inputs on which a written file is compared with the model, and the model's outputs for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.common.foreign import details, error_text
from secateur.common.models import device_of
from secateur.common.preserving import preserved
from secateur.errors import ArtefactError, SettingError
from secateur.graph.inputs import Arguments, InputSpec, batch_size, call_arguments, resized
from secateur.graph.leaf import Place
from secateur.targets.units.compare import run
from secateur.targets.units.record import record_of

Sizes = Mapping[Place, int]


def inputs_of(model: nn.Module, example_inputs: Any) -> tuple[Arguments, InputSpec]:
    """Return example arguments for a model, and a description of the inputs that it accepts.

    Args:
        model: The model.
        example_inputs: As for `trace`. If None, drawn from the description in the model's plan.

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
    """Inputs and a model's outputs for them.

    Attributes:
        model: The model.
        arguments: Positional and keyword inputs of each trial. The first trial has the user's inputs.
        wanted: The model's output tensors for each trial.
        refusable: How many of the trials, from the last, the file may refuse. It may not give other outputs.
    """

    model: nn.Module
    arguments: tuple[Arguments, ...]
    wanted: tuple[list[torch.Tensor], ...]
    refusable: int = 0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        given: Arguments,
        spec: InputSpec,
        sizes: Iterable[Sizes],
        refusable: Iterable[Sizes] = (),
    ) -> Trials:
        """Run the model on the user's inputs, and on random inputs of other sizes.

        Random inputs have ids over the whole vocabulary and masks with padding. If the model refuses
        them, the user's inputs are cropped or repeated to the size instead. If it refuses those too, the
        size is skipped.

        Args:
            model: The model; it runs in its current mode.
            given: The user's inputs.
            spec: The description of the inputs that it accepts.
            sizes: For each random trial, the sizes of the axes that differ from `spec`.
            refusable: The same, for trials that the file may refuse.

        Raises:
            SettingError: If the model does not run on `given`.
        """
        arguments, wanted, lenient = [given], [], 0
        with preserved(model):
            try:
                wanted.append(run(model, *given))
            except Exception as error:
                raise SettingError(
                    f"export: expected inputs that {type(model).__name__} takes, got {error_text(error)}. "
                    f"Pass example_inputs= on which it runs.",
                    details(error),
                ) from error
            firm = [*sizes]
            for number, changes in enumerate([*firm, *refusable]):
                drawn = spec.example(seed=1, device=device_of(model), sizes=changes)
                for trial in (drawn, resized(spec, given, changes)):
                    try:
                        wanted.append(run(model, *trial))
                    except Exception:  # a forward pass may refuse inputs in any way
                        continue
                    arguments.append(trial)
                    lenient += number >= len(firm)
                    break
        return cls(model, tuple(arguments), tuple(wanted), lenient)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes of the trials that the file may not refuse, each once."""
        firm = self.arguments[: len(self.arguments) - self.refusable]
        return tuple(dict.fromkeys(map(batch_size, firm)))


def captured_trials(
    model: nn.Module,
    given: Arguments,
    spec: InputSpec,
    *,
    dynamic: bool,
    also: Iterable[Sizes] = (),
    refusable: Iterable[Sizes] = (),
) -> Trials:
    """Return trials of the given sizes, with one sample more if the batch size is `dynamic`, and of others.

    Args:
        model: The model.
        given: The user's inputs.
        spec: The description of the inputs that it accepts.
        dynamic: Whether the program takes any batch size.
        also: Further sizes of some axes; the others are as given.
        refusable: The same, where the file may refuse them.
    """
    own = InputSpec.of(*given)
    batch = batch_size(given)
    sizes: dict[Place, int] = {}
    more: dict[Place, int] = {}
    for name, leaf in zip(spec.tensors(), own.tensors().values(), strict=True):
        for axis, size in enumerate(leaf.shape):
            sizes[name, axis] = size
            more[name, axis] = size + 1 if axis == 0 and size == batch else size
    others, last = ([{**sizes, **changes} for changes in found] for found in (also, refusable))
    return Trials.of(model, given, spec, [sizes, *([more] if dynamic else []), *others], last)
