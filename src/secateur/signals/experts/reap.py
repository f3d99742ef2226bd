"""Router weight times output norm: REAP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from secateur.signals.experts.signal import Context, ExpertSignal, ExpertTally, Mean, Need


@dataclass(frozen=True)
class Reap(ExpertSignal):
    r"""The mean contribution of the expert to the tokens that it gets.

    .. math:: S_e = \frac{1}{|X_e|} \sum_{x \in X_e} g_e(x) \, \lVert f_e(x) \rVert_2

    over the tokens X_e that the router sends to it, g being the factor on its output f. It is 0 if there are
    none. It says what an expert does when it is used; `frequency` says how often that is.

    g is what the block applies. Where a router scales the weights of a token's experts to a sum of 1, that is
    in g; where it does not (``norm_topk_prob=False``), g is the plain softmax, and nothing is scaled here
    either, so that g f is what the expert adds to the block's output in both cases.

    Source: Lasby et al. 2025, REAP, arXiv 2510.13999.

    Direction: higher is worth more.
    """

    name: ClassVar[str] = "reap"
    needs: ClassVar[frozenset[Need]] = frozenset({"routing"})

    def start(self, context: Context) -> ExpertTally:
        """Begin a run."""
        return Mean(
            context,
            lambda routed: routed.weight.double().abs() * routed.output.double().norm(dim=-1),
            over_all=False,
        )
