"""Small networks with residual blocks and random weights: by hand, of Transformers and of timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.importing import import_timm, import_transformers

WIDTH, WORDS = 16, 64


class Residual(nn.Module):
    """x + down(relu(up(x)))."""

    def __init__(self, width: int = WIDTH, inner: int = 24) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Chain(nn.Module):
    """A list of residual blocks between two layers; subclasses run them in ways of their own."""

    def __init__(self, depth: int = 4, block: Callable[[], nn.Module] = Residual) -> None:
        super().__init__()
        self.depth = depth
        self.stem, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def stream(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.stream(self.stem(x)))
        return head


class Counted(Chain):
    """Runs as many as an attribute says."""

    def stream(self, x: Tensor) -> Tensor:
        for k in range(self.depth):
            x = self.blocks[k](x)
        return x


class Zipped(Chain):
    """Each block has a factor in another list."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = [1.0, 0.5, 2.0, 0.25]

    def stream(self, x: Tensor) -> Tensor:
        for factor, block in zip(self.factors, self.blocks, strict=False):
            x = factor * block(x)
        return x


class Indexed(Chain):
    """Reads its blocks by constants."""

    def stream(self, x: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[3](self.blocks[2](x.tanh()))


class Tapped(Chain):
    """Returns the stream behind the second block, too."""

    def forward(self, x: Tensor) -> Any:
        x, taps = self.stem(x), []
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k == 1:
                taps.append(x)
        return self.head(x), *taps


class Twice(Chain):
    """Calls its first block again at the end."""

    def stream(self, x: Tensor) -> Tensor:
        return self.blocks[0](super().stream(x))


class Shared(Chain):
    """Holds one block in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = self.blocks[0]


class Sharing(Chain):
    """Two blocks share a matrix, or all their layers."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        for name in ("up", "down") if whole else ("up",):
            layer, other = (getattr(self.blocks[k], name) for k in (0, 2))
            if whole:
                setattr(self.blocks[2], name, layer)
            else:
                other.weight = layer.weight


class TupleBlock(Residual):
    """Returns a tuple: the stream, an argument, nothing."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return super().forward(x) * 1.0, mask, None


class Tuples(Chain):
    """Blocks that return tuples."""

    def __init__(self) -> None:
        super().__init__(block=TupleBlock)

    def stream(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(x[:1])
        for block in self.blocks:
            x, mask, _ = block(x, mask)
        return x * mask


class Telling(Residual):
    """Returns beside the stream what a later block needs."""

    def forward(self, x: Tensor, told: Tensor | None = None) -> Any:
        told = self.up.bias.sum() + (0 if told is None else told)
        return super().forward(x) + told, told


class Told(Chain):
    """Each block tells the next one something that it computes."""

    def __init__(self) -> None:
        super().__init__(block=Telling)

    def stream(self, x: Tensor) -> Tensor:
        told = None
        for block in self.blocks:
            x, told = block(x, told)
        return x


class Dropping(Residual):
    """With dropout, and a path that is dropped in training."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.drop(self.down(torch.relu(self.up(x))))
        if self.training:
            branch = branch * (torch.rand(len(x), *[1] * (x.ndim - 1)) > 0.5)
        return x + branch


class Stateful(Residual):
    """Counts its calls in a buffer that it reads."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + 0.01 * self.calls


class Inplace(nn.Module):
    """Writes into its input first, as some pre-activation networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(x)
        return x + self.down(self.up(x))


class Basic(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.short = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


class ResNet(nn.Module):
    """Two stages of basic blocks, of which one changes the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(*(Basic(8, 8) for _ in range(3)))
        self.layer2 = nn.Sequential(Basic(8, 12, 2), Basic(12, 12), Basic(12, 12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.stem(x))))
        head: Tensor = self.head(x.mean((2, 3)))
        return head


class Plain(nn.Module):
    """Layers that keep the shape, and are no residual blocks: each weighs or gates what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Gate(), nn.Linear(WIDTH, WIDTH), Gate()
        )

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found


class Gate(nn.Module):
    """A factor that a layer computes from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.layer(x))


ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
MAPS = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(3, WORDS, (2, 9), generator=torch.Generator().manual_seed(0))

_TEXT: dict[str, Any] = {
    **{"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_KV: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "intermediate_size": 48}
_IDS = {"input_ids": IDS}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Tensor]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _KV, _IDS),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_KV, "head_dim": 8}, _IDS),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_KV, "head_dim": 8, "num_hidden_layers": 7, "sliding_window": 4},
        _IDS,
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_TEXT, "n_embd": 32, "n_layer": 4, "n_head": 4}, _IDS),
    "bert": ("BertConfig", "BertForMaskedLM", {**_TEXT, "intermediate_size": 48}, _IDS),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **_KV,
            **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
            **{"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
        },
        _IDS,
    ),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {**_TEXT, "intermediate_size": 48, "image_size": 32, "patch_size": 8},
        {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **{"vocab_size": WORDS, "d_model": 32, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 3},
            **{"num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0},
        },
        {"input_ids": IDS, "decoder_input_ids": IDS},
    ),
}
TIMM: dict[str, tuple[str, dict[str, Any], int]] = {
    "deit": (
        "deit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 4, "depth": 4},
        32,
    ),
    "convnext": ("convnext_atto", {"dims": (8, 16, 24, 32), "depths": (2, 2, 3, 2)}, 64),
    "efficientnet": ("efficientnet_lite0", {}, 64),
}
PLAIN: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "chain": (Chain, ROWS),
    "counted": (Counted, ROWS),
    "zipped": (Zipped, ROWS),
    "indexed": (Indexed, ROWS),
    "tapped": (Tapped, ROWS),
    "tuples": (Tuples, ROWS),
    "dropping": (lambda: Chain(block=Dropping), ROWS),
    "stateful": (lambda: Chain(block=Stateful), ROWS),
    "resnet": (ResNet, MAPS),
}
"""Networks by hand of which all that look like residual blocks can go."""

LIBRARIES = [
    *(TRANSFORMERS if import_transformers() is not None else ()),
    *(TIMM if import_timm() is not None else ()),
]


def make(name: str) -> tuple[nn.Module, Any]:
    """A network in evaluation mode, and inputs for it."""
    torch.manual_seed(0)
    if name in PLAIN:
        build, inputs = PLAIN[name]
        model = build().eval()
    elif name in TIMM:
        architecture, options, side = TIMM[name]
        timm: Any = import_timm()
        model = timm.create_model(architecture, num_classes=5, **options).eval()
        inputs = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    else:
        config, kind, options, inputs_ = TRANSFORMERS[name]
        transformers: Any = import_transformers()
        return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval(), inputs_
    for parameter in model.parameters():  # no branch that a small factor hides
        if parameter.ndim < 2:
            nn.init.normal_(parameter, 0.5, 0.2)
    return model, inputs
