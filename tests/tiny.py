"""Components with genuine Stable Diffusion configurations and random weights, for tests of shapes and plumbing only."""

from __future__ import annotations

import inspect

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vml_ldm.assets import bundled_model


def unet(in_channels: int = 4, seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
    ).eval()


def unet2d(channels: int = 3, seed: int = 0, **options) -> UNet2DModel:
    """Of pixels or latents, unconditional."""
    torch.manual_seed(seed)
    options = {"in_channels": channels, "out_channels": channels, **options}
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    ).eval()


def vqvae(seed: int = 0) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.5,
    ).eval()


def scheduler(prediction_type: str = "epsilon", cls=DDIMScheduler, **options):
    return cls(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        **options,
    )


def schedulers() -> list[type]:
    """diffusers' schedulers for Stable Diffusion, as far as what they need is installed."""
    names = [
        *(kind.name for kind in KarrasDiffusionSchedulers if not kind.name.startswith("EDM")),
        "LCMScheduler",
        "TCDScheduler",
    ]
    found = (getattr(diffusers, name) for name in names)
    return [cls for cls in found if ".dummy_" not in cls.__module__]


def options(function) -> set[str]:
    """The names of a function's, or of a class's constructor's, arguments."""
    return set(inspect.signature(function).parameters)


def tokenizer() -> CLIPTokenizer:
    """The bundled checkpoint's: a vocabulary has no weights."""
    return CLIPTokenizer.from_pretrained(bundled_model(), subfolder="tokenizer")


def text_encoder(seed: int = 0) -> CLIPTextModel:
    torch.manual_seed(seed)
    width = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"vocab_size": 1742, "max_position_embeddings": 32, "bos_token_id": 1740, "eos_token_id": 1741}
    return CLIPTextModel(CLIPTextConfig(**width, **words, pad_token_id=1741)).eval()


def components() -> dict:
    """Every component of a Stable Diffusion pipeline, for images of 64 x 64 pixels."""
    none = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    networks = {"unet": unet(), "vae": vae(), "text_encoder": text_encoder()}
    return {
        **networks,
        "tokenizer": tokenizer(),
        "scheduler": scheduler(steps_offset=1, set_alpha_to_one=False, clip_sample=False),
        **none,
    }


def save(folder) -> str:
    """A checkpoint of `components` in diffusers' layout; its path."""
    pipe = StableDiffusionPipeline(**components(), requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return str(folder)
