"""A scoring run: the passes over the calibration data that serve every signal.

Usually a single pass. With a memory limit there are several, each for some of the groups; with a checkpoint
a run that was killed is taken up again; and several processes share the batches out among themselves. Each
batch is scored from a random state of its own, so none of that shows in the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from secateur.calibration import Calibration, seeded
from secateur.calibration.batch import IGNORED
from secateur.common.paths import path_named
from secateur.errors import CalibrationError
from secateur.graph.graph import Graph
from secateur.signals.checkpoint import Checkpoint, Position, Saved, Values
from secateur.signals.distributed import Team, check_whole, team_of_processes
from secateur.signals.identity import checksum, first_batch, identity
from secateur.signals.inparts import InParts
from secateur.signals.loss import LossFn
from secateur.signals.memory import Covers, in_bytes, is_heavy, passes
from secateur.signals.onepass import OnePass, errors_prefixed
from secateur.signals.program import CapturedModel
from secateur.signals.scores import Scores
from secateur.signals.signal import Signal

_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of two batches: large, so that runs with neighbouring seeds share none."""


def gather(
    graph: Graph,
    calibration: Calibration | None,
    signals: Sequence[Signal],
    *,
    loss_fn: LossFn | None = None,
    seed: int = 0,
    progress: bool = True,
    memory: int | str | None = None,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> Scores:
    """Score every group of `graph` with every signal.

    Args:
        graph: From `sc.trace`.
        calibration: May be None if no signal needs data.
        signals: Instances; see `secateur.signals.registry.resolve` for names.
        loss_fn: ``loss_fn(model, batch)``, the mean loss of a batch, instead of `default_loss`.
        seed: Seed for signals and programs that draw random numbers.
        progress: Show a bar on a terminal.
        memory: Most bytes that the states of signals may take; None: no limit.
        checkpoint: A file to resume from and to write to.
        checkpoint_every: Seconds between two writes; 0 writes after every batch.

    Raises:
        CalibrationError: The data cannot feed what a signal needs; the message names the signal or batch.
        ScoreError: A weight is not finite, a signal's scores are not, or another process failed.
        ArtefactError: The checkpoint is damaged or of another run.
        SettingError: The memory limit cannot be kept, or a setting is invalid.
    """
    by_data = [s for s in signals if s.needs - {"weights"}]
    if by_data and calibration is None:
        raise CalibrationError(
            f"signal {by_data[0].name}: expected calibration data for its "
            f"{', '.join(sorted(by_data[0].needs))}, got None. Pass a loader, or choose "
            "a signal that reads weights alone."
        )
    limit = None if memory is None else in_bytes(memory)
    # inference_mode(False): a caller's inference mode would forbid aliases that need gradients.
    with team_of_processes(graph.device) as team, seeded(seed), torch.inference_mode(False):
        progress = progress and team.rank == 0
        if limit is not None:
            limit //= team.size  # to merge states, the first process holds those of all
        about: dict[str, str] = {}
        saver: Checkpoint | None = None
        saved: Saved | None = None
        data = calibration.to(graph.device) if by_data and calibration is not None else None
        if data is not None and any("gradients" in signal.needs for signal in by_data):
            data = data.to_weights(graph.device)
        with team.together():
            if data is not None and team.size > 1:
                check_whole(data)
            if (data is not None and checkpoint is not None) or team.size > 1:
                about = identity(
                    graph,
                    signals,
                    loss_fn=loss_fn,
                    seed=seed,
                    memory=limit,
                    batches=None if data is None else data.count(),
                    processes=team.size,
                )
            if data is not None and checkpoint is not None:
                path = path_named("score: checkpoint", checkpoint)
                if team.size > 1:
                    path = path.with_name(f"{path.name}.{team.rank}of{team.size}")
                saver = Checkpoint(path, checkpoint_every, about)
                saved = saver.load()
            planned = passes(graph, signals, limit, _classes(data, graph, signals, limit, progress))
        with team.together():
            seen = first_batch(data) if data is not None and team.size > 1 else {}
        team.check_same(about | seen)
        run = _Run(graph, data, signals, planned, loss_fn, seed, limit, progress, team, saver)
        scores = run.scores(saved)
        scores.check(graph)
        if saver is not None:
            saver.remove()
    return scores


def _classes(
    data: Calibration | None, graph: Graph, signals: Sequence[Signal], limit: int | None, progress: bool
) -> int:
    """Count the classes in the labels; 0 if no signal needs that."""
    reader = next((s for s in signals if "labels" in s.needs and is_heavy(s, graph)), None)
    if data is None or limit is None or reader is None:
        return 0
    found: set[int] = set()
    for batch in data.batches("Counting classes", progress):
        with errors_prefixed(f"signal {reader.name}"):
            found.update(batch.classes().tolist())
    return len(found - {IGNORED})


@dataclass(frozen=True, eq=False)
class _Run:
    """The share of one process in a scoring run."""

    graph: Graph
    data: Calibration | None
    signals: Sequence[Signal]
    passes: Sequence[Covers]
    loss_fn: LossFn | None
    seed: int
    limit: int | None
    progress: bool
    team: Team
    checkpoint: Checkpoint | None
    seen: dict[str, int] = field(default_factory=dict)

    def scores(self, saved: Saved | None) -> Scores:
        """Run all passes; start from the checkpoint if there is one."""
        if self.data is not None and self.limit is None:
            with self.team.together():
                in_parts = InParts.of(self.graph, self.signals, self.data, self._pass)
            if in_parts is not None:
                return self._scores_in_parts(in_parts, self.data, saved)
        now = self._start(saved)
        counted = (0, 0)
        for number in range(now.position.number, len(self.passes)):
            with self.team.together():
                one = self._begin(number, now)
                self._read(one, now)
            self.team.check_same({what: str(value) for what, value in self.seen.items()})
            for name, by_group in self._finished(one).items():
                now.values[name].update(by_group)
            counted = self._counted(now.position)
            now = Saved(Position(number + 1), {}, now.values)
            if self.checkpoint is not None and number + 1 < len(self.passes):
                with self.team.together():
                    self.checkpoint.save(now)
        return Scores(now.values, *counted, self.seed, self.graph.fingerprint)

    def _scores_in_parts(self, in_parts: InParts, data: Calibration, saved: Saved | None) -> Scores:
        """Score a model whose weights stay in files, part by part. Skip groups that the checkpoint has."""
        seen = Position()
        if self.checkpoint is not None:
            for batch in data.batches():
                seen.read, seen.digest = batch.index + 1, checksum(batch.raw, seen.digest)
            if saved is not None and saved.values and any(saved.values.values()):
                self.checkpoint.check_data(saved.position, seen.digest)
        given = {} if saved is None else saved.values
        shares = self.team.everyone({name: [*by_group] for name, by_group in given.items()})
        known = {
            name: {
                group: by_group[group] for group in by_group if all(group in s.get(name, ()) for s in shares)
            }
            for name, by_group in given.items()
        }

        def note(found: Values) -> None:
            if self.checkpoint is not None and self.checkpoint.due:
                self.checkpoint.save(Saved(seen, {}, found))

        values, steps = in_parts.run(data, self.team, self._finished, self.progress, known, note)
        names = [group.name for group in self.graph.groups]
        values = {name: {n: by_group[n] for n in names} for name, by_group in values.items()}
        position = Position()
        for step in steps:
            position.count(step)
        return Scores(values, *self._counted(position), self.seed, self.graph.fingerprint)

    def _counted(self, position: Position) -> tuple[int, int]:
        """Count samples and classes over all processes. A sample with several views counts once."""
        shares = self.team.everyone((position.samples, position.classes))
        samples = sum(n for n, _ in shares) // (1 if self.data is None else self.data.repeats)
        return samples, len(set[int]().union(*(classes for _, classes in shares)))

    def _start(self, saved: Saved | None) -> Saved:
        """Return where to start: the checkpoint, or an earlier pass if another process is still in it."""
        values: Values = {signal.name: {} for signal in self.signals}
        first = min(self.team.everyone(0 if saved is None else saved.position.number))
        if saved is None:
            return Saved(Position(), {}, values)
        with nullcontext() if self.checkpoint is None else self.checkpoint.errors_from_content():
            for covers in self.passes[:first]:
                for name, groups in covers.items():
                    values[name].update({group.name: saved.values[name][group.name] for group in groups})
        if saved.position.number > first:
            return Saved(Position(first), {}, values)
        return Saved(saved.position, saved.states, values)

    def _begin(self, number: int, now: Saved) -> OnePass:
        one = self._pass(self.passes[number])
        if self.checkpoint is not None or self.team.size > 1:
            one.check_states()
        if now.states and self.checkpoint is not None:
            with self.checkpoint.errors_from_content():
                one.merge({name: [state] for name, state in now.states.items()})
        return one

    def _pass(self, covers: Covers, model: CapturedModel | None = None) -> OnePass:
        with seeded(self.seed):
            return OnePass(
                self.graph,
                self.signals,
                covers,
                self.loss_fn,
                seed=self.seed,
                memory=self.limit,
                views=1 if self.data is None else self.data.repeats,
                model=model,
            )

    def _read(self, one: OnePass, now: Saved) -> None:
        """Score this process's share of the data. Skip what the checkpoint has."""
        if self.data is None:
            return
        position = now.position
        which = f" ({position.number + 1}/{len(self.passes)})" if len(self.passes) > 1 else ""
        note = self._note if self.team.size > 1 else None
        self.seen["batches"] = self.seen["data"] = 0
        batches = self.data.batches(f"Scoring{which}", self.progress, self.team.takes, note)
        if self.checkpoint is not None and position.read:
            skipped = 0
            for batch in batches:
                skipped = checksum(batch.raw, skipped)
                if batch.index + 1 >= position.read:
                    break
            self.checkpoint.check_data(position, skipped)
        unsaved = False
        for batch in batches:
            with seeded((self.seed + _STRIDE * batch.index) % 2**63):
                position.count(one.run(batch))
            if self.checkpoint is not None:
                position.digest = checksum(batch.raw, position.digest)
                unsaved = not self.checkpoint.due
                if not unsaved:
                    self.checkpoint.save(Saved(position, one.states(), now.values))
        if self.checkpoint is not None and unsaved:
            self.checkpoint.save(Saved(position, one.states(), now.values))

    def _note(self, raw: Any) -> None:
        """Update the checksum of all data that were read: it must be the same in each process."""
        self.seen["batches"] += 1
        self.seen["data"] = checksum(raw, self.seen["data"])

    def _finished(self, one: OnePass) -> Values:
        """Return the scores of the pass, from the shares of all processes."""
        if self.team.size == 1:
            with seeded(self.seed):
                return one.finish()
        with self.team.together():
            states = one.states()
        merged = {name: self.team.to_first(state) for name, state in states.items()}
        values: Values = {}
        with self.team.together():
            if self.team.rank == 0:
                one.merge(merged)
                with seeded(self.seed):
                    values = one.finish()
        return self.team.from_first(values)
