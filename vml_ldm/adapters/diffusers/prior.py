"""Text-to-image checkpoints as a `Prior`: prompt, guidance and VAE; Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers import AsymmetricAutoencoderKL
from diffusers.utils import USE_PEFT_BACKEND
from torch import Tensor, nn

from ...guidance import mixed, rescaled
from .network import Autoencoded
from .precision import cast
from .unet import UNetPrior

_LISTS = ("image_embeds", "ip_adapter_image_embeds", "controlnet_cond")  # a tensor for each adapter or network
_ATTENTION = ("cross_attention_kwargs", "joint_attention_kwargs")  # of a UNet, of a transformer


class GuidedPrior(Autoencoded):
    """For a `NetworkPrior` of a VAE's latents (`AutoencoderKL`, `AutoencoderTiny`) that is conditioned on a prompt.

    `denoise` is conditioned on the prompt alone: a posterior mean, whose Jacobian the loss needs. Guidance, a scale
    w > 1 and a negative prompt, adds `push` to it; `guided` has both, in one pass of the network.

    A LoRA's ``scale`` among the attention's arguments of `condition` acts on the network's layers within `with`.

    Attributes:
        condition, negative, guidance_scale, inpainting: as they came, and free to be changed.
        guidance_rescale: phi of `vml_ldm.guidance.rescaled`, in [0, 1]; 0 is none.
        told: what an `AsymmetricAutoencoderKL` decodes with beside the latents: image (B, 3, H, W) in [-1, 1] and mask
            (B, 1, H, W), 1 = painted. Empty: it draws everything.
    """

    def _hold(
        self,
        vae: nn.Module,
        condition: dict,
        negative: dict | None,
        guidance_scale: float,
        guidance_rescale: float,
        inpainting,
    ) -> None:
        self.vae, self.condition, self.negative = vae, condition, negative
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.inpainting, self.told = inpainting, {}

    def select(self, rows: Tensor, batch: int) -> GuidedPrior:
        """The prior of some images of a batch: their rows of all that the network is told, on the same networks."""
        part = copy.copy(self)
        for name in ("condition", "negative", "inpainting", "told"):
            setattr(part, name, _selected(getattr(self, name), rows, batch))
        return part

    def __enter__(self):
        super().__enter__()
        for given in filter(None, map(self.condition.get, _ATTENTION)):
            self._guard.scale_lora(self._network, given.get("scale", 1.0))
        return self

    @property
    def push(self) -> Callable[[Tensor, Tensor, float, float], Tensor] | None:
        """What guidance adds to an estimate, see `_push`; None without a negative prompt, or at w <= 1."""
        return None if self.negative is None or self.guidance_scale <= 1 else self._push

    def guided(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``D_w(x_t)``, (B, c, h, w) float32; `denoise` if no w. The prompt and the negative prompt go in one batch,
        where memory allows."""
        if self.push is None:
            return self.denoise(x_t, alpha, sigma)

        def at_once() -> Tensor:
            both = joined(self.negative, self.condition)
            run = lambda: self._denoise(torch.cat([x_t, x_t]), alpha, sigma, both)  # noqa: E731
            negative, conditional = self._guard.run(self._name, self._network, run).chunk(2)
            return self._mixed(x_t, conditional, negative, alpha)

        def one_by_one() -> Tensor:
            z0_hat = self.denoise(x_t, alpha, sigma)
            return z0_hat + self._push(x_t, z0_hat, alpha, sigma)

        return self.steps.either("both prompts in one batch", at_once, one_by_one)

    def _push(self, x_t: Tensor, z0_hat: Tensor, alpha: float, sigma: float) -> Tensor:
        """``D_w(x_t) - z0_hat``, of the conditional estimate z0_hat at x_t: a pass with the negative prompt."""
        run = lambda: self._denoise(x_t, alpha, sigma, self.negative)  # noqa: E731
        return self._mixed(x_t, z0_hat, self._guard.run(self._name, self._network, run), alpha) - z0_hat

    def _mixed(self, x_t: Tensor, conditional: Tensor, negative: Tensor, alpha: float) -> Tensor:
        guided = mixed(conditional, negative, self.guidance_scale)
        return rescaled(guided, conditional, x_t, alpha, self.guidance_rescale)

    def _inputs(self, x: Tensor, condition: dict | None) -> tuple[Tensor, dict]:
        """The state with what is appended to it, and a condition (None: the prompt), as the denoiser takes them."""
        inputs = x if self.inpainting is None else torch.cat([x, _repeated(self.inpainting, len(x)).to(x)], dim=1)
        placed = self._guard.place(self._network, inputs)
        condition = _without_scale(self.condition if condition is None else condition)
        return placed, cast(condition, placed)

    def _encode(self, image: Tensor, vae: nn.Module) -> Tensor:
        encoded = vae.encode(self._guard.place(vae, 2 * image - 1), return_dict=False)[0]
        latent = encoded if isinstance(encoded, Tensor) else encoded.mode()  # a tiny autoencoder has no distribution
        shift, scale = _normalisation(vae, image)
        return (latent.to(image) - shift) * scale

    def _decode(self, z: Tensor, vae: nn.Module) -> Tensor:
        shift, scale = _normalisation(vae, z)
        latent = self._guard.place(vae, z / scale + shift)
        told = cast(self.told, latent) if isinstance(vae, AsymmetricAutoencoderKL) else {}
        return vae.decode(latent, return_dict=False, **told)[0].to(z) / 2 + 0.5


