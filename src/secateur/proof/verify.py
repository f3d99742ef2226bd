"""The numeric proof: a pruned model computes what the masked dense one computes, and what was seen of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.artefact.otherweights import with_other_weights
from secateur.common.caches import Given, without_caches
from secateur.common.foreign import said
from secateur.common.models import device_of, unwrap
from secateur.common.modes import require_plain_modes
from secateur.errors import ApplyError, CaptureError, SettingError, VerificationError
from secateur.graph.answering import Answering
from secateur.graph.folding import folded
from secateur.graph.graph import fingerprint
from secateur.graph.inputs import InputSpec, batch_size, call_arguments
from secateur.plan import Plan
from secateur.proof.diagnosis import Pair
from secateur.proof.exercised import Exercise, gradients
from secateur.proof.proving import ArgumentSet, Comparisons, is_program, listed
from secateur.targets.granularity import by_granularity
from secateur.targets.units.apply import apply
from secateur.targets.units.compare import Double, Way
from secateur.targets.units.draws import AnyDraws
from secateur.targets.units.masked import masked
from secateur.targets.units.spread import gathered

if TYPE_CHECKING:
    from secateur.targets.weights.plan import MaskPlan

SIZES = (0.3, 1.0)
"""Of the random numbers added to the weights, relative to these, for what the model's own weights hide."""


@dataclass(frozen=True)
class Proof:
    """What was compared, how close it came, and what the comparison could see.

    Attributes:
        difference: Largest relative difference over all outputs and sizes.
        tolerance: What it had to stay under.
        reference: ``masked`` for exact plans, ``graph`` where a removed group is inexact, ``none`` where
            there is nothing to compare with.
        outputs: Number of output tensors compared.
        sizes: The sizes of the inputs at which both were compared.
        refused: Sizes at which the dense model runs, and the captured program says that it does not.
        training: Whether training mode was compared too: its outputs, buffers, and gradients where it runs
            other lines. It is if the reference is ``masked`` and the dense model can train on some inputs.
        gradients: Whether the gradients of the parameters were compared too, in evaluation mode. They are
            where both have a backward pass, the reference is ``masked`` and no slope hangs on rounding.
        exercised: For each tensor that the plan cut, how many of the positions that stay were seen to move
            the output, and how many stay.
        not_exercised: Cut tensors that moved no output: the comparison says nothing about them.
        cancelled: Those of `not_exercised` that no input can exercise, because what follows cancels them: a
            bias in front of a softmax over positions, for example. They raise no doubt.
        other_weights: Cut tensors that the model's own weights hide, as a factor of zero does. They moved
            the output once random numbers were added to the weights of both models.
        constant: Numbers of the outputs that are one number everywhere, and so say nothing.
        doubts: Why this is no proof; empty if it is one.
    """

    difference: float
    tolerance: float
    reference: str
    outputs: int
    sizes: tuple[str, ...] = ()
    refused: tuple[str, ...] = field(default=(), repr=False)
    training: bool = field(default=False, repr=False)
    gradients: bool = field(default=False, repr=False)
    exercised: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    not_exercised: tuple[str, ...] = ()
    cancelled: tuple[str, ...] = field(default=(), repr=False)
    other_weights: tuple[str, ...] = field(default=(), repr=False)
    constant: tuple[int, ...] = field(default=(), repr=False)
    doubts: tuple[str, ...] = field(default=(), repr=False)

    @property
    def proven(self) -> bool:
        """Whether every cut tensor that can move the output was seen to, and the outputs agree."""
        return not self.doubts


