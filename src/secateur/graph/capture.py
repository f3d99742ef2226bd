"""Capturing a model with `torch.export`."""

from __future__ import annotations

import io
import itertools
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from secateur.calibration.randomness import seeded
from secateur.common.collecting import uncollected
from secateur.common.foreign import details, error_text, line_of
from secateur.common.models import copied, evaluation_mode
from secateur.common.outputs import agree, as_trees, tensors_of
from secateur.common.preserving import State, WritesUndone, preserved
from secateur.compat.exporting import quick_export
from secateur.errors import CaptureError
from secateur.graph.assertions import AssertionsHold
from secateur.graph.decompose import decompose
from secateur.graph.exporting import exporting
from secateur.graph.inline import inline_regions
from secateur.graph.inputs import Arguments, batch_size, samples_of
from secateur.graph.knownvalues import KnownValues
from secateur.graph.leaf import Place
from secateur.graph.nodes import hint, is_open
from secateur.graph.passes import FirstPass, output_of
from secateur.graph.recurrences import shapes_known
from secateur.graph.symbolic import Answers, lengths_open, numbers_open
from secateur.measure.kernels import capturable, runs_other_kernels


class Capture(NamedTuple):
    """A captured program, and what is known of its batch size.

    Attributes:
        program: The captured program.
        batch: The batch size that it was captured with.
        static: The same size if the program takes no other; else None.
        why: The line of the user's code that fixed the batch size, and what it does; empty if unknown.
        agrees: Whether the program gives what the model gives on these arguments. It may not where
            conditions got an answer.
        values: The integer inputs for whose values alone the program is right, by their numbers among the
            leaves of the arguments.
        answer: The one answer that all conditions on tensors got; None if they got several, or if some
            compare numbers made from tensors.
    """

    program: ExportedProgram
    batch: int
    static: int | None
    why: str
    agrees: bool = True
    values: Mapping[int, torch.Tensor] = {}
    answer: bool | None = None


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    also: Collection[Place] = (),
    exact: bool = False,
    training: bool = False,
    gradients: bool = True,
    answers: Answers | None = None,
    known_values: KnownValues | None = None,
    first: FirstPass | None = None,
) -> Capture:
    """Capture a model in one mode. If the model allows it, the program takes any batch size.

    First the model runs once as the user runs it. So an error of the model itself is reported as such, and
    functions that remember their results remember real tensors. Then the model is captured in the state
    before that run, so that the program computes tables which the model keeps between calls. If that fails,
    the model is captured in the state after the run.

    Args:
        model: The model; it is left as it was.
        args: Positional arguments.
        kwargs: Keyword arguments.
        also: Further axes that may have any size, with the numbers of tensors as their names.
        exact: Whether to capture the model for exactly these sizes.
        training: Whether to capture it in training mode.
        gradients: Whether gradients are on in the capture.
        answers: The answers to conditions on values of tensors. None: such code cannot be captured.
        known_values: Gives the code the values of integer inputs; then the sizes are exact too.
        first: Watches the first run.

    Raises:
        CaptureError: If the model does not run on these arguments, or cannot be captured.
    """
    given: Arguments = copied((args, dict(kwargs)))  # a capture changes attributes of tensors
    with (
        preserved(model, parameters=training),
        evaluation_mode(model, training=training),
        capturable(model),
        shapes_known(),
        torch.set_grad_enabled(gradients),
        _quiet(),
        uncollected(),
    ):
        fresh = State(model, functions=True, parameters=training)
        try:
            axes = None if exact or known_values is not None else also
            program, why, agrees = _first_that_works(model, fresh, given, axes, answers, known_values, first)
        finally:
            fresh.restore()
    _use_own_tensors(program, model)
    inline_regions(program)
    decompose(program)
    sizes = _sizes(program)
    batch = hint(sizes[0]) if sizes else 1
    leaves = pytree.tree_leaves(given)
    values = {} if known_values is None else {number: leaves[number] for number in sorted(known_values.read)}
    if _is_open(program):
        return Capture(program, batch, None, "", agrees, values)
    return Capture(program, batch, batch, why or _what_fixed(program), agrees, values)


