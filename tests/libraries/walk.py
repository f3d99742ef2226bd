"""One case from trace to use: the pruned model beside the masked dense one, wherever the dense one runs.

    python -m tests.libraries.walk NAME

prints what was found as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import secateur as sc
from secateur.targets.units.compare import relative_difference, run, run_in_double
from secateur.targets.units.copying import duplicate
from tests.libraries.case import Case, Inputs
from tests.libraries.importing import prepare
from tests.zoo.walk import RATIO, TOLERANCE, random_keep

Masks = dict[str, NDArray[np.bool_]]
"""By group, which units stay."""

USED_TOLERANCE = 1e-3
"""Largest relative difference of what a use returns: it runs in single precision."""


@dataclass
class Found:
    """What became of one case.

    Attributes:
        name: The case.
        library: Its library.
        form: ``module``, ``graph``, or ``refused`` where nothing could be pruned.
        note: Why it is not a plain module, or what it left whole.
        groups: Prunable groups.
        macs: MACs after pruning, as a fraction of before.
        checks: By check: ``ok``, ``dense cannot``, or the fault, which begins with ``WRONG``, ``refused`` or
            ``crash``.
    """

    name: str
    library: str
    form: str = ""
    note: str = ""
    groups: int = 0
    macs: float = 1.0
    checks: dict[str, str] = field(default_factory=dict)

    def check(self, title: str, dense: Callable[[], Any], pruned: Callable[[Any], str]) -> None:
        """Record a check: `pruned` gets what `dense` returned, and returns a fault or nothing."""
        try:
            reference = dense()
        except Exception as error:
            self.checks[title] = f"dense cannot: {_line(error)}"
            return
        try:
            self.checks[title] = pruned(reference) or "ok"
        except Exception as error:
            self.checks[title] = _fault(error)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def _fault(error: Exception) -> str:
    if isinstance(error, sc.VerificationError):
        return f"WRONG {_line(error)}"
    traceback.print_exc()
    return f"{'refused' if isinstance(error, sc.SecateurError) else 'crash'} {_line(error)}"


def _compared(ours: list[Tensor], theirs: list[Tensor], tolerance: float = TOLERANCE) -> str:
    difference = relative_difference(ours, theirs)
    return "" if difference <= tolerance else f"WRONG {difference:.2g}"


def _split(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})


def _drawn(case: Case, batch: int, size: Any) -> Inputs:
    torch.manual_seed(2)
    return case.inputs(batch, size)


def _seeded(function: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(3)
    return function(*args)


@contextmanager
def _training(model: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = duplicate(model).to(dtype)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        yield model.train()
    finally:
        torch.set_default_dtype(default)


def step(
    model: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs in training mode, and the gradients of a loss, after a step of an optimizer went well."""
    args, kwargs = _cast(inputs, dtype)
    with _training(model, dtype) as trained:
        leaves = [v for v in pytree.tree_leaves(_seeded(lambda: trained(*args, **kwargs))) if _learns(v)]
        torch.stack([v.abs().square().mean() for v in leaves]).mean().backward()
        gradients = {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}
        torch.optim.SGD(trained.parameters(), lr=1e-3).step()
    return [v.detach() for v in leaves], gradients


def _cast(inputs: Inputs, dtype: torch.dtype) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, _split(inputs))


