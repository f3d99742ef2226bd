"""A small Llama and its Trainer, for tests; import Transformers through tests.zoo.importing first."""

from __future__ import annotations

import os
from typing import Any

import torch

import secateur as sc
from secateur.integrations import GradualPruner, Schedule
from secateur.integrations.huggingface import GradualPruning


def a_llama(layers: int = 1) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def rows(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Stretches of counting, each from another number. [10]"""
    starts = torch.randint(0, 40, (count,), generator=torch.Generator().manual_seed(seed))
    stretches = [(start + torch.arange(10)) % 40 for start in starts]
    return [{"input_ids": s, "labels": s} for s in stretches]


def calibration() -> list[dict[str, torch.Tensor]]:
    given = rows(8, seed=1)
    return [{k: torch.stack([row[k] for row in given]) for k in given[0]}]


def a_trainer(model: Any, folder: str | os.PathLike[str], steps: int, save: int = 0, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    evaluated = rows(8, seed=2) if settings.pop("eval_dataset", False) else None
    saving = {"save_strategy": "steps", "save_steps": save} if save else {"save_strategy": "no"}
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
            **saving,
            **settings,
        }
    )
    return Trainer(model, arguments, train_dataset=rows(48), eval_dataset=evaluated)


def gradual(
    model: Any,
    folder: str | os.PathLike[str],
    steps: int,
    save: int = 0,
    *,
    spend: bool = True,
    allocator: Any = "uniform",
    **settings: Any,
) -> tuple[Any, GradualPruner]:
    """A trainer that prunes after steps 2 and 4."""
    schedule = Schedule(sc.Budget(macs=0.7, spend=spend), start=0, end=4, rounds=2)
    pruner = GradualPruner(schedule, calibration(), allocator)
    trainer = a_trainer(model, folder, steps, save, **settings)
    GradualPruning(pruner).attach(trainer)
    return trainer, pruner
