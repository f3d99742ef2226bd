"""Which function does the work for a granularity: one table for `trace`, `score`, `apply` and so on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from reprlib import repr as short
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

from torch import nn

from secateur.calibration.workers import living_workers
from secateur.common.precision import full_precision
from secateur.common.seeds import seed_of
from secateur.errors import SettingError

P = ParamSpec("P")
R = TypeVar("R")

_RANKS = {
    "score": "secateur.targets.lowrank.score",
    "apply": "secateur.targets.lowrank.apply",
    "verify": "secateur.targets.lowrank.apply",
    "repair": "secateur.targets.lowrank.repair",
}

_BLOCKS = {
    "score": "secateur.targets.together.score",
    "apply": "secateur.targets.together.blocks",
    "verify": "secateur.targets.together.blocks",
    "repair": "secateur.targets.together.blocks",
}

MODULES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "expert": {
            "trace": "secateur.targets.experts.trace",
            "score": "secateur.signals.experts.score",
            "apply": "secateur.targets.experts.apply",
            "verify": "secateur.targets.experts.apply",
            "repair": "secateur.targets.experts.repair",
        },
        "weight": {
            "trace": "secateur.targets.weights.weights",
            "score": "secateur.signals.weights.score",
            "apply": "secateur.targets.weights.apply",
            "verify": "secateur.targets.weights.apply",
        },
        "block": {
            "trace": "secateur.targets.blocks.trace",
            "score": "secateur.signals.blocks.score",
            "apply": "secateur.targets.blocks.apply",
            "verify": "secateur.targets.blocks.apply",
            "repair": "secateur.targets.blocks.repair",
        },
        "head_size": {"trace": "secateur.targets.headsizes.trace"},
        "unit+head_size": {"trace": "secateur.targets.headsizes.together"},
        "rank": {"trace": "secateur.targets.lowrank.trace", **_RANKS},
        "unit+rank": {"trace": "secateur.targets.lowrank.together", **_RANKS},
        "unit+block": {"trace": "secateur.targets.together.blocks", **_BLOCKS},
        "unit+head_size+block": {"trace": "secateur.targets.headsizes.blocks"},
        "unit+expert": {
            "trace": "secateur.targets.together.graph",
            "score": "secateur.targets.together.score",
            "apply": "secateur.targets.together.apply",
            "verify": "secateur.targets.together.apply",
        },
    }
)
"""Granularity -> name of a function -> the module with it. Modules are imported when they are needed."""

UNITS = frozenset({"unit", "head_size", "unit+head_size", "rank", "unit+rank"})
"""What is removed as units of a `Graph`. Only their traces differ."""

_NOT_RESUMED = "this pass cannot be resumed"
_BY_BLOCK = "only single weights can be scored block by block"

REFUSED: Mapping[tuple[str, str], Mapping[str, str]] = MappingProxyType(
    {
        ("trace", "expert"): {
            "more_inputs": "the sizes of inputs decide nothing about experts",
            "methods": "experts are removed from the module itself, so for every method",
            "allow_inexact": "only experts whose removal is exact may go",
        },
        ("trace", "block"): {
            "methods": "blocks are removed from the module itself, so for every method",
            "allow_inexact": "only blocks whose removal is exact may go",
        },
        ("trace", "weight"): {
            **dict.fromkeys(
                ("example_inputs", "more_inputs", "forward"), "weights are found without a forward pass"
            ),
            **dict.fromkeys(("methods", "allow_inexact"), "masks leave all shapes as they are"),
        },
        ("score", "unit"): {"by_block": _BY_BLOCK},
        ("score", "expert"): {
            "memory": "all blocks are scored in one pass",
            **dict.fromkeys(("checkpoint", "checkpoint_every"), _NOT_RESUMED),
            "by_block": _BY_BLOCK,
        },
        ("score", "block"): {
            "memory": "only a few numbers are kept for each block",
            **dict.fromkeys(("checkpoint", "checkpoint_every"), _NOT_RESUMED),
            "by_block": _BY_BLOCK,
        },
        ("score", "weight"): {
            "memory": "only a few numbers are kept for each weight",
            **dict.fromkeys(("checkpoint", "checkpoint_every"), _NOT_RESUMED),
        },
        ("apply", "unit"): {"renormalise": "only routers of experts have such a setting"},
        **{
            ("apply", ranks): {"renormalise": "only routers of experts have such a setting"}
            for ranks in ("rank", "unit+rank")
        },
        **{
            ("repair", ranks): {"memory": "only the repair of experts can be bounded"}
            for ranks in ("rank", "unit+rank")
        },
        **{("score", ranks): {"by_block": _BY_BLOCK} for ranks in ("rank", "unit+rank")},
        ("apply", "expert"): {"on_unrealisable": "a module can express every removal of experts"},
        ("apply", "block"): {
            "on_unrealisable": "only blocks that a module can lose may go",
            "renormalise": "only routers of experts have such a setting",
        },
        ("apply", "weight"): {
            "example_inputs": "masks need no forward pass",
            "on_unrealisable": "masks leave all shapes as they are",
            "renormalise": "only routers of experts have such a setting",
        },
        ("trace", "unit+expert"): {
            "allow_inexact": "only what leaves the rest unchanged is removed together with experts",
        },
        **{
            ("trace", granularity): {
                "allow_inexact": "only what leaves the rest unchanged is removed together with blocks",
            }
            for granularity in ("unit+block", "unit+head_size+block")
        },
        **{
            ("score", f"unit+{other}"): {
                "memory": f"{other}s are scored in one pass",
                **dict.fromkeys(("checkpoint", "checkpoint_every"), _NOT_RESUMED),
                "by_block": _BY_BLOCK,
            }
            for other in ("expert", "block")
        },
        ("apply", "unit+block"): {"renormalise": "only routers of experts have such a setting"},
        ("repair", "unit+block"): {"memory": "only the repair of experts can be bounded"},
        ("verify", "weight"): dict.fromkeys(
            ("example_inputs", "other_sizes", "tolerance"), "all tensors are compared bit for bit"
        ),
        ("verify", "expert"): {"other_sizes": "experts are compared on one set of inputs"},
        ("repair", "unit"): {"memory": "only the repair of experts can be bounded"},
        ("repair", "block"): {"memory": "only the repair of experts can be bounded"},
        ("repair", "expert"): {
            "own": "experts have repairs of their own",
            "loss_fn": "experts are fitted to what the dense block gives",
        },
    }
)
"""(Function, granularity) -> the options that mean nothing there -> the reason."""


def by_granularity(told_by: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function for units pass calls for another granularity on to the function in `MODULES`.

    Args:
        told_by: The name of the argument that tells the granularity: that of the granularity itself, or of a
            graph, a plan or a pruned model.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        signature, name = inspect.signature(function), function.__name__

        @wraps(function)
        @living_workers()
        @full_precision()
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # which says what is wrong with these arguments
            given = bound.arguments
            if "seed" in given:
                given["seed"] = seed_of(given["seed"])
            told = given.get(told_by, "unit")
            granularity = named(name, told) if told_by == "granularity" else granularity_of(told)
            for option, why in REFUSED.get((name, granularity), {}).items():
                default = signature.parameters[option].default
                value = given.get(option, default)
                if not (isinstance(value, type(default)) and value == default):
                    raise refusal(f"{name}({option}={short(value)})", granularity, why)
            traced = given.get("graph")
            fits = "unit" if granularity == "weight" else granularity
            if told_by != "graph" and traced is not None and granularity_of(traced) != fits:
                right = "sc.trace(model, inputs)" if granularity == "weight" else "the graph of the plan"
                raise SettingError(
                    f"{name}: expected a trace with granularity {fits!r}, got one with "
                    f"{granularity_of(traced)!r}. Pass {right}, or leave it out."
                )
            if granularity == "unit":
                return function(*bound.args, **bound.kwargs)
            other = _other(name, granularity)
            known = inspect.signature(other).parameters
            found: R = other(**{option: value for option, value in given.items() if option in known})
            return found

        return run

    return wrap


def named(function: str, granularity: Any) -> str:
    """Return the granularity that a user asks for: a name, or several joined, as "unit+expert".

    Raises:
        SettingError: It is neither.
    """
    if isinstance(granularity, list | tuple | set | frozenset):
        return "+".join(sorted(map(str, granularity), reverse=True))
    if not isinstance(granularity, str):
        raise SettingError(
            f"{function}(granularity={short(granularity)}): expected a name or a list of names, such as "
            f"'unit' or ['unit', 'head_size'], got {type(granularity).__name__}. Pass one, or leave it out."
        )
    return granularity


def granularity_of(value: Any) -> str:
    """Return the granularity of a graph, a plan, or a model that `apply` returned."""
    if isinstance(value, nn.Module):
        from secateur.targets.units.record import record_of  # which imports functions that this module wraps

        value = record_of(value).plan
    return getattr(value, "granularity", "unit")


def refusal(where: str, granularity: str, why: str) -> SettingError:
    """Make the error for an option that means nothing for a granularity."""
    return SettingError(
        f"{where}: expected no such setting with granularity {granularity!r}: {why}. Leave it out."
    )


def _other(name: str, granularity: str) -> Callable[..., Any]:
    if name == "repair" and granularity == "unit+expert":
        raise SettingError(
            "repair: expected a model without some units, or without some experts, got one without both: the "
            "units have to be repaired before the experts go. Use sc.prune(..., repair=...), which does that."
        )
    if name not in MODULES.get(granularity, {}):
        known = ["unit", *(other for other, modules in MODULES.items() if name in modules)]
        raise SettingError(
            f"{name}: expected granularity {' or '.join(map(repr, known))}, got {granularity!r}. Choose "
            f"one of these."
        )
    found: Callable[..., Any] = getattr(import_module(MODULES[granularity][name]), name)
    return found
