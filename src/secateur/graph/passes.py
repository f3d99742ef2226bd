"""Ordinary forward passes of the dense model during a trace. Each is made only once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.models import evaluating
from secateur.common.outputs import has_nan, tensors_of
from secateur.common.preserving import State
from secateur.graph.answering import answering
from secateur.graph.executionpath import ExecutionPath
from secateur.graph.inputs import Arguments
from secateur.graph.modes import PLAIN, WITHOUT_GRADIENTS, Mode, asked_modes, questions


def output_of(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a model. All passes use this one line, since an execution path has the line of each call."""
    return model(*args, **kwargs)


_Variant = tuple[bool, Mode, bool | None]
"""How the model runs: in training mode or not, in which mode of PyTorch, with which answer to conditions."""


class FirstPass:
    """Watches an ordinary pass on the user's arguments that a capture makes, so that it serves `Passes` too.

    Attributes:
        path: The execution path of the pass.
        questions: What the code asked of PyTorch's mode.
        worked: Whether the pass ended without an error, and its output has no NaN.
        leaves_something: Whether it changed the model's state; None if that is not known.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare a pass of `model`."""
        self.path = ExecutionPath(model)
        self.questions = set[str]()
        self.worked = False
        self.leaves_something: bool | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the pass is watched."""
        with questions(self.questions), self.path:
            yield

    def ended(self, output: Any) -> None:
        """Take what the pass returned."""
        self.worked = not has_nan(tensors_of(output))


class Passes:
    """Runs the model on arguments: does it fail, and which execution path does it take?

    Attributes:
        given: The user's own arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        given: Arguments,
        first: FirstPass | None = None,
        *,
        modes: bool = True,
        earlier: Passes | None = None,
    ) -> None:
        """Run the model once on the user's own arguments.

        Args:
            model: The dense model; it is left as it was.
            given: The user's own arguments.
            first: A pass on them that was watched already.
            modes: Whether to find out which modes of PyTorch the code asks for; see `other_modes`. That makes
                the first pass about twice as long.
            earlier: Passes of the same model since when nothing was set in it.
        """
        self._model, self.given = model, given
        # By training mode: what each pass has to restore.
        self._states: dict[bool, State] = {} if earlier is None else earlier._states
        self._watched = True  # False where the code takes only Python's own integers
        self._errors: dict[Any, Exception | None] = {}
        self._paths: dict[Any, ExecutionPath] = {}
        self._questions = set[str]()  # what the code asks of PyTorch's mode
        self._first = first
        if first is not None and first.worked:
            self._questions = first.questions
            self._errors[_shapes(given), _sums(given)] = None
            self._note(given, first.path, (False, WITHOUT_GRADIENTS, None))
            return
        with questions(self._questions) if modes else nullcontext():
            failed = self.attempt(given)
        if failed is not None:
            self._watched = False
            self._errors.clear()

    def on_others(self, given: Arguments) -> Passes:
        """Return passes on other arguments; nothing was set in the model since these were made."""
        return Passes(self._model, given, modes=False, earlier=self)

    def attempt(self, arguments: Arguments) -> Exception | None:
        """Run the model and return what it raises, None if nothing. An output of NaN is an error too."""
        key = _shapes(arguments), _sums(arguments)
        if key not in self._errors:
            self._errors[key] = self._run(arguments)
        return self._errors[key]

    def path_of(
        self,
        arguments: Arguments,
        *,
        training: bool = False,
        mode: Mode = WITHOUT_GRADIENTS,
        answer: bool | None = None,
    ) -> ExecutionPath | None:
        """Return the execution path of the model on some arguments; None if it fails, or cannot be watched.

        Args:
            arguments: The arguments. A pass on others of these sizes may have been made already.
            training: Whether the model runs in training mode.
            mode: PyTorch's mode.
            answer: The outcome of all conditions on values of tensors; None: what the values say.
        """
        variant = training, mode, answer
        found = self._recorded(arguments, variant)
        if found is None and self._watched:
            self._run(arguments, training=training, mode=mode, answer=answer)
            found = self._recorded(arguments, variant)
        return found

    def _recorded(self, arguments: Arguments, variant: _Variant) -> ExecutionPath | None:
        shapes = _shapes(arguments)
        found = self._paths.get((shapes, None, *variant))
        return self._paths.get((shapes, _sums(arguments), *variant)) if found is None else found

    def _note(self, arguments: Arguments, path: ExecutionPath, variant: _Variant) -> None:
        """Remember a path, for all arguments of these shapes if none of their values was asked for."""
        training, mode, answer = variant
        sums = _sums(arguments) if path.reads_values and answer is None else None
        self._paths.setdefault((_shapes(arguments), sums, *variant), path)
        if answer is None and len(path.answers) == 1:  # the same answer to all conditions changes nothing
            given = _shapes(arguments), None, training, mode, *path.answers
            self._paths.setdefault(given, path)

    def other_modes(self) -> list[Mode]:
        """Return modes of PyTorch in which the model makes other calls than in a capture.

        Only modes that its code asks for are tried, on the user's own arguments. Of several modes with the
        same calls, the first is returned.
        """
        plain = self.path_of(self.given)
        if plain is None:
            return []
        found = []
        seen = {(plain.distinct_calls, plain.numbers)}
        for mode in asked_modes(self._questions | plain.questions, self._model):
            # All passes run without gradients, and a capture with them.
            run = PLAIN if mode == WITHOUT_GRADIENTS else mode._replace(gradients=False)
            path = self.path_of(self.given, mode=run)
            if path is not None and (path.distinct_calls, path.numbers) not in seen:
                found.append(mode)
                seen.add((path.distinct_calls, path.numbers))
        return found

    def leaves_something(self, *, training: bool = False) -> bool:
        """Whether a call on the user's own arguments changes the model's state."""
        if not training and self._first is not None and self._first.leaves_something is not None:
            return self._first.leaves_something
        return leaves_something(self._model, self.given, training=training)

    def asks_the_same(self, first: Arguments, second: Arguments) -> bool:
        """Whether the model makes the same calls with the same numbers at two sizes: no number is a size."""
        one, other = self.path_of(first), self.path_of(second)
        return one is not None and other is not None and one.calls_with_numbers == other.calls_with_numbers

    def _run(
        self,
        arguments: Arguments,
        *,
        training: bool = False,
        mode: Mode = WITHOUT_GRADIENTS,
        answer: bool | None = None,
    ) -> Exception | None:
        """Run the model once, remember its execution path, and return its error, if there is one."""
        args, kwargs = mode.cast(arguments)
        path = ExecutionPath(self._model)
        if training not in self._states:
            self._states[training] = State(self._model, parameters=training)
        with (
            evaluating(self._model, training=training, state=self._states[training]),
            mode._replace(gradients=mode.gradients or training).on(self._model),  # the code may ask for it
            seeded(0),
            warnings.catch_warnings(),
            answering(answer),
            path if self._watched else nullcontext(),
        ):
            warnings.simplefilter("ignore")
            try:
                outputs = tensors_of(output_of(self._model, args, kwargs))
            except Exception as error:  # the user's forward may fail in any way
                return error
        if self._watched:
            self._note(arguments, path, (training, mode, answer))
        if has_nan(outputs) and (arguments is self.given or self.attempt(self.given) is None):
            return FloatingPointError("its output is NaN there")
        return None


def leaves_something(model: nn.Module, arguments: Arguments, *, training: bool = False) -> bool:
    """Whether a call changes the model's state, so that later calls may do something else."""
    args, kwargs = arguments
    with evaluating(model, training=training), torch.no_grad(), seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = State(model)
        try:
            output_of(model, args, kwargs)
        except Exception:  # then nothing is known here
            return False
        return state.restore()


def calls_of(model: nn.Module, arguments: Arguments) -> frozenset[Any] | None:
    """Return the calls that a model makes on some arguments, also with their numbers; None if it fails."""
    path = Passes(model, arguments).path_of(arguments)
    return None if path is None else path.distinct_calls | path.numbers_but_lengths


def _shapes(arguments: Arguments) -> tuple[torch.Size, ...]:
    return tuple(v.shape for v in pytree.tree_leaves(arguments) if isinstance(v, torch.Tensor))


def _sums(arguments: Arguments) -> tuple[Any, ...]:
    """Return the sum of the values of each tensor: arguments of the same sizes mostly differ in these."""
    return tuple(
        complex(v.detach().sum()) if isinstance(v, torch.Tensor) and not v.is_meta else repr(v)
        for v in pytree.tree_leaves(arguments)
    )
