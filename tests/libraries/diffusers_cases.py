"""diffusers: networks that denoise, and the autoencoders around them."""

from __future__ import annotations

import copy
import tempfile
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from tests.libraries.case import Case, Use

GROUPS = {"norm_num_groups": 4}
BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, **GROUPS}
CODED = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    **BLOCKS,
}


def _make(name: str, **options: Any) -> Any:
    return lambda: getattr(import_module("diffusers"), name)(**options)


def _steps(batch: int) -> Tensor:
    return torch.randint(0, 1000, (batch,))


def _noisy(channels: int = 3) -> Any:
    def inputs(batch: int, size: Any) -> dict[str, Any]:
        return {
            "sample": torch.randn(batch, channels, *size),
            "timestep": _steps(batch),
            "return_dict": False,
        }

    return inputs


def _conditioned(channels: int, width: int) -> Any:
    def inputs(batch: int, size: Any) -> dict[str, Any]:
        height, length, words = size
        return {
            "sample": torch.randn(batch, channels, height, length),
            "timestep": _steps(batch),
            "encoder_hidden_states": torch.randn(batch, words, width),
            "return_dict": False,
        }

    return inputs


def _labelled(batch: int, size: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, *size),
        "timestep": _steps(batch),
        "class_labels": torch.randint(0, 10, (batch,)),
        "return_dict": False,
    }


def _pixels(channels: int = 3) -> Any:
    return lambda batch, size: {"sample": torch.randn(batch, channels, *size), "return_dict": False}


def _flux(batch: int, size: Any) -> dict[str, Any]:
    tokens, words = size
    return {
        "hidden_states": torch.randn(batch, tokens, 16),
        "encoder_hidden_states": torch.randn(batch, words, 32),
        "pooled_projections": torch.randn(batch, 32),
        "timestep": torch.rand(batch),
        "img_ids": torch.randint(0, 8, (tokens, 3)).float(),
        "txt_ids": torch.zeros(words, 3),
        "return_dict": False,
    }


def _sd3(batch: int, size: Any) -> dict[str, Any]:
    height, width, words = size
    return {
        "hidden_states": torch.randn(batch, 4, height, width),
        "encoder_hidden_states": torch.randn(batch, words, 32),
        "pooled_projections": torch.randn(batch, 64),
        "timestep": _steps(batch),
        "return_dict": False,
    }


