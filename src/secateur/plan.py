"""The decision about a whole model as data, and its file; see `secateur.group_decision` for one group.

A `Plan` is all that `apply` needs beside the model itself: every slice lists the positions to remove.
It is frozen, compares by value, and its JSON is the same byte for byte for the same decision.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError, field_validator, model_validator

from secateur.artefact.writing import replace_text
from secateur.common.inert import inert_line
from secateur.common.paths import path_named
from secateur.common.reading import Count, complaint, parse_json, read_text
from secateur.errors import PlanError
from secateur.graph.inputs import InputSpec
from secateur.group_decision import GroupDecision, Record, SliceDecision, mask_of

if TYPE_CHECKING:
    from secateur.allocators.curve import Curve
    from secateur.graph.graph import Graph
    from secateur.measure.cost import Cost
    from secateur.targets.blocks.graph import BlockGraph
    from secateur.targets.experts.graph import ExpertGraph
    from secateur.targets.together.graph import Joined

LARGEST = 1 << 27
"""The most bytes of a file."""

UNITS = 1 << 26
"""The most units of all groups together: a file of a few bytes could name more than fit into memory."""

FORMAT: Final = 1
"""The format of the JSON that this version writes; it reads this one and none that is newer."""


class CostRecord(Record):
    """What a model costs.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulate operations for one sample.
    """

    params: Count
    macs: Count

    @classmethod
    def of(cls, cost: Cost) -> CostRecord:
        """The record of a `Cost`."""
        return cls(params=int(cost.params), macs=int(cost.macs))


class Plan(Record):
    """A decision about every group of one model.

    Attributes:
        format: Version of this layout.
        secateur: Version of the package that made the plan.
        fingerprint: Of the model the plan was made for.
        allocator: Name of the rule that decided.
        settings: The rule's settings, with the value of its knob that decided (solved, under a budget).
        seed: The seed of the run.
        budget: The budget that was asked for, None if the rule decided alone.
        inputs: What the model takes.
        dense: Cost before.
        predicted: Cost after, by analysis.
        groups: Every group of the graph, the untouched ones too.
        certificates: What the rule guarantees or predicts, computed with the plan.
        folded: Computed weights (weight norm, standardised kernels) that become parameters.
        granularity: What a unit of the groups is: ``unit``, ``expert`` for an expert of a mixture,
            ``block`` for a residual block, ``unit+expert`` and ``unit+block`` where groups of both kinds are
            decided on together, or ``rank`` for a direction of a layer of low rank, and ``unit+rank`` with
            units.
    """

    format: Literal[1]
    secateur: str
    fingerprint: str
    allocator: str
    settings: dict[str, JsonValue]
    seed: int
    budget: dict[str, JsonValue] | None
    inputs: InputSpec
    dense: CostRecord
    predicted: CostRecord
    groups: tuple[GroupDecision, ...]
    certificates: dict[str, JsonValue]
    folded: tuple[str, ...] = ()
    granularity: Literal["unit", "expert", "unit+expert", "block", "unit+block", "rank", "unit+rank"] = "unit"

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Plan:
        """Itself: a plan never changes."""
        return self

    @field_validator("settings", "budget", "certificates")
    @classmethod
    def _is_canonical(cls, value: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        # Sorted here rather than when written, so that the order in which a rule happened to fill its
        # dictionaries never reaches the file; NaN and infinity are not JSON.
        return None if value is None else json.loads(json.dumps(value, sort_keys=True, allow_nan=False))

    @model_validator(mode="after")
    def _groups_do_not_collide(self) -> Plan:
        if sum(group.size for group in self.groups) > UNITS:
            raise ValueError(f"expected at most {UNITS:,} units in all groups")
        names = [group.name for group in self.groups]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"expected each group once, got {twice!r} twice")
        taken: dict[tuple[str, int, bool], list[tuple[str, set[int]]]] = {}
        for group in self.groups:
            for piece in group.slices:
                # An expert may go as a whole, whatever units its tensors would lose.
                others = taken.setdefault((piece.tensor, piece.axis, piece.role == "expert"), [])
                for other, positions in others:
                    # One group may touch an axis twice (tied weights); two groups own disjoint positions.
                    if other != group.name and not positions.isdisjoint(piece.removed):
                        raise ValueError(
                            f"expected {group.name!r} and {other!r} to own different positions of axis "
                            f"{piece.axis} of {piece.tensor!r}, got an overlap"
                        )
                others.append((group.name, set(piece.removed)))
        return self

    @model_validator(mode="after")
    def _knows_its_granularity(self) -> Plan:
        """Files that are older than the field: in plans of experts all slices produce units."""
        if "granularity" not in self.model_fields_set:
            slices = [piece for group in self.groups for piece in group.slices]
            modules = {piece.tensor.rpartition(".")[0] for piece in slices}
            if len(modules) > 1 and all(piece.role == "produce" for piece in slices):
                object.__setattr__(self, "granularity", "expert")
        return self

    @classmethod
    def build(
        cls,
        graph: Graph | ExpertGraph | Joined | BlockGraph,
        keep: Mapping[str, NDArray[np.bool_]],
        *,
        allocator: str,
        settings: Mapping[str, JsonValue] | None = None,
        seed: int = 0,
        budget: Mapping[str, JsonValue] | None = None,
        certificates: Mapping[str, JsonValue] | None = None,
    ) -> Plan:
        """Writes a decision down, with its consequence for every tensor and its cost.

        Args:
            graph: The traced model.
            keep: Per group, True for each unit that stays. [group.size] Groups not named keep all.
            allocator: Name of the rule that decided.
            settings: The rule's settings.
            seed: The seed of the run.
            budget: The budget that was asked for.
            certificates: What the rule guarantees or predicts.

        Returns:
            The plan, with one decision for every group of `graph`, in the graph's order.

        Raises:
            PlanError: `keep` names no group, is not boolean, has another length or keeps nothing, or a
                setting is not JSON.
        """
        sizes = {group.name: group.size for group in graph.groups}
        masks = {name: mask_of(name, mask, sizes) for name, mask in keep.items()}
        try:
            made = cls(
                format=FORMAT,
                secateur=_version(),
                fingerprint=graph.fingerprint,
                allocator=allocator,
                settings=dict(settings or {}),
                seed=int(seed),
                budget=None if budget is None else dict(budget),
                inputs=graph.inputs,
                dense=CostRecord.of(graph.cost()),
                predicted=CostRecord.of(graph.cost(masks)),
                groups=tuple(GroupDecision.of(group, masks.get(group.name)) for group in graph.groups),
                certificates=dict(certificates or {}),
                folded=graph.folded,
                granularity=graph.granularity,
            )
        except ValidationError as error:
            why = complaint(error)
            raise PlanError(f"plan: expected a valid decision, got {why}. Correct it.") from error
        return made.of_graph()

    def of_graph(self) -> Plan:
        """This plan, which remembers that its slices come from a graph; returns itself."""
        object.__setattr__(self, "_slices_known", True)  # beside the decision, as the curve is
        return self

    @property
    def slices_known(self) -> bool:
        """Whether the slices come from a graph, and not from a file, where somebody may have changed them."""
        return bool(self.__dict__.get("_slices_known"))

    def on(self, curve: Curve) -> Plan:
        """This plan, which remembers the curve that it is a point of; returns itself."""
        object.__setattr__(self, "_curve", curve)  # beside the decision: neither compared nor written
        return self

    @property
    def curve(self) -> Curve:
        """What every value of the rule's knob would have given: MACs, parameters, units kept, all at once.

        It follows from the scores, so it is not part of the decision, and not in its JSON.

        Raises:
            PlanError: The plan was made by hand or read from a file.
        """
        found: Curve | None = self.__dict__.get("_curve")
        if found is None:
            raise PlanError(
                "plan.curve: expected a plan that a rule just made, got one by hand or read from a file. "
                "Ask the rule: ToD().curve(graph, scores)."
            )
        return found

    @property
    def keep(self) -> dict[str, NDArray[np.bool_]]:
        """Per group, True for each unit that stays, [group.size]."""
        return {group.name: group.keep for group in self.groups}

    @property
    def ratios(self) -> dict[str, float]:
        """Per group, the fraction of its units that go, in [0, 1)."""
        return {group.name: group.ratio for group in self.groups}

    def check(self, fingerprint: str) -> None:
        """Makes sure that the plan was made for the model with this fingerprint.

        Raises:
            PlanError: It was made for another model.
        """
        if fingerprint != self.fingerprint:
            raise PlanError(
                f"plan: expected the model it was made for (fingerprint {self.fingerprint[:12]}), got one "
                f"with other parameter names or shapes ({fingerprint[:12]}). "
                "Use that model (if it had been pruned before: load that result), or plan for this one."
            )

    def check_graph(self, graph: Graph | ExpertGraph | Joined | BlockGraph) -> None:
        """Make sure that all that a graph decides is as the graph has it: positions, costs, certificates.

        MACs are compared if the graph was traced at the plan's sizes, and they do not depend on the data.

        Raises:
            PlanError: The graph has no such group, or the plan says something else of it.
        """
        if self.slices_known:
            return
        found = {group.name: group for group in graph.groups}
        for group in self.groups:
            if not group.removed:
                continue
            own = found.get(group.name)
            if own is None or own.size != group.size:
                got = "no such group" if own is None else f"one of {own.size}"
                raise PlanError(
                    f"plan: expected a group {group.name!r} of {group.size} units in the model, got {got}. "
                    "Make the plan again."
                )
            if own.exact != group.exact:
                raise PlanError(
                    f"plan: expected exact={own.exact} for group {group.name!r}, as in the model, got "
                    f"{group.exact}. Make the plan again."
                )
            wanted = {_place(piece) for piece in GroupDecision.of(own, group.keep).slices}
            wrong = sorted({_place(piece) for piece in group.slices} ^ wanted)
            if wrong:
                tensor, axis = wrong[0][:2]
                raise PlanError(
                    f"plan: expected the positions that units of {group.name!r} have in the model, got other "
                    f"ones for axis {axis} of {tensor!r}. Make the plan again."
                )
        self._check_costs(graph)
        self._check_shares()

    def _check_costs(self, graph: Graph | ExpertGraph | Joined | BlockGraph) -> None:
        kept = {group.name: group.keep for group in self.groups if group.removed}
        compares_macs = self._is_of_sizes(graph) and not getattr(graph, "costs_follow_data", False)
        for called, written, cost in (
            ("dense", self.dense, graph.cost()),
            ("predicted", self.predicted, graph.cost(kept)),
        ):
            for what in ("params", "macs") if compares_macs else ("params",):
                got, wanted = getattr(written, what), int(getattr(cost, what))
                if got != wanted:
                    raise PlanError(
                        f"plan: expected {called} {what} of {wanted:,}, as this decision and the model give, "
                        f"got {got:,}: the file was changed, or another version counted. Make the plan again."
                    )

    def _is_of_sizes(self, graph: Graph | ExpertGraph | Joined | BlockGraph) -> bool:
        """Whether the graph was captured with inputs of the plan's sizes, whatever their batch."""
        captured = getattr(graph, "captured_inputs", None)
        spec = graph.inputs if captured is None else InputSpec.of(*captured())
        batch = {place for axis in self.inputs.open if axis.batch for place in axis.places}
        own, others = self.inputs.tensors(), [*spec.tensors().values()]
        return len(own) == len(others) and all(
            len(leaf.shape) == len(other.shape)
            and all(
                a == b or (name, axis) in batch
                for axis, (a, b) in enumerate(zip(leaf.shape, other.shape, strict=True))
            )
            for (name, leaf), other in zip(own.items(), others, strict=True)
        )

    def _check_shares(self) -> None:
        """Compare what certificates say of how much a group loses with what it loses.

        A group that was left whole since is passed over: its certificate is that of the rule's decision.
        """
        written: Any = self.certificates.get("groups")
        for group in self.groups if isinstance(written, dict) else ():
            own = written.get(group.name)
            gone = len(group.removed)
            right = {"removed": (gone, group.ratio), "kept": (group.kept,), "units": (group.size,)}
            for name, values in right.items() if gone and isinstance(own, dict) else ():
                got = own.get(name)
                if isinstance(got, int | float) and got not in values:
                    raise PlanError(
                        f"plan: expected a certificate of {group.name!r} with {name} {values[0]}, which is "
                        f"what the plan takes, got {got}. Make the plan again."
                    )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The plan as JSON; also written to `path`, if one is given.

        The text is the same byte for byte for the same plan. It has one line for each field and for each
        group. The file is either the whole text or what was there before.

        Args:
            path: The file to write.

        Returns:
            The text.

        Raises:
            PlanError: The file cannot be written.
        """
        data = self.model_dump(mode="json")
        groups = ",\n  ".join(json.dumps(group) for group in data["groups"])
        lines = [
            f'"groups": [\n  {groups}\n ]'
            if key == "groups" and groups
            else f"{json.dumps(key)}: {json.dumps(value)}"
            for key, value in data.items()
        ]
        text = "{\n " + ",\n ".join(lines) + "\n}\n"
        if path is not None:
            replace_text(path_named("plan.to_json", path, PlanError), text, PlanError)
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> Plan:
        """Reads a plan.

        Args:
            source: The JSON itself (text whose first character is ``{``), or a file that holds it.

        Returns:
            The plan; equal to the one that was written.

        Raises:
            PlanError: There is no such file, it is malformed, or a newer version wrote it.
        """
        if isinstance(source, str) and source.lstrip().startswith("{"):
            where, text = "plan", source
        else:
            what = "JSON text or a readable file of it"
            path = path_named("plan", source, PlanError, what)
            where = f"plan {str(path)!r}"
            text = read_text(path, LARGEST, where, PlanError, what)
        try:
            data = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(
                f"{where}: expected JSON, got text that is damaged or cut short ({error}). "
                "Write the plan again."
            ) from error
        written = data.get("format") if isinstance(data, dict) else None
        if type(written) is not int:  # True would pass for 1
            raise PlanError(
                f"{where}: expected a plan, got JSON whose format is {repr(written)[:40]}. "
                "Pass what Plan.to_json wrote."
            )
        if written > FORMAT:
            raise PlanError(
                f"{where}: expected format {FORMAT}, got format {written}, which a newer secateur wrote. "
                "Upgrade secateur to read it."
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(
                f"{where}: expected a plan of format {FORMAT}, got {complaint(error)}. Write the plan again."
            ) from error

    def __str__(self) -> str:
        """A table: what each group keeps, then the totals."""
        asked = (
            "" if self.budget is None else ", budget " + ", ".join(f"{k}={v}" for k, v in self.budget.items())
        )
        head = f"plan by {self.allocator}{asked}, seed {self.seed}"
        rows = [("group", "kept", "total", "removed")]
        rows += [(g.name, str(g.kept), str(g.size), f"{g.ratio:.1%}") for g in self.groups]
        for label, before, after in (
            ("parameters", self.dense.params, self.predicted.params),
            ("MACs", self.dense.macs, self.predicted.macs),
        ):
            rows.append((label, f"{after:,}", f"{before:,}", f"{1 - after / before if before else 0.0:.1%}"))
        width = [max(len(row[column]) for row in rows) for column in range(4)]
        table = [
            f"{row[0]:<{width[0]}}  {row[1]:>{width[1]}} / {row[2]:>{width[2]}}  {row[3]:>{width[3]}}"
            for row in rows
        ]
        rule = "-" * len(table[0])
        lines = [head, "", table[0], rule, *table[1:-2], rule, *table[-2:]]
        return "\n".join(map(inert_line, lines))


def _place(piece: SliceDecision) -> tuple[str, int, str, tuple[int, ...]]:
    return piece.tensor, piece.axis, piece.role, piece.removed


def _version() -> str:
    try:
        return metadata.version("secateur")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"
