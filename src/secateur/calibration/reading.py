"""Split the batches of a loader into arguments of the model and labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.calibration.hints import forward_hint
from secateur.calibration.randomness import seeded
from secateur.common.foreign import details, error_text
from secateur.common.models import copied, device_of, evaluating
from secateur.errors import CalibrationError

Forward = Callable[[Callable[..., Any], Any], Any]
"""``forward(model, batch)``: calls the model on a batch of the loader, and returns the model's output."""

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Keys of a mapping, or attributes of another object, that hold labels, in order of preference."""


@dataclass(frozen=True)
class Taken:
    """A batch, split into arguments and labels.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        labels: The labels, as the loader gave them; None if there are none.
        extra: Labels as a keyword argument, if the model takes it to compute its own loss.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any = None
    extra: Mapping[str, Any] | None = None


class Reading:
    """Splits the batches of one source into arguments and labels.

    A batch has one of these forms:

    - a tensor: the only input, without labels;
    - ``(inputs, labels)`` or ``(inputs,)``, where `inputs` is one tensor, a tuple or list of positional
      arguments, a list that the model takes as one argument, or a mapping of keyword arguments;
    - ``(a, b, ...)`` or ``(a, b, ..., labels)``, if the model cannot run with fewer arguments than a, b, ...,
      and, in front of labels, takes no more;
    - a mapping of keyword arguments, with the labels under one of `LABEL_KEYS`;
    - anything, if `forward` is given: the arguments are those with which `forward` calls the model.

    Labels are not passed to the model, with two exceptions: a model that cannot run without ``labels`` always
    gets them, and a model that computes its own loss from ``labels`` gets them when a loss is needed.
    """

    def __init__(
        self, model: nn.Module | None = None, forward: Forward | None = None, whole: bool | None = None
    ) -> None:
        """Set the rules for one source.

        Args:
            model: The model that takes the batches, if known.
            forward: The user's function that calls the model on a batch.
            whole: True: batches cannot be cut into samples. False: they can. None: find out later.
        """
        self.model, self.forward, self.whole = model, forward, whole
        self._needs_labels: bool | None = None
        self._takes_labels: bool | None = None
        self._listed: bool | None = None
        self.kinds: tuple[str, ...] | None = None
        """What the tensors of the first batch are, for messages; None before there was one."""

    def of(self, model: nn.Module) -> Reading:
        """Return this reading with a model set; self if it already has one."""
        return self if self.model is not None else Reading(model, self.forward, self.whole)

    def inputs(self, raw: Any) -> Any:
        """Return the arguments in a batch: a mapping of keyword arguments, or a tuple of positional ones."""
        taken = self.take(raw, "example inputs")
        return taken.kwargs or taken.args

    def take(self, raw: Any, where: str) -> Taken:
        """Split a batch into arguments and labels.

        Args:
            raw: The batch as the loader gives it.
            where: Start of error messages, such as ``calibration batch 3``.

        Raises:
            CalibrationError: The batch has none of the known forms, or a key is no argument of the model.
        """
        if self.forward is not None:
            own = fresh(raw)
            before = pytree.tree_map(lambda leaf: leaf, own)  # forward may remove entries from its batch
            try:
                args, kwargs = recorded(self.forward, own, self.model, where)
            except PartError:
                raise
            except CalibrationError as error:
                raise CalibrationError(f"{error} Return model(...), {self._hint(raw)}.") from error.__cause__
            given = {id(v) for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
            return Taken(*self._one_kind(args, kwargs, where), _labels_in(before, given))
        if isinstance(raw, Mapping):
            return self._mapping(raw, where)
        if isinstance(raw, Tensor):
            return Taken((raw,), {})
        if not isinstance(raw, list | tuple):
            raise CalibrationError(
                f"{where}: expected (inputs, labels), (inputs,), a tensor or a mapping, got "
                f"{type(raw).__name__}. Pass forward=, {self._hint(raw)}."
            )
        if (several := self._several(raw, where)) is not None:
            return several
        if len(raw) not in (1, 2):
            raise CalibrationError(
                f"{where}: expected (inputs, labels), (inputs,), a tensor or a mapping, got "
                f"{type(raw).__name__} of {len(raw)}. Wrap several inputs in a tuple of their own, "
                f"((a, b), labels), or pass forward=, {self._hint(raw)}."
            )
        inputs, labels = raw[0], raw[1] if len(raw) == 2 else None
        if isinstance(inputs, Mapping):
            self._check_names(inputs, where, raw)
            return Taken((), {str(k): v for k, v in inputs.items()}, labels)
        if isinstance(inputs, tuple) or (isinstance(inputs, list) and not self._takes_list(inputs)):
            return Taken(tuple(inputs), {}, labels)
        return Taken((inputs,), {}, labels)

    def _several(self, raw: Sequence[Any], where: str) -> Taken | None:
        """Split a batch whose first entries are the arguments of the model; None for other forms.

        The model's signature decides: two entries are no pair of inputs and labels, if it needs two inputs.
        """
        names = self._parameters()[0]
        required = [name for name, parameter in names.items() if parameter.default is parameter.empty]
        count = len(required)
        if count < 2 or isinstance(raw[0], list | tuple | Mapping):
            return None
        given = dict(zip(required, raw, strict=False))
        if len(raw) == count and required[-1] == "labels":
            return self._mapping(given, where)
        if len(raw) == count or (len(raw) == count + 1 and len(names) == count):
            labels = raw[-1] if len(raw) > count else None
            if any(names[name].kind is inspect.Parameter.KEYWORD_ONLY for name in required):
                return Taken((), given, labels)
            return Taken(tuple(given.values()), {}, labels)
        return None

    def _takes_list(self, inputs: list[Any]) -> bool:
        """Whether the model takes a list as one argument, instead of its entries as several arguments.

        Detectors take a list of images. But loaders also turn tuples of inputs into lists. So the entries as
        several arguments are tried first.
        """
        if self._listed is None:
            self._listed = (
                self.model is not None and not runs(self.model, tuple(inputs)) and runs(self.model, (inputs,))
            )
        return self._listed

    def _mapping(self, raw: Mapping[Any, Any], where: str) -> Taken:
        names, _ = self._parameters()
        keys = [k for k in LABEL_KEYS if k in raw and (k == "labels" or k not in names)]
        # Without the model's argument names, a key such as "target" could also be an input.
        key = next((k for k in keys if names or k in ("labels", "label")), None)
        kwargs = {str(k): v for k, v in raw.items() if k != key}
        self._check_names(kwargs, where, raw)
        if key != "labels":
            return Taken((), kwargs, None if key is None else raw[key])
        labels = {"labels": raw["labels"]}
        if self._needs_labels is None:
            self._try_labels(kwargs, labels)
        if self._needs_labels:
            return Taken((), kwargs | labels, raw["labels"], labels)
        return Taken((), kwargs, raw["labels"], labels if self._takes_labels else None)

    def _try_labels(self, kwargs: dict[str, Any], labels: dict[str, Any]) -> None:
        """Run the model to find out whether it accepts the argument ``labels`` and whether it needs it."""
        names, open_ended = self._parameters()
        if self.model is None:
            self._takes_labels = True
        elif "labels" not in names and not open_ended:
            self._takes_labels = self._needs_labels = False
        else:
            self._takes_labels = runs(self.model, kwargs=kwargs | labels)
            self._needs_labels = self._takes_labels and not runs(self.model, kwargs=kwargs)

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments by the names that the model's forward gives them, the positional ones too."""
        names = [*self._parameters()[0]]
        return dict(zip(names, args, strict=False)) | dict(kwargs)

    def _parameters(self) -> tuple[dict[str, inspect.Parameter], bool]:
        """The named parameters of the model's forward, and whether it also has ``**kwargs``."""
        try:
            found = inspect.signature(self.model.forward).parameters if self.model is not None else None
        except (TypeError, ValueError):
            found = None
        if found is None:
            return {}, True
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return (
            {n: p for n, p in found.items() if p.kind in named},
            any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found.values()),
        )

    def _hint(self, raw: Any) -> str:
        """The end of an error message: a suggested `forward` for this batch."""
        names, _ = self._parameters()
        required = [n for n, p in names.items() if p.default is p.empty]

        def works(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
            return self.model is not None and runs(self.model, args, kwargs)

        return f"for instance {forward_hint(raw, required, names, LABEL_KEYS, works)}"

    def _check_names(self, given: Mapping[Any, Any], where: str, raw: Any) -> None:
        """Raise CalibrationError if a key is no argument of the model, or a required argument has no key."""
        names, open_ended = self._parameters()
        if not names:
            return
        unknown = [] if open_ended and names.keys() & given.keys() else [k for k in given if k not in names]
        missing = [n for n, p in names.items() if p.default is p.empty and n not in given]
        if not unknown and (not missing or missing == ["labels"]):
            return
        got = f"got {_short(given)}" + (f" without {', '.join(missing)}" if missing else "")
        raise CalibrationError(
            f"{where}: expected keys that are arguments of {type(self.model).__name__}.forward "
            f"({_short(names)}), {got}. Rename them, or pass forward=, {self._hint(raw)}."
        )

    def _one_kind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], where: str
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Turn mixed arguments into keyword arguments: example inputs are all positional or all keyword."""
        if not args or not kwargs:
            return args, kwargs
        names = [*self._parameters()[0]][: len(args)]
        if len(names) < len(args) or set(names) & kwargs.keys():
            raise CalibrationError(
                f"{where}: expected forward to call the model with positional or with keyword arguments, got "
                f"{len(args)} and {len(kwargs)}. Name them all."
            )
        return (), dict(zip(names, args, strict=True)) | kwargs


def _short(names: Mapping[Any, Any]) -> str:
    shown = [str(name) for name in names][:12]
    return ", ".join(shown) + (", …" if len(names) > len(shown) else "")


def _labels_in(raw: Any, given: set[int]) -> Any:
    """Find the labels in a batch that `forward` reads.

    Args:
        raw: The batch.
        given: The ``id`` of each tensor that `forward` passes to the model. Those are no labels.
    """
    if isinstance(raw, list | tuple):
        found = [raw[1]] if len(raw) == 2 else []
    elif isinstance(raw, Mapping):
        found = [raw[k] for k in LABEL_KEYS if k in raw]
    else:
        found = [v for k in LABEL_KEYS if (v := getattr(raw, k, None)) is not None]
    return next((v for v in found if id(v) not in given), None)


class _Recorded(BaseException):
    """Stops the user's `forward` at its call of the model, and carries the arguments out."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.call = args, kwargs