@by_granularity("plan")
def verify(
    model: nn.Module,
    small: nn.Module,
    plan: Plan | MaskPlan,
    example_inputs: Any = None,
    *,
    other_sizes: bool = True,
    tolerance: float = 1e-9,
) -> Proof:
    """Compare a pruned model with the masked dense one, in float64, at every size, and say what was seen.

    The comparison runs on inputs that the trace knows how to draw, with every axis that may vary at two
    sizes. Each tensor that the plan cut has to move the output: a backward pass tells, or a forward pass with
    that tensor spoiled where gradients do not reach. What never does is ``not_exercised``, and the result is
    then not ``proven``. The gradients of the parameters are compared too, at one size. Where the forward
    pass draws random numbers, both models draw the same.

    Experts are compared with the dense model whose routers may not choose the removed ones, on
    `example_inputs`, or random ones of the traced sizes. Blocks are compared with the dense model in which
    the removed ones pass on what they read, at every size. For single weights all tensors are compared, bit
    for bit, with the dense ones with these weights at zero.

    Verify before repair: a repaired model differs from the masked one on purpose.

    Args:
        model: The dense model. Neither it nor `small` is changed; copies are compared.
        small: What `apply` returned.
        plan: The plan in between.
        example_inputs: As for `trace`: real inputs, in place of drawn ones of the traced sizes.
        other_sizes: Compare at the other sizes of open axes too, on drawn inputs. If False, and
            `example_inputs` are given, these are all that is looked at. Not for experts.
        tolerance: Largest accepted relative difference, max|a - b| / max|b|.

    Returns:
        What was found. See ``proven`` and ``doubts``.

    Raises:
        VerificationError: If the outputs differ by more or the gradients do, or the pruned model fails where
            the dense one runs, in its forward or in its backward pass.
        PlanError: If the plan is for another model.
        SettingError: If the dense model runs on none of the inputs.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> plan = sc.Uniform(ratio=0.25).allocate(graph, sc.score(graph, None, "magnitude"))
        >>> proof = sc.verify(net, sc.apply(net, plan), plan)
        >>> proof.difference < 1e-9, proof.proven, proof.not_exercised
        (True, True, ())
    """
    plan = cast(Plan, plan)  # masks do not come here
    model = gathered(unwrap(model))
    require_plain_modes("verify", model)
    plan.check(fingerprint(model))
    original, model = model, folded(model, plan.folded)
    trials = argument_sets(plan.inputs, example_inputs, device_of(model), other_sizes=other_sizes)

    def first() -> Given:
        return trials[0][0][1:]

    with without_caches(model, first), without_caches(small, first):
        return _compared(original, model, small, plan, trials, tolerance, example_inputs, other_sizes)


def _compared(
    original: nn.Module,
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    trials: Sequence[Sequence[ArgumentSet]],
    tolerance: float,
    example_inputs: Any,
    other_sizes: bool,
) -> Proof:
    """Compare two models that hold no caches.

    Args:
        original: The user's dense model.
        model: The same, with folded weights if the plan says so.
        small: The pruned model.
        plan: The plan in between.
        trials: For each comparison, arguments of which the first that the dense model takes serve.
        tolerance: See `verify`.
        example_inputs: See `verify`.
        other_sizes: See `verify`.
    """
    exact = all(group.exact or not group.removed for group in plan.groups)
    made = partial(masked, model, plan) if exact else partial(_program, original, small, plan, trials[0][0])
    pair = Pair(model, small, made)
    try:
        _ = pair.theirs
    except ApplyError as error:
        if exact:
            raise
        return Proof(float("nan"), tolerance, "none", 0, doubts=(str(error),))
    comparisons = Comparisons(plan, tolerance, "masked" if exact else "graph")
    asked, draws = Answering(None), []
    sets: list[ArgumentSet] = []
    for options in trials:
        for arguments in options:
            with nullcontext() if sets else asked:  # which conditions on values the code has
                shared = comparisons.compare(pair, arguments)
            if shared is not None:
                sets.append(arguments)
                draws.append(shared)
                break  # what the dense model refuses says nothing: the next one may
    if not comparisons.sizes:
        raise SettingError(
            f"verify: expected inputs that {type(model).__name__} takes, got {comparisons.refused}. "
            f"Pass example_inputs= on which the dense model runs and gives finite numbers."
        )
    exercise = Exercise(model, small, plan, tolerance)
    order = sorted(range(len(sets)), key=lambda i: _numbers(sets[i]))
    # The cheapest pass comes first: mostly it shows all there is to see. Of one position it does not.
    telling = sorted(order, key=lambda i: _has_one_position(sets[i]))
    agree, differ = False, None
    for i in telling:
        if exercise.unsettled or exercise.half_seen:
            exercise.look(pair.ours, *sets[i][1:], draws[i])
            if exact and not (agree or differ) and exercise.gradients is not None and not is_program(small):
                try:
                    agree = comparisons.compare_gradients(pair, sets[i], draws[i], exercise.gradients)
                except VerificationError as error:  # other weights may say more: outputs come first
                    differ = error
            exercise.gradients = None
    for i in telling:  # gradients at every size say more, and cost less
        if exercise.unsettled:
            exercise.spoil(pair.ours, *sets[i][1:], draws[i])
    if exercise.failed and not is_program(small):
        _require_backward(pair, sets, draws)
    answers = [answer for answer in (True, False) if exact and asked.given - {answer}]
    ways = [*(Way(method=name) for name in plan.inputs.methods), *(Way(answer=answer) for answer in answers)]
    training = _in_other_ways(comparisons, pair, exercise, plan, [sets[i] for i in order], ways, exact=exact)
    if other_sizes and not is_program(small):
        _train_otherwise(comparisons, pair, exercise, plan, example_inputs)
    hidden = set(exercise.left)
    if exact:
        drawn = plan.inputs.drawn and (other_sizes or example_inputs is None)
        del pair  # their float64 copies make room for others
        _other_weights(comparisons, (model, small), exercise, plan, sets, drawn, anyway=differ is not None)
    if differ is not None:
        raise differ
    shown = tuple(sorted(hidden - set(exercise.left)))
    found = _proof(comparisons, exercise, tolerance)
    return replace(found, training=training, gradients=agree, other_weights=shown)


