r"""`polish`: train the pruned network to give the outputs of the dense one, without labels.

The pruned program runs with gradients beside the dense one (`pairs.py`). So it works for every form, and
whatever a capture fixes stays fixed: batch norms keep their statistics, and dropout is off. A batch has the
loss

.. math:: \frac{\lVert \hat y - y \rVert^2}{\lVert y \rVert^2}
          + \phi \, \frac1n \sum_{i=1}^n \frac{\lVert \hat f_i - f_i \rVert^2}{\lVert f_i \rVert^2}

with the outputs y and the values f_i between two blocks (`features.py`) of the dense network, at the
positions that were kept, and those of the pruned network with a hat. For the scores of a language model the
first term is the divergence of the words' probabilities, the mean over positions (`divergence.py`).

Sources: Hinton et al. 2015 (arXiv 1503.02531); Romero et al. 2015, FitNets (arXiv 1412.6550), and Wang et al.
2022, MiR (arXiv 2201.02620), for features. Departures: squared distances instead of a divergence if
outputs may be no logits; all features at once; and features are found in the program.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.calibration import Batch
from secateur.common.accelerating import ProcessGroup
from secateur.common.mapped import any_mapped
from secateur.common.training import Best, Loop, Zeros
from secateur.errors import SettingError
from secateur.graph.graph import Graph
from secateur.measure.divergence import divergence, reads_and_writes_words
from secateur.repairs.features import features, outputs
from secateur.repairs.pairs import Pair, Pairs
from secateur.signals.distributed import Team, team_of_processes
from secateur.signals.loss import logits_of
from secateur.stream.calls import ProgramCalls
from secateur.stream.dense import Values
from secateur.targets.units.record import record_of

if TYPE_CHECKING:
    from secateur.repairs.methods import Work

WARM = 0.1
"""Share of the training in which the learning rate rises from zero; then it falls along half a cosine."""

CLIP = 1.0
"""The gradient of a step is scaled down to this norm: losses are relative, so no good step needs more."""


@dataclass(frozen=True)
class Polish:
    """A repair that trains: distillation of the pruned network from the dense one, without labels.

    Run it after ``reconstruct``, and it starts from that result: ``repair=["reconstruct", "polish"]``.
    ``auto`` never runs it, because it takes minutes and others take seconds. The state with the smallest
    error on held-out data is kept, so the result is never worse than the start.

    Attributes:
        passes: Passes over the calibration data. Default: 40, and 4 for language models, or no limit
            if `minutes` is given.
        minutes: Minutes that it may take, measuring included. With both limits the first one ends it.
        learning_rate: Of Adam, at its highest. It is halved whenever the error rises too far. Default: 0.001,
            and 0.0003 for language models.
        batch: Samples in a step. Batches that are larger are cut, if they can be. Default: 25, and 2 for
            language models.
        features: Weight of the distances between blocks beside that of the outputs; 0: outputs alone.
        divergence: Train and judge by the divergence of the class probabilities over the last axis of the
            output, or of its ``logits``, in place of the distance. Default: for language models, which read
            token ids and return ``logits`` of [texts, tokens, words].
        mixed: Multiply in bfloat16; parameters, losses and sums keep their precision. Several times as fast
            where the hardware multiplies bfloat16.

    Raises:
        SettingError: If a setting is out of range.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> data = [torch.randn(20, 4) for _ in range(5)]
        >>> result = sc.prune(
        ...     net, data, sc.Budget(macs=0.5), "repair_aware", repair=["reconstruct", sc.Polish(passes=5)],
        ...     measure_latency=False, progress=False,
        ... )
        >>> closed, polished = result.report.repairs
        >>> polished["after"] <= polished["before"] == closed["after"]
        True
    """

    passes: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    batch: int | None = None
    features: float = 20.0
    divergence: bool | None = None
    mixed: bool = False

    name: ClassVar[str] = "polish"
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the settings."""
        rate, by = self.learning_rate, self.divergence
        for name, value, fits, expected in (
            ("passes", self.passes, self.passes is None or _is_count(self.passes), "a whole number above 0"),
            ("minutes", self.minutes, self.minutes is None or _is_above_0(self.minutes), "a number above 0"),
            ("learning_rate", rate, rate is None or _is_above_0(rate), "a number above 0"),
            ("batch", self.batch, self.batch is None or _is_count(self.batch), "a whole number above 0"),
            ("features", self.features, self.features == 0 or _is_above_0(self.features), "0 or more"),
            ("divergence", by, by is None or type(by) is bool, "True, False or None"),
            ("mixed", self.mixed, type(self.mixed) is bool, "True or False"),
        ):
            if not fits:
                raise SettingError(f"polish: expected {name} of {expected}, got {value!r}. Correct it.")

    def run(self, small: nn.Module, work: Work) -> dict[str, Any] | None:
        """Train a pruned model in place.

        Returns:
            The number of started passes and their minutes; None if the model has no parameters.

        Raises:
            SettingError: The model's weights stay in files or are in half precision, or its outputs are no
                floating-point numbers.
        """
        graph = work.graph()
        settings = self.with_defaults(graph)
        objective = Distance(graph, small, self.features, by_scores=settings.divergence, mixed=self.mixed)
        parameters = objective.parameters
        if not parameters:
            return None
        _refuse(parameters)
        begun = time.monotonic()
        with team_of_processes(graph.device) as team:
            processes = ProcessGroup.of_team(team)
            judge = work.judge
            best = None if judge is None else Best(lambda: float(judge(small).mean()), parameters)
            passes = settings.passes if self.minutes is None else self.passes
            loop = Loop(
                passes,
                factor=one_cycle,
                title=_title(passes),
                spent=_clock(team, begun, self.minutes and self.minutes * work.share),
                zeros=Zeros.of(parameters) if record_of(small).form == "masked" else Zeros(),
                clip=CLIP,
                best=best,
                kept=work.kept,
            )
            adam = torch.optim.Adam(parameters, settings.learning_rate, fused=True)
            data = work.data if graph.static_batch is not None else work.data.recut(settings.batch)
            data = data.fresh().to_weights(graph.device)
            with torch.inference_mode(False), torch.enable_grad():
                done = loop.run(objective, parameters, adam, data, processes, progress=work.progress)
        return {"passes": done, "minutes": (time.monotonic() - begun) / 60}

    def with_defaults(self, graph: Graph) -> Settings:
        """Return the settings for a model: those of this repair, and defaults for those that are None."""
        language = is_language(ProgramCalls(graph))
        usual = LANGUAGE if language else USUAL
        return Settings(
            self.passes or usual.passes,
            self.learning_rate or usual.learning_rate,
            self.batch or usual.batch,
            usual.divergence if self.divergence is None else self.divergence,
        )