class PartError(CalibrationError, AttributeError):
    """The user's `forward` reads a part of the model, such as ``model.layer``, and does not call it."""

    def __init__(self, part: str) -> None:
        super().__init__(
            f"forward: expected it to call the model itself, model(...), got {part}. Wrap the model in a "
            f"module whose forward does what you need."
        )


class StandIn:
    """An object that the user's code calls in place of the model.

    It gives access to plain data of the model, such as ``config``, but not to modules and methods.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._stands_for = model

    def __getattr__(self, name: str) -> Any:
        value = None if name.startswith("_") else getattr(self._stands_for, name, None)
        if value is None or callable(value):
            raise PartError(f"model.{name}")
        return value

    def __getitem__(self, key: Any) -> NoReturn:
        raise PartError(f"model[{key!r}]")

    def __iter__(self) -> NoReturn:
        raise PartError("a loop over its modules")

    def __len__(self) -> NoReturn:
        raise PartError("len(model)")

    def __bool__(self) -> bool:
        return True


class _Recorder(StandIn):
    """Takes the place of the model to record the arguments of the first call."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _Recorded(args, kwargs)


def fresh(raw: Any) -> Any:
    """Copy a batch with its containers and tensors, because the user's code may change it."""
    return copy(raw) if isinstance(raw, Mapping) and not isinstance(raw, dict) else copied(raw)


def recorded(
    forward: Forward, raw: Any, model: nn.Module | None = None, where: str = "forward"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Record the arguments with which the user's `forward` first calls the model. The model does not run.

    Returns:
        Positional and keyword arguments.

    Raises:
        CalibrationError: `forward` raised an error, or did not call the model.

    Example:
        >>> recorded(lambda model, batch: model(batch["image"], scale=2), {"image": 1})
        ((1,), {'scale': 2})
    """
    try:
        forward(_Recorder(model), raw)
    except _Recorded as found:
        return found.call
    except CalibrationError:  # `PartError`, whose message already says what to do
        raise
    except Exception as error:  # the user's code may fail in any way
        raise CalibrationError(
            f"{where}: expected forward(model, batch) to run, got {error_text(error)}. "
            "Correct that function.",
            details(error),
        ) from error
    raise CalibrationError(
        f"{where}: expected forward(model, batch) to call the model, got no call. Return model(...)."
    )


def runs(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> bool:
    """Run the model in evaluation mode, and return whether that raised no error. The model is not changed."""
    device = device_of(model)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs or {}))
    with evaluating(model), torch.no_grad(), seeded(0):
        try:
            model(*args, **kwargs)
        except Exception:  # a user's forward may fail in any way
            return False
    return True
