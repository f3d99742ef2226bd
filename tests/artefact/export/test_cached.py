"""A language model with its cache as input and output generates in ONNX Runtime what it generates here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.artefact.export.cached import CACHES, Decoder, cached_program
from tests.targets.units.plans import random_plan
from tests.zoo.importing import import_transformers

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BASE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 63, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE),
    "qwen3": ("Qwen3Config", BASE),
    "gemma3": ("Gemma3TextConfig", BASE | {"sliding_window": 4,
                                           "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 63}),
    "opt": ("OPTConfig", {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
                          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 63}),
}  # fmt: skip


def make(family: str) -> nn.Module:
    found = import_transformers()
    if found is None:
        pytest.skip("transformers is not installed")
    torch.manual_seed(0)
    name, options = FAMILIES[family]
    model: nn.Module = found.AutoModelForCausalLM.from_config(getattr(found, name)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def pruned(model: nn.Module) -> nn.Module:
    batch = {"input_ids": torch.randint(2, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    graph = sc.trace(model, batch)
    return sc.apply(model, random_plan(graph), graph=graph).eval()


def generated(path: Path, ids: torch.Tensor, mask: torch.Tensor, count: int) -> np.ndarray:
    """Generate greedily with the file alone: all of the prompt at once, then token by token."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {entry.name: entry for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    past = {
        name: np.zeros((len(ids), entry.shape[1], 0, entry.shape[3]), np.float32)
        for name, entry in given.items()
        if name.startswith("past")
    }
    tokens, seen, found = ids.numpy(), mask.numpy(), []
    for _ in range(count):
        feeds = {"input_ids": tokens, "attention_mask": seen, **past}
        if "position_ids" in given:
            feeds["position_ids"] = np.maximum(seen.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        outputs = dict(zip(names, session.run(None, feeds), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        tokens = outputs["logits"][:, -1, :-1].argmax(-1)[:, None]  # without the word that ends a text
        seen = np.concatenate([seen, np.ones_like(tokens)], 1)
        found.append(tokens)
    return np.concatenate(found, 1)


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "qwen3", "gemma3", "opt"))],
)
def test_it_generates_what_the_model_generates(tmp_path: Path, family: str) -> None:
    small: Any = pruned(make(family))
    done = sc.export(small, tmp_path / "small.onnx", cache=True)
    assert done.open == ("batch", "new tokens", "tokens in the cache")
    ids = torch.randint(2, 60, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    wanted = small.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=7, min_new_tokens=7, do_sample=False
    )
    assert np.array_equal(generated(done.path, ids, mask, 7), wanted[:, 6:].numpy())


def test_what_has_no_such_cache_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        sc.SettingError, match=r"expected a causal language model .* got Sequential, which takes no"
    ):
        sc.export(net, tmp_path / "net.onnx", torch.zeros(1, 4), cache=True)
    with pytest.raises(
        sc.SettingError, match="as a captured program, which has only the inputs of its trace"
    ):
        sc.export(torch.fx.symbolic_trace(net), tmp_path / "net.onnx", cache=True)
    with pytest.raises(sc.SettingError, match="expected no fixed= for this format"):
        sc.export(make("llama"), tmp_path / "net.onnx", cache=True, fixed=True)
    for name in (
        "folder",
        "net.pt2",
    ):  # PyTorch's own program takes no text of one word, if it takes longer ones
        with pytest.raises(sc.SettingError, match="expected no cache= for this format"):
            sc.export(net, tmp_path / name, cache=True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("argument", CACHES)
def test_the_argument_that_takes_the_cache_has_two_names(argument: str) -> None:
    """Versions of Transformers differ in it."""
    model = make("llama")
    own = Decoder(model).cache

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = model, model.config
            self.get_input_embeddings = model.get_input_embeddings

        def forward(self, **given: Any) -> Any:
            return self.inner(**{own if name == argument else name: value for name, value in given.items()})

    names = ["self", "input_ids", "attention_mask", "position_ids", argument, "use_cache", "return_dict"]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, default=None) for name in names]
    Named.forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    _, trials = cached_program(Named().eval())
    _, wanted = cached_program(model)
    assert len(trials.wanted) > 3
    for got, want in zip(trials.wanted, wanted.wanted, strict=True):
        torch.testing.assert_close(got, want)
