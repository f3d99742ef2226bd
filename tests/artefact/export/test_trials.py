"""What a file is compared on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.artefact.export.trials import Trials, inputs_of
from tests.targets.units.plans import random_plan


class Net(nn.Module):
    """Takes ids and a mask; refuses ids that do not begin with 1, if asked to."""

    def __init__(self, *, picky: bool = False) -> None:
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(20, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.picky = picky

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.picky and not torch.compiler.is_compiling() and bool((ids[:, 0] != 1).any()):
            raise ValueError("expected a first id of 1")
        return (self.down(torch.relu(self.up(self.words(ids)))) * mask[..., None]).sum(1)


@pytest.mark.parametrize("picky", [False, True])
def test_other_sizes_over_the_vocabulary_or_the_users_own(picky: bool) -> None:
    model = Net(picky=picky).eval()
    given = {"ids": torch.ones(2, 6, dtype=torch.long), "mask": torch.ones(2, 6, dtype=torch.long)}
    graph = sc.trace(model, given)
    small = sc.apply(model, random_plan(graph), graph=graph, example_inputs=given)
    arguments, spec = inputs_of(small, given)
    trials = Trials.of(small, arguments, spec, [{}, *(sizes for _, sizes in spec.other_sizes())])
    first, *others = (kwargs for _, kwargs in trials.arguments)
    assert torch.equal(first["ids"], given["ids"])
    assert len(others) == 2
    assert len({kwargs["ids"].shape for kwargs in others}) == 2
    assert len(trials.batches) == 2
    for kwargs, wanted in zip(others, trials.wanted[1:], strict=True):
        assert bool((kwargs["ids"] == 1).all()) == picky
        assert torch.equal(small(**kwargs), wanted[0])
    if not picky:
        assert any(int(kwargs["ids"].max()) > 9 for kwargs in others)
        assert all(0 < int(kwargs["mask"].sum()) < kwargs["mask"].numel() for kwargs in others)


def test_inputs_have_to_come_from_somewhere() -> None:
    with pytest.raises(sc.SettingError, match=r"expected example_inputs for a Net .* got none"):
        inputs_of(Net(), None)
