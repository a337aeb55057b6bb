"""Proximal levels: z0_hat is held and brought to y by the autoencoder alone. No network is asked for a gradient of D.

A level of VML-MAP ends where the bracket is 0 (see `vml_ldm.objective`). At the state ``x_t = alpha z`` it is

    b = d nll(Dec(z)) / dz  +  alpha^2 (z - z0_hat) / sigma^2,      z0_hat = D(x_t)

so with z0_hat held, b is the gradient in z of

    nll(Dec(z))  +  |z - z0_hat|^2 / (2 s^2),      s = sigma / alpha

A proximal level finds the minimiser of this and takes it for its clean estimate, in place of K steps through the
denoiser. Re-noised and repeated at one level it comes to rest where b = 0, which is the Jacobian-free form's point: for
a prior N(m, C), a linear operator and Dec = 1 the MAP of the prior N(m, C + s^2 I), and the MAP itself as s falls.

The bracket is the paper's (arXiv:2512.10524, for a linear operator without a decoder); to hold z0_hat, and what
follows, is ours. Plug-and-play methods (DiffPIR, arXiv:2305.08995) meet the measurement by this step.

There are two ways to the minimiser:

- in pixels: ``z = Enc(settle(Dec(z0_hat)))``, where `settle` brings an image to y in closed form. The autoencoder's way
  back keeps z a latent that an image has. For a mask: the known pixels are put in.
- by the decoder: a few conjugate steps in z, each with one gradient of the decoder; with a draft (a small decoder of
  the same latents) of two fidelities, see `TwoFidelities`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .objective import Prior, PullBack, data_term, decode_pullback
from .operators import Measurement, column, is_whole
from .optimize import Descent, Secant, Underway, step_length

Settle = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [0, 1] -> images nearer to y
ERROR = 0.5  # of a level's noise, is taken for the error of its clean estimate


@dataclass(frozen=True)
class Proximal:
    """Every level ends with a proximal step, and levels of little noise consist of it alone.

    Args:
        alone_below: levels with ``sigma / alpha < alone_below`` take no inner steps before it: there J is nearly
            1 / alpha, and a step through the denoiser tells little more. Infinity: no level takes any; 0: all do.
        steps: decoder steps of a level's end, >= 0, after the way through pixels; where there is no way through pixels,
            at least one.
        refresh: with a draft, the full decoder draws anew at every `refresh`-th decoder step, see `TwoFidelities`.

    Raises:
        ValueError: a number outside its range.

    Example:
        >>> Proximal(alone_below=1.0).is_alone(alpha=0.9, sigma=0.4)
        True
    """

    alone_below: float = math.inf
    steps: int = 0
    refresh: int = 2

    def __post_init__(self):
        if not self.alone_below >= 0:
            raise ValueError(f"alone_below is {self.alone_below!r}; expected a noise >= 0, infinity for all levels.")
        for name, least in (("steps", 0), ("refresh", 1)):
            value = getattr(self, name)
            if not is_whole(value, least):
                raise ValueError(f"{name} is {value!r}; expected a whole number >= {least}.")

    def is_alone(self, alpha: float, sigma: float) -> bool:
        """Whether a level of these scales takes no inner steps."""
        return sigma < self.alone_below * alpha


def proximal_step(
    inner: Descent,
    *,
    prior: Prior,
    measurement: Measurement,
    alpha: float,
    sigma: float,
    how: Proximal = Proximal(),
    stop_at: float = 1.0,
    settle: Settle | None = None,
    draft: Prior | None = None,
) -> Descent:
    """A level's estimate, brought to the minimiser of the module's subproblem.

    Args:
        inner: as the level's inner steps ended, or without any (`vml_ldm.optimize.descend` with ``steps=0``).
        alpha, sigma: the level's scales. At alpha = 0 the state says nothing of z0, and `inner` stays as it is.
        how: decoder steps, and how often the full decoder draws.
        stop_at: an image rests while ``rms(residual) <= stop_at * sigma_y``.
        settle: a step in pixels, such as `vml_ldm.measuring.settle`; None: decoder steps alone.
        draft: the prior with a small decoder, for the decoder steps.

    Returns:
        The minimiser z as z0_hat, and the state that goes with it, ``x_t + alpha (z - z0_hat)``: what x_t holds of
        noise stays as it is.
    """
    if alpha == 0:
        return inner
    z0_hat, noise = inner.z0_hat, sigma / alpha
    if settle is not None:
        inner = _through_pixels(inner, prior, measurement, settle)
    steps = how.steps if settle is not None else max(1, how.steps)
    if steps:
        inner = _by_decoder(inner, noise, prior, measurement, noise, steps, stop_at, draft, how.refresh)
    return inner._replace(x_t=inner.x_t + alpha * (inner.z0_hat - z0_hat))


def correct(
    inner: Descent,
    *,
    prior: Prior,
    measurement: Measurement,
    noise: float,
    steps: int,
    stop_at: float = 1.0,
    settle: Settle | None = None,
    draft: Prior | None = None,
    refresh: int = 2,
) -> Descent:
    """The clean estimate of a level's end, brought nearer to y by the autoencoder alone: no call of the denoiser.

    First, where there is a step in pixels, z0_hat goes half of the way to ``Enc(settle(Dec(z0_hat)))``: a latent that
    came to agree with y by gradients is one that no image has, and a picture's own decodes more like a picture. Then
    ``p(z0 | x_t)``, whose covariance is ``sigma^2 J / alpha``, is taken as N(z0_hat, s^2 I) with s half of the level's
    noise, and z0 moves from z0_hat down

        nll(Dec(z0)) + |z0 - z0_hat|^2 / (2 s^2)

    in conjugate directions (the rule "secant"): the bracket's steps with z0_hat held, at two calls each in place of
    four. What y does not tell stays where the denoiser put it. (Ours. At a noise of 0.14 the bundled model's estimates
    of validation images are wrong by 0.57 of it; the half is nearer in perceptual distance, and as near in PSNR.)

    Args:
        inner: as the level's inner steps ended.
        noise: ``sigma / alpha``, the level's noise in VE units.
        steps: how many at the most, >= 0; the way through the encoder counts as one.
        stop_at: an image rests while ``rms(residual) <= stop_at * sigma_y``.
        settle: a step in pixels, such as `vml_ldm.measuring.settle`; None: not taken.
        draft, refresh: a small decoder takes the gradients, see `TwoFidelities`; None: the prior's own.

    Returns:
        `inner` with z0 in place of z0_hat, and with the residual, nll and image of the last evaluation.
    """
    if steps and settle is not None:
        encoded = prior.encode(settle(prior.decode(inner.z0_hat).clamp(0, 1)))
        inner = inner._replace(z0_hat=(inner.z0_hat + encoded) / 2)
        steps -= 1
    return _by_decoder(inner, ERROR * noise, prior, measurement, noise, steps, stop_at, draft, refresh)


def _through_pixels(inner: Descent, prior: Prior, measurement: Measurement, settle: Settle) -> Descent:
    """``Enc(settle(Dec(z0_hat)))``, with the residual, nll and image of ``Dec(z0_hat)``."""
    image = prior.decode(inner.z0_hat)
    residual, nll = measurement.rms(measurement.residual(image)), measurement.nll(image)
    z, movable = prior.encode(settle(image.clamp(0, 1))), getattr(prior, "movable", None)
    if movable is not None:
        z = inner.z0_hat + movable(z - inner.z0_hat)
    drawn = {"residual": residual, "nll": nll, "image": image, "drawn": inner.z0_hat}
    return inner._replace(z0_hat=z, **drawn, steps=inner.steps + 1)


def _by_decoder(inner: Descent, s, prior, measurement, noise, steps, stop_at, draft, refresh) -> Descent:
    """Conjugate steps in z, from z0_hat, down ``nll(Dec(z)) + |z - z0_hat|^2 / (2 s^2)``."""
    batch = Underway(prior if draft is None else TwoFidelities(prior, draft, refresh), measurement)
    rule, whole, ahead, moving = Secant(noise), inner, inner.z0_hat, None
    for k in range(steps):
        at, z = {"prior": batch.prior, "measurement": batch.measurement}, ahead
        data = data_term(z, **at)
        residual = batch.measurement.rms(data.residual)
        awake = residual > stop_at * batch.measurement.sigma_y
        moving = awake if moving is None else awake & moving  # who rests does so for good, as alone
        drawn = {"residual": residual, "nll": data.nll, "image": data.image, "drawn": z}
        inner = inner._replace(**drawn, steps=inner.steps + moving)
        flags = moving.tolist()  # the step's one wait for the device
        if not any(flags):
            break
        v = (inner.z0_hat - z) / s**2 - data.gradient
        d, eta = rule(z, v, partial(step_length, z0_hat=z, data=data, **at, noise=s, jacobian="free"), moving)
        ahead = z + column(eta * moving, d) * d
        if k + 1 < steps and (left := batch.those(flags)):
            left, going = left
            whole = whole.put(batch.rows, inner._replace(z0_hat=ahead))
            batch, inner = left, Descent(*(field[going] for field in inner))
            ahead, moving = ahead[going], moving[going]
            rule.select(going)
    return whole.put(batch.rows, inner._replace(z0_hat=ahead))


class TwoFidelities:
    """``Dec(z) ~ small(z) + c``: the full decoder's image near z, with the small decoder's derivative.

    ``c = full(z) - small(z)`` is drawn anew at every `refresh`-th gradient, at the z of that gradient, so that the
    residual there is the full decoder's own. (Ours; the first-order correction of a surrogate model.)

    Args:
        prior, draft: with the full decoder, and with the small one of the same latents.
        refresh: >= 1.
    """

    def __init__(self, prior: Prior, draft: Prior, refresh: int):
        self._full, self._small, self._refresh = prior, draft, refresh
        self._seen, self._c = 0, torch.zeros(())

    @property
    def select(self) -> Callable[[Tensor, int], TwoFidelities] | None:
        """The decoders', if both have it."""
        full, small = (getattr(decoder, "select", None) for decoder in (self._full, self._small))
        return full and small and (lambda rows, batch: self._of(rows, full(rows, batch), small(rows, batch)))

    def _of(self, rows: Tensor, full: Prior, small: Prior) -> TwoFidelities:
        part = copy.copy(self)
        part._full, part._small, part._c = full, small, self._c[rows]
        return part

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, c, h, w) -> image (B, 3, H, W), as of the last gradient's c."""
        return self._small.decode(z) + self._c

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        """The image at z, and the small decoder's pull-back."""
        small, pull = decode_pullback(self._small, z)
        if self._seen % self._refresh == 0:
            self._c = self._full.decode(z) - small
        self._seen += 1
        return small + self._c, pull
