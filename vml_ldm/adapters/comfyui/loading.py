"""Networks that belong together, loaded whole, with weights that autograd may save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import comfy.model_management as management
import torch
from comfy.samplers import CFGGuider
from torch import Tensor, nn

from ...operators import own

_GRAPH = 6  # times the memory of a decoder's pass that its pass with a gradient takes; of the model's, more


def check_match(model, vae, gradient_vae=None, gradients: bool = True) -> None:
    """Refuse networks that do not go together, or that gradients cannot pass where `gradients` are asked for.

    VAEs of as many channels and pixels are not told apart: those of Stable Diffusion 1.x and XL, say.

    Raises:
        ValueError: a MODEL that is not of still images, or a VAE of other latents.
        RuntimeError: as `check_vaes`.
    """
    check_vaes(vae, gradient_vae, gradients)
    if gradients:
        _check_static([model])
    latents = model.model.latent_format
    if latents.latent_dimensions != 2:
        raise ValueError(
            f"the MODEL's latents have {latents.latent_dimensions} dimensions, as those of video models, Qwen-Image "
            "and Anima; expected 2-D latents, as those of Stable Diffusion and Flux. Take another MODEL."
        )
    found, ratio = _shape(vae), getattr(latents, "spacial_downscale_ratio", None)  # newer versions say the ratio
    _check_latents("VAE", found, (latents.latent_channels, ratio or found[1]))


def check_vaes(vae, gradient_vae=None, gradients: bool = True) -> None:
    """Refuse VAEs that are none, not of the same latents, or that gradients cannot pass where they are asked for.

    Raises:
        ValueError: VAEs that are not of still images, or of other latents.
        RuntimeError: a checkpoint's VAE that is missing, or weights that ComfyUI moves as it likes.
    """
    for name, each in (("VAE", vae), ("gradient_vae", gradient_vae)):
        if each is None:
            continue
        each.throw_exception_if_invalid()
        if gradients:
            _check_static([each.patcher])
        if each.latent_dim != 2:
            raise ValueError(
                f"the {name} has latents of {each.latent_dim} dimensions; expected 2-D latents, those of still images. "
                "Take the VAE that belongs to the MODEL."
            )
        _check_latents(name, _shape(each), _shape(vae))


@contextmanager
def differentiable() -> Iterator[None]:
    """Out of inference mode, and ComfyUI's models leave out kernels that have no gradient, as for its trainer.

    (Older versions have neither those kernels nor the switch.)
    """
    before = getattr(management, "in_training", None)
    with torch.inference_mode(False), torch.no_grad():
        try:
            if before is not None:
                management.in_training = True
            yield
        finally:
            if before is not None:
                management.in_training = before


def prepare(guider: CFGGuider, x: Tensor, vaes: list, gradients: bool = True) -> None:
    """Load all networks beside each other. For gradients: whole, and free what they pass through of inference mode.

    Args:
        guider: within a sampler's call, for a state x (B, c, h, w).
        gradients: False: weights may stay elsewhere and come when they are used, as ComfyUI likes.

    Raises:
        RuntimeError: weights that are not where they compute.
    """
    patchers = [guider.model_patcher, *guider.loaded_models, *(vae.patcher for vae in vaes)]  # with control networks
    needed = guider.inner_model.memory_required(list(x.shape))
    needed += max(vae.memory_used_decode(x.shape, vae.vae_dtype) for vae in vaes)
    if not gradients:
        management.load_models_gpu(patchers, memory_required=needed)
        return
    _check_static(patchers)
    needed *= _GRAPH
    management.load_models_gpu(patchers, memory_required=needed, force_full_load=True)
    for patcher in patchers:
        _check_whole(patcher)
        patcher.unpin_all_weights()  # which `thaw` is about to replace
    thaw(patcher.model for patcher in patchers)
    for conditions in guider.conds.values():
        for condition in conditions:
            for value in condition["model_conds"].values():
                if hasattr(value, "cond"):
                    several = isinstance(value.cond, list)
                    value.cond = [own(each) for each in value.cond] if several else own(value.cond)


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


def _check_static(patchers: Iterable) -> None:
    """Dynamic VRAM computes with weights that come and go behind the module's own; a graph would keep what is gone."""
    if any(getattr(patcher, "is_dynamic", bool)() for patcher in patchers):
        raise RuntimeError(
            "ComfyUI's dynamic VRAM moves weights while they are in use, and VML needs gradients through them; "
            "expected weights that stay. Start ComfyUI with --disable-dynamic-vram; or inpaint with a cfg above 1 or "
            "the preset fast, which need none."
        )


def _check_whole(patcher) -> None:
    """Offloaded weights pass through buffers that the next layer overwrites."""
    weights = patcher.model.parameters() if isinstance(patcher.model, nn.Module) else ()
    away = {weight.device.type for weight in weights} - {patcher.load_device.type}
    if away:
        raise RuntimeError(
            f"weights of {type(patcher.model).__name__} are on {', '.join(sorted(away))} and it computes on "
            f"{patcher.load_device.type}; expected all of them there, for gradients cannot pass weights that are "
            "offloaded. Start ComfyUI without --novram, or take a smaller MODEL or one of fewer bits; or inpaint with "
            "a cfg above 1 or the preset fast, which need none."
        )


def _shape(vae) -> tuple[int, int]:
    return vae.latent_channels, vae.spacial_compression_decode()


def _check_latents(name: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        raise ValueError(
            f"the {name} has {found[0]} latent channels and {found[1]} pixels for each latent; expected {expected[0]} "
            f"and {expected[1]}, those of the MODEL's own VAE. Take the VAE that belongs to the MODEL."
        )