@dataclass(frozen=True)
class Settings:
    """The settings of a training; see `Polish`."""

    passes: int
    learning_rate: float
    batch: int
    divergence: bool


USUAL = Settings(40, 0.001, 25, divergence=False)
LANGUAGE = Settings(4, 0.0003, 2, divergence=True)
"""Defaults. For language models a step reads many tokens, and large networks need smaller steps."""


class Distance:
    """The loss, as a function of a batch.

    Attributes:
        parameters: The parameters of the pruned model. They share its memory.
    """

    def __init__(
        self, graph: Graph, small: nn.Module, weight: float, *, by_scores: bool = False, mixed: bool = False
    ) -> None:
        """Prepare the programs.

        Args:
            graph: The trace of the dense model.
            small: The pruned model, in any form.
            weight: The weight of the features in the loss.
            by_scores: Use the divergence of the class scores.
            mixed: Multiply in bfloat16.

        Raises:
            SettingError: No output is a floating-point number, or, with `by_scores`, none is class scores.
        """
        self._pairs, self._weight = Pairs(graph, small), weight
        self._by_scores, self._mixed = by_scores, mixed
        if not outputs(self._pairs.first):
            raise SettingError(
                "polish: expected outputs that are floating-point numbers, got none. Let the model return "
                "its scores, or leave polish out."
            )
        if by_scores and scores_of(self._pairs.first) is None:
            raise SettingError(
                "polish: expected one output, or one called logits, to take the divergence of, got "
                "others. Set divergence=False."
            )
        self._points: dict[Pair, tuple[list[fx.Node], list[fx.Node], fx.Node | None]] = {}
        self.parameters = self._pairs.first.learnable(small)

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of a batch, a scalar with gradients."""
        with torch.autocast(self._pairs.first.graph.device.type, torch.bfloat16, enabled=self._mixed):
            return self._loss(self._pairs.of(batch), batch)

    def _loss(self, pair: Pair, batch: Batch) -> Tensor:
        if pair not in self._points:
            between = features(pair) if self._weight else []
            self._points[pair] = between, outputs(pair), scores_of(pair) if self._by_scores else None
        between, last, scores = self._points[pair]
        values = pair.start(batch)
        found = []
        for node in between:
            # Read the value right after the node ran: a later node may write into it.
            pair.advance(values, pair.index[node] + 1)
            found.append(_apart(pair, node, values))
        pair.advance(values, len(pair.nodes))
        ends = []
        for node in last:
            if node is scores:
                both = pair.small_value(node, values), pair.dense_value(node, values)
                ends.append(divergence(*map(values.padding.matrix, both)).mean())
            else:
                ends.append(_apart(pair, node, values))
        loss = torch.stack(ends).sum()
        return loss + self._weight * torch.stack(found).mean() if found else loss


def _apart(pair: Pair, node: fx.Node, values: Values) -> Tensor:
    """Return the relative distance of a node's two values, without padding."""
    return relative(*(values.padding.hide(v(node, values)) for v in (pair.small_value, pair.dense_value)))


