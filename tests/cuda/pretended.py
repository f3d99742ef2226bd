"""A second device on a machine that has none: see `pretended.cpp`, which a C++ compiler builds once.

`pytest -p tests.cuda.pretended -m cuda` with ``SECATEUR_DEVICE=pretended`` runs the tests of a device on it.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

NAME = "pretended"


class Device:
    """In the place of `torch.cuda.device`: there is one device."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def pytest_configure() -> None:
    """Build the device and give it its name."""
    from torch.utils.cpp_extension import load  # with a compiler's needs, which other tests have not

    torch.utils.rename_privateuse1_backend(NAME)
    load("secateur_pretended", [str(Path(__file__).with_suffix(".cpp"))]).start()
    module: Any = ModuleType(f"torch.{NAME}")
    module.device = Device
    module.is_available = module.is_initialized = lambda: True
    module.current_device = lambda: 0
    module.device_count = lambda: 1
    module._is_in_bad_fork = lambda: False
    module.synchronize = module.manual_seed = module.manual_seed_all = module.set_rng_state = lambda *_: None
    module.get_rng_state = lambda *_: torch.zeros(1, dtype=torch.uint8)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[torch.quint8])
