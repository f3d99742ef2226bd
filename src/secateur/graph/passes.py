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
from secateur.graph.courses import Course
from secateur.graph.inputs import Arguments
from secateur.graph.modes import PLAIN, WITHOUT_GRADIENTS, Mode, asked_modes, questions


def output_of(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a model. It is one line for all passes, as a course has the line of each call in it."""
    return model(*args, **kwargs)


class FirstPass:
    """Watches an ordinary pass on the user's arguments that a capture makes, so that it serves `Passes` too.

    Attributes:
        course: Which calls the pass made.
        questions: What the code asked of PyTorch's mode.
        worked: Whether the pass ended, and its output has no NaN.
    """

    def __init__(self, model: nn.Module) -> None:
        """Prepare a pass of `model`."""
        self.course = Course(model)
        self.questions = set[str]()
        self.worked = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the pass is watched."""
        with questions(self.questions), self.course:
            yield

    def ended(self, output: Any) -> None:
        """Take what the pass returned."""
        self.worked = not has_nan(tensors_of(output))


class Passes:
    """Runs the model on arguments: does it run, and which lines of code does it take?"""

    def __init__(self, model: nn.Module, given: Arguments, first: FirstPass | None = None) -> None:
        """Run the model once on the user's own arguments.

        Args:
            model: The dense model; it is left as it was.
            given: The user's own arguments.
            first: A pass on them that was watched already.
        """
        self._model, self._given = model, given
        self._states: dict[bool, State] = {}  # by training mode: what each pass has to restore
        self._watched = True  # False where the code takes only Python's own integers
        self._errors: dict[Any, Exception | None] = {}
        self._courses: dict[Any, Course] = {}
        self._questions = set[str]()  # what the code asks of PyTorch's mode
        if first is not None and first.worked:
            self._questions = first.questions
            self._errors[_shapes(given), _sums(given)] = None
            self._note(given, first.course, (False, WITHOUT_GRADIENTS, None))
            return
        with questions(self._questions):
            failed = self.attempt(given)
        if failed is not None:
            self._watched = False
            self._errors.clear()

    def attempt(self, arguments: Arguments) -> Exception | None:
        """Run the model and return what it raises, None if nothing. An output of NaN is an error too."""
        key = _shapes(arguments), _sums(arguments)
        if key not in self._errors:
            self._errors[key] = self._run(arguments)
        return self._errors[key]

    def course(
        self,
        arguments: Arguments,
        *,
        training: bool = False,
        mode: Mode = WITHOUT_GRADIENTS,
        answer: bool | None = None,
    ) -> Course | None:
        """Return which calls the model makes at these sizes; None if that cannot be watched.

        With an `answer`, all conditions of its code on values of tensors have that.
        """
        way = training, mode, answer
        found = self._known(arguments, way)
        if found is None and self._watched:
            self._run(arguments, training=training, mode=mode, answer=answer)
            found = self._known(arguments, way)
        return found

    def _known(self, arguments: Arguments, way: Any) -> Course | None:
        shapes = _shapes(arguments)
        found = self._courses.get((shapes, None, *way))
        return self._courses.get((shapes, _sums(arguments), *way)) if found is None else found

    def _note(self, arguments: Arguments, course: Course, way: tuple[bool, Mode, bool | None]) -> None:
        """Remember a course, for all arguments of these shapes if none of their values was asked for."""
        training, mode, answer = way
        sums = _sums(arguments) if course.reads_values and answer is None else None
        self._courses.setdefault((_shapes(arguments), sums, *way), course)
        if answer is None and len(course.answers) == 1:  # the same answer to all conditions changes nothing
            given = _shapes(arguments), None, training, mode, *course.answers
            self._courses.setdefault(given, course)

    def other_modes(self) -> list[Mode]:
        """Return modes of PyTorch in which the model makes other calls than in a capture, one for each kind.

        Only modes that its code asks for are tried, on the user's own arguments.
        """
        plain = self.course(self._given)
        if plain is None:
            return []
        found = []
        known = {(plain.lines, plain.numbers)}
        for mode in asked_modes(self._questions | plain.questions, self._model):
            # All passes run without gradients, and a capture with them.
            run = PLAIN if mode == WITHOUT_GRADIENTS else mode._replace(gradients=False)
            course = self.course(self._given, mode=run)
            if course is not None and (course.lines, course.numbers) not in known:
                found.append(mode)
                known.add((course.lines, course.numbers))
        return found

    def asks_the_same(self, first: Arguments, second: Arguments) -> bool:
        """Whether the model makes the same calls with the same numbers. If so, none of them is a size."""
        one, other = self.course(first), self.course(second)
        return one is not None and other is not None and one.asked == other.asked

    def _run(
        self,
        arguments: Arguments,
        *,
        training: bool = False,
        mode: Mode = WITHOUT_GRADIENTS,
        answer: bool | None = None,
    ) -> Exception | None:
        """Run the model once, remember its course, and return its error, if there is one."""
        args, kwargs = mode.cast(arguments)
        course = Course(self._model)
        if training not in self._states:
            self._states[training] = State(self._model, parameters=training)
        with (
            evaluating(self._model, training=training, state=self._states[training]),
            mode._replace(gradients=mode.gradients or training).on(self._model),  # the code may ask for it
            seeded(0),
            warnings.catch_warnings(),
            answering(answer),
            course if self._watched else nullcontext(),
        ):
            warnings.simplefilter("ignore")
            try:
                outputs = tensors_of(output_of(self._model, args, kwargs))
            except Exception as error:  # the user's forward may fail in any way
                return error
        if self._watched:
            self._note(arguments, course, (training, mode, answer))
        if has_nan(outputs) and (arguments is self._given or self.attempt(self._given) is None):
            return FloatingPointError("its output is NaN there")
        return None


def _shapes(arguments: Arguments) -> tuple[torch.Size, ...]:
    return tuple(v.shape for v in pytree.tree_leaves(arguments) if isinstance(v, torch.Tensor))


def _sums(arguments: Arguments) -> tuple[Any, ...]:
    """Return sums of values, which tell arguments of the same sizes apart."""
    return tuple(
        complex(v.detach().sum()) if isinstance(v, torch.Tensor) and not v.is_meta else repr(v)
        for v in pytree.tree_leaves(arguments)
    )