def scores_of(program: ProgramCalls) -> fx.Node | None:
    """Return the node of the class scores: the model's only output, or the output that it calls `logits`."""
    returned, values = _returned(program)
    scores = logits_of(pytree.tree_unflatten(values, program.program.call_spec.out_spec))
    return next((v for v, value in zip(returned, values, strict=True) if value is scores), None)


def _returned(program: ProgramCalls) -> tuple[list[Any], list[Any]]:
    """Return what the program gives back: its nodes (or constants), and their example values."""
    (node,) = (n for n in program.program.graph.nodes if n.op == "output")
    specs = program.program.graph_signature.output_specs
    returned = [v for v, s in zip(node.args[0], specs, strict=True) if s.kind.name == "USER_OUTPUT"]
    return returned, [v.meta["val"] if isinstance(v, fx.Node) else v for v in returned]


def is_language(program: ProgramCalls) -> bool:
    """Whether a captured model `reads_and_writes_words`."""
    spec = program.program.call_spec.out_spec
    if spec is None:
        return False
    inputs = (node.meta.get("val") for node in program.inputs)
    return reads_and_writes_words(inputs, pytree.tree_unflatten(_returned(program)[1], spec))


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_above_0(value: object) -> bool:
    return type(value) in (int, float) and 0 < float(cast(float, value)) < math.inf


def relative(got: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared distance of `got` to `wanted`, divided by the square of `wanted`.

    Entries where `wanted` is not finite, such as masked logits, do not count.
    """
    if got.dtype.itemsize < 4 or wanted.dtype.itemsize < 4:
        got, wanted = got.float(), wanted.float()  # sums in half precision would lose small addends
    finite = torch.isfinite(wanted)
    error = torch.where(finite, got - wanted, 0.0).square().sum()
    scale = torch.where(finite, wanted, 0.0).square().sum()
    return error / scale.clamp_min(torch.finfo(scale.dtype).tiny)


def one_cycle(done: float) -> float:
    """Return the factor of the learning rate when a share of the training is done."""
    if done < WARM:
        return max(done, WARM / 100) / WARM
    return 0.5 * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM)))


def _refuse(parameters: Sequence[Tensor]) -> None:
    if any_mapped(parameters):
        raise SettingError("polish: expected weights in memory, got some in files. Use 'reconstruct' alone")
    half = {p.dtype for p in parameters} - {torch.float32, torch.float64}
    if half:
        raise SettingError(
            f"polish: expected parameters in float32 or float64, got {half.pop()}, in which small steps "
            "are lost. Convert the models with .float() first, and the result back afterwards"
        )


def _title(passes: int | None) -> Callable[[int, float], str]:
    def title(k: int, error: float) -> str:
        of = "" if passes is None else f" of {passes}"
        return f"polish, pass {k}{of}" + ("" if math.isnan(error) else f", error {error:.4g}")

    return title


def _clock(team: Team, begun: float, minutes: float | None) -> Callable[[], float]:
    """Return a function that returns the share of the time that is over, by the first process's clock."""
    if not minutes:
        return lambda: 0.0
    return lambda: team.from_first(time.monotonic() - begun) / (60 * minutes)
