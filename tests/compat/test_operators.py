"""What `secateur.compat.operators` uses is there: PyTorch says what its operators consist of."""

from __future__ import annotations

import torch

from secateur.compat.operators import made_of

aten = torch.ops.aten


def test_a_composite_operator_and_one_with_a_decomposition_give_what_they_give() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    for operator, is_composite in ((aten.inner.default, True), (aten.mse_loss.default, False)):
        function, composite = made_of(operator)
        assert composite is is_composite
        assert function is not None
        torch.testing.assert_close(function(a, b), operator(a, b))


def test_an_operator_with_a_kernel_alone_has_none() -> None:
    assert made_of(aten.mm.default) == (None, False)
