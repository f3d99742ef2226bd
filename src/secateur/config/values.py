"""Types of settings: how the text of a user becomes a value, and what is wrong with it."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from secateur.config.names import BLOCK_SIGNALS, EXPERT_SIGNALS, REPAIRS, SIGNALS, Criterion

T = TypeVar("T")
UNKNOWN_NAME = "unknown_name"
"""The pydantic error type for an unknown name. The error's message says what is expected."""


def entries(value: Any) -> Any:
    """Make a list from one value, or from a text with commas between the entries."""
    given = value if isinstance(value, list | tuple) else [value]
    cut = [each.split(",") if isinstance(each, str) else [each] for each in given]
    return [part.strip() if isinstance(part, str) else part for parts in cut for part in parts]


def _amount(value: int | float, info: ValidationInfo) -> int | float:
    if (isinstance(value, float) and not 0 < value < 1) or (isinstance(value, int) and value < 1):
        raise ValueError(
            f"expected {info.field_name} to be a fraction in (0, 1) or a whole number of at least 1, "
            f"got {value}"
        )
    return value


def _signal(text: str) -> str:
    """Check the name of a signal. Signals may be multiplied and added: ``l1*wasserstein``."""
    known = tuple(dict.fromkeys((*SIGNALS, *get_args(Criterion), *EXPERT_SIGNALS, *BLOCK_SIGNALS)))
    parts = [part.strip(" ()") for part in text.replace("*", " ").replace("+", " ").split()]
    if not parts or not {part for part in parts if part} <= {*known}:
        wanted = f"one of {', '.join(known)}, or such names with * or + between them"
        raise PydanticCustomError(UNKNOWN_NAME, "{wanted}", {"wanted": wanted})
    return text


def _repair(text: str) -> str:
    if text not in REPAIRS:
        raise PydanticCustomError(UNKNOWN_NAME, "{wanted}", {"wanted": f"one of {', '.join(REPAIRS)}"})
    return text


Listed = Annotated[tuple[T, ...], BeforeValidator(entries)]
Amount = Annotated[int | float, AfterValidator(_amount)]
Share = Annotated[float, Field(gt=0, lt=1)]
SignalName = Annotated[str, AfterValidator(_signal)]
RepairName = Annotated[str, AfterValidator(_repair)]
