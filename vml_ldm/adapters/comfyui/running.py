"""A solver's work inside ComfyUI's sampling: levels, progress, and what an inpainting MODEL is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import latent_preview
import torch
from comfy.samplers import KSAMPLER, SCHEDULER_NAMES, CFGGuider, calculate_sigmas
from torch import Tensor

from ...operators import own
from ...solve import Level, Levels
from .loading import differentiable, prepare
from .prior import ComfyPrior, is_flow

AUTO = "auto"  # the scheduler that suits the kind of MODEL
SCHEDULERS = (AUTO, *SCHEDULER_NAMES)


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


def make_sampler(work: Work, vae, gradient_vae=None, gradients: bool = True) -> KSAMPLER:
    """A SAMPLER that does the work of a solver.

    A noise mask of the LATENT is not used: the measurement says what is known, and ComfyUI's blending of latents would
    hide the rest of the state from the solver. (ComfyUI has given it to an inpainting MODEL by then.)

    Args:
        work: takes a `Sampling`, gives the clean latent (B, c, h, w) in the model's scaling.
        vae: the MODEL's VAE.
        gradient_vae: None, or a VAE of the same latents with a small decoder.
        gradients: whether the work asks a network for one. If not, networks are loaded and run as by any sampler.
    """

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None) -> Tensor:
        with differentiable() if gradients else torch.inference_mode():
            guider, vaes = model.inner_model, [v for v in (vae, gradient_vae) if v is not None]
            prepare(guider, x, vaes, gradients)
            prior = ComfyPrior(model, (extra_args or {}) | {"denoise_mask": None}, vae, x.device)

            def tell(level: Level) -> None:
                if callback is not None:
                    callback({"i": level.index, "denoised": level.z0_hat, "x": level.x_next})

            draft = None if gradient_vae is None else prior.draft(gradient_vae)
            seed = (extra_args or {}).get("seed") or 0
            return work(Sampling(prior, draft, own(x).float(), own(sigmas), seed, guider.model_patcher, tell))

    return KSAMPLER(sample)


def run(
    work: Work, *, model, vae, positive, negative, cfg: float, sigmas: Tensor, batch: int, size, seed: int,
    gradient_vae=None, gradients: bool = True,
) -> Tensor:  # fmt: skip
    """The work of a solver on MODEL, VAE and CONDITIONING -> the latent (B, c, h, w) as LATENT holds it.

    Args:
        work: as for `make_sampler`; the state that it is given holds no noise.
        cfg: guidance scale.
        sigmas: (L + 1,), the last one 0.
        batch, size: how many images, and their (height, width) in pixels.
        seed: what conditioning that draws its own noise is given.
        gradients: as for `make_sampler`.
    """
    guider = CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    latent = torch.zeros(batch, *latent_size(vae, size))
    preview = latent_preview.prepare_callback(model, len(sigmas) - 1)
    sampler = make_sampler(work, vae, gradient_vae, gradients)
    return guider.sample(torch.zeros_like(latent), latent, sampler, sigmas, callback=preview, seed=seed).cpu()


def sigmas_of(model, scheduler: str, count: int) -> Tensor:
    """(L + 1,): the noise of `count` levels of one of `SCHEDULERS`, and 0.

    ComfyUI's ddim_uniform has a level more where `count` does not divide 1000 (17 of 16). Its first is left out: the
    budget holds, and the levels are those of diffusers' DDIM.
    """
    model_sampling = model.get_model_object("model_sampling")
    if scheduler == AUTO:
        scheduler = "simple" if is_flow(model_sampling) else "ddim_uniform"
    return calculate_sigmas(model_sampling, scheduler, count).cpu()[-(count + 1) :]


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


def with_masked_image(model, vae, conditionings: Iterable[list], image: Tensor, known: Tensor) -> list[list]:
    """CONDITIONING as an inpainting MODEL takes it, with the mask and the known part of the image; others as it is.

    What a conditioning already holds of the two is left.

    Args:
        image: (B, 3, H, W) in [0, 1].
        known: (B, 1, H, W), 1 = known.
    """
    if not _takes_mask(model.model):
        return list(conditionings)
    painted = (known < 0.5).to(image)
    seen = image * (1 - painted) + 0.5 * painted
    more = {"concat_latent_image": vae.encode(seen.movedim(1, 3)), "concat_mask": painted}
    return [[[text, more | about] for text, about in conditioning] for conditioning in conditionings]


def latent_size(vae, size: tuple[int, int]) -> tuple[int, int, int]:
    """(c, h, w) of the latent of an image (height, width) in pixels."""
    stride = vae.spacial_compression_decode()
    return vae.latent_channels, size[0] // stride, size[1] // stride


def _takes_mask(model) -> bool:
    """Whether a model sees a latent image and a mask beside the latent: it then has more channels than two latents.

    (Of ComfyUI's models Stable Diffusion's say so in `concat_keys`; Flux Fill does not.)
    """
    channels = model.model_config.unet_config.get("in_channels", 0)
    return bool(getattr(model, "concat_keys", ())) or channels > 2 * model.latent_format.latent_channels
