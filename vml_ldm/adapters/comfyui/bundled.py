"""The bundled checkpoint as ComfyUI's MODEL, VAE and CONDITIONING.

Its networks have group norms that ComfyUI's own modules cannot hold, so they are diffusers' modules under ComfyUI's
patchers: LoRAs, previews, offloading and samplers work on them; ControlNets do not.
"""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec

import comfy.model_management as management
import torch
from comfy.latent_formats import SD15 as LatentFormat
from comfy.ldm.models.autoencoder import AutoencoderKL as ComfyAutoencoderKL
from comfy.model_base import BaseModel, ModelType
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy.supported_models import SD15
from torch import Tensor, nn

from ...assets import bundled_model

_TYPES = {"epsilon": ModelType.EPS, "v_prediction": ModelType.V_PREDICTION}


def check_installed() -> None:
    """Raises ModuleNotFoundError without the packages that the bundled checkpoint's networks come from."""
    missing = [name for name in ("diffusers", "transformers") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the bundled checkpoint needs {' and '.join(missing)}, which ComfyUI's Python does not have. Install "
            f"there: {sys.executable} -m pip install {' '.join(missing)}"
        )


def load_model() -> ModelPatcher:
    """The UNet as MODEL."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(bundled_model(), subfolder="unet").eval()
    noise = DDIMScheduler.from_pretrained(bundled_model(), subfolder="scheduler").config
    scale = AutoencoderKL.load_config(bundled_model(), subfolder="vae")["scaling_factor"]
    described = SD15({"in_channels": unet.config.in_channels, "model_channels": unet.config.block_out_channels[0]})
    described.set_inference_dtype(torch.float32, None)
    described.latent_format = LatentFormat(scale)
    described.sampling_settings |= {  # ComfyUI's "linear" is diffusers' "scaled_linear"
        "linear_start": noise.beta_start,
        "linear_end": noise.beta_end,
        "timesteps": noise.num_train_timesteps,
    }
    model = BaseModel(described, _TYPES[noise.prediction_type], unet_model=lambda **_: _UNet(unet)).eval()
    return ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


def load_vaes() -> tuple[VAE, VAE]:
    """The VAE, and the one with the small decoder for the gradients."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    full = AutoencoderKL.from_pretrained(bundled_model(), subfolder="vae").eval()
    small = AutoencoderTiny.from_pretrained(bundled_model(), subfolder="gradient_vae").eval()
    ratio = full.config.scaling_factor / small.config.scaling_factor
    return _vae(_Autoencoder(full), full.config), _vae(_TinyAutoencoder(small, ratio), full.config)


def encode_prompts(*prompts: str) -> list[list]:
    """A CONDITIONING for each prompt."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(bundled_model(), subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(bundled_model(), subfolder="text_encoder").eval()
    with torch.no_grad():
        return [[[encoder(_tokens(tokenizer, prompt))[0], {"pooled_output": None}]] for prompt in prompts]


def _tokens(tokenizer, prompt: str) -> Tensor:
    length = tokenizer.model_max_length
    return tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def _vae(network: nn.Module, config) -> VAE:
    """A VAE around a network with `encode` and `decode`; the constructor's own one is of the least size and left."""
    stride = 2 ** (len(config.block_out_channels) - 1)
    shape = {
        "double_z": True, "z_channels": config.latent_channels, "resolution": 32, "in_channels": 3, "out_ch": 3,
        "ch": 32, "ch_mult": [1] * int(math.log2(stride) + 1), "num_res_blocks": 1, "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip
    own = {"ddconfig": shape, "embed_dim": config.latent_channels}
    vae = VAE(sd=ComfyAutoencoderKL(**own).state_dict(), config={"params": own}, dtype=torch.float32)
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = config.latent_channels, stride, stride
    vae.first_stage_model, vae.size = network, None
    vae.patcher = ModelPatcher(network, vae.device, management.vae_offload_device())
    return vae


class _UNet(nn.Module):
    """A diffusers UNet, called as ComfyUI calls its own."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, control=None, **_) -> Tensor:
        if control is not None:
            raise ValueError("the bundled MODEL came with a ControlNet; expected none. Take another checkpoint.")
        return self.unet(x, timesteps, encoder_hidden_states=context, return_dict=False)[0]


class _Autoencoder(nn.Module):
    """A diffusers `AutoencoderKL`, called as ComfyUI calls its own."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def encode(self, image: Tensor) -> Tensor:
        return self.vae.encode(image).latent_dist.mode()

    def decode(self, latent: Tensor, **_) -> Tensor:
        return self.vae.decode(latent, return_dict=False)[0]


class _TinyAutoencoder(nn.Module):
    """A diffusers `AutoencoderTiny` of the full one's latents, which are a ratio apart from its own."""

    def __init__(self, vae: nn.Module, ratio: float):
        super().__init__()
        self.vae, self.ratio = vae, ratio

    def encode(self, image: Tensor) -> Tensor:
        return self.vae.encode(image, return_dict=False)[0] / self.ratio

    def decode(self, latent: Tensor, **_) -> Tensor:
        return self.vae.decode(self.ratio * latent, return_dict=False)[0]
