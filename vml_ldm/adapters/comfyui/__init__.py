"""ComfyUI as a host: MODEL, VAE and CONDITIONING as a `Prior`, SIGMAS as `Levels`, a solver as a SAMPLER.

The work is done inside a sampler's call, which ComfyUI makes with the model loaded, its LoRAs and hooks applied and its
conditioning prepared. Nothing of ComfyUI is replaced.
"""

from ...objective import NonFiniteError
from .loading import check_match, check_vaes
from .prior import ComfyPrior
from .running import (
    SCHEDULERS,
    Sampling,
    latent_size,
    levels_of,
    make_sampler,
    run,
    sigmas_of,
    with_masked_image,
)

__all__ = [
    "SCHEDULERS",
    "ComfyPrior",
    "NonFiniteError",
    "Sampling",
    "check_match",
    "check_vaes",
    "latent_size",
    "levels_of",
    "make_sampler",
    "run",
    "sigmas_of",
    "with_masked_image",
]
