"""ComfyUI's model, guider and VAE as a `Prior`, while a sampler runs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import torch
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.samplers import CFGGuider
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ...objective import NonFiniteError, PullBack, at_unit_size, pullback


class ComfyPrior:
    """A loaded MODEL under its guider, and a VAE, as ``E[z0 | x_t]``, encoder and decoder.

    `denoise` is conditioned on the positive conditioning alone: a posterior mean, whose Jacobian the loss needs.
    Guidance adds `push` to it, and `guided` is what the guider predicts. That holds for ComfyUI's own `CFGGuider`. What
    other guiders predict is both, whatever they mix. Every call of a network first asks whether the user cancelled.

    Args:
        model: the sampler function's model: ``model(x, sigma (B,), **extra_args)`` is the clean estimate.
        extra_args: the sampler function's.
        vae: a VAE, loaded.

    Attributes:
        push: what the guider adds to an estimate; None without guidance.
        retries: empty; ComfyUI decides on precision.
        device: where the state lives.
        model_sampling: the MODEL's, which scales its state.
    """

    def __init__(self, model: Callable, extra_args: dict, vae, device: torch.device):
        self._model, self._extra_args, self._decoder, self._vae = model, extra_args, vae, vae
        self._guider, self.device, self.retries, self._copies = model.inner_model, device, Counter(), False
        self._space = self._guider.inner_model
        self.model_sampling = self._space.model_sampling
        plain = type(self._guider).predict_noise is CFGGuider.predict_noise
        self._has_scale = plain and self._guider.cfg != 1.0 and bool(self._guider.conds.get("negative"))
        self.push = self._push if self._has_scale else None

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[z0 | x_t]``, (B, c, h, w) float32, for ``x_t = alpha z0 + sigma e`` in any scaling."""
        return _finite("the model", self._conditional(x_t, alpha, sigma))

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        """z0_hat and ``b -> J^T b``.

        Some models (Flux, any with a ControlNet) change in place what their graph has saved. That shows when the
        product is taken; the pass is then repeated, and later ones made at once, with a graph that saves copies.
        """
        z0_hat, pull = self._passed(x_t, alpha, sigma)

        def pulled(b: Tensor) -> Tensor:
            try:
                return pull(b)
            except RuntimeError as error:
                if self._copies or "inplace operation" not in str(error):
                    raise
            self._copies = True
            return self._passed(x_t, alpha, sigma)[1](b)

        return z0_hat, pulled

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> the mean latent, scaled as the model expects it, float32."""
        vae = self._vae
        pixels = vae.process_input(image).to(vae.device, vae.vae_dtype)
        latent = vae.first_stage_model.encode(pixels).to(image)
        return _finite("the VAE encoder", self._space.process_latent_in(latent))

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image (B, 3, H, W) float32, about [0, 1] and not clamped."""
        return _finite("the VAE decoder", self._decode(z))

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        """Image and the decoder's vector-Jacobian product."""
        return _pullback("the VAE decoder", self._decode, z)

    def draft(self, vae) -> ComfyPrior:
        """This prior with the decoder of another VAE of the same latents, loaded."""
        other = copy.copy(self)
        other._decoder = vae
        return other

    def guided(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """The guider's own estimate, whichever way it mixes the two conditionings."""
        return _finite("the model", self._estimate(x_t, alpha, sigma))

    def _push(self, x_t: Tensor, z0_hat: Tensor, alpha: float, sigma: float) -> Tensor:
        """What the guider adds to the conditional estimate z0_hat at x_t."""
        return self.guided(x_t, alpha, sigma) - z0_hat

    def _conditional(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """The estimate of the positive conditioning: at scale 1 the guider does not run the negative one."""
        if not self._has_scale:
            return self._estimate(x_t, alpha, sigma)
        scale, self._guider.cfg = self._guider.cfg, 1.0
        try:
            return self._estimate(x_t, alpha, sigma)
        finally:
            self._guider.cfg = scale

    def _passed(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        weights = {weight.data_ptr() for weight in self._space.parameters()} if self._copies else set()
        pack = lambda saved: saved if saved.data_ptr() in weights else saved.detach().clone()  # noqa: E731
        with saved_tensors_hooks(pack, lambda kept: kept) if self._copies else nullcontext():
            return _pullback("the model", lambda x: self._conditional(x, alpha, sigma), x_t)

    def _estimate(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        throw_exception_if_processing_interrupted()
        scale = (alpha + sigma) if is_flow(self.model_sampling) else alpha
        x = x_t / scale
        return self._model(x, x.new_full((len(x),), sigma / scale), **self._extra_args).to(x_t)

    def _decode(self, z: Tensor) -> Tensor:
        throw_exception_if_processing_interrupted()
        vae = self._decoder
        latent = self._space.process_latent_out(z).to(vae.device, vae.vae_dtype)
        black, white = vae.process_input(torch.tensor([0.0, 1.0])).tolist()
        return (vae.first_stage_model.decode(latent).to(z) - black) / (white - black)


def is_flow(model_sampling) -> bool:
    """Whether a model's states are ``(1 - s) z0 + s e``, as for flow matching, and not ``z0 + s e``.

    Raises:
        ValueError: they are neither.
    """
    one, half = torch.ones(1, 1, 1, 1), torch.full((1,), 0.5)
    of_noise = float(model_sampling.noise_scaling(half, one.clone(), 0 * one))
    of_latent = float(model_sampling.noise_scaling(half, 0 * one, one.clone()))
    if (of_latent, of_noise) not in ((1.0, 0.5), (0.5, 0.5)):
        raise ValueError(
            f"the MODEL mixes {of_latent:g} of the latent and {of_noise:g} of the noise at sigma 0.5; expected 1 and "
            "0.5 (Stable Diffusion), or 0.5 and 0.5 (flow matching). Take another MODEL."
        )
    return of_latent == 0.5


def _pullback(name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, PullBack]:
    """`pullback` with both passes checked; the cotangent goes in at unit size, image by image, for half precision."""
    value, pull = pullback(function, x)

    def checked(cotangent: Tensor) -> Tensor:
        throw_exception_if_processing_interrupted()
        return _finite(f"the backward pass of {name}", at_unit_size(pull)(cotangent))

    return _finite(name, value), checked


def _finite(name: str, value: Tensor) -> Tensor:
    if not torch.isfinite(value).all():
        raise NonFiniteError(
            f"{name} gave NaN or infinity; expected finite values. Start ComfyUI with --fp32-vae or --force-fp32, or "
            "check the weights and the image."
        )
    return value
