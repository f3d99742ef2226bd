"""Parts cover a program in order, read few weights each, and are cut where few values cross."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.stream.dense import Dense
from secateur.stream.parts import parts
from tests.stream.test_mapped import Decoder, convolutional


@pytest.mark.parametrize("limit", [1, 3_000, 8_000, 10**9])
@pytest.mark.parametrize("name", ["decoder", "convolutional"])
def test_parts_cover_the_program_and_keep_to_the_limit(name: str, limit: int) -> None:
    net: nn.Module = Decoder() if name == "decoder" else convolutional()
    inputs = torch.randint(17, (2, 6)) if name == "decoder" else torch.randn(2, 3, 8, 8)
    dense = Dense(sc.trace(net.eval(), inputs))
    ends = parts(dense, limit)
    assert ends == sorted(set(ends))
    assert ends[-1] == len(dense.nodes)
    seen: set[str] = set()
    for start, end in zip([0, *ends], ends, strict=False):
        read: dict[str, int] = {}
        readers = 0
        for node in dense.nodes[start:end]:
            new = {dense.names[n]: n for n in node.all_input_nodes if n in dense.names}
            sizes = {k: n.meta["val"].numel() * 4 for k, n in new.items() if k not in seen and k not in read}
            readers += bool(sizes)
            read |= sizes
        assert sum(read.values()) <= limit or readers == 1
        seen |= set(read)
    assert (len(ends) == 1) == (limit == 10**9)


def test_a_decoder_is_cut_between_its_sums() -> None:
    dense = Dense(sc.trace(Decoder().eval(), torch.randint(17, (2, 6))))
    block = sum(p.numel() for p in Decoder().blocks[0].parameters()) * 4
    for end in parts(dense, block)[:-1]:
        (crossing,) = {
            node for node in dense.nodes[:end] if any(dense.index.get(user, -1) >= end for user in node.users)
        }
        assert crossing.meta["val"].shape[-1] == 16  # the stream alone
