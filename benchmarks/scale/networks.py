"""The networks: four of true size, without weights, and small ones of the same kinds that can be measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import moe_language_model, small_language_model
from benchmarks.resnet20 import ResNet20
from benchmarks.scale.subject import Subject
from benchmarks.small_networks import DeiT
from tests.zoo.importing import import_timm, import_transformers

LENGTH = 2048
"""Tokens of a text."""


def images(side: int, device: str) -> Callable[[int], Tensor]:
    """So many, [samples, 3, side, side]."""
    return lambda samples: torch.randn(samples, 3, side, side, device=device)


def texts(length: int, words: int, device: str) -> Callable[[int], dict[str, Tensor]]:
    """So many, as Transformers takes them."""

    def some(samples: int) -> dict[str, Tensor]:
        ids = torch.randint(words, (samples, length), device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    return some


def _timm(name: str) -> nn.Module:
    library: Any = import_timm()
    with torch.device("meta"):
        model: nn.Module = library.create_model(name)
    return model.eval()


def _transformers(config: Callable[[Any], Any]) -> nn.Module:
    library: Any = import_transformers()
    with torch.device("meta"):
        model = library.AutoModelForCausalLM.from_config(config(library))
    model.set_attn_implementation("eager")
    return model.bfloat16().eval()


def _resnet50() -> Subject:
    return Subject("ResNet-50", _timm("resnet50"), images(224, "meta"), 32_000, 1024, 64, 1000)


def _deit_b() -> Subject:
    name = "deit_base_patch16_224"
    return Subject("DeiT-B", _timm(name), images(224, "meta"), 32_000, 1024, 64, 1000)


def _llama() -> Subject:
    model = _transformers(lambda library: library.LlamaConfig(use_cache=False))
    return Subject("Llama-7B", model, texts(LENGTH, 32_000, "meta"), 128, 128, 1)


def _qwen() -> Subject:
    sizes = {
        "num_hidden_layers": 24, "num_experts": 60, "num_experts_per_tok": 4, "hidden_size": 2048,
        "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632, "vocab_size": 151_936, "use_cache": False,
    }  # fmt: skip
    model = _transformers(lambda library: library.Qwen2MoeConfig(**sizes))
    return Subject("Qwen1.5-MoE-A2.7B", model, texts(LENGTH, 151_936, "meta"), 128, 128, 1)


LARGE = {"resnet50": _resnet50, "deit_b": _deit_b, "llama_7b": _llama, "qwen_moe": _qwen}
"""Name -> what is predicted, on the meta device."""


def _resnet20() -> Subject:
    return Subject("ResNet-20", ResNet20().eval(), images(32, "cpu"), 256, 256, 64, 10)


def _deit() -> Subject:
    return Subject("DeiT of width 96", DeiT().eval(), images(32, "cpu"), 256, 256, 64, 10)


def _small_llama() -> Subject:
    model = small_language_model.build(65).eval()
    model.set_attn_implementation("eager")
    return Subject("Llama of width 128", model, texts(128, 65, "cpu"), 32, 32, 8)


def _small_moe() -> Subject:
    model = moe_language_model.build(65).eval()
    model.config.output_router_logits = False
    model.set_attn_implementation("eager")
    return Subject("Qwen2-MoE of width 128", model, texts(128, 65, "cpu"), 32, 32, 8)


SMALL = {"resnet20": _resnet20, "deit": _deit, "llama": _small_llama, "moe": _small_moe}
"""Name -> what is measured, with random weights on the CPU."""


def small(name: str) -> Subject:
    """One of `SMALL`; a function that other processes can be given."""
    return SMALL[name]()


def on_meta(subject: Subject) -> Subject:
    """One of `SMALL` without values, so that walking it computes nothing."""
    model = copy.deepcopy(subject.model).to("meta")
    inputs: Callable[[int], Any] = images(32, "meta") if subject.classes else texts(128, 65, "meta")
    return replace(subject, model=model, inputs=inputs)
