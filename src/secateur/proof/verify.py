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
from secateur.common.caches import CallArguments, without_caches
from secateur.common.foreign import error_text
from secateur.common.models import device_of, unwrap
from secateur.common.modes import require_plain_modes
from secateur.errors import ApplyError, CaptureError, SettingError, VerificationError
from secateur.graph.answering import Answering
from secateur.graph.folding import folded
from secateur.graph.graph import fingerprint
from secateur.graph.inputs import InputSpec, batch_size, call_arguments
from secateur.graph.passes import leaves_something
from secateur.graph.views import CALLS
from secateur.plan import Plan
from secateur.proof.diagnosis import Pair
from secateur.proof.exercised import Exercise, gradients
from secateur.proof.proving import ArgumentSet, Comparisons, is_program, listed
from secateur.targets.granularity import by_granularity
from secateur.targets.units.apply import apply
from secateur.targets.units.compare import Double, Way
from secateur.targets.units.copying import duplicate
from secateur.targets.units.draws import AnyDraws
from secateur.targets.units.masked import masked
from secateur.targets.units.spread import gathered

if TYPE_CHECKING:
    from secateur.targets.weights.plan import MaskPlan

SIZES = (0.3, 1.0)
"""Relative sizes of random numbers that are added to weights which hide a tensor."""