def _first_that_works(
    model: nn.Module,
    fresh: State,
    given: Arguments,
    also: Collection[Place] | None,
    answers: Answers | None,
    known_values: KnownValues | None,
    watch: FirstPass | None = None,
) -> tuple[ExportedProgram, str, bool]:
    """Capture a model with various states, batch sizes and options, until one attempt works.

    Returns:
        The program; the error of the first attempt, in words, empty if that worked; and whether the program
        gives what the model gives.

    Raises:
        CaptureError: No attempt works.
    """
    used, error = _state_after_call(model, fresh, given, None if runs_other_kernels(model) else watch)
    if error is not None and not any(p.is_meta for p in model.parameters()):
        raise CaptureError(
            f"trace: expected model(*example_inputs) to run, got {error_text(error)}. Check the model, "
            f"and pass example_inputs= that it takes.",
            details(error),
        ) from error
    attempts: list[tuple[State | None, Arguments, ShapesCollection | None]]
    attempts = [(fresh, given, None), (used, given, None)]
    first: Exception | None = None
    general = copied(_at_least_two(*given))
    shapes = _open_axes(general, also or ())
    if also is not None and batch_size(general) != batch_size(given):
        used, first = _state_after_call(model, fresh, general)
    if also is not None and first is None:
        attempts = [(fresh, general, shapes), (used, general, shapes), *attempts]
    asked = set[str]()
    ways = itertools.product((None, False), attempts, (False, True))
    for told, (state, arguments, axes), numbers in ways:
        if state is None or (numbers and not depends_on_data(first)) or (told is False and not asked):
            continue
        agrees = True
        try:
            with (
                numbers_open() if numbers else nullcontext(),
                nullcontext() if answers is None else answers.given(),
                exporting(told, asked),  # code that makes no mask in an export may need one
            ):
                program = _export(model, state, arguments, axes, known_values)
            other = answers is not None or (known_values is not None and bool(known_values.inverted))
            if numbers or answers is not None or known_values is not None:
                agrees = _agrees(program, model, state, arguments, fails=other)
            if not other and not agrees:
                continue
        except Exception as error:  # any error may stop one attempt, and another may work
            first = first or error
            continue
        if axes is not None and state is fresh and used is None and not _is_open(program):
            program = _without_leftovers(model, fresh, general, shapes) or program
        return program, "" if first is None else error_text(first, capturing=True), agrees
    first = first or RuntimeError("nothing was tried")
    raise CaptureError(
        f"trace: torch.export could not capture {type(model).__name__}: {error_text(first, capturing=True)}.",
        details(first),
    ) from first


def _agrees(
    program: ExportedProgram, model: nn.Module, state: State, arguments: Arguments, *, fails: bool
) -> bool:
    """Whether a program gives what the model gives. It may not if the code asks for the type of a number.

    Args:
        program: The program.
        model: The model.
        state: The state of the model in which it was captured.
        arguments: What both are called with.
        fails: Whether the program may fail, since these arguments do not take its branch.
    """
    outputs = []
    for run in (model, program.module()):
        state.restore()
        args, kwargs = copied(arguments)
        try:
            with seeded(0), torch.no_grad(), WritesUndone(model):
                outputs.append(tensors_of(run(*args, **kwargs)))
        except Exception:
            if run is model or not fails:
                raise
            return False
    return agree(outputs[1], outputs[0])


def depends_on_data(error: BaseException | None) -> bool:
    """Whether a capture failed because the code takes a Python number from a tensor, or asks about one."""
    return isinstance(error, GuardOnDataDependentSymNode)


def _state_after_call(
    model: nn.Module, fresh: State, arguments: Arguments, watch: FirstPass | None = None
) -> tuple[State | None, Exception | None]:
    """Call a model once, and restore it.

    No activations are kept for a backward pass, unless the model differentiates in its forward pass.

    Returns:
        The state after the call, None if the call changed nothing; and the error of the call, if any.

    Raises:
        CaptureError: The call creates parameters.
    """
    names = {name for name, _ in model.named_parameters()}
    raised: Exception | None = None
    watched = [] if watch is None or watch.worked else [(False, watch)]
    for gradients, watcher in (*watched, (False, None), (True, None)):
        args, kwargs = copied(arguments)
        try:
            with (
                seeded(0),
                torch.set_grad_enabled(gradients),
                WritesUndone(model),
                nullcontext() if watcher is None else watcher.on(),
            ):
                output = output_of(model, args, kwargs)
            if watcher is not None:
                watcher.ended(output)
        except Exception as error:  # the user's code may fail in any way
            fresh.restore()
            raised = error
        else:
            break
    else:
        return None, raised
    created = [name for name, _ in model.named_parameters() if name not in names]
    state = State(model)
    changed = fresh.restore()
    if watch is not None:
        watch.leaves_something = changed
    if created:
        raise _lazy_parameter(model, created[0])
    return state if changed else None, None


def _export(
    model: nn.Module,
    state: State,
    arguments: Arguments,
    axes: ShapesCollection | None,
    known_values: KnownValues | None = None,
) -> ExportedProgram:
    """Export the model from a given state; `axes` may have any size."""
    state.restore()
    if known_values is not None:
        known_values.attach(model, arguments)
    model.register_forward_hook(lambda module, args, output: as_trees(output))  # until the state is restored
    with (
        AssertionsHold(),
        lengths_open(),
        failed_calls_left(),
        seeded(0),  # leaves the user's random state as it is; one thread at a time
        quick_export(),
        nullcontext() if known_values is None else known_values,
    ):
        program = export(model, *arguments, dynamic_shapes=axes, strict=False)  # type: ignore[arg-type]
    _drop_mistaken_writes(program, model, state, arguments)
    return program


