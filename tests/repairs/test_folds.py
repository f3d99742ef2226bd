"""What repairs fit on and are judged on: a fifth held out, in turn where samples are few."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from secateur.repairs.repair import FEW, folds_of


def samples(data: sc.Calibration) -> list[int]:
    return sorted(int(v) for batch in data for v in batch.args[0])


@pytest.mark.parametrize("sizes", [(8,), (3, 4), (2,) * 9, (10,) * 5])
def test_few_samples_are_each_held_out_once(sizes: tuple[int, ...]) -> None:
    everything = torch.arange(sum(sizes))
    data = sc.Calibration.of([(part,) for part in everything.split(list(sizes))])
    folds = folds_of(data)
    assert len(folds) == 5
    assert sorted(v for _, held in folds for v in samples(held)) == everything.tolist()
    for fit, held in folds:
        assert sorted(samples(fit) + samples(held)) == everything.tolist()
    for ours, theirs in zip(folds[-1], data.split(), strict=True):
        assert samples(ours) == samples(theirs)


def test_many_samples_and_very_few_are_split_once() -> None:
    for sizes in ((FEW + 1,), (20, 20, 20), (2, 1), (4,)):
        data = sc.Calibration.of([(part,) for part in torch.arange(sum(sizes)).split(list(sizes))])
        ((fit, held),) = folds_of(data)
        assert (samples(fit), samples(held)) == tuple(samples(part) for part in data.split())
    with pytest.raises(sc.CalibrationError, match="expected at least two samples"):
        folds_of(sc.Calibration.of([torch.zeros(1)]))
