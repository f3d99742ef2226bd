"""Graphs, tables, policies, operators on functions, KANs, and transformers as lego: everything else."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.libraries.case import Case
from tests.libraries.vision_cases import made


def _edges(nodes: int, edges: int) -> Tensor:
    return torch.stack([torch.randint(0, nodes, (edges,)), torch.randint(0, nodes, (edges,))])


def _graph(_: int, size: Any) -> tuple[Tensor, ...]:
    nodes, edges = size
    return torch.randn(nodes, 6), _edges(nodes, edges)


def _relations(_: int, size: Any) -> tuple[Tensor, ...]:
    nodes, edges = size
    return torch.randn(nodes, 6), _edges(nodes, edges), torch.randint(0, 3, (edges,))


def _molecules(_: int, size: Any) -> tuple[Tensor, ...]:
    atoms, molecules = size
    return (
        torch.randint(1, 10, (atoms * molecules,)),
        torch.randn(atoms * molecules, 3),
        torch.arange(molecules).repeat_interleave(atoms),
    )


class _Near(nn.Module):
    """Which atoms of the same molecule see each other; the library's own function needs a compiled part."""

    def forward(self, positions: Tensor, molecule: Tensor) -> tuple[Tensor, Tensor]:
        distance = (positions[:, None] - positions[None]).square().sum(-1).add(1e-9).sqrt()
        near = (molecule[:, None] == molecule[None]) & (distance < 10.0) & (distance > 1e-3)
        edges = near.nonzero().t()
        return edges, (positions[edges[0]] - positions[edges[1]]).norm(dim=-1)


def _schnet() -> nn.Module:
    models: Any = import_module("torch_geometric.nn.models")
    model: nn.Module = models.SchNet(
        hidden_channels=16, num_filters=16, num_interactions=2, num_gaussians=8, interaction_graph=_Near()
    )
    return model


class _Convolutions(nn.Module):
    """Two graph convolutions with a linear layer after them, as tutorials write it."""

    def __init__(
        self, kind: str, *args: Any, last: int = 16, first: tuple[int, int] = (6, 16), **options: Any
    ) -> None:
        super().__init__()
        layer = getattr(import_module("torch_geometric.nn"), kind)
        self.first = layer(*first, *args, **options)
        self.second = layer(last, 12, *args, **options)
        self.out = nn.LazyLinear(4)

    def forward(self, x: Tensor, edges: Tensor, *more: Tensor) -> Tensor:
        x = F.elu(self.first(x, edges, *more))
        return self.out(F.elu(self.second(x, edges, *more)))


def _convolutions(kind: str, *args: Any, inputs: Any = _graph, **options: Any) -> Case:
    def make() -> nn.Module:
        # Else relational convolutions choose a kernel by the data, which no capture can hold.
        import_module("torch_geometric.backend").use_segment_matmul = False
        model = _Convolutions(kind, *args, **options)
        with torch.no_grad():
            model(*inputs(1, (7, 12)))
        return model

    return Case(f"PyG {kind}", "torch-geometric", make, inputs, NODES, batches=(1,))


def _pyg(kind: str, *args: Any, inputs: Any = _graph, sizes: Any = None, **options: Any) -> Case:
    return Case(
        f"PyG {kind}",
        "torch-geometric",
        made("torch_geometric.nn.models", kind, *args, **options),
        inputs,
        sizes or NODES,
        batches=(1,),
    )


NODES = ((20, 50), (27, 50), (13, 61))

GRAPHS = (
    _pyg("GCN", 6, 16, 2, out_channels=4),
    _pyg("GraphSAGE", 6, 16, 2, out_channels=4),
    _pyg("GIN", 6, 16, 2, out_channels=4, norm="batch_norm"),
    _pyg("GAT", 6, 16, 2, out_channels=4, heads=4),
    _convolutions("GATv2Conv", heads=2, concat=True, last=32),
    _convolutions("TransformerConv", heads=2, concat=True, last=32),
    _convolutions("ChebConv", 2),
    _convolutions("RGCNConv", 3, inputs=_relations),
    Case("PyG SchNet", "torch-geometric", _schnet, _molecules, ((5, 2), (7, 2), (5, 4)), batches=(1,)),
)


