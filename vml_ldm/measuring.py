"""A measurement as the solver takes it, through a VAE that cannot draw every image; and the report of a solve."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .closeup import CloseUp, Part, drawn_shares, near, whole
from .images import fill_holes, seamless
from .metering import Metered
from .objective import Prior
from .operators import Mask, Measurement, is_linear, uncast
from .proximal import Settle
from .report import Report
from .solve import Solution

_VAE_SHARE = 0.25  # of the VAE's round-trip error, in the sigma_y that a restoration takes
_KNOWN_SHARE = 0.5  # and that an inpainting takes, whose known pixels are pasted
_MISSING_SLOPE = 0.02  # how much neighbouring pixels differ of what a decoder cannot draw; chosen on validation images
_LEAST_NOISE = 1e-3  # of 8-bit values: 1 / 255 / sqrt(12)
NEAR = 3e-3  # tolerance of the smooth images: their rms is then wrong by about as much as 8 bits round
_LEAST_SIGMA_Y = 1e-3  # a VAE that draws y exactly (nothing known, say) still needs a positive sigma_y
_LEAST_KNOWN = 1 / 255  # and known pixels, which are pasted, ask for no more than the last of 8 bits


class Measured(NamedTuple):
    """What the VAE makes of a measurement.

    Attributes:
        measurement: with the sigma_y that the solver takes.
        vae_error: (B,), the VAE's round-trip error as the operator sees it, in units of y.
        latent: (B, c, h, w), of the image that went through the VAE.
        view: the prior as the measurement sees it: itself, or a close-up of it.
        drawn: of each image, how much of it the view draws, in [0, 1]; empty: all.
    """

    measurement: Measurement
    vae_error: Tensor
    latent: Tensor
    view: Callable[[Prior], Prior] = whole
    drawn: Sequence[float] = ()


def measure(
    operator,
    y: Tensor,
    noise_std: Tensor,
    image: Tensor,
    prior: Metered,
    seen: Tensor | None = None,
    latent: Tensor | None = None,
    share: float = _VAE_SHARE,
    least: float = _LEAST_SIGMA_Y,
) -> Measured:
    """A measurement as the solver takes it, from the VAE's round trip of an image that agrees with y.

    The decoder cannot draw y exactly, so the solver takes ``sqrt(sigma_y^2 + (share vae_error)^2)`` for its sigma_y,
    ``vae_error = rms(seen - A(Dec(Enc(image))))``: a latent that was searched for comes closer than one that was
    encoded (the shares were found on validation images).

    Args:
        operator: A.
        noise_std: (B,), sigma_y as the caller named it.
        image: (B, 3, H, W) in [0, 1].
        seen: what the round trip should give back, shaped like y; None is A(image), for an image that is not free of
            noise or does not quite agree with y. (A noisy image overstates the error: a VAE does not reproduce noise.)
        latent: (B, c, h, w), of the image, where it is there already.
        share: of vae_error, in the solver's sigma_y.
        least: what that is at the least.
    """
    if seen is None:
        with uncast(image):
            seen = operator(image)
    latent = prior.encode(image) if latent is None else latent
    before = Measurement(operator, seen, 1.0)
    vae_error = before.rms(before.residual(prior.decode(latent)))
    effective = (noise_std**2 + (share * vae_error) ** 2).sqrt().clamp(min=least)
    return Measured(Measurement(operator, y, effective), vae_error, latent)


def measure_known(
    image: Tensor, known: Tensor, noise_std: Tensor, prior: Metered, parts: list[Part] | None = None
) -> Measured:
    """The known pixels as a measurement, see `measure`; the holes are filled smoothly before the VAE sees them.

    Args:
        image: (B, 3, H, W) in [0, 1].
        known: (B, 1, H, W) in [0, 1], 1 = known.
        noise_std: (B,), sigma_y as the caller named it.
        parts: where they are given, only the known pixels that they hold are measured, and the solver is to take the
            prior with the result's `view`, a `CloseUp`.
    """
    filled, view = fill_holes(image, known), whole
    latent = prior.encode(filled)
    if parts is not None:
        view = partial(CloseUp, parts=parts, image=image, latent=latent)
        known = known * near(parts, known, known.shape[2] // latent.shape[2])
    operator = Mask(known)
    y = operator(image)
    measured = measure(
        operator, y, noise_std, filled, prior, seen=y, latent=latent, share=_KNOWN_SHARE, least=_LEAST_KNOWN
    )
    return measured._replace(view=view, drawn=drawn_shares(parts, latent.shape[2:]))


def groups_of(decisions: Sequence[Hashable]) -> list[list[int]]:
    """Places of images with equal decisions, the groups by their first image: ``[a, b, a] -> [[0, 2], [1]]``."""
    found: dict[Hashable, list[int]] = {}
    for place, decision in enumerate(decisions):
        found.setdefault(decision, []).append(place)
    return list(found.values())


def pick_start(colours: Tensor) -> str:
    """Where VML starts, one of `vml_ldm.presets.RESTORE_STARTS`.

    From the measurement if all of it is seen. A guess tells nothing of what is inside a hole, and is hard to leave once
    the solver has begun there: then from noise. Where colours alone are lost, the guess is right in all but these: then
    it is an outline, which is noised more.

    Args:
        colours: (N, B, h, w), of how many y tells something in what each latent draws, in N pictures
            (`Measurement.seen`); where of none in one of them, there is a hole.
    """
    if not colours.all():
        return "noise"
    return "measurement" if (colours == 3).all() else "outline"


def leaves_most_open(colours: Tensor) -> bool:
    """Whether y tells of at most half of the colours of all latents, in some image of the batch, whatever the picture.

    Then VML takes more levels of fewer inner steps. Light that is clipped in some pictures does not count. (On 48
    validation images, 24 of them with two seeds, the half has 0.5 dB +- 0.3 more with ten levels of three than with
    five of seven, and a distance nearer by 0.011; a box of a seventh of the picture -0.1 dB +- 0.5, 0.004 further. That
    the box is left out was settled on held-out images, see docs/benchmark/README.md.)

    Args:
        colours: as `pick_start` has them.
    """
    return bool((colours.amax(0).double().mean(dim=(1, 2)) <= 1.5).any())


def settle(image: Tensor, measurement: Measurement, noise_std: Tensor) -> Tensor:
    """A last step in pixels: an image and the smoothest change of it that y asks for, (B, 3, H, W) in [0, 1].

    Added is the minimiser v of ``|y - A (x + v)|^2 / sigma_y^2 + R(v) / 0.02^2`` (`Measurement.smooth`): what the
    decoder cannot draw of y, as far as y's noise lets. A sigma_y below 0.001, that of 8-bit values, counts as 0.001.
    (Ours. The image of an operator that is not linear stays as it is.)

    Args:
        image: (B, 3, H, W) in [0, 1].
        noise_std: (B,), sigma_y as the caller named it.
    """
    if not is_linear(measurement.operator):
        return image
    noise = noise_std.clamp(min=_LEAST_NOISE)
    return measurement.smooth(image, noise=noise, slope=_MISSING_SLOPE, of=image, tolerance=NEAR).clamp(0, 1)


def settling(measurement: Measurement, noise_std: Tensor) -> Settle | None:
    """`settle` for a measurement, or None where it changes nothing."""
    if not is_linear(measurement.operator):
        return None
    return partial(settle, measurement=measurement, noise_std=noise_std)


def put_in(image: Tensor, pixels: Tensor, known: Tensor, noise_std: Tensor) -> Tensor:
    """The step in pixels of a mask: the known pixels in the image, as far as their noise lets, (B, 3, H, W) in [0, 1].

    The minimiser of ``|y - m x|^2 / (2 sigma_y^2) + |x - image|^2 / (2 s^2)`` has the known pixels with the weight
    ``w = s^2 / (s^2 + sigma_y^2)``, and s, the image's own error, is read off them: ``s^2 = rms(y - m image)^2 -
    sigma_y^2``. Beside them what the image missed is carried a pixel or two into the hole (`vml_ldm.images.seamless`).

    Args:
        image: (B, 3, H, W) in [0, 1].
        pixels, known: what is known, and where, (B, 1, H, W) in [0, 1], 1 = known.
        noise_std: (B,), sigma_y as the caller named it.
    """
    operator = Mask(known)
    seen = Measurement(operator, operator(pixels), 1.0)
    error = (seen.rms(seen.residual(image)) ** 2 - noise_std**2).clamp(min=torch.finfo(image.dtype).tiny)
    weight = error / (error + noise_std**2)
    return seamless(pixels, image, known * weight.reshape(-1, 1, 1, 1))


def check_std(sigma_y, batch: int, device) -> Tensor:
    """sigma_y as (B,) float32.

    Raises:
        ValueError: negative, not finite, or neither a number nor one for each image.
    """
    std = torch.as_tensor(0.0 if sigma_y is None else sigma_y, dtype=torch.float32, device=device)
    if std.ndim > 1 or std.numel() not in (1, batch):
        raise ValueError(f"sigma_y has shape {tuple(std.shape)}; expected a number, or one for each of {batch} images.")
    if not (torch.isfinite(std) & (std >= 0)).all():
        raise ValueError(f"sigma_y is {sigma_y}; expected >= 0, in units of y (images are in [0, 1]).")
    return std.expand(batch)


def tell(solution: Solution, measured: Measured, noise_std: Tensor, retries: Mapping[str, int], **about) -> Report:
    """The report of a solve; `retries` are the prior's, `about` are other fields of `Report`."""
    return solution.report(
        sigma_y=noise_std.tolist(),
        vae_error=measured.vae_error.tolist(),
        effective_sigma_y=measured.measurement.sigma_y.tolist(),
        retries=dict(retries),
        drawn=list(measured.drawn),
        **about,
    )