def _drop_mistaken_writes(
    program: ExportedProgram, model: nn.Module, state: State, arguments: Arguments
) -> None:
    """Remove writes into inputs and buffers that the model does not make, in place.

    If forward registers a buffer, `torch.export` adds a copy of it into the first input, or into the earlier
    buffer of that name, whatever the sizes.
    """
    names = set(program.graph_signature.user_inputs)
    writes = []
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.copy_.default and not node.users:
            into, value = (argument.meta["val"].shape for argument in node.args[:2])
            if node.args[0].name in names:
                writes.append(node)
            elif len(into) != len(value) or any(map(is_open, value)) != any(map(is_open, into)):
                program.graph.erase_node(node)
    if not writes:
        return
    state.restore()
    args, kwargs = copied(arguments)
    before = [t.clone() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    with seeded(0), torch.no_grad(), WritesUndone(model):
        model(*args, **kwargs)
    after = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if all(map(torch.equal, before, after)):
        for node in writes:
            program.graph.erase_node(node)


def _without_leftovers(
    model: nn.Module, fresh: State, arguments: Arguments, axes: ShapesCollection
) -> ExportedProgram | None:
    """Capture a program of any batch size after a call with another batch size; None if that fails.

    If the user called the model before with the captured batch size, it may keep tables of that size. A
    capture takes these for constants, which fix the size.
    """
    state, _ = _state_after_call(model, fresh, samples_of(arguments, [*range(batch_size(arguments)), 0]))
    if state is None:
        return None
    try:
        program = _export(model, state, arguments, axes)
    except Exception:  # the program that was captured already works
        return None
    return program if _is_open(program) else None


def _lazy_parameter(model: nn.Module, name: str) -> CaptureError:
    return CaptureError(
        f"trace: expected {type(model).__name__} to have all its parameters, got {name!r}, which only its "
        "first call creates. Run model(*example_inputs) once before the trace."
    )


def require_parameters(model: nn.Module) -> None:
    """Refuse a model whose first call creates parameters.

    Raises:
        CaptureError: The model is one.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise _lazy_parameter(model, name)


def _use_own_tensors(program: ExportedProgram, model: nn.Module) -> None:
    """Put the model's own tensors into a program, where a call replaced them by others."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    for tensors in (program.state_dict, program.constants):
        for name, tensor in tensors.items():
            if name in own and own[name] is not tensor and own[name].shape == tensor.shape:
                tensors[name] = own[name]


def _sizes(program: ExportedProgram) -> list[Any]:
    """Return the sizes of the inputs' first axes."""
    names = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    return [value.shape[0] for value in values if isinstance(value, torch.Tensor) and value.ndim]


def _is_open(program: ExportedProgram) -> bool:
    return any(map(is_open, _sizes(program)))


def _what_fixed(program: ExportedProgram) -> str:
    """Return the line that fixed an axis's size; empty if unknown. PyTorch has no public record of it."""
    modes = (getattr(n.meta.get("val"), "fake_mode", None) for n in program.graph.nodes)
    environment = next((env for mode in modes if (env := getattr(mode, "shape_env", None)) is not None), None)
    places = getattr(environment, "replacements_slocs", {}).values()
    return next((line for p in places if (line := line_of(getattr(p, "framework_loc", None)))), "")


def _open_axes(arguments: Any, also: Collection[Place]) -> ShapesCollection:
    """Return the axes that may have any size: the batch axes, and those in `also`."""
    leaves = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    batch = batch_size(arguments)
    shapes = ShapesCollection()
    for number, leaf in enumerate(leaves):
        axes = {axis for name, axis in also if name == str(number)}
        if leaf.ndim and leaf.shape[0] == batch:
            axes.add(0)
        if axes:
            shapes[leaf] = dict.fromkeys(sorted(axes), Dim.AUTO)
    return shapes


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, a capture writes no warnings, logs or prints about PyTorch's internals.

    Errors still come as exceptions; often only the first attempt fails.
    """
    logs = [
        logging.getLogger(f"torch.{n}")
        for n in (
            "_export.non_strict_utils",
            "_subclasses.fake_tensor",
            "fx.experimental.recording",
            "fx.experimental.symbolic_shapes",
        )
    ]
    disabled = [log.disabled for log in logs]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for log in logs:
                log.disabled = True
            yield
        finally:
            for log, was in zip(logs, disabled, strict=True):
                log.disabled = was


def _at_least_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one sample, because a size of one would be captured as a constant."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not tensors or any(t.shape[0] != 1 for t in tensors):
        return args, kwargs
    leaves = [torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.ndim else v for v in leaves]
    doubled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, structure)
    return doubled


@contextmanager
def failed_calls_left() -> Iterator[None]:
    """Inside, a capture leaves a submodule that raised an error, where the model's code catches the error.

    An example is ``try: layer(x, lengths)`` with ``except TypeError: layer(x)``. PyTorch would go on as if
    the failed call were still running, and then fail itself.
    """
    original = fx.Tracer.call_module

    def call_module(
        self: fx.Tracer, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        depth = len(self.module_stack)
        try:
            return original(self, m, forward, args, kwargs)
        except BaseException:
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            raise

    fx.Tracer.call_module = call_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        fx.Tracer.call_module = original  # type: ignore[method-assign]
