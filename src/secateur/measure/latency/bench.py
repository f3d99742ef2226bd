"""`sc.bench`: measure whether a pruned model is faster on this machine, with a confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from secateur.common.foreign import error_text
from secateur.common.models import device_of, unwrap
from secateur.errors import ArtefactError, SettingError
from secateur.graph.inputs import batch_size, call_arguments, samples_of
from secateur.measure.latency.backends import BACKENDS
from secateur.measure.latency.interval import median_ratio
from secateur.measure.latency.measurement import Measurement, Row
from secateur.measure.latency.reasons import reasons
from secateur.measure.latency.table import table
from secateur.measure.latency.timing import Latency, interleaved, stopwatch
from secateur.targets.units.record import record_of


class Bench(Measurement):
    """The result of `bench`. ``print(bench)`` shows it as a table."""

    def __str__(self) -> str:
        """Return the table, with the likely reasons for rows without a gain."""
        return table(self)


def bench(
    dense: nn.Module,
    small: nn.Module,
    example_inputs: Any = None,
    *,
    backends: Sequence[str] = ("eager",),
    batches: Sequence[int] | None = None,
    rounds: int = 30,
    warmup: int = 5,
    confidence: float = 0.95,
    seed: int = 0,
) -> Bench:
    """Time a pruned model against the dense one, in turn, in evaluation mode and without gradients.

    Args:
        dense: The dense model. It is not changed.
        small: The pruned model, on the same device. It is not changed.
        example_inputs: As for `trace`. Default: inputs with the shapes in the pruned model's plan.
        backends: Any of ``eager``, ``compile`` and ``onnxruntime``. The last runs on the CPU and needs
            ``pip install "secateur[export]"``.
        batches: Batch sizes. The samples of the inputs are repeated to fill them. Default: the batch
            size of the inputs.
        rounds: Timed forward passes of each model per back end and batch size, at least 5.
        warmup: Forward passes before them that are not timed.
        confidence: Confidence level of the intervals, in (0, 1).
        seed: Seed of the bootstrap that gives the intervals.

    Returns:
        The measurements. A back end that cannot run both models is left out and named in `failed`.

    Raises:
        SettingError: If a back end is unknown, a number is out of range, inputs are missing, or no back end
            can run both models.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = bench(net, net, torch.zeros(2, 4), batches=(1, 16), rounds=5)
        >>> [(row.backend, row.batch, len(row.dense.seconds)) for row in found.rows]
        [('eager', 1, 5), ('eager', 16, 5)]
    """
    _check(backends, batches, rounds, warmup, confidence)
    dense, small = unwrap(dense), unwrap(small)
    args, kwargs = _arguments(small, example_inputs)
    own = batch_size((args, kwargs))
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for backend in backends:
        for size in batches or (own,):
            given = (
                samples_of((args, kwargs), [i % own for i in range(size)]) if size != own else (args, kwargs)
            )
            try:
                times = _measure(backend, (dense, small), given, rounds, warmup)
            except Exception as error:  # compilers and runtimes raise their own
                failed[backend] = error_text(error)
                break
            speedup = median_ratio(times[0], times[1], confidence=confidence, seed=seed)
            rows.append(Row(backend, size, Latency(times[0], size), Latency(times[1], size), speedup))
    if not rows:
        why = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise SettingError(f"bench: expected a back end that runs both models, got none. {why} Try eager.")
    gainless = any(row.verdict != "faster" for row in rows)
    return Bench(
        rows=tuple(rows),
        failed=failed,
        reasons=reasons(small, rows) if gainless else (),
        confidence=confidence,
        rounds=rounds,
        warmup=warmup,
        threads=torch.get_num_threads(),
        device=str(device_of(small)),
    )


def _measure(
    backend: str,
    models: tuple[nn.Module, nn.Module],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    rounds: int,
    warmup: int,
) -> list[tuple[float, ...]]:
    with BACKENDS[backend](models, *inputs) as calls:
        return interleaved(calls, rounds, warmup, stopwatch(inputs))


def _arguments(small: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if example_inputs is not None:
        return call_arguments(example_inputs, device_of(small))
    try:
        return record_of(small).plan.inputs.arguments(None, device_of(small))
    except ArtefactError as error:
        raise SettingError(
            "bench: expected example_inputs for a model that did not come from apply, got none. Pass what "
            "the models are called with."
        ) from error


def _check(
    backends: Sequence[str], batches: Sequence[int] | None, rounds: int, warmup: int, confidence: float
) -> None:
    wrong = [name for name in backends if name not in BACKENDS]
    if wrong or not backends:
        raise SettingError(
            f"bench(backends={list(backends)!r}): expected some of {', '.join(BACKENDS)}, got "
            f"{wrong[0] if wrong else 'none'}. Write backends=('eager', 'compile'), for example."
        )
    for name, value, least in (("rounds", rounds, 5), ("warmup", warmup, 0)):
        if value < least:
            raise SettingError(f"bench({name}={value}): expected at least {least}. Give 30, for example.")
    if batches is not None and (not batches or min(batches) < 1):
        raise SettingError(f"bench(batches={list(batches)}): expected sizes of at least 1. Write (1, 32).")
    if not 0 < confidence < 1:
        raise SettingError(f"bench(confidence={confidence}): expected a number in (0, 1). Write 0.95.")
