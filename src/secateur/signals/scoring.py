"""`sc.score`: score units, weights, experts and blocks."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

from secateur.calibration import Calibration, Forward
from secateur.common.modes import require_plain_modes
from secateur.graph.graph import Graph
from secateur.signals.distributed import team_of_processes
from secateur.signals.gather import gather
from secateur.signals.loss import LossFn
from secateur.signals.registry import resolve
from secateur.signals.scores import Scores
from secateur.signals.units.combination import SignalLike, listed, with_combinations
from secateur.targets.granularity import by_granularity

if TYPE_CHECKING:
    from secateur.signals.blocks.score import BlockAsked
    from secateur.signals.experts.score import ExpertAsked
    from secateur.targets.blocks.graph import BlockGraph
    from secateur.targets.experts.graph import ExpertGraph
    from secateur.targets.weights.weights import Weights


@by_granularity("graph")
def score(
    graph: Graph | ExpertGraph | BlockGraph | Weights,
    calibration: Any = None,
    signals: SignalLike | ExpertAsked | BlockAsked | Iterable[SignalLike | ExpertAsked | BlockAsked] = (
        "wasserstein",
        "taylor",
    ),
    *,
    loss_fn: LossFn | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: bool = True,
    memory: int | str | None = None,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
    by_block: bool | None = None,
) -> Scores:
    """Score each unit with every signal, in one pass over the data.

    The model comes back bitwise as it was: parameters, buffers, gradients, training flags, hooks and random
    state, also after an exception. It is scored in evaluation mode, as it was captured.

    Under ``torchrun``, or with torch.distributed initialised, the processes share the work, and each returns
    the same scores. Every process has to call `score`, with the same model, data and settings: batch i is
    scored by process i mod N. What no process may skip is reading, so that loaders that shuffle or augment
    give the same samples everywhere; it is what a loader's workers are for. The data may be of any length. An
    error in one process is raised in all, and so it is if one does not come, ends or hangs: gives no sign of
    life for 50 seconds, or for as many as the environment variable ``SECATEUR_TIMEOUT`` says. Processes whose
    weights, settings, versions or data differ are refused before work is done, by a checksum of the first
    batch, and again by one of all batches.

    Experts have signals of their own, by default ``reap`` and ``expert_taylor``. Their model runs with its
    own kernels, on one device and in one process. Tokens that a batch's ``attention_mask`` calls padding
    count for nothing.

    Residual blocks have signals of their own too, by default ``output_change`` and ``stream_change``; the
    former runs the model once for each block.

    Single weights are scored by `secateur.signals.weights.score.CRITERIA`, by default ``magnitude``, also in
    one process, and by a model on several devices.

    Args:
        graph: From `sc.trace`, of units, experts or single weights.
        calibration: A DataLoader, Dataset or iterable of batches (see `Calibration.of`); None if no signal
            needs data. Batches are moved to the model's device.
        signals: Names, or instances for settings other than the default: ``Wasserstein(per_class=64)``.
            Names with ``*`` and ``+`` between them, or `Product` and `RankSum`, are computed from their
            parts, which are in the result as well. For experts: ``frequency``, ``router_weight``, ``reap``,
            ``output_change``, ``specialisation``, ``expert_taylor``, ``weight_norm``, ``random``. For blocks:
            ``output_change``, ``stream_change``, ``stream_distance``, ``block_taylor``, ``magnitude``,
            ``random``. For single weights: ``magnitude``, ``wanda``, ``taylor``, ``snip``, ``fisher``,
            ``random``.
        loss_fn: ``loss_fn(model, batch)`` returns the mean loss of a batch; `model` is called like the user's
            own, `batch` is what the loader gave. By default the cross-entropy of logits and labels, or the
            `loss` that the model returns for a mapping batch.
        forward: ``forward(model, batch)`` calls the model on what the loader gives, where that is not a
            tensor, ``(inputs, labels)`` or a mapping of arguments (see `Calibration.of`).
        seed: For shuffling loaders and for what signals draw. Same seed, same scores.
        progress: Show a bar on a terminal.
        memory: Most that the signals together may hold of what they accumulate, in bytes or as ``"2 GB"``;
            N processes get an N-th each. If it does not suffice for all groups at once, the data are read
            several times, each time for some groups; the scores are the same. Labels are then read once more
            beforehand, to count the classes. This and the next two options are for units only.
        checkpoint: A file that keeps what has been accumulated. If it exists and belongs to this run, the run
            goes on behind the last batch that it holds, and gives the same scores, bit for bit; it is removed
            at the end. Batches before that are read, not run. With N processes, each has a file of its own,
            named after its rank.
        checkpoint_every: Seconds between two writes of it; 0 writes after every batch.
        by_block: For single weights only. True: make Wanda's pass block by block, with the same scores up to
            rounding. None: only if Accelerate has offloaded weights. A model that is not a chain of blocks
            runs as a whole; so do all criteria that need gradients.

    Returns:
        ``scores[signal][group]``, float64 [group.size]; higher is worth more.

    Raises:
        CalibrationError: The data cannot feed what a signal needs.
        ScoreError: A signal is unknown, a weight is not finite, scores are not, or another process failed.
        ArtefactError: The checkpoint is damaged, or of another model, data or settings.
        SettingError: The memory limit is too low for a single group, a setting is none, or it means nothing
            for this granularity.

    Example:
        >>> import torch
        >>> import secateur as sc
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> graph = sc.trace(net, torch.zeros(2, 4))
        >>> data = [(torch.randn(10, 4), torch.arange(10) % 2) for _ in range(3)]
        >>> scores = sc.score(graph, data, ("wasserstein", "l1*apoz"), progress=False)
        >>> sorted(scores.values), scores["wasserstein"]["0"].shape
        (['apoz', 'l1', 'l1*apoz', 'wasserstein'], (8,))
    """
    graph = cast(Graph, graph)  # others do not come here
    if graph.programs.model is not None:
        require_plain_modes("score", graph.programs.model)
    requested = listed(cast("SignalLike | Iterable[SignalLike]", signals))
    chosen = resolve(requested)
    with team_of_processes(graph.device) as team:
        data = None
        with team.together():
            if calibration is not None:
                data = Calibration.of(calibration, seed=seed, forward=forward, model=graph.programs.model)
        scores = gather(
            graph,
            data,
            chosen,
            loss_fn=loss_fn,
            seed=seed,
            progress=progress,
            memory=memory,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
        )
    return with_combinations(scores, requested)
