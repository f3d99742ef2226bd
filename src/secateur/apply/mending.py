"""Sizes that the user's code holds as numbers, mended at the call that uses them.

``x.reshape(B, N, C)`` with C read off the input, ``x.new_full((16, 1, 1), 0.5)``: no attribute makes such
code take fewer units. The module keeps its class and its code. Its ``forward`` runs with a mode that gives
such a call its new size, and leaves all others alone. So training mode, gradients, dtypes, devices and other
sizes are what the user's code makes of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from secateur.apply import calls
from secateur.apply.attention import head_size, with_head_size
from secateur.apply.calls import Heads, Need, Number, Parts, Positions, Sizes
from secateur.apply.constants import Constants
from secateur.apply.recording import Place, Recorded, place_of
from secateur.errors import ApplyError

Rules = dict[Place, dict[int, Need]]
"""For a call, by where it stands: what each of its steps has to say."""


def need_of(constants: Constants, node: fx.Node) -> Need | None:
    """What the call behind an operator has to say in the smaller model; None if what it says stays right."""
    call = constants.follow(node)
    if call is None:
        return None
    family = calls.FAMILIES[str(node.target).split(".")[1]]
    if family in ("shape", "expand", "fill", "repeat"):
        masks = constants.kept(node)
        axes = [(k, len(m), int(m.sum())) for k, m in enumerate(masks)]
        if family == "repeat":
            source = constants.kept(node.all_input_nodes[0])
            new = len(masks) - len(source)
            axes = [a for a in axes if a[0] < new or len(source[a[0] - new]) == 1]
        return Sizes(tuple(axes)) if any(old != new for _, old, new in axes) else None
    if family == "split":
        parts = call.arguments.get("split_sizes")
        return None if parts is None else Parts(int(call.arguments["dim"]), tuple(parts))
    if family == "take":
        source = constants.kept(node.all_input_nodes[0])
        whole = "indices" not in call.arguments and source[call.integer("dim") % len(source)].all()
        return None if whole else _positions(call.arguments, str(call.target))
    word = {"conv": "groups"}.get(family) or next(
        w for w in ("num_groups", "normalized_shape", "pad", "shifts") if w in call.arguments
    )
    return _number(call.arguments.get(word, 1), _argument(node, word, 1))


def _argument(node: fx.Node, word: str, default: Any) -> Any:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return (dict(zip(names, node.args, strict=False)) | dict(node.kwargs)).get(word, default)


def _number(new: Any, old: Any) -> Number | None:
    if not isinstance(new, list | tuple):
        return None if new == old else Number(int(new))
    values = tuple(None if a is b or a == b else int(a) for a, b in zip(new, old, strict=True))
    return None if all(v is None for v in values) else Number(values)


def _positions(arguments: Mapping[str, Any], target: str) -> Positions | None:
    if "indices" in arguments:
        changed = [v for v in arguments["indices"] if isinstance(v, torch.Tensor)]
        return Positions(0, 0, tuple(changed[0].tolist())) if changed else None
    if "index" in arguments and isinstance(arguments["index"], torch.Tensor):
        return Positions(0, 0, tuple(arguments["index"].tolist()))
    if target.startswith("aten.select"):
        return Positions(int(arguments["index"]), int(arguments["index"]) + 1, single=True)
    if "end" in arguments and isinstance(arguments["start"], int) and isinstance(arguments["end"], int):
        return Positions(arguments["start"], arguments["end"])
    return None


@dataclass
class Mender:
    """Follows a smaller model beside what was recorded of the dense one, and finds the calls to be mended.

    Attributes:
        dense: The dense model's calls, with the operators that they became.
        needs: What the call behind an operator has to say.
    """

    dense: list[Recorded]
    needs: Callable[[fx.Node], Need | None]
    _seen: dict[tuple[str, Place], list[tuple[dict[int, Need], bool]]] = field(default_factory=dict)
    _number: int = 0

    def rules(self) -> dict[str, Rules]:
        """What has to be mended, by module path, once the smaller model has run.

        Raises:
            ApplyError: If one line would have to say different things.
        """
        rules: dict[str, Rules] = {}
        for (module, place), runs in self._seen.items():
            unfit = [needs for needs, fitting in runs if not fitting]
            if not unfit:
                continue
            needs = unfit[0]
            if any(other != needs for other in unfit) or not all(_agree(needs, other) for other, _ in runs):
                raise ApplyError(
                    f"apply: expected one size for every run of a line in module {module or 'itself'}, got "
                    f"several at {_line(place)}. Leave the group alone, or hold the size in an attribute."
                )
            rules.setdefault(module, {})[place] = needs
        return rules

    def change(self, call: Recorded, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call of the smaller model as it has to be.

        Raises:
            ApplyError: If the smaller model runs other code than the dense one.
        """
        known = self._next(call)
        every = {k: self.needs(node) for k, node in enumerate(known.nodes) if node is not None}
        if call.steps[0].family == "attention":  # many operators, none of which holds its sizes
            every = {0: Heads(head_size(known.args, known.kwargs))}
        needs = {k: need for k, need in every.items() if need is not None}
        steps = known.steps
        fitting = all(calls.fits(call.name, steps[k], need, args, kwargs) for k, need in needs.items())
        if not fitting:
            needs = {k: calls.observed(call.name, need, args, kwargs) for k, need in needs.items()}
        self._seen.setdefault((call.module, call.place), []).append((needs, fitting))
        return func(*args, **kwargs) if fitting else mended(func, call.name, steps, needs, args, kwargs)

    def _next(self, call: Recorded) -> Recorded:
        while self._number < len(self.dense):
            known = self.dense[self._number]
            self._number += 1
            if known.steps:
                # A layer of our own calls no such function, or calls PyTorch's on the line for any widths.
                attention = known.steps[0].family == "attention"
                same = (known.name, known.module) == (call.name, call.module)
                if same and (attention or known.place == call.place):
                    return known
                if not attention:
                    break
        raise ApplyError(
            f"apply: expected the smaller model to run the same code as the dense one, got another way at "
            f"{_line(call.place)}: it branches on a size that has changed. Leave the group alone."
        )