@dataclass(frozen=True)
class Proof:
    """The result of `verify`: what was compared, the largest difference, and what the comparison covers.

    Attributes:
        difference: Largest relative difference over all outputs and sizes.
        tolerance: The largest accepted difference.
        reference: ``masked`` for exact plans, ``graph`` if a removed group is inexact, ``none`` if there is
            nothing to compare with.
        outputs: Number of output tensors compared.
        sizes: The sizes of the inputs at which both were compared.
        refused: Sizes at which the dense model runs, and the captured program refuses to.
        training: Whether training mode was compared, too: outputs, buffers, and gradients if it runs other
            code. This needs the reference ``masked`` and inputs that the dense model can train on.
        gradients: Whether the gradients of the parameters were compared, in evaluation mode. This needs the
            reference ``masked``, a backward pass of both models, and gradients independent of rounding.
        exercised: For each pruned tensor, how many of its kept positions changed the output, and how many
            there are.
        not_exercised: Pruned tensors that did not change the output: nothing is proven about them.
        cancelled: Those of `not_exercised` that no input can exercise, because later operators cancel them:
            a bias before a softmax over positions, for example. They cause no doubt.
        other_weights: Pruned tensors that the model's own weights hide, for example by a factor of zero. They
            changed the output after random numbers were added to the weights of both models.
        constant: Indices of outputs that are the same number everywhere, and so show nothing.
        doubts: The reasons why the proof is incomplete; empty if it is complete.
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
        """Whether the outputs agree, and every pruned tensor that can change the output was seen to do so."""
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
    """Prove that a pruned model equals the masked dense one: compare them in float64, at every input size.

    The models run on random inputs of the kinds that the trace recorded, with two sizes for each axis that
    may vary. The proof is complete only if each pruned tensor changes the output. This is tested by a
    backward pass; where gradients do not reach, by a forward pass with that tensor perturbed. A tensor that
    never changes the output is ``not_exercised``, and then the result is not ``proven``. Gradients of the
    parameters are compared at one size. If the forward pass draws random numbers, both models get the same.

    Experts are compared with the dense model whose routers may not choose the removed experts, on
    `example_inputs` or on random inputs of the traced sizes. Blocks are compared with the dense model in
    which the removed blocks are bypassed, at every size. For single weights, all tensors are compared bit
    for bit with the dense tensors in which these weights are zero.

    Verify before repair: a repaired model differs from the masked one on purpose.

    Args:
        model: The dense model. Neither it nor `small` is changed; copies are compared.
        small: What `apply` returned.
        plan: The plan that was applied.
        example_inputs: As for `trace`: real inputs, used instead of random ones of the traced sizes.
        other_sizes: Compare at other sizes, too, on random inputs. If False and `example_inputs` are given,
            the models run on these alone. Not for experts.
        tolerance: Largest accepted relative difference, max|a - b| / max|b|.

    Returns:
        The proof; see its attributes ``proven`` and ``doubts``.

    Raises:
        VerificationError: The outputs or gradients differ by more, or the pruned model fails where the dense
            one runs, in its forward or in its backward pass.
        PlanError: The plan is for another model.
        SettingError: The dense model runs on none of the inputs.

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

    def first() -> CallArguments:
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
        plan: The plan that was applied.
        trials: For each comparison, argument sets in the order to try; the first that the dense model
            accepts is used.
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
                break  # if the dense model refuses a set, the next one is tried
    if not comparisons.sizes:
        raise SettingError(
            f"verify: expected inputs that {type(model).__name__} takes, got {comparisons.refused}. "
            f"Pass example_inputs= on which the dense model runs and gives finite numbers."
        )
    exercise = Exercise(model, small, plan, tolerance)
    order = sorted(range(len(sets)), key=lambda i: _numbers(sets[i]))
    # The cheapest pass comes first: mostly it exercises everything. One position alone does not.
    telling = sorted(order, key=lambda i: _has_one_position(sets[i]))
    agree, differ = False, None
    for i in telling:
        if exercise.to_exercise or exercise.is_half_exercised:
            exercise.by_gradients(pair.ours, *sets[i][1:], draws[i])
            if exact and not (agree or differ) and exercise.gradients is not None and not is_program(small):
                try:
                    agree = comparisons.compare_gradients(pair, sets[i], draws[i], exercise.gradients)
                except (
                    VerificationError
                ) as error:  # raised later: a difference of outputs is a better message
                    differ = error
            exercise.gradients = None
    for i in telling:  # only now: gradients at every size show more, and cost less
        if exercise.to_exercise:
            exercise.by_perturbation(pair.ours, *sets[i][1:], draws[i])
    if exercise.failed and not is_program(small):
        _require_backward(pair, sets, draws)
    answers = [answer for answer in (True, False) if exact and asked.given - {answer}]
    ways = [*(Way(method=name) for name in plan.inputs.methods), *(Way(answer=answer) for answer in answers)]
    # A copy runs: what a pass leaves in generators of the user's own would make the models differ.
    if exact and not is_program(small) and leaves_something(duplicate(small), sets[0][1:]):
        ways.append(Way(calls=CALLS))
    training = _in_other_ways(comparisons, pair, exercise, plan, [sets[i] for i in order], ways, exact=exact)
    if other_sizes and not is_program(small):
        _train_otherwise(comparisons, pair, exercise, plan, example_inputs)
    hidden = set(exercise.not_exercised)
    if exact:
        drawn = plan.inputs.drawn and (other_sizes or example_inputs is None)
        del pair  # frees the memory of their float64 copies
        _other_weights(comparisons, (model, small), exercise, plan, sets, drawn, anyway=differ is not None)
    if differ is not None:
        raise differ
    shown = tuple(sorted(hidden - set(exercise.not_exercised)))
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
    """Make inputs of every size to compare two models on; for each size, a list in the order to try.

    Args:
        spec: Describes the inputs of the dense model.
        example_inputs: The user's own inputs, used instead of random ones of the traced sizes.
        device: Device of the tensors.
        more_inputs: Further inputs of the user, each of which is compared, too.
        other_sizes: Whether to use other sizes than the traced ones, too.
        seed: Seed of random inputs.
    """
    given = None if example_inputs is None else call_arguments(example_inputs, device)
    trials = spec.trials(given, seed=seed, device=device, other_sizes=other_sizes)
    own = [[call_arguments(inputs, device)] for inputs in more_inputs]
    sets = [*(options for _, options in trials), *own]
    return [[(_title(spec, arguments), *arguments) for arguments in options] for options in sets]


