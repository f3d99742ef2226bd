"""A recording of the torch functions that a model's code calls: places, arguments and operators."""

from __future__ import annotations

import bisect
import difflib
import dis
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import module as _module
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from secateur.graph.nodes import shape_of
from secateur.graph.rules import operator_name
from secateur.targets.units.module_form.calls import FAMILIES, numbers, steps_of
from secateur.targets.units.module_form.needs import Step
from secateur.targets.units.module_form.sizes import running_modules

Place = tuple[tuple[str, str, int, int, int], ...]
"""The place of a call: for each function from the call up to ``forward``, the file, the name, the first line,
the line and the instruction."""

Key = tuple[str, ...]
"""A key that is equal for a step and for its operator in the captured program."""


@dataclass(eq=False)
class Recorded:
    """One call of a torch function.

    Attributes:
        module: Path of the module whose ``forward`` was running.
        name: The name of the function.
        place: Its place in the code.
        steps: The steps of the call; empty if it passes no sizes.
        args: Its positional arguments. Tensors are replaced by empty ones, but for integers along one axis.
        kwargs: Its keyword arguments, likewise.
        keys: For each step, the key by which its operator is found.
        nodes: For each step, the operator of the captured program; None if unknown.
        literals: The integers in the code that makes the call.
    """

    module: str
    name: str
    place: Place
    steps: list[Step]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keys: list[Key]
    nodes: list[fx.Node | None] = field(default_factory=list)
    literals: frozenset[int] = frozenset()


Change = Callable[[Recorded, Any, tuple[Any, ...], dict[str, Any]], Any]
"""A function that runs a call with steps: (call, function, arguments, keyword arguments) -> result."""


