"""The core needs no framework, and a callback without its framework says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

_CORE = """
import sys
import secateur.integrations
names = ("transformers", "lightning", "pytorch_lightning", "accelerate")
print([name for name in names if name in sys.modules])
"""

_MISSING = """
import sys
for name in ("transformers", "lightning", "lightning.pytorch", "pytorch_lightning"):
    sys.modules[name] = None
from secateur.integrations.{module} import GradualPruning
GradualPruning(None)
"""


def test_the_core_imports_no_framework() -> None:
    done = subprocess.run([sys.executable, "-c", _CORE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["huggingface", "lightning"])
def test_a_framework_that_is_missing(module: str) -> None:
    program = _MISSING.format(module=module)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ImportError: " in done.stderr
    assert "Run pip install" in done.stderr