def _agree(needs: Mapping[int, Need], other: Mapping[int, Need]) -> bool:
    """Whether what one run of a line has to say, where it does not, is right for another run as well."""
    return all(_says(need, other.get(k)) for k, need in needs.items())


def _says(need: Need, other: Need | None) -> bool:
    if not isinstance(need, Sizes) or not isinstance(other, Sizes):
        return need == other
    news = {axis: new for axis, _, new in other.axes}
    return all(news.get(axis) == new for axis, _, new in need.axes)


def _line(place: Place) -> str:
    if not place:
        return "an unknown line"
    file, function, first, _ = place[0]
    return f"{file.replace(chr(92), '/').rsplit('/', 1)[-1]}, {function} (line {first})"


def mended(
    func: Any,
    name: str,
    steps: list[calls.Step],
    needs: Mapping[int, Need],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Carry out a call with what its steps need."""
    for k, need in needs.items():
        if isinstance(need, Parts):
            return calls.split(need, args, kwargs)
        if isinstance(need, Heads):
            return with_head_size(need.size, args, kwargs)
        args, kwargs = calls.changed(name, steps[k], need, args, kwargs)
    return func(*args, **kwargs)


class _NoScript(ApplyError, AttributeError):
    """A mended module cannot be scripted. To all others who ask, there is no such attribute."""


class MendedForward:
    """The ``forward`` of a module some of whose calls are mended.

    Attributes:
        module: The module.
        rules: What has to be mended, as plain data.
    """

    def __init__(self, module: nn.Module, rules: Rules, inner: Any = None) -> None:
        self.module, self.rules = module, rules
        self._inner = inner  # what stood in its place before: an earlier round's, or somebody else's

    def moved(self, module: nn.Module) -> MendedForward:
        """The same for another module of the same class."""
        inner = self._inner.moved(module) if isinstance(self._inner, MendedForward) else self._inner
        return MendedForward(module, self.rules, inner)

    @property
    def __wrapped__(self) -> Any:
        """The user's forward, for whoever asks for its signature."""
        return self._inner or type(self.module).forward.__get__(self.module)

    @property
    def __code__(self) -> Any:
        """The code of the user's forward: `torch.export` reads the names of its arguments there."""
        return self.__wrapped__.__code__

    @property
    def __globals__(self) -> Any:
        """What `torch.jit.script` asks for first, and it can only compile the user's code as it stands.

        Raises:
            ApplyError: Always.
        """
        raise _NoScript(
            f"expected no torch.jit.script of {type(self.module).__name__}, got one: it compiles the code, "
            f"which holds a size that is mended as the code runs. Use torch.jit.trace or torch.export."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's forward, mended."""
        return mended_forward(self, args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiler makes frames anew, which tell places
def mended_forward(owner: MendedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the user's forward, mended. `place_of` knows this function by its name."""
    with _Mending(owner):
        return owner.__wrapped__(*args, **kwargs)


class _Mending(TorchFunctionMode):
    def __init__(self, owner: MendedForward) -> None:
        super().__init__()
        self._owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in calls.FAMILIES:
            return func(*args, **kwargs)
        place, frame = place_of(sys._getframe(1))
        needs = self._owner.rules.get(place)
        runs = None if frame is None else frame.f_locals.get("owner")
        if not needs or runs is None or runs.module is not self._owner.module:
            return func(*args, **kwargs)
        steps = calls.steps_of(name, args, kwargs)
        try:
            return mended(func, name, steps, needs, args, kwargs)
        except ValueError as error:
            raise ApplyError(f"{_line(place)}: {error}. This size cannot follow what was removed.") from error


def mend(small: nn.Module, rules: Mapping[str, Rules]) -> tuple[str, ...]:
    """Let modules run mended, in place; returns their paths."""
    paths = []
    for path, found in rules.items():
        own = {place: needs for place, needs in found.items() if needs}
        if own:
            module = small.get_submodule(path)
            module.forward = MendedForward(module, own, vars(module).get("forward"))
            paths.append(path)
    return tuple(sorted(paths))
