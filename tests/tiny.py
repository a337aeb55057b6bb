"""Components with genuine Stable Diffusion configurations and random weights, for tests of shapes and plumbing only."""

from __future__ import annotations

import inspect

import diffusers
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from vml_ldm.assets import bundled_model


def unet(in_channels: int = 4, seed: int = 0, **options) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    options = {"cross_attention_dim": 128, "attention_head_dim": 4, **options}
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    ).eval()


def vae(seed: int = 0, **options) -> AutoencoderKL:
    torch.manual_seed(seed)
    options = {"latent_channels": 4, "scaling_factor": 0.18215, **options}
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
        **options,
    ).eval()


def gradient_vae(seed: int = 0, **options) -> AutoencoderTiny:
    """Of the same latents as `vae`."""
    torch.manual_seed(seed)
    narrow, few = (8, 8, 8, 8), (1, 1, 1, 1)
    shape = {"num_encoder_blocks": few, "num_decoder_blocks": few, "decoder_block_out_channels": narrow, **options}
    return AutoencoderTiny(encoder_block_out_channels=narrow, **shape).eval()


def asymmetric_vae(seed: int = 0) -> AsymmetricAutoencoderKL:
    """Of the same latents as `vae`; its decoder is told what is known."""
    torch.manual_seed(seed)
    narrow = {"down_block_out_channels": (8, 8, 8, 8), "up_block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AsymmetricAutoencoderKL(**narrow, **blocks).eval()


def consistency_vae(seed: int = 0) -> ConsistencyDecoderVAE:
    """Of the same latents as `vae`; its decoder draws with noise of its own."""
    torch.manual_seed(seed)
    shape = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    encoder, decoder = ({f"{part}_{name}": value for name, value in shape.items()} for part in ("encoder", "decoder"))
    return ConsistencyDecoderVAE(**encoder, **decoder).eval()


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


def text_encoder(seed: int = 0, cls=CLIPTextModel, width: int = 128, layers: int = 1, **options) -> CLIPTextModel:
    torch.manual_seed(seed)
    size = {"hidden_size": width, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    words = {"vocab_size": 1742, "max_position_embeddings": 32, "bos_token_id": 1740, "eos_token_id": 1741}
    return cls(CLIPTextConfig(**size, **words, pad_token_id=1741, **options)).eval()


KNOWN = torch.ones(1, 1, 64, 64)
KNOWN[..., 32:] = 0
HALF_PAINTED = {  # a short call of an inpainting pipeline, but for its prompt
    "image": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
    "mask_image": 1 - KNOWN,
    "num_inference_steps": 12,
    "inner_steps": 2,
    "output_type": "pt",
    "return_report": True,
    "paste": False,
}


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


def xl_components(in_channels: int = 4, scores: bool = False) -> dict:
    """Every component of a Stable Diffusion XL pipeline, for images of 64 x 64 pixels.

    Args:
        scores: a refiner, which has one text encoder and takes an aesthetic score.
    """
    pooled, time_ids = 16, 5 if scores else 6
    sizes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * time_ids + pooled,
        "cross_attention_dim": 32 if scores else 64,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
    }
    projected = {"cls": CLIPTextModelWithProjection, "projection_dim": pooled, "hidden_act": "gelu"}
    return {
        "unet": unet(in_channels, **sizes),
        "vae": vae(scaling_factor=0.13025, force_upcast=True),
        "text_encoder": None if scores else text_encoder(1, width=32, layers=2),
        "tokenizer": None if scores else tokenizer(),
        "text_encoder_2": text_encoder(2, width=32, layers=2, **projected),
        "tokenizer_2": tokenizer(),
        "scheduler": scheduler(cls=EulerDiscreteScheduler, timestep_spacing="leading", steps_offset=1),
    }


def sd3_components(in_channels: int = 16, t5: bool = True, **flow) -> dict:
    """Every component of a Stable Diffusion 3 pipeline, for images of 64 x 64 pixels.

    Args:
        t5: with the third text encoder, which a user may leave out.
        flow: configuration of the scheduler.
    """
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=in_channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        out_channels=16,
        pos_embed_max_size=16,
    ).eval()
    size = {"d_model": 48, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    alphabet = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(ord("a"), ord("z") + 1))]
    words = T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(alphabet)], extra_ids=0)
    projected = {"cls": CLIPTextModelWithProjection, "width": 16, "layers": 2, "projection_dim": 16}
    return {
        "transformer": transformer,
        "vae": vae(
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "text_encoder": text_encoder(1, **projected),
        "tokenizer": tokenizer(),
        "text_encoder_2": text_encoder(2, hidden_act="gelu", **projected),
        "tokenizer_2": tokenizer(),
        "text_encoder_3": T5EncoderModel(T5Config(**size)).eval() if t5 else None,
        "tokenizer_3": words if t5 else None,
        "scheduler": FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **flow}),
    }


def save(folder) -> str:
    """A checkpoint of `components` in diffusers' layout; its path."""
    pipe = StableDiffusionPipeline(**components(), requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return str(folder)