def _spaces() -> tuple[Any, Any]:
    spaces: Any = import_module("gymnasium.spaces")
    seen = {"position": spaces.Box(-1, 1, (5,)), "speed": spaces.Box(-1, 1, (3,)), "goal": spaces.Discrete(4)}
    return spaces.Dict(seen), spaces.Box(-1, 1, (2,))


def _actor_critic() -> nn.Module:
    policies: Any = import_module("stable_baselines3.common.policies")
    observed, actions = _spaces()
    model: nn.Module = policies.MultiInputActorCriticPolicy(
        observed, actions, lambda _: 1e-3, net_arch=[32, 24]
    )
    return model


def _q_network() -> nn.Module:
    policies: Any = import_module("stable_baselines3.dqn.policies")
    spaces: Any = import_module("gymnasium.spaces")
    policy = policies.MultiInputPolicy(_spaces()[0], spaces.Discrete(3), lambda _: 1e-3, net_arch=[32, 24])
    model: nn.Module = policy.q_net
    return model


def _seen(batch: int, _: Any) -> dict[str, Any]:
    goal = torch.randint(0, 4, (batch,))
    return {"obs": {"position": torch.randn(batch, 5), "speed": torch.randn(batch, 3), "goal": goal}}


def _decided(batch: int, _: Any) -> dict[str, Any]:
    return {**_seen(batch, _), "deterministic": True}


def predict(model: Any) -> Tensor:
    """The policy's own `predict`, on one observation in NumPy."""
    seen = {
        "position": torch.randn(1, 5),
        "speed": torch.randn(1, 3),
        "goal": torch.ones(1, dtype=torch.long),
    }
    actions, _ = model.predict({k: v.numpy() for k, v in seen.items()}, deterministic=True)
    return torch.from_numpy(actions)


def evaluate_actions(model: Any) -> list[Tensor]:
    """What the policy's training reads: values, log probabilities and entropy."""
    with torch.no_grad():
        return list(model.evaluate_actions(_seen(3, None)["obs"], torch.randn(3, 2)))


POLICIES = (
    Case(
        "SB3 PPO policy (dictionary)",
        "stable-baselines3",
        _actor_critic,
        _decided,
        (None,),
        uses={"predict": predict, "evaluate_actions": evaluate_actions},
    ),
    Case("SB3 DQN network (dictionary)", "stable-baselines3", _q_network, _seen, (None,)),
)


def _rows(width: int) -> Any:
    return lambda batch, _: (torch.randn(batch, width),)


def _mixed(batch: int, _: Any) -> tuple[Tensor, ...]:
    return torch.randn(batch, 5), torch.randint(0, 3, (batch, 2))


TABLES = (
    Case(
        "rtdl FT-Transformer",
        "rtdl-revisiting-models",
        made(
            "rtdl_revisiting_models",
            "FTTransformer",
            n_cont_features=5,
            cat_cardinalities=[3, 3],
            d_out=2,
            n_blocks=2,
            d_block=32,
            attention_n_heads=4,
            attention_dropout=0.0,
            ffn_d_hidden=48,
            ffn_d_hidden_multiplier=None,
            ffn_dropout=0.0,
            residual_dropout=0.0,
        ),
        _mixed,
        (None,),
        batches=(4, 1, 3),
    ),
    Case(
        "rtdl ResNet",
        "rtdl-revisiting-models",
        made(
            "rtdl_revisiting_models",
            "ResNet",
            d_in=8,
            d_out=2,
            n_blocks=2,
            d_block=24,
            d_hidden=32,
            d_hidden_multiplier=None,
            dropout1=0.0,
            dropout2=0.0,
        ),
        _rows(8),
        (None,),
    ),
    Case(
        "TabNet",
        "pytorch-tabnet",
        made(
            "pytorch_tabnet.tab_network",
            "TabNet",
            8,
            3,
            n_d=8,
            n_a=8,
            n_steps=2,
            group_attention_matrix=torch.eye(8),
        ),
        _rows(8),
        (None,),
        batches=(4, 2, 3),
    ),
)


