"""Further captures of a model: training mode, other methods, and sizes and modes with other code."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from secateur.common.models import device_of
from secateur.errors import CaptureError, SettingError
from secateur.graph.branches import capture_branches
from secateur.graph.capture import Capture
from secateur.graph.frames import codes_in
from secateur.graph.inputs import Arguments, InputSpec, batch_size, resized, samples_of
from secateur.graph.leaf import Place
from secateur.graph.modes import PLAIN, Mode
from secateur.graph.nodes import lifted, tensor_of
from secateur.graph.omissions import Omissions
from secateur.graph.openaxes import larger_arguments
from secateur.graph.passes import Passes, calls_of

_LOG = logging.getLogger(__name__)

TRIES = 32
"""The most other values of integer inputs that a model is run with, if its sizes depend on them."""
VALUES = 4
"""The most of these values that it is captured with."""
CALLS = 4
"""The most calls in a row that are captured, where a call finds what earlier ones have left in the model."""


@dataclass(frozen=True, eq=False)
class View:
    """A further capture of a model, that runs it in another way than the first.

    Attributes:
        program: The captured program.
        arguments: The arguments that it was captured with.
        training: Whether the model was in training mode.
        method: The method that was called; empty for ``forward``.
        everywhere: Whether every axis that may vary has another size than in the first capture.
        mode: PyTorch's mode during the capture.
        other_answer: Whether conditions on values of tensors have other answers than in the capture before.
        answer: With `other_answer`: the one answer to all of them; None if they have several.
    """

    program: ExportedProgram
    arguments: Arguments
    training: bool = False
    method: str = ""
    everywhere: bool = False
    mode: Mode = PLAIN
    other_answer: bool = False
    answer: bool | None = None


class Method(nn.Module):
    """A module whose forward pass calls a method of a model."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method with these arguments."""
        return getattr(self.model, self.name)(*args, **kwargs)