def argument_sets(
    spec: InputSpec,
    example_inputs: Any,
    device: torch.device,
    *,
    more_inputs: Iterable[Any] = (),
    other_sizes: bool = True,
    seed: int = 0,
) -> list[list[ArgumentSet]]:
    """Inputs of every size to compare two models on, for each size in the order to try.

    Args:
        spec: What the dense model takes.
        example_inputs: The user's own inputs, in place of drawn ones of the traced sizes.
        device: Where the tensors will be.
        more_inputs: Further inputs of the user's own, each compared too.
        other_sizes: Whether to give sizes other than the traced ones too.
        seed: Of what is drawn.
    """
    given = None if example_inputs is None else call_arguments(example_inputs, device)
    trials = spec.trials(given, seed=seed, device=device, other_sizes=other_sizes)
    own = [[call_arguments(inputs, device)] for inputs in more_inputs]
    sets = [*(options for _, options in trials), *own]
    return [[(_title(spec, arguments), *arguments) for arguments in options] for options in sets]


def _title(spec: InputSpec, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """``ids [2, 9], mask [2, 9]``."""
    parts = []
    for (kind, *path), value in pytree.tree_flatten_with_path(arguments)[0]:
        if isinstance(value, torch.Tensor):
            keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
            if getattr(kind, "idx", 1) == 0:
                known = spec.names[int(keys[0]) :][:1]
                keys[0] = known[0] if known and not known[0].isdigit() else f"input {keys[0]}"
            parts.append(f"{'.'.join(keys)} {list(value.shape)}")
    return ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")


def _numbers(arguments: ArgumentSet) -> int:
    return sum(t.numel() for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor))


def _has_one_position(arguments: ArgumentSet) -> bool:
    """Whether an axis behind the batch axis has size one, as where attention has one position to read."""
    return any(1 in t.shape[1:] for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor))


def _program(model: nn.Module, small: nn.Module, plan: Plan, arguments: ArgumentSet) -> nn.Module:
    """The captured program after a plan, which is the reference where units are mixed.

    Raises:
        ApplyError: If there is none, or `small` is that program itself.
    """
    mixed = (
        "the plan removes units that an operator mixes with others, so that no masked model is a reference"
    )
    if is_program(small):
        raise ApplyError(f"{mixed}, and the pruned model is itself the captured program, the only other one")
    _, args, kwargs = arguments
    try:
        return apply(model, plan, "graph", example_inputs=kwargs or args)
    except (ApplyError, CaptureError) as error:
        raise ApplyError(f"{mixed}, and the captured program is refused: {said(error)}") from error


def _require_backward(pair: Pair, sets: Sequence[ArgumentSet], draws: Sequence[AnyDraws]) -> None:
    """Raise VerificationError if the backward pass of the pruned model fails where the dense one's runs.

    Gradients are those of the parameters alone, as in training.
    """
    for (title, args, kwargs), shared in zip(sets, draws, strict=True):
        try:
            gradients(Double(pair.small), args, kwargs, shared)
        except Exception as error:  # a user's backward may fail in any way
            try:
                gradients(Double(pair.reference), args, kwargs, shared)
            except Exception:  # what the dense model cannot do, the pruned one need not
                continue
            raise VerificationError(
                f"verify: expected the backward pass of the pruned {type(pair.model).__name__} to run where "
                f"that of the dense one does, got {said(error)} at {title}. A backward pass of your own "
                f"holds a size that has changed. Take that size from its tensors, or leave out the group "
                f"before it, with limits=sc.Limits(ignore=...)."
            ) from error