def _words(batch: int, length: Any) -> tuple[Tensor, ...]:
    return (torch.randint(0, 100, (batch, length)),)


def _lego(kind: str) -> Any:
    def make() -> nn.Module:
        library: Any = import_module("x_transformers")
        options = {
            "Decoder": {"rotary_pos_emb": True, "attn_kv_heads": 2, "ff_glu": True},
            "Encoder": {"alibi_pos_bias": True, "use_rmsnorm": True},
        }[kind]
        layers = getattr(library, kind)(dim=48, depth=2, heads=4, attn_dim_head=12, **options)
        model: nn.Module = library.TransformerWrapper(num_tokens=100, max_seq_len=64, attn_layers=layers)
        return model

    return make


def _lora() -> nn.Module:
    peft: Any = import_module("peft")
    transformers: Any = import_module("transformers")
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6, vocab_size=100
    )
    config.use_cache = False
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model: nn.Module = peft.get_peft_model(transformers.LlamaForCausalLM(config), options)
    return model


def merge(model: Any) -> Tensor:
    """LoRA's weights merged into the base model, which must compute the same."""
    with torch.no_grad():
        return model.merge_and_unload()(torch.arange(12)[None]).logits


def _kan(name: str, **options: Any) -> Case:
    def make() -> nn.Module:
        model: nn.Module = getattr(import_module("kan"), name)(
            width=[4, 8, 6, 2], grid=3, k=3, auto_save=False, save_act=False, **options
        )
        return model

    return Case(f"pykan {name}{' without symbols' if options else ''}", "pykan", make, _rows(4), (None,))


def _denoiser(batch: int, size: Any) -> tuple[Tensor, ...]:
    return torch.randn(batch, 3, *size), torch.randint(0, 100, (batch,))


REST = (
    _kan("KAN"),
    _kan("KAN", symbolic_enabled=False),
    Case(
        "neuraloperator FNO",
        "neuraloperator",
        made(
            "neuralop.models",
            "FNO",
            n_modes=(4, 4),
            in_channels=1,
            out_channels=1,
            hidden_channels=12,
            n_layers=2,
        ),
        lambda batch, size: (torch.randn(batch, 1, *size),),
        ((16, 16), (24, 16), (32, 20)),
    ),
    Case(
        "denoising-diffusion Unet",
        "denoising-diffusion-pytorch",
        made(
            "denoising_diffusion_pytorch",
            "Unet",
            dim=16,
            dim_mults=(1, 2),
            attn_dim_head=8,
            attn_heads=2,
            flash_attn=False,
        ),
        _denoiser,
        ((16, 16), (24, 32)),
    ),
    Case("x-transformers Decoder", "x-transformers", _lego("Decoder"), _words, (10, 17)),
    Case("x-transformers Encoder", "x-transformers", _lego("Encoder"), _words, (10, 17)),
    Case(
        "mambapy Mamba",
        "mambapy",
        lambda: import_module("mambapy.mamba").Mamba(
            import_module("mambapy.mamba").MambaConfig(d_model=32, n_layers=2, d_state=8)
        ),
        lambda batch, length: (torch.randn(batch, length, 32),),
        (16, 25),
    ),
    Case(
        "PEFT Llama with LoRA",
        "peft",
        _lora,
        lambda batch, length: {"input_ids": torch.randint(0, 100, (batch, length))},
        (10, 17),
        uses={"merge": merge},
    ),
)

CASES = (*GRAPHS, *POLICIES, *TABLES, *REST)