def joined(negative: dict, positive: dict) -> dict:
    """Two conditions as one of twice the batch, the negative rows first. What attention is told is the same for both,
    but for the IP-Adapter's embeddings."""
    return {name: _joined(name, negative[name], value) for name, value in positive.items()}


def _joined(name: str, first, second):
    if isinstance(second, Tensor):
        return torch.cat([first, second])
    if isinstance(second, (list, tuple)) and name in _LISTS:
        return [torch.cat(pair) for pair in zip(first, second, strict=True)]
    if isinstance(second, dict) and name != "cross_attention_kwargs":
        return joined(first, second)
    return second


def _selected(value, rows: Tensor, batch: int):
    """Of all tensors in a value that have a row for each image of a batch these rows, and all else as it is."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim > 0 and len(value) == batch else value
    if isinstance(value, dict):
        return {name: _selected(item, rows, batch) for name, item in value.items()}
    return [_selected(item, rows, batch) for item in value] if isinstance(value, (list, tuple)) else value


def _repeated(rows: Tensor, batch: int) -> Tensor:
    """Rows (B, ...) once more for each pass that shares a batch."""
    return rows.repeat(batch // len(rows), *[1] * (rows.ndim - 1))


def _without_scale(condition: dict) -> dict:
    """A condition without the scale of a LoRA. (Where PEFT is missing, diffusers warns of it.)"""
    given = {name: condition[name] for name in _ATTENTION if condition.get(name)} if USE_PEFT_BACKEND else {}
    return condition | {name: {k: v for k, v in own.items() if k != "scale"} for name, own in given.items()}


def _normalisation(vae: nn.Module, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """(shift, scale) of ``z = (latent - shift) scale``: the VAE's numbers, or one of each for every channel."""
    config = vae.config
    shift, scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return shift, scale
    by_channel = lambda values: like.new_tensor(values).reshape(1, -1, 1, 1)  # noqa: E731
    return shift + by_channel(mean), scale / by_channel(std)


class StableDiffusionPrior(GuidedPrior, UNetPrior):
    """UNet, VAE and prompt as ``E[z0 | x_t]``, encoder and decoder. Use it in `with`.

    Args:
        unet: `UNet2DConditionModel` with as many input channels as latents have, or an inpainting checkpoint's (then
            `inpainting` is appended).
        vae: `AutoencoderKL`, `AutoencoderTiny` or `AsymmetricAutoencoderKL`.
        scheduler: gives `alphas_cumprod` and the prediction type (epsilon, v_prediction, sample).
        condition: keyword arguments of the UNet's call for the prompt: encoder_hidden_states (B, n, d), and others.
        negative: the same for the negative prompt; None for no guidance.
        guidance_scale: w of classifier-free guidance; used when `negative` is given.
        guidance_rescale: phi of `vml_ldm.guidance.rescaled`, in [0, 1].
        inpainting: (B, 1 + c, h, w), mask and masked latents of an inpainting checkpoint.

    Attributes:
        retries: how often a network was run once more in float32, by network.
    """

    def __init__(
        self,
        *,
        unet: nn.Module,
        vae: nn.Module,
        scheduler,
        condition: dict,
        negative: dict | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        inpainting: Tensor | None = None,
    ):
        super().__init__(unet=unet, scheduler=scheduler)
        self._hold(vae, condition, negative, guidance_scale, guidance_rescale, inpainting)

    def _predict(self, x: Tensor, t: float, condition: dict | None = None) -> Tensor:
        """The UNet's output for a condition (None: the prompt), float32."""
        inputs, condition = self._inputs(x, condition)
        out = self.unet(inputs, torch.as_tensor(t, device=inputs.device), return_dict=False, **condition)
        return out[0].to(x)


class StableDiffusionXLPrior(StableDiffusionPrior):
    """A `StableDiffusionPrior` of SDXL's networks. Use it in `with`.

    Its conditions also hold ``added_cond_kwargs``: text_embeds (B, d), pooled, and time_ids (B, 5 or 6), the sizes. A
    float16 VAE whose configuration has `force_upcast` runs in float32, with its gradient, and is float16 again after.
    """

    def __enter__(self):
        super().__enter__()
        if self.vae.dtype == torch.float16 and getattr(self.vae.config, "force_upcast", False):
            self._guard.upcast(self.vae)
        return self
