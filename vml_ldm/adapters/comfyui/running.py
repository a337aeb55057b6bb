"""A solver's work inside ComfyUI's sampling: loading, weights that autograd may save, levels, progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import latent_preview
import torch
from comfy.model_management import load_models_gpu
from comfy.samplers import KSAMPLER, SCHEDULER_NAMES, CFGGuider, calculate_sigmas
from torch import Tensor, nn

from ...operators import own
from ...solve import Level, Levels
from .prior import ComfyPrior, is_flow

SCHEDULERS = tuple(SCHEDULER_NAMES)
_GRAPH = 6  # times the memory of a decoder's pass that its pass with a gradient takes; of the model's, more


@dataclass
class Sampling:
    """What a sampler's call knows, for the work of a solver.

    Attributes:
        prior: of the loaded networks.
        draft: the same with the small decoder, or None.
        x: (B, c, h, w) float32, the state that ComfyUI starts from, in the scaling of the first level.
        sigmas: (L + 1,), the levels.
        seed: of the NOISE.
        patcher: the MODEL.
        tell: takes each level as it ends, for progress and previews.
    """

    prior: ComfyPrior
    draft: ComfyPrior | None
    x: Tensor
    sigmas: Tensor
    seed: int
    patcher: object
    tell: Callable[[Level], None]

    def levels(self, renoise: float = 1.0) -> Levels:
        """The levels, see `levels_of`."""
        return levels_of(self.prior.model_sampling, self.sigmas, renoise)


Work = Callable[[Sampling], Tensor]


def make_sampler(work: Work, vae, gradient_vae=None) -> KSAMPLER:
    """A SAMPLER that does the work of a solver.

    Args:
        work: takes a `Sampling`, gives the clean latent (B, c, h, w) in the model's scaling.
        vae: the MODEL's VAE.
        gradient_vae: None, or a VAE of the same latents with a small decoder.
    """

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            guider, vaes = model.inner_model, [v for v in (vae, gradient_vae) if v is not None]
            _prepare(guider, x, vaes)
            prior = ComfyPrior(model, extra_args or {}, vae, x.device)

            def tell(level: Level) -> None:
                if callback is not None:
                    callback({"i": level.index, "denoised": level.z0_hat, "x": level.x_next})

            draft = None if gradient_vae is None else prior.draft(gradient_vae)
            seed = (extra_args or {}).get("seed") or 0
            return work(Sampling(prior, draft, own(x).float(), own(sigmas), seed, guider.model_patcher, tell))

    return KSAMPLER(sample)


def run(
    work: Work, *, model, vae, positive, negative, cfg: float, sigmas: Tensor, batch: int, size, seed: int,
    gradient_vae=None,
) -> Tensor:  # fmt: skip
    """The work of a solver on MODEL, VAE and CONDITIONING -> the latent (B, c, h, w) as LATENT holds it.

    Args:
        work: as for `make_sampler`; the state that it is given holds no noise.
        cfg: guidance scale.
        sigmas: (L + 1,), the last one 0.
        batch, size: how many images, and their (height, width) in pixels.
        seed: what conditioning that draws its own noise is given.
    """
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    latent = torch.zeros(batch, *latent_size(vae, size))
    preview = latent_preview.prepare_callback(model, len(sigmas) - 1)
    sampler = make_sampler(work, vae, gradient_vae)
    return guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, callback=preview, seed=seed).cpu()


def sigmas_of(model, scheduler: str, count: int) -> Tensor:
    """(L + 1,): the noise of `count` levels of one of ComfyUI's schedulers, and 0."""
    return calculate_sigmas(model.get_model_object("model_sampling"), scheduler, count).cpu()


