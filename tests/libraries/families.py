"""Every family of Transformers, tiny and with random weights: pruned beside masked, called as its users call it.

    python -m tests.libraries.families KIND [NAME ...]

KIND is ``causal`` or ``seq2seq``. 30 % of the units of every group are removed at random, in float64. Then both
models are called with other sizes, padding, labels, embeddings, ``generate`` and a training step. A line a
family: what was refused, and what was wrong. Families whose tiny configuration cannot be made are skipped.
Ends with status 1 if a call gave something wrong, or an error that is not secateur's.
"""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import secateur as sc
from secateur.errors import SecateurError
from secateur.targets.units.masked import masked
from tests.zoo.importing import import_transformers
from tests.zoo.walk import random_keep

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
WORDS, SECONDS, LARGE = 96, 150, 5_000_000
TOLERANCE = 1e-7
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "mlp_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "rotary_dim", "time_step_rank"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "mamba_dt_rank"), 4),
    **dict.fromkeys(("head_dim", "attention_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_d_state", "attention_window", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_head", "sliding_window", "block_size"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), WORDS),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **{"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2},
    **{"num_kv_shared_layers": 0, "mamba_expand": 2},
}  # fmt: skip
"""Small values for the fields of configurations. Each family has some of the fields."""


class TooLong(BaseException):
    """A family took more than `SECONDS`."""


def tiny(configuration: type[Any]) -> Any:
    """A configuration with two layers, few units and no dropout. Experts run in a loop, which takes float64."""
    usual = configuration()
    sizes = {name: value for name, value in SIZES.items() if hasattr(usual, name)}
    if kinds := getattr(usual, "layer_types", None):
        sizes["layer_types"] = ([*dict.fromkeys(kinds)][:2] * 2)[:2]
    if getattr(usual, "num_key_value_heads", None) == getattr(usual, "num_attention_heads", 0):
        sizes["num_key_value_heads"] = 4
    sizes |= {
        k: 0.0 for k, v in vars(usual).items() if ("drop" in k or k.endswith("pdrop")) and type(v) is float
    }
    made = configuration(**sizes)
    made._experts_implementation = "eager"
    return made


def calls(kind: str) -> Iterator[tuple[str, Callable[[Any], torch.Tensor]]]:
    """Name and make the calls that both models get. Each returns a tensor."""
    few, more = ids(3, 7), ids(2, 12)
    padding = torch.ones_like(few)
    padding[0, :3] = 0
    decoded = {"decoder_input_ids": ids(3, 5)} if kind == "seq2seq" else {}
    long = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}

    def train(model: Any) -> torch.Tensor:
        model.train()
        torch.manual_seed(1)
        loss: torch.Tensor = model(input_ids=few, labels=few).loss
        loss.backward()
        model.eval().zero_grad()
        return loss.detach()

    yield "other size", lambda model: model(input_ids=few, **decoded).logits
    yield "padding", lambda model: model(input_ids=few, attention_mask=padding, **decoded).logits[:, 3:]
    yield "labels", lambda model: model(input_ids=more, labels=more).loss
    yield "generate", lambda model: model.generate(input_ids=few, **long)
    yield "generate, with padding", lambda m: m.generate(input_ids=few, attention_mask=padding, **long)
    yield "beams", lambda model: model.generate(input_ids=few, num_beams=2, **long)
    if kind == "causal":
        yield "embeddings", lambda model: model(inputs_embeds=model.get_input_embeddings()(few)).logits
    yield "training", train


def ids(samples: int, length: int) -> torch.Tensor:
    return torch.randint(3, WORDS - 6, (samples, length))


def compared(small: nn.Module, dense: nn.Module, call: Callable[[Any], torch.Tensor]) -> str:
    """What went wrong in a call of the pruned model; empty if nothing did, or the masked model fails too."""
    try:
        expected = call(dense).double()
    except Exception:  # the family does not know this call
        return ""
    try:
        got = call(small).double()
    except SecateurError as error:
        return f"refused: {str(error)[:200]}"
    except Exception as error:
        return f"CRASH: {type(error).__name__}: {str(error)[:200]}"
    if got.shape != expected.shape or not torch.equal(got.isnan(), expected.isnan()):
        return "WRONG"
    most = TOLERANCE * float(expected.nan_to_num().abs().max().clamp(min=1))
    return "" if float((got - expected).nan_to_num().abs().max()) <= most else "WRONG"


def walk(kind: str, model: nn.Module) -> list[str]:
    """Prune a model, and return what went wrong in its calls."""
    inputs = {"input_ids": ids(2, 12)} | ({"decoder_input_ids": ids(2, 10)} if kind == "seq2seq" else {})
    graph = sc.trace(model, inputs)
    plan = sc.Plan.build(graph, random_keep(graph), allocator="random")
    small = sc.apply(model, plan, graph=graph, example_inputs=inputs)
    sc.verify(model, small, plan, inputs)
    dense = masked(model, plan)
    found = [(name, compared(small, dense, call)) for name, call in calls(kind)]
    form = sc.record_of(small).form
    return ([] if form == "module" else [f"form {form}"]) + [
        f"{name}: {text}" for name, text in found if text
    ]


def main(kind: str, names: list[str]) -> int:
    """Walk the named families, or all."""
    warnings.simplefilter("ignore")
    transformers = import_transformers()
    logging.disable(logging.WARNING)
    auto = transformers.models.auto
    classes: dict[str, Any] = getattr(auto.modeling_auto, KINDS[kind])
    wrong = 0

    def late(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, late)
    for name in (n for n in classes if not names or n in names):
        made = classes[name] if isinstance(classes[name], str) else classes[name][0]
        torch.manual_seed(0)
        try:
            configuration = tiny(auto.configuration_auto.CONFIG_MAPPING[name])
            with torch.device("meta"):
                count = sum(p.numel() for p in getattr(transformers, made)(configuration).parameters())
            if count > LARGE:
                raise ValueError(f"{count:,} parameters")
            model = getattr(transformers, made)(configuration).eval().double()
            model(input_ids=ids(2, 12), **({"decoder_input_ids": ids(2, 10)} if kind == "seq2seq" else {}))
        except Exception as error:  # families differ in what their fields may be
            print(f"{name}: skipped, {type(error).__name__}: {str(error).strip()[:80]}", flush=True)
            continue
        signal.alarm(SECONDS)
        try:
            found = walk(kind, model)
        except SecateurError as error:
            found = [f"refused: {str(error)[:300]}"]
        except TooLong:
            found = [f"not done after {SECONDS} s"]
        finally:
            signal.alarm(0)
        wrong += any("WRONG" in one or "CRASH" in one for one in found)
        print(f"{name}: {'; '.join(found).replace(chr(10), ' ') or 'ok'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