def _title(spec: InputSpec, arguments: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """Name the inputs with their shapes, such as ``ids [2, 9], mask [2, 9]``."""
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
    """Whether an axis after the batch axis has size one, for example a text of one token."""
    return any(1 in t.shape[1:] for t in pytree.tree_leaves(arguments) if isinstance(t, torch.Tensor))


def _program(model: nn.Module, small: nn.Module, plan: Plan, arguments: ArgumentSet) -> nn.Module:
    """Apply a plan to the captured program, which is the reference if the plan removes mixed units.

    Raises:
        ApplyError: The model cannot be captured, or `small` is that program itself.
    """
    mixed = "the plan removes units that an operator mixes with others, so the masked model is no reference"
    if is_program(small):
        raise ApplyError(
            f"{mixed}, and the pruned model is itself the captured program, the only other reference"
        )
    _, args, kwargs = arguments
    try:
        return apply(model, plan, "graph", example_inputs=kwargs or args)
    except (ApplyError, CaptureError) as error:
        raise ApplyError(f"{mixed}, and the captured program is refused: {error_text(error)}") from error


def _require_backward(pair: Pair, sets: Sequence[ArgumentSet], draws: Sequence[AnyDraws]) -> None:
    """Raise VerificationError if a backward pass fails for the pruned model and runs for the reference.

    Gradients are those of the parameters alone, as in training.
    """
    for (title, args, kwargs), shared in zip(sets, draws, strict=True):
        try:
            gradients(Double(pair.small), args, kwargs, shared)
        except Exception as error:  # a user's backward may fail in any way
            try:
                gradients(Double(pair.reference), args, kwargs, shared)
            except Exception:  # the dense model fails as well
                continue
            raise VerificationError(
                f"verify: expected the backward pass of the pruned {type(pair.model).__name__} to run where "
                f"that of the dense one does, got {error_text(error)} at {title}. A backward pass of your "
                f"own holds a size that has changed. Take that size from its tensors, or leave out the group "
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
    """Compare in other ways than a plain run: other methods of the model, and training mode.

    In training mode buffers are compared, too, and gradients if it runs other code. It uses the set with the
    most samples that the dense model can train on: with few samples, dropout may leave nothing.

    Returns:
        Whether training mode was compared.
    """
    if is_program(pair.small):  # a captured program has only evaluation mode
        return False
    unread = sorted(exercise.unread or ())
    for way in ways:
        draws = comparisons.compare(pair, sets[0], way)
        if draws is not None and exercise.to_exercise:
            exercise.by_gradients_and_perturbation(pair.ours, *sets[0][1:], draws, way)
    learning = Way(training=True)
    order = sorted(sets[::-1], key=lambda one: -batch_size(one[1:])) if exact else []
    for arguments in order:
        draws = comparisons.compare(pair, arguments, learning, only_here=unread)
        if draws is None:
            continue
        if exercise.to_exercise or plan.inputs.training:
            exercise.by_gradients_and_perturbation(pair.ours, *arguments[1:], draws, learning)
            if plan.inputs.training and exercise.gradients is not None:
                comparisons.compare_gradients(pair, arguments, draws, exercise.gradients, learning)
        return True
    return False


def _train_otherwise(
    comparisons: Comparisons, pair: Pair, exercise: Exercise, plan: Plan, example_inputs: Any
) -> None:
    """Compare in training mode at the sizes and with the arguments for which it runs other code."""
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
                if exercise.to_exercise:
                    exercise.by_gradients_and_perturbation(pair.ours, *arguments, draws, Way(training=True))
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
    """Compare with other weights if some pruned tensor is not exercised yet, or if `anyway`."""
    for seed, size in enumerate(SIZES, 1):
        if not (exercise.to_exercise or anyway):
            return
        if drawn:
            device = device_of(models[0])
            trials = argument_sets(plan.inputs, None, device, other_sizes=len(sets) > 1, seed=seed)
            sets = [options[0] for options in trials]
        sets = sorted(sets, key=lambda one: (_has_one_position(one), _numbers(one)))  # cheap ones first
        model, small = with_other_weights(*models, plan, size, seed)
        other = Pair(model, small, partial(masked, model, plan), own_weights=False)
        arguments = sets[(seed - 1) % len(sets)]
        draws = comparisons.compare(other, arguments, seed=seed)
        if draws is not None:
            exercise.by_gradients_and_perturbation(other.ours, *arguments[1:], draws)


def _proof(comparisons: Comparisons, exercise: Exercise, tolerance: float) -> Proof:
    """Collect the results of all comparisons."""
    counts, cancelled = exercise.counts(), exercise.cancelled
    unseen = exercise.to_exercise
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
