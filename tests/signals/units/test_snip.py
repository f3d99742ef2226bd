from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.graph.trace import trace
from secateur.signals import score
from tests.helpers.models import build
from tests.signals import literal
from tests.signals.data import labelled


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        *(
            (name, torch.float64, 1e-10)
            for name in ("residual", "gated", "tied_linear", "grouped", "functional")
        ),
        ("residual", torch.float32, 1e-3),
    ],
)
def test_equals_the_formula(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, data = build(name, dtype), labelled(name, dtype=dtype)
    graph = trace(model, data[0][0])
    scores = score(graph, data, ("snip", "taylor"))
    for group in graph.groups:
        expected = literal.snip(model, group, data)
        np.testing.assert_allclose(scores["snip"][group.name], expected, rtol=tolerance)
        # What taylor adds up with signs, snip adds up without.
        assert (scores["snip"][group.name] >= scores["taylor"][group.name] * (1 - tolerance)).all()