class Repeated(nn.Module):
    """A module that calls a model several times in a row; what a call leaves in it, the next one finds."""

    def __init__(self, model: nn.Module, times: int) -> None:
        super().__init__()
        self.model, self.times = model, times

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with these arguments, and return what the last call returns."""
        found = None
        for _ in range(self.times):
            found = self.model(*args, **kwargs)
        return found


def calls_in_a_row(
    model: nn.Module, given: Arguments, spec: InputSpec, passes: Passes
) -> list[ExportedProgram]:
    """Capture several calls in a row, if a later one makes other calls with what earlier ones have left.

    Such are a video model that keeps its last features, and a policy that keeps its hidden state.

    Args:
        model: The dense model.
        given: The arguments of each call.
        spec: Says whether training mode runs other code.
        passes: The passes of the model on `given`.
    """
    found: list[ExportedProgram] = []
    for training in (False, True) if spec.training else (False,):
        if not passes.leaves_something(training=training):
            continue
        once, more = (_path_of_calls(model, given, times, training=training) for times in (1, CALLS))
        if once is None or more is None or more <= once:
            continue
        paths = ((n, _path_of_calls(model, given, n, training=training)) for n in range(2, CALLS))
        times = next((n for n, path in paths if path is not None and more <= path), CALLS)
        with _unless_it_fails(f"{times} calls in a row"):
            row = capture_branches(Repeated(model, times), *given, training=training, exact=True)
            found += [one.program for one in row]
    return found


def _path_of_calls(
    model: nn.Module, given: Arguments, times: int, *, training: bool
) -> frozenset[Any] | None:
    path = Passes(Repeated(model, times), given, modes=False).path_of(given, training=training)
    return None if path is None else path.distinct_calls


@contextlib.contextmanager
def _unless_it_fails(what: str) -> Iterator[None]:
    """Go on without a capture that fails, and log why. `verify` still compares the models there."""
    try:
        yield
    except CaptureError as error:
        _LOG.debug("%s is not captured: %s", what, error)


def further_views(
    model: nn.Module,
    captured: Sequence[Capture],
    given: Arguments,
    spec: InputSpec,
    passes: Passes,
) -> tuple[list[View], list[str]]:
    """Capture the other ways to run a model, which may read other parameters than the forward pass does.

    Args:
        model: The dense model.
        captured: The captures of its forward pass in evaluation mode; see `capture_branches`. The batch size
            is two where the user gave one sample; as code may treat one sample in another way, that is
            captured too.
        given: The arguments of these captures.
        spec: Says what else to capture: other arguments, methods, training mode, other sizes.
        passes: Runs ordinary forward passes of the model.

    Returns:
        The captures, and the names of tensors that no capture reads, but that a method of the model names.

    Raises:
        SettingError: The model has no method of a name in `spec`.
        CaptureError: A method, or the model with other arguments, cannot be captured.
    """
    program, batch = captured[0].program, captured[0].batch
    views = _views(captured, given)[1:] + _other_values(model, given, captured[0].values)
    unread = _tensors(program) - _read(program)
    others = {p: axis.other for axis in spec.open for p in axis.places} if spec.together else {}
    traced: list[tuple[str, dict[Place, int]]] = []
    first = passes.path_of(given if batch == batch_size(given) else samples_of(given, [0] * batch))
    if batch != batch_size(given):
        here = passes.path_of(given)
        traced += (
            [("", {})]
            if here is not None and first is not None and here.distinct_calls != first.distinct_calls
            else []
        )
    omissions = Omissions(model, program, passes, given, first)
    for _, sizes in [*traced, *spec.other_path_sizes()]:
        arguments, wide = resized(spec, given, sizes), resized(spec, given, {**others, **sizes})
        here, there = passes.path_of(arguments), passes.path_of(wide)
        # If the other axes are changed as well, the code may do something else again. Then they stay.
        everywhere = here is not None and there is not None and here.distinct_calls == there.distinct_calls
        used = wide if everywhere else arguments
        if omissions.explain(arguments, (wide, arguments) if everywhere else (arguments,)):
            continue
        with _unless_it_fails(f"the pass at sizes {sizes}"):
            found = capture_branches(model, *used, exact=True)
            views += _views(found, used, everywhere=everywhere and bool(others))
            omissions.captured(arguments)
    for other in spec.also:
        arguments = other.example(device=device_of(model))
        found = capture_branches(model, *arguments, exact=True)
        views += _views(found[:1], arguments)
        if (larger := larger_arguments(other, arguments, None)) is not None:
            with _unless_it_fails("the pass with larger arguments"):
                views += _views(capture_branches(model, *larger, exact=True), larger)
        views += further_views(model, found, arguments, other, Passes(model, arguments))[0]
    for mode in passes.other_modes():
        used = mode.cast(given)
        with _unless_it_fails(f"the pass in {mode}"), mode.on(model):
            found = capture_branches(model, *used, exact=True, gradients=mode.gradients)
            views += _views(found, used, mode=mode)
    unread = unread.difference(*(_read(view.program) for view in views))
    for name in spec.methods:
        if not callable(getattr(model, name, None)):
            raise SettingError(
                f"trace(methods={name!r}): expected a method of {type(model).__name__}, got no such one."
            )
        try:
            found = capture_branches(Method(model, name), *given)
        except CaptureError as error:
            raise CaptureError(f"trace(methods={name!r}): {error}") from error
        views += _views(found, given, method=name)
        unread = unread.difference(*(_read(one.program) for one in found))
    if spec.training or (unread and spec.training is None):
        with _unless_it_fails("training mode"):
            # One sample has no variance, which batch norms in training mode need.
            used = samples_of(given, [0] * batch) if batch != batch_size(given) else given
            found = capture_branches(model, *used, training=True, exact=True)
            read = set[int]().union(*(_read(one.program) for one in found))
            if spec.training or unread & read:
                views += _views(found, used, training=True)
                unread -= read
    for train_sizes in spec.training_at:
        arguments = resized(spec, given, spec.at(train_sizes))
        with _unless_it_fails(f"training mode at sizes {train_sizes}"):
            found = capture_branches(model, *arguments, training=True, exact=True)
            views += _views(found, arguments, training=True)
    return views, [n for n in _names(program, unread) if _is_named(model, n)]


def _other_values(model: nn.Module, given: Arguments, numbers: Collection[int]) -> list[View]:
    """Capture a model with other values of integer inputs on which sizes depend, where it makes other calls.

    Args:
        model: The dense model.
        given: The arguments of the trace.
        numbers: The numbers of these inputs among the leaves of the arguments.
    """
    leaves, spec = pytree.tree_flatten(given)
    found: list[View] = []
    captured = calls_of(model, given) if numbers else None
    if captured is None:
        return found
    changes = itertools.product(_CHANGES, [*([number] for number in numbers), list(numbers)])
    for change, chosen in itertools.islice(changes, TRIES):
        changed = [change(v.long()).to(v.dtype) if k in chosen else v for k, v in enumerate(leaves)]
        arguments: Arguments = pytree.tree_unflatten(changed, spec)
        calls = calls_of(model, arguments)
        if calls is not None and not calls <= captured and len(found) < VALUES:
            captured |= calls
            with _unless_it_fails("the pass with other values"):
                found += _views(capture_branches(model, *arguments, exact=True), arguments)
    return found


_CHANGES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda v: v + 1,
    lambda v: (v - 1).clamp(min=0),
    lambda v: (v - 2).clamp(min=0),
    lambda v: v + 2,
    torch.ones_like,
    lambda v: v.flip(0) if v.ndim else v + 3,
    lambda v: v * 2,
    torch.zeros_like,
)
"""Functions that make other values of those of the trace."""


def _views(found: Sequence[Capture], arguments: Arguments, **options: Any) -> list[View]:
    """Return a view for each capture. All but the first have other answers to conditions."""
    first = [View(one.program, arguments, **options) for one in found[:1]]
    return first + [
        View(one.program, arguments, other_answer=True, answer=one.answer, **options) for one in found[1:]
    ]


_INDIRECT = frozenset(
    {"getattr", "children", "modules", "named_children", "named_modules", "get_submodule", "_modules"}
)
"""Names by which code can reach a submodule without naming the submodule."""


def _is_named(model: nn.Module, name: str) -> bool:
    """Whether some method may read a tensor: methods name the tensor, and each module that it is inside.

    The forward pass counts too, since a branch that did not run may read the tensor. PyTorch's own modules
    are assumed to read all that they hold.
    """
    owner, seen = model, set[str]()
    for attribute in name.split("."):
        names = _names_of(type(owner))
        seen |= names
        own = type(owner).__module__.startswith("torch.")
        if not (own or attribute in seen or names & _INDIRECT):
            return False
        owner = getattr(owner, attribute)
    return True


def _names_of(cls: type) -> set[str]:
    """Return all names in the code of a class's methods, except the constructor and PyTorch's classes."""
    functions = {
        key: value
        for kind in reversed(cls.__mro__)
        if not kind.__module__.startswith("torch.")
        for key, value in vars(kind).items()
    }
    codes = (
        getattr(getattr(v, "fget", v), "__code__", None) for k, v in functions.items() if k != "__init__"
    )
    return {name for code in codes if code is not None for inner in codes_in(code) for name in inner.co_names}


def _tensors(program: ExportedProgram) -> set[int]:
    """Return the identities of parameters and buffers with more than one entry: only those hold units."""
    return {
        id(tensor_of(program, name))
        for _, kind, name in lifted(program)
        if kind in (InputKind.PARAMETER, InputKind.BUFFER) and name and tensor_of(program, name).numel() > 1
    }


def _read(program: ExportedProgram) -> set[int]:
    return {
        id(tensor_of(program, name))
        for node, kind, name in lifted(program)
        if kind in (InputKind.PARAMETER, InputKind.BUFFER) and name and node.users
    }


def _names(program: ExportedProgram, wanted: set[int]) -> list[str]:
    named: Mapping[str, torch.Tensor] = program.state_dict
    return [name for name, tensor in named.items() if id(tensor) in wanted]