def _pixart(batch: int, size: Any) -> dict[str, Any]:
    height, width, words = size
    return {
        "hidden_states": torch.randn(batch, 4, height, width),
        "encoder_hidden_states": torch.randn(batch, words, 32),
        "timestep": _steps(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def _video(batch: int, size: Any) -> dict[str, Any]:
    frames, height, width = size
    return {
        "sample": torch.randn(batch, 4, frames, height, width),
        "timestep": _steps(batch),
        "encoder_hidden_states": torch.randn(batch, 5, 32),
        "return_dict": False,
    }


def unconditional_step(model: nn.Module) -> Tensor:
    """Two steps of a DDPM pipeline, with the network as the pipeline's own."""
    diffusers: Any = import_module("diffusers")
    pipeline = diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    made = pipeline(batch_size=2, num_inference_steps=2, output_type="np", generator=generator).images
    return torch.from_numpy(made)


def _autoencoder() -> Any:
    return _make("AutoencoderKL", latent_channels=4, **CODED)().eval()


def latent_step(model: nn.Module) -> Tensor:
    """Two steps of Stable Diffusion with guidance, around embeddings of a prompt."""
    diffusers: Any = import_module("diffusers")
    torch.manual_seed(5)
    vae = _autoencoder()
    scheduler = diffusers.DDIMScheduler()
    pipeline = diffusers.StableDiffusionPipeline(
        vae, None, None, model, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt_embeds=torch.randn(1, 7, 32),
        negative_prompt_embeds=torch.randn(1, 7, 32),
        num_inference_steps=2,
        guidance_scale=3.0,
        height=32,
        width=32,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    return made


def dit_step(model: nn.Module) -> Tensor:
    """Two steps of the pipeline for DiT."""
    diffusers: Any = import_module("diffusers")
    torch.manual_seed(5)
    vae = _autoencoder()
    pipeline = diffusers.DiTPipeline(model, vae, diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline([1], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(made.images)


def encode_and_decode(model: nn.Module) -> list[Tensor]:
    """The autoencoder's two methods, one after the other; the code between them has fewer channels."""
    pixels = torch.randn(2, 3, 24, 40)
    with torch.no_grad():
        latent: Any = model.encode(pixels)  # type: ignore[operator]
        code = latent.latent_dist.mode() if hasattr(latent, "latent_dist") else latent.latents
        return [model.decode(code).sample]  # type: ignore[operator]


def save_pretrained(model: nn.Module) -> list[Tensor]:
    """What the model's own `save_pretrained` writes, read again."""
    torch_files: Any = import_module("safetensors.torch")
    with tempfile.TemporaryDirectory() as folder:
        copy.deepcopy(model).save_pretrained(folder)  # type: ignore[operator]
        held = torch_files.load_file(f"{folder}/diffusion_pytorch_model.safetensors")
    if held.keys() != model.state_dict().keys():
        raise AssertionError("expected the file to hold the model's tensors.")
    return []


def _case(
    name: str, kind: str, inputs: Any, sizes: tuple[Any, ...], use: Use | None = None, **options: Any
) -> Case:
    uses = {"save_pretrained": save_pretrained}
    if use is not None:
        uses[use.__name__.replace("_", " ")] = use
    return Case(name, "diffusers", _make(kind, **options), inputs, sizes, uses=uses)


UNET = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "sample_size": 16,
    **BLOCKS,
}
TRANSFORMER = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}

CASES = (
    _case(
        "UNet2D",
        "UNet2DModel",
        _noisy(),
        ((16, 16), (32, 16), (24, 40)),
        unconditional_step,
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **BLOCKS,
    ),
    _case(
        "UNet2DCondition",
        "UNet2DConditionModel",
        _conditioned(4, 32),
        ((16, 16, 7), (32, 16, 7), (16, 24, 11)),
        latent_step,
        **UNET,
    ),
    _case(
        "UNet2DCondition (class labels)",
        "UNet2DConditionModel",
        _conditioned(4, 32),
        ((16, 16, 7), (24, 16, 9)),
        latent_step,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        **UNET,
    ),
    _case(
        "UNet3DCondition",
        "UNet3DConditionModel",
        _video,
        ((3, 16, 16), (5, 16, 24)),
        cross_attention_dim=32,
        attention_head_dim=4,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        **BLOCKS,
    ),
    _case(
        "AutoencoderKL",
        "AutoencoderKL",
        _pixels(),
        ((16, 16), (32, 16), (24, 40)),
        encode_and_decode,
        latent_channels=4,
        **CODED,
    ),
    _case(
        "VQModel",
        "VQModel",
        _pixels(),
        ((16, 16), (32, 24)),
        encode_and_decode,
        latent_channels=4,
        num_vq_embeddings=32,
        **CODED,
    ),
    _case(
        "AutoencoderTiny",
        "AutoencoderTiny",
        _pixels(),
        ((32, 32), (64, 48)),
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ),
    _case(
        "DiT",
        "DiTTransformer2DModel",
        _labelled,
        ((8, 8),),
        dit_step,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
        **TRANSFORMER,
    ),
    _case(
        "PixArt",
        "PixArtTransformer2DModel",
        _pixart,
        ((8, 8, 6), (8, 8, 9)),
        in_channels=4,
        out_channels=8,
        sample_size=8,
        cross_attention_dim=32,
        caption_channels=32,
        norm_num_groups=4,
        **TRANSFORMER,
    ),
    _case(
        "SD3",
        "SD3Transformer2DModel",
        _sd3,
        ((8, 8, 6), (8, 12, 9)),
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        **TRANSFORMER,
    ),
    _case(
        "Flux",
        "FluxTransformer2DModel",
        _flux,
        ((16, 5), (24, 9)),
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=False,
        **TRANSFORMER,
    ),
)