def levels_of(model_sampling, sigmas: Tensor, renoise: float = 1.0) -> Levels:
    """ComfyUI's SIGMAS as levels, in the model's own scaling of its state.

    Raises:
        ValueError: fewer than one level, noise that does not fall, or that does not end at 0.
    """
    values = own(sigmas).double().cpu().tolist()
    if len(values) < 2 or values[-1] != 0:
        raise ValueError(
            f"the SIGMAS are {[round(s, 4) for s in values]}; expected at least one level and 0 at the end: the solver "
            "ends at a clean image. Do not split them, and take denoise > 0."
        )
    flow = is_flow(model_sampling)
    return Levels([(1 - min(s, 1.0), min(s, 1.0)) if flow else (1.0, s) for s in values[:-1]], renoise)


def check_match(model, vae, gradient_vae=None) -> None:
    """Refuse networks that do not go together.

    Raises:
        ValueError: a MODEL that is not of still images, or a VAE of other latents.
    """
    latents = model.model.latent_format
    if latents.latent_dimensions != 2:
        raise ValueError(
            f"the MODEL's latents have {latents.latent_dimensions} dimensions; expected 2: a model of still images."
        )
    channels, pixels = latents.latent_channels, vae.spacial_compression_decode()
    for name, each in (("VAE", vae), ("gradient_vae", gradient_vae)):
        if each is None:
            continue
        found = (each.latent_channels, each.spacial_compression_decode())
        if found != (channels, pixels):
            raise ValueError(
                f"the {name} has {found[0]} latent channels and {found[1]} pixels for each latent; expected {channels} "
                f"and {pixels}, those of the MODEL's own VAE. Take the VAE that belongs to the MODEL."
            )


def with_masked_image(model, vae, conditionings: Iterable[list], image: Tensor, known: Tensor) -> list[list]:
    """CONDITIONING as an inpainting MODEL takes it, with the mask and the known part of the image; others as it is.

    What a conditioning already holds of the two is left.

    Args:
        image: (B, 3, H, W) in [0, 1].
        known: (B, 1, H, W), 1 = known.
    """
    if not getattr(model.model, "concat_keys", ()):
        return list(conditionings)
    painted = (known < 0.5).to(image)
    seen = image * (1 - painted) + 0.5 * painted
    more = {"concat_latent_image": vae.encode(seen.movedim(1, 3)), "concat_mask": painted}
    return [[[text, more | about] for text, about in conditioning] for conditioning in conditionings]


def latent_size(vae, size: tuple[int, int]) -> tuple[int, int, int]:
    """(c, h, w) of the latent of an image (height, width) in pixels."""
    stride = vae.spacial_compression_decode()
    return vae.latent_channels, size[0] // stride, size[1] // stride


def _prepare(guider: CFGGuider, x: Tensor, vaes: list) -> None:
    """Load the VAEs beside the model, and free all that the gradient passes through of inference mode."""
    needed = _GRAPH * (
        guider.inner_model.memory_required(list(x.shape))
        + max(vae.memory_used_decode(x.shape, vae.vae_dtype) for vae in vaes)
    )
    load_models_gpu([guider.model_patcher, *(vae.patcher for vae in vaes)], memory_required=needed)
    more = (getattr(patcher, "model", None) for patcher in getattr(guider, "loaded_models", ()))  # control networks
    thaw([guider.inner_model, *(vae.first_stage_model for vae in vaes), *more])
    for conditions in guider.conds.values():
        for condition in conditions:
            for value in condition["model_conds"].values():
                if hasattr(value, "cond"):
                    value.cond = own(value.cond)


def thaw(networks: Iterable) -> None:
    """Make weights and buffers that were created in inference mode ordinary tensors without gradients, one by one.

    ComfyUI creates them so whenever it loads, patches or moves weights, so this is repeated in every run. A clone takes
    its tensor's place, so nothing is held twice.
    """
    for network in networks:
        for module in network.modules() if isinstance(network, nn.Module) else ():
            for name, weight in module._parameters.items():
                if weight is not None and weight.is_inference():
                    module._parameters[name] = nn.Parameter(weight.detach().clone(), requires_grad=False)
                elif weight is not None:
                    weight.requires_grad_(False)
            for name, buffer in module._buffers.items():
                module._buffers[name] = own(buffer)
