"""GGUF files say what the pruned model computes; what llama.cpp does not compute is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from secateur.artefact.export.gguf_running import gguf_runner
from tests.targets.units.plans import plan_of
from tests.zoo.importing import import_transformers

gguf = pytest.importorskip("gguf")

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 63, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("LlamaConfig", {}, "llama", "deci"),
    "llama with biases, tied": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        "llama",
        "deci",
    ),
    "llama 3": ("LlamaConfig", {"rope_parameters": LLAMA3, "head_dim": 16}, "llama", "deci"),
    "mistral": ("MistralConfig", {"sliding_window": 40}, "llama", "deci"),
    "qwen2": ("Qwen2Config", {}, "llama", "deci"),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}, "qwen3", "openelm"),
}


def make(config: str, options: dict[str, Any]) -> nn.Module:
    found = import_transformers()
    if found is None:
        pytest.skip("transformers is not installed")
    torch.manual_seed(0)
    made = getattr(found, config)(**{**BASE, **options})
    model: nn.Module = found.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.normal_(1, 0.3)
    return model


def uneven_plan(graph: sc.Graph) -> sc.Plan:
    """A plan after which no two layers have as many heads and neurons."""
    keep = {}
    for number, group in enumerate(graph.groups):
        keep[group.name] = np.arange(group.size) >= min(number, group.size - 1)
    return plan_of(graph, keep)


def ids(*size: int) -> torch.Tensor:
    return torch.randint(2, 60, size, generator=torch.Generator().manual_seed(1))


def fact(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


def narrowed(model: nn.Module, *, even: bool) -> nn.Module:
    """The model with fewer neurons, as many in each layer; or with fewer heads and neurons, uneven."""
    graph = sc.trace(model, ids(2, 9))
    keep = {g.name: np.arange(g.size) % 3 > 0 for g in graph.groups if "mlp" in g.name}
    return sc.apply(model, plan_of(graph, keep) if even else uneven_plan(graph), graph=graph)


def check(model: nn.Module, path: Path, architecture: str) -> None:
    """Export a model, and compare the file's scores of other texts."""
    done = sc.export(model, path)
    assert done.difference <= 1e-5
    assert (done.runtime, done.open) == ("gguf", ("batch", "tokens"))
    assert fact(done.path, "general.architecture") == architecture
    assert fact(done.path, "tokenizer.ggml.model") == "no_vocab"
    text = ids(3, 20)
    (found,) = gguf_runner(done.path)((text,), {})
    with torch.no_grad():
        wanted = model(input_ids=text).logits
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_models_are_written_and_run_from_the_file_alone(family: str, tmp_path: Path) -> None:
    config, options, even, _ = FAMILIES[family]
    check(make(config, options), tmp_path / "model.gguf", even)


@pytest.mark.parametrize("family", ["llama 3", "qwen3"])
def test_each_layer_may_have_its_own_heads_and_neurons(family: str, tmp_path: Path) -> None:
    config, options, _, architecture = FAMILIES[family]
    small = narrowed(make(config, options), even=False)
    heads = {len(layer.self_attn.q_proj.weight) for layer in small.model.layers}  # type: ignore[union-attr]
    assert len(heads) > 1
    check(small, tmp_path / "model.gguf", architecture)


@pytest.mark.parametrize("family", ["llama", "mistral"])  # of others it does not read the size of a head
def test_transformers_reads_even_files_too(family: str, tmp_path: Path) -> None:
    model = make(*FAMILIES[family][:2])
    small = narrowed(model, even=True) if family == "llama" else model
    sc.export(small, tmp_path / "model.gguf")
    transformers = import_transformers()
    assert transformers is not None
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    text = ids(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(loaded(text).logits, small(text).logits, rtol=1e-4, atol=1e-4)


def test_weights_keep_their_dtype_and_vectors_are_in_float32(tmp_path: Path) -> None:
    model = make(*FAMILIES["llama"][:2])
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        half = model.to(dtype)
        done = sc.export(half, tmp_path / "model.gguf")
        assert done.difference <= 1e-5, "weights are exact, and products in float32"
        assert next(half.parameters()).dtype == dtype
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(done.path).tensors}
        assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == kind
        assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_the_text_is_no_longer_than_the_window(tmp_path: Path) -> None:
    """Up to its window, attention with one is attention without: llama.cpp's `llama` has none."""
    done = sc.export(make(*FAMILIES["mistral"][:2]), tmp_path / "model.gguf")
    assert fact(done.path, "llama.context_length") == 40


def test_the_tokenizer_of_the_dense_model_is_copied(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "dense.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{k}" for k in range(64)])
    writer.add_token_types([1] * 64)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_name("not copied")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    model = make(*FAMILIES["llama"][:2])
    done = sc.export(model, tmp_path / "small.gguf", tokenizer=tmp_path / "dense.gguf")
    there, here = (gguf.GGUFReader(path).fields for path in (tmp_path / "dense.gguf", done.path))
    copied = {name for name in there if name.startswith("tokenizer.")}
    assert len(copied) == 5
    for name in copied:
        assert here[name].contents() == there[name].contents()
        assert here[name].types == there[name].types
    assert "general.name" not in here
    old = done.path.read_bytes()
    with pytest.raises(sc.ExportError, match="expected 80 words, as the model has, got 64"):
        sc.export(make("LlamaConfig", {"vocab_size": 80}), done.path, tokenizer=tmp_path / "dense.gguf")
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(sc.ExportError, match="to be a GGUF file"):
        sc.export(model, done.path, tokenizer=tmp_path / "text.gguf")
    assert done.path.read_bytes() == old


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        ("GemmaConfig", {}, "No architecture of llama.cpp computes it"),
        ("LlamaConfig", {"hidden_act": "gelu"}, "No architecture of llama.cpp computes it"),
        ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, "has no place in any"),
        ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("Qwen3Config", {"rope_parameters": LLAMA3, "head_dim": 16}, "scaled rotary frequencies"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    config: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(sc.ExportError, match=reason):
        sc.export(make(config, options), tmp_path / "model.gguf")
    assert not any(tmp_path.iterdir())


def test_uneven_layers_with_norms_need_tied_words(tmp_path: Path) -> None:
    small = narrowed(make("Qwen3Config", {"head_dim": 8}), even=False)
    with pytest.raises(sc.ExportError, match="word scores with a matrix of their own"):
        sc.export(small, tmp_path / "model.gguf")


def test_other_models_and_settings_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(sc.ExportError, match="decoder that an architecture"):
        sc.export(nn.Linear(3, 2), tmp_path / "model.gguf")
    with pytest.raises(sc.SettingError, match="expected no tokenizer="):
        sc.export(nn.Linear(3, 2), tmp_path / "model.pt2", torch.ones(1, 3), tokenizer="a.gguf")
    with pytest.raises(sc.SettingError, match="expected no fixed="):
        sc.export(nn.Linear(3, 2), tmp_path / "model.gguf", fixed=True)
