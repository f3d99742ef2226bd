"""Models without the memory of their weights, to load smaller ones into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import nn


@contextmanager
def empty_weights() -> Iterator[None]:
    """Inside, parameters of new modules are on the meta device, where they take no memory; buffers are real.

    With it `secateur.load` never holds the dense model:

        def make_model():
            with sc.empty_weights():
                return AutoModelForCausalLM.from_config(config)

        model = sc.load(directory, make_model)

    Buffers stay real because those that no checkpoint holds, such as rotary frequencies, have to be computed.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is not None and not param.is_meta:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    with mock.patch.object(nn.Module, "register_parameter", register):
        yield