class Recorder(TorchFunctionMode):
    """Inside, every call is recorded. If `change` is given, it runs the calls with steps."""

    def __init__(self, modules: Callable[[], str], change: Change | None = None) -> None:
        super().__init__()
        self.calls: list[Recorded] = []
        self._module, self._change = modules, change

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record a call."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":  # an attribute, such as shape
            return func(*args, **kwargs)
        steps = steps_of(name, args, kwargs)
        empty = pytree.tree_map_only(torch.Tensor, _empty, (tuple(args), kwargs))
        place, codes, _ = place_of(sys._getframe(1))
        written_numbers = frozenset[int]().union(*map(literals, codes)) if steps else frozenset[int]()
        call = Recorded(self._module(), name, place, steps, empty[0], empty[1], [], literals=written_numbers)
        self.calls.append(call)
        try:
            if steps and self._change is not None:
                result = self._change(call, func, args, kwargs)
            else:
                result = func(*args, **kwargs)
        except Exception:
            call.steps = []  # it gave nothing; the model's code may catch this and go on
            raise
        call.keys = [_key_of_step(step, args, result) for step in steps]
        return result


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor of the same shape and dtype without values, so that records keep no activations.

    A single integer keeps its value, since it may be a size; so do integers along one axis, which may be
    positions.
    """
    if tensor.is_nested:
        return torch.empty(0, device="meta")
    if tensor.ndim <= 1 and not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.detach().clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _key_of_step(step: Step, args: Sequence[Any], result: Any) -> Key:
    if step.family == "take":
        return ("take", str(step.dim))
    tensors = [v for v in pytree.tree_leaves(result) if isinstance(v, torch.Tensor)]
    return (step.family, *(str(tuple(t.shape)) for t in tensors))


_PACKAGE = str(Path(__file__).parent)
_PASSING = ("torch.utils.", "torch._", "torch.autograd.", "torch.amp.", "torch.overrides")


def place_of(frame: FrameType | None) -> tuple[Place, list[CodeType], FrameType | None]:
    """Find the place of a call.

    Frames of this package, of the standard library, and of functions that only pass calls on (checkpoints)
    are left out. Of a function that calls itself, one frame counts, because the depth depends on the inputs.

    Returns:
        The place, the code of each function in it, and the frame that called the enclosing module.
    """
    place: Place = ()
    codes: list[CodeType] = []
    while frame is not None:
        code = frame.f_code
        own = code.co_filename.startswith(_PACKAGE)
        if code.co_filename == _module.__file__ or (own and code.co_name in ("mended_call", "record")):
            break
        if not own and code.co_name != "__torch_function__" and not _passes(frame):
            where = (code.co_filename, code.co_name, code.co_firstlineno, frame.f_lineno, _instruction(frame))
            if where not in place:
                place = (*place, where)
                codes.append(code)
        frame = frame.f_back
    return place, codes, frame


def _instruction(frame: FrameType) -> int:
    """Return the start of the instruction that a frame is at.

    Python changes code as it runs. A frame may then be inside an instruction, or at a part of it before the
    start.
    """
    starts = _starts(frame.f_code)
    return starts[max(bisect.bisect_right(starts, frame.f_lasti) - 1, 0)]


@functools.lru_cache(maxsize=4096)  # a pruned model asks at each forward pass
def _starts(code: CodeType) -> tuple[int, ...]:
    every = list(dis.get_instructions(code))
    after = {b.offset for a, b in itertools.pairwise(every) if a.opname == "PRECALL"}  # Python 3.11 only
    return tuple(i.offset for i in every if i.offset not in after)


@functools.lru_cache(maxsize=4096)
def literals(code: CodeType, line: int = 0) -> frozenset[int]:
    """Return the integers that are written in a function, or on one line of it."""
    spans = [(start, end) for start, end, at in code.co_lines() if not line or at == line]
    inside = (i for i in dis.get_instructions(code) if any(a <= i.offset < b for a, b in spans))
    return frozenset(number for i in inside for number in written(i))


def written(instruction: dis.Instruction) -> list[int]:
    """Return the integers of an instruction that are written in the code, not its offsets and counts."""
    constant = "CONST" in instruction.opname or "SMALL_INT" in instruction.opname
    return numbers(instruction.argval) if constant else []


def _passes(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name.startswith(_PASSING) or name.partition(".")[0] in sys.stdlib_module_names


@contextmanager
def running(model: nn.Module) -> Iterator[Callable[[], str]]:
    """Inside, a function tells which module's ``forward`` is running, by its first path in the model."""
    paths = {id(module): path for path, module in model.named_modules()}
    stack = [""]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(paths.get(id(module), stack[-1]))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    hooks = [
        _module.register_module_forward_pre_hook(enter),
        _module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield lambda: stack[-1]
    finally:
        for hook in hooks:
            hook.remove()


def assign_nodes(calls: Sequence[Recorded], program: fx.Graph, model: nn.Module, prefix: str = "") -> None:
    """Find the operator of the captured program for each step: in each module, both come in the same order.

    Args:
        calls: The recorded calls of a run; their `nodes` are set.
        program: The captured operators.
        model: The model.
        prefix: What module paths begin with in the program, before the path in the model.
    """
    first = {id(module): path for path, module in model.named_modules()}
    steps: dict[str, list[tuple[Recorded, int]]] = {}
    for call in calls:
        call.nodes = [None] * len(call.steps)
        for k in range(len(call.steps)):
            steps.setdefault(call.module, []).append((call, k))
    nodes: dict[str, list[fx.Node]] = {}
    for node in program.nodes:
        if has_sizes(node):
            path = next(iter(running_modules(node)[-1:]), "").partition("@")[0]
            path = path.removeprefix(prefix)
            try:
                path = first[id(model.get_submodule(path))]
            except (AttributeError, KeyError):
                continue
            nodes.setdefault(path, []).append(node)
    for path, own in steps.items():
        step_keys = [call.keys[k] for call, k in own]
        node_keys = [_key_of_node(node) for node in nodes.get(path, [])]
        matcher = difflib.SequenceMatcher(None, step_keys, node_keys, autojunk=False)
        for a, b, size in matcher.get_matching_blocks():
            for k in range(size):
                call, number = own[a + k]
                call.nodes[number] = nodes[path][b + k]


def has_sizes(node: fx.Node) -> bool:
    """Whether a call of a recorded model could have become this operator."""
    return node.op == "call_function" and _family(node) is not None


def _family(node: fx.Node) -> str | None:
    name = operator_name(node)
    if not name.startswith("aten.") or _is_whole_slice(node):
        return None
    family = FAMILIES.get(name.split(".")[1])
    return None if family == "scale" else family  # its number is read from the dense model's call


def _is_whole_slice(node: fx.Node) -> bool:
    """Whether a slice takes a whole axis. Indexing makes such slices for ``:``."""
    if not str(node.target).startswith("aten.slice"):
        return False
    given: list[Any] = [*node.args[2:], None, None, None]
    start, end, step = given[:3]
    return not start and (end is None or (isinstance(end, int) and end >= sys.maxsize)) and step in (None, 1)


def _key_of_node(node: fx.Node) -> Key:
    """Return the key of an operator, which equals the key of the step that became it."""
    family = _family(node) or ""
    if family == "take":
        if str(node.target).startswith("aten.index.Tensor"):
            indices: Any = node.args[1]
            return ("take", str(next(k for k, v in enumerate(indices) if v is not None)))
        source: Any = node.args[0]
        dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return ("take", str(int(dim) % max(source.meta["val"].ndim, 1)))
    value = node.meta.get("val")
    tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]
    try:
        return (family, *(str(shape_of(t)) for t in tensors))
    except ValueError:  # a size that depends on the data
        return (family,)


def record(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    change: Change | None = None,
    *,
    method: str = "",
) -> list[Recorded]:
    """Run a model once, or one of its methods, and return the calls that its code makes, in order."""
    with running(model) as module, Recorder(module, change) as recorder:
        (getattr(model, method) if method else model)(*args, **kwargs)
    found: list[Recorded] = recorder.calls
    return found