def _learns(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _same_step(
    ours: tuple[list[Tensor], dict[str, Tensor]],
    theirs: tuple[list[Tensor], dict[str, Tensor]],
    tolerance: float,
    draws: bool,
) -> str:
    if not all(bool(torch.isfinite(g).all()) for g in ours[1].values()):
        return "WRONG gradients are not finite"
    if ours[1].keys() != theirs[1].keys():
        return f"WRONG gradients of other parameters: {sorted(ours[1].keys() ^ theirs[1].keys())[:4]}"
    if draws:  # dropout draws for as many units as there are
        return "" if [a.shape for a in ours[0]] == [b.shape for b in theirs[0]] else "WRONG shapes"
    if fault := _compared(ours[0], theirs[0], tolerance):
        return f"{fault} in the outputs"
    whole = [n for n, g in ours[1].items() if g.shape == theirs[1][n].shape]
    largest = max(float(g.abs().max()) for g in theirs[1].values())
    for name in whole:
        difference = float((ours[1][name] - theirs[1][name]).abs().max()) / largest
        if not difference <= tolerance:
            return f"WRONG {difference:.2g} in the gradient of {name}"
    return ""


def _varies(outputs: list[Tensor]) -> bool:
    varied = [bool((v != v.flatten()[0]).any()) for v in outputs if v.is_floating_point() and v.numel() > 1]
    return any(varied) and not any(bool(torch.isnan(v).any()) for v in outputs)


def walk(case: Case) -> Found:
    """Every check of one case."""
    found = Found(case.name, case.library)
    torch.manual_seed(0)
    model = case.model()
    inputs = _drawn(case, case.batches[0], case.sizes[0])
    args, kwargs = _split(inputs)
    if not _varies(_seeded(run, duplicate(model), args, kwargs)):
        raise AssertionError(f"{case.name}: expected finite outputs, and one that varies.")
    try:
        graph = sc.trace(model, inputs, allow_inexact=case.inexact)
        keep = rounded(random_keep(graph), case.round_to)
        plan = sc.Plan.build(graph, keep, allocator="random", settings={"ratio": RATIO})
        small = sc.apply(model, plan, "auto", graph=graph, example_inputs=inputs)
    except Exception as error:
        found.form = "refused"
        found.note = f"{_line(error)}"
        if not isinstance(error, sc.SecateurError):
            found.checks["prune"] = _fault(error)
        return found
    record = sc.record_of(small)
    found.form, found.note, found.groups = record.form, record.note, len(graph.groups)
    found.macs = record.plan.predicted.macs / max(plan.dense.macs, 1)
    reference = sc.apply(model, record.plan, "graph" if case.inexact else "masked", graph=graph)
    found.check("verify", lambda: None, lambda _: sc.verify(model, small, plan, inputs) and "")
    check_sizes(found, case, reference, small)
    check_training(found, case, reference, small)
    _check_half(found, case, reference, small)
    found.check("save and load", lambda: None, lambda _: _reloaded(small, model, inputs))
    for title, use in (case.uses or {}).items():
        found.check(
            title,
            lambda use=use: _seeded(use, duplicate(reference)),
            lambda wanted, use=use: _compared(
                _tensors(_seeded(use, duplicate(small))), _tensors(wanted), USED_TOLERANCE
            ),
        )
    return found


def rounded(masks: Masks, multiple: int) -> Masks:
    """The masks with a few units more, so that a multiple of a number is kept where that can be."""
    for mask in masks.values():
        mask[np.flatnonzero(~mask)[: -int(mask.sum()) % multiple]] = True
    return masks


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def check_sizes(found: Found, case: Case, reference: nn.Module, small: nn.Module) -> None:
    """At every size and batch size, in evaluation mode and float64."""
    for size in case.sizes:
        for batch in case.batches:
            args, kwargs = _split(_drawn(case, batch, size))
            found.check(
                f"size {size}, batch {batch}",
                lambda a=args, k=kwargs: _seeded(run_in_double, reference, a, k),
                lambda wanted, a=args, k=kwargs: _compared(_seeded(run_in_double, small, a, k), wanted),
            )


def check_training(found: Found, case: Case, reference: nn.Module, small: nn.Module) -> None:
    """A step of an optimizer in training mode: outputs and gradients."""
    inputs = _drawn(case, case.batches[-1], case.sizes[0])

    def dense() -> tuple[Any, torch.dtype, bool]:
        try:
            dtype, stepped = torch.float64, step(reference, inputs)
        except Exception:  # models that name a dtype in their forward pass
            dtype, stepped = torch.float32, step(reference, inputs, torch.float32)
        args, kwargs = _cast(inputs, dtype)
        with _training(reference, dtype) as trained, torch.no_grad():
            torch.manual_seed(4)
            state = torch.get_rng_state()
            trained(*args, **kwargs)
        return stepped, dtype, not torch.equal(state, torch.get_rng_state())

    def pruned(wanted: tuple[Any, torch.dtype, bool]) -> str:
        stepped, dtype, draws = wanted
        tolerance = 1e-7 if dtype is torch.float64 else USED_TOLERANCE
        return _same_step(step(small, inputs, dtype), stepped, tolerance, draws)

    found.check("training step", dense, pruned)


def _check_half(found: Found, case: Case, reference: nn.Module, small: nn.Module) -> None:
    inputs = _drawn(case, case.batches[0], case.sizes[0])

    def outputs(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        args, kwargs = _cast(inputs, dtype)
        return _seeded(run, duplicate(model).to(dtype), args, kwargs)

    def dense() -> tuple[list[Tensor], torch.dtype]:
        try:
            return outputs(reference, torch.float16), torch.float16
        except Exception:
            return outputs(reference, torch.bfloat16), torch.bfloat16

    def pruned(wanted: tuple[list[Tensor], torch.dtype]) -> str:
        ours = outputs(small, wanted[1])
        same = [(a.shape, a.dtype) for a in ours] == [(b.shape, b.dtype) for b in wanted[0]]
        return "" if same else "WRONG shapes or dtypes"

    found.check("half precision", dense, pruned)


def _reloaded(small: nn.Module, model: nn.Module, inputs: Inputs) -> str:
    args, kwargs = _split(inputs)
    with tempfile.TemporaryDirectory() as folder:
        sc.save(small, Path(folder))
        again = sc.load(Path(folder), lambda: duplicate(model), example_inputs=inputs)
    return _compared(_seeded(run, again, args, kwargs), _seeded(run, small, args, kwargs), 0.0)


def main() -> None:
    """Walks the case that the command line names."""
    prepare()
    from tests.libraries.cases import case

    print(json.dumps(asdict(walk(case(sys.argv[1])))))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