def _in_other_ways(
    comparisons: Comparisons,
    pair: Pair,
    exercise: Exercise,
    plan: Plan,
    sets: Sequence[ArgumentSet],
    ways: Sequence[Way],
    *,
    exact: bool,
) -> bool:
    """Compare what a plain run leaves out: `ways`, such as other methods, and training mode.

    In training mode buffers are compared too, and gradients where it runs other lines.

    Returns whether training mode was compared. It is on the set of the most samples that the dense model can
    train on: of few, dropout may leave nothing.
    """
    if is_program(pair.small):  # it has evaluation alone
        return False
    unread = sorted(exercise.unread or ())
    for way in ways:
        draws = comparisons.compare(pair, sets[0], way)
        if draws is not None and exercise.unsettled:
            exercise.look_closely(pair.ours, *sets[0][1:], draws, way)
    learning = Way(training=True)
    order = sorted(sets[::-1], key=lambda one: -batch_size(one[1:])) if exact else []
    for arguments in order:
        draws = comparisons.compare(pair, arguments, learning, only_here=unread)
        if draws is None:
            continue
        if exercise.unsettled or plan.inputs.training:
            exercise.look_closely(pair.ours, *arguments[1:], draws, learning)
            if plan.inputs.training and exercise.gradients is not None:
                comparisons.compare_gradients(pair, arguments, draws, exercise.gradients, learning)
        return True
    return False


def _train_otherwise(
    comparisons: Comparisons, pair: Pair, exercise: Exercise, plan: Plan, example_inputs: Any
) -> None:
    """Compare in training mode where it goes another way: at other sizes, with other arguments."""
    device, own = device_of(pair.model), plan.inputs
    given = None if example_inputs is None else call_arguments(example_inputs, device)
    trials = [own.trials_at(own.at(sizes), given, device=device) for sizes in own.training_at]
    for spec in own.also:
        ways = [*([{}] if spec.training else []), *map(spec.at, spec.training_at)]
        trials += [spec.trials_at(sizes, None, device=device) for sizes in ways]
    for options in trials:
        for arguments in options:
            found = (_title(own, arguments), *arguments)
            draws = comparisons.compare(pair, found, Way(training=True))
            if draws is not None:
                if exercise.unsettled:
                    exercise.look_closely(pair.ours, *arguments, draws, Way(training=True))
                break


def _other_weights(
    comparisons: Comparisons,
    models: tuple[nn.Module, nn.Module],
    exercise: Exercise,
    plan: Plan,
    sets: Sequence[ArgumentSet],
    drawn: bool,
    *,
    anyway: bool,
) -> None:
    """Compare with other weights while some cut tensor has not moved the output, or `anyway`."""
    for seed, size in enumerate(SIZES, 1):
        if not (exercise.unsettled or anyway):
            return
        if drawn:
            device = device_of(models[0])
            trials = argument_sets(plan.inputs, None, device, other_sizes=len(sets) > 1, seed=seed)
            sets = [options[0] for options in trials]
        model, small = with_other_weights(*models, plan, size, seed)
        other = Pair(model, small, partial(masked, model, plan), own_weights=False)
        arguments = sets[(seed - 1) % len(sets)]
        draws = comparisons.compare(other, arguments, seed=seed)
        if draws is not None:
            exercise.look_closely(other.ours, *arguments[1:], draws)


def _proof(comparisons: Comparisons, exercise: Exercise, tolerance: float) -> Proof:
    """What all comparisons together say."""
    counts, cancelled = exercise.counts(), exercise.cancelled
    unseen = exercise.unsettled
    doubts = []
    if unseen:
        doubts.append(
            f"{len(unseen)} of the {len(counts)} tensors that were cut moved no output: {listed(unseen)}"
        )
    if all(comparisons.constant):
        doubts.append("all outputs are one number everywhere")
    return Proof(
        difference=comparisons.worst,
        tolerance=tolerance,
        reference=comparisons.reference,
        outputs=len(comparisons.constant),
        sizes=tuple(comparisons.sizes),
        refused=tuple(comparisons.program_refused),
        exercised=counts,
        not_exercised=(*unseen, *cancelled),
        cancelled=cancelled,
        constant=tuple(i for i, constant in enumerate(comparisons.constant) if constant),
        doubts=tuple(doubts),
    )
