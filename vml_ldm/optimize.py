"""How x_t moves inside one noise level: the descent direction, its preconditioner, its length, and when to stop.

Directions and lengths are in variance-exploding (VE) units, ``x_t / alpha``, where they compare with z0_hat:
``x_t += alpha * eta * d``. Everything is per image: a batch moves as its images would move alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .objective import (
    DataTerm,
    NonFiniteError,
    Prior,
    PullBack,
    bracket,
    data_term,
    decode_linear,
    denoise_pullback,
    guided,
    linearise,
)
from .operators import (
    Measurement,
    column,
    conjugate_gradients,
    dot,
    is_linear,
    is_whole,
    length_of_rms,
    normal_of,
    solves,
    squares,
    uncast,
)

JACOBIANS = ("exact", "free")
RULES = ("analytic", "secant")
PRECONDITIONERS = ("none", "gauss-newton")
Length = Callable[[Tensor, Tensor], Tensor]  # (d, v) -> eta (B,)
OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]
_PROBE = 0.05  # rms change of the latent over which the decoder's directional derivative is taken
_TRIAL = 0.7  # how far a trial goes, of the length that the last step should have had
_BACK = 0.2  # of a trial's length, is the least that a step goes
_TRUST = (0.5, 3.0)  # between these, of its trial's length, a step's best length is believed
_GROWTH = 2.0  # more than so many times as long as the gradients that it is made of, a foretold one is not believed


@dataclass(frozen=True)
class InnerStep:
    """How an inner step moves ``x = x_t / alpha``, given v, minus the gradient (or minus the bracket) in VE units.

    Args:
        rule: "analytic": conjugate directions, each as long as the minimiser of the loss's quadratic model (see
            `step_length`), for a decode each. With a preconditioner, v itself, whose length 1 is right (see
            `precondition`).
            "secant": a level's first step is so; the others have `secant_length`, without a decode, wherever a trial
            turns out to be about as long as it should have been. That is for exact gradients: the Jacobian-free
            direction is none, its differences no symmetric matrix's, and there it is "analytic".
            A number eta > 0: always ``x += eta v``. Where 0 <= J <= I, safe up to
            1 / (|H|^2 / sigma_y^2 + alpha^2 / (4 sigma^2)) for the gradient and
            1 / max(|H|^2 / sigma_y^2, alpha^2 / sigma^2) for the bracket (derived).
            A function ``params -> torch.optim.Optimizer``: that optimiser moves x by the gradient -v and begins anew
            at each level. Its step must take no closure (so no LBFGS) and treat entries apart if batches are to.
        precondition: "gauss-newton" replaces b by N^-1 b inside the VJP, see `precondition`: for operators that see
            some directions much worse than others. "none" leaves it.
        cg_steps: how many conjugate-gradient steps N^-1 may take, >= 1, each with one product by the decoder's
            Jacobian and one by its transpose. A pixel model with an operator that has a closed form takes none.

    Raises:
        ValueError: a choice outside these.
    """

    rule: str | float | OptimizerFactory = "secant"
    precondition: str = "none"
    cg_steps: int = 5

    def __post_init__(self):
        rule = self.rule
        number = isinstance(rule, (int, float)) and not isinstance(rule, bool) and 0 < rule < float("inf")
        if not (number or rule in RULES or callable(rule)):
            raise ValueError(
                f"rule is {self.rule!r}; expected 'analytic', 'secant', a step length > 0, or a function "
                "params -> Optimizer."
            )
        if self.precondition not in PRECONDITIONERS:
            raise ValueError(f"precondition is {self.precondition!r}; expected one of {PRECONDITIONERS}.")
        if not is_whole(self.cg_steps, 1):
            raise ValueError(f"cg_steps is {self.cg_steps!r}; expected a whole number >= 1.")

    def begin(self, jacobian: str, noise: float) -> Rule:
        """The rule with the state that it keeps through one level, of that noise in VE units."""
        if callable(self.rule):
            return _Optimised(self.rule)
        if self.rule not in RULES:
            return _Fixed(self.rule)
        if self.precondition != "none":
            return _Fixed(1.0)
        return Secant(noise) if self.rule == "secant" and jacobian == "exact" else _Conjugate()


class Descent(NamedTuple):
    """What the inner steps of one level did, of all images or of some.

    Attributes:
        x_t: (B, c, h, w), the state after them.
        z0_hat: (B, c, h, w), the clean estimate there.
        residual: (B,), rms of y - A(Dec(drawn)) over the measured values, in units of y; NaN where nothing was drawn.
        nll: (B,), the negative log-likelihood there.
        steps: (B,), how many steps each image took.
        image: (B, 3, H, W), Dec(drawn), not clamped; None where nothing was drawn.
        drawn: (B, c, h, w), the clean estimate that was drawn last: the one before the last step, which no call draws
            again, or z0_hat itself where that step was not taken.
    """

    x_t: Tensor
    z0_hat: Tensor
    residual: Tensor
    nll: Tensor
    steps: Tensor
    image: Tensor | None = None
    drawn: Tensor | None = None

    def put(self, rows: Tensor | None, part: Descent) -> Descent:
        """With a part in place of these rows; None: all of them are the part's."""
        if rows is None:
            return part
        return Descent(*(mine.index_copy(0, rows, theirs) for mine, theirs in zip(self, part, strict=True)))


class Underway(NamedTuple):
    """The images of a batch that are not at rest, and what they are solved with. Those at rest have left the batch
    where the prior can tell images apart (`Prior.select`); elsewhere they stay, and do not move.

    Attributes:
        rows: (n,), their places in the batch; None: all are there.
    """

    prior: Prior
    measurement: Measurement
    rows: Tensor | None = None

    def those(self, flags: list[bool]) -> tuple[Underway, Tensor] | None:
        """The flagged ones, with their places (n,) among all; None where nobody can leave, or all go on."""
        select, count = getattr(self.prior, "select", None), len(flags)
        if select is None or all(flags):
            return None
        going = torch.tensor([i for i in range(count) if flags[i]], device=self.measurement.y.device)
        rows = going if self.rows is None else self.rows[going]
        return Underway(select(going, count), self.measurement.select(going), rows), going


def descend(
    x_t: Tensor,
    *,
    prior: Prior,
    measurement: Measurement,
    alpha: float,
    sigma: float,
    steps: int,
    jacobian: str = "exact",
    stop_at: float = 1.0,
    step: InnerStep = InnerStep(),
) -> Descent:
    """Up to `steps` steps down VML_S at one level; an image rests once its residual is at the noise.

    What guidance adds to the estimate is found once, at x_t as it comes, and held over the level: no step sees its
    derivative. (Ours. With the pull-back of the whole D_w the measurement bends the prompt's push to its own ends.)

    Args:
        x_t: (B, c, h, w), ``alpha z0 + sigma e``.
        alpha, sigma: the level's scales. At alpha = 0 the state says nothing of z0 and no step is taken.
        steps: how many, >= 0.
        jacobian: "exact" pulls the bracket back through the denoiser (the gradient); "free" follows it as it is.
        stop_at: an image rests while ``rms(residual) <= stop_at * sigma_y``; 0 never rests.
        step: how each step is made.
    """
    noise = sigma / alpha if alpha > 0 else torch.inf
    unknown, taken = x_t.new_full((len(x_t),), torch.nan), torch.zeros(len(x_t), dtype=torch.long, device=x_t.device)
    if steps == 0 or alpha == 0:
        return Descent(x_t, guided(prior, x_t, alpha, sigma), unknown, unknown, taken)
    rule, push, batch = step.begin(jacobian, noise), 0.0, Underway(prior, measurement)
    found = whole = Descent(x_t, x_t, unknown, unknown, taken)
    for k in range(steps):
        prior, measurement, x_t = batch.prior, batch.measurement, found.x_t
        z0_hat, pull = _estimate(prior, x_t, alpha, sigma, jacobian)
        push = _push(prior, x_t, z0_hat, alpha, sigma) if k == 0 else push
        z0_hat = z0_hat + push
        data = data_term(z0_hat, prior=prior, measurement=measurement)
        residual = measurement.rms(data.residual)
        found = Descent(x_t, z0_hat, residual, data.nll, found.steps, data.image, z0_hat)
        moving = residual > stop_at * measurement.sigma_y
        finite, flags = torch.stack([residual.isfinite(), moving]).tolist()  # the step's one wait for the device
        if not all(finite):
            raise NonFiniteError(
                f"the residual of the clean estimate is {residual.tolist()} at noise {noise:.3g}; expected "
                "finite values. Look for NaN in y, or for a denoiser or decoder that overflows there."
            )
        if not any(flags):
            return whole.put(batch.rows, found)
        at = {"prior": prior, "measurement": measurement, "noise": noise}
        b = bracket(x_t, z0_hat, data.gradient, alpha=alpha, sigma=sigma)
        if step.precondition == "gauss-newton":
            b = precondition(b, z0_hat, **at, cg_steps=step.cg_steps)
        v = getattr(prior, "movable", lambda change: change)(-alpha * pull(b))
        d, eta = rule(x_t / alpha, v, partial(step_length, z0_hat=z0_hat, data=data, **at, jacobian=jacobian), moving)
        found = found._replace(x_t=x_t + alpha * column(eta * moving, d) * d, steps=found.steps + moving)
        if k + 1 < steps and hasattr(rule, "select") and (left := batch.those(flags)):
            left, going = left
            whole = whole.put(batch.rows, found)
            batch, found, push = left, Descent(*(field[going] for field in found)), _of(push, going)
            rule.select(going)
    z0_hat = batch.prior.denoise(found.x_t, alpha, sigma) + push
    return whole.put(batch.rows, found._replace(z0_hat=z0_hat))


def _of(value: Tensor | float | None, rows: Tensor) -> Tensor | float | None:
    """These rows of a tensor; what is none is alike for all."""
    return value[rows] if isinstance(value, Tensor) else value


class _Conjugate:
    """Conjugate directions of analytic length."""

    def __init__(self):
        self.v_last = self.d_last = None

    def __call__(self, x: Tensor, v: Tensor, length: Length, moving: Tensor) -> tuple[Tensor, Tensor]:
        d = v if self.d_last is None else conjugate(v, self.v_last, self.d_last)
        self.v_last, self.d_last = v, d
        return d, length(d, v)

    def select(self, rows: Tensor) -> None:
        """Go on with some images of the batch, by their places."""
        self.v_last, self.d_last = self.v_last[rows], self.d_last[rows]


class Secant:
    """Conjugate directions of gradients v, each of which is used twice.

    A step goes to a trial point, eta along d. The gradient there tells the curvature along d (the product of linear
    conjugate gradients with the Hessian, as a difference of gradients), and so how long the step should have been and
    what the gradient is at its end, where the next direction begins. A step takes no call of a network beyond its
    gradient's. Where that is not to be believed (see `secant_length`), and for a level's first step, the next trial has
    the bounded length of `_Conjugate`, for one decode. No trial is further than the level's noise, in the rms of x:
    beyond, x is no sample of any z0 near it, and what a gradient told is no longer so.
    """

    def __init__(self, noise: float):
        self.noise = noise
        self.v = self.d = self.eta = None  # v where the last direction began; the direction; how far its trial went

    def __call__(self, x: Tensor, v: Tensor, length: Length, moving: Tensor) -> tuple[Tensor, Tensor]:
        if self.v is None:
            self.v, self.d, self.eta = v, v, self._within_noise(length(v, v), v)
            return self.d, self.eta
        eta, v_end, believed = secant_length(self.v, v, self.d, self.eta)
        d, trial = conjugate(v_end, self.v, self.d), _TRIAL * eta
        if not (believed | ~moving).all():  # an image at rest asks for no decode
            trial = torch.where(believed, trial, length(d, v_end))
        trial = self._within_noise(trial, d)
        move = column(eta - self.eta, v) * self.d + column(trial, v) * d
        self.v, self.d, self.eta = v_end, d, trial
        return move, torch.ones_like(eta)

    def select(self, rows: Tensor) -> None:
        """Go on with some images of the batch, by their places."""
        self.v, self.d, self.eta = self.v[rows], self.d[rows], self.eta[rows]

    def _within_noise(self, eta: Tensor, d: Tensor) -> Tensor:
        """eta, or less: so that ``eta d`` is no longer than the level's noise."""
        rms = (squares(d) / d[0].numel()).sqrt()
        return torch.minimum(eta, self.noise / rms.clamp(min=torch.finfo(d.dtype).tiny))


class _Fixed:
    """The direction v and one length."""

    def __init__(self, eta: float):
        self.eta = eta

    def __call__(self, x: Tensor, v: Tensor, length: Length, moving: Tensor) -> tuple[Tensor, Tensor]:
        return v, v.new_full((len(v),), self.eta)

    def select(self, rows: Tensor) -> None:
        """Go on with some images of the batch, by their places: all are alike."""


class _Optimised:
    """The change of x that a torch optimiser makes with the gradient -v.

    What it keeps of an image is its own affair, so no image leaves the batch.
    """

    def __init__(self, factory: OptimizerFactory):
        self.factory, self.x, self.optimizer = factory, None, None

    def __call__(self, x: Tensor, v: Tensor, length: Length, moving: Tensor) -> tuple[Tensor, Tensor]:
        if self.optimizer is None:
            self.x = torch.empty_like(x)
            self.optimizer = self.factory([self.x])
        self.x.copy_(x)  # where it is, which is not where the last step went for an image that rests
        self.x.grad = -v
        self.optimizer.step()
        return self.x - x, v.new_ones(len(v))


Rule = _Conjugate | Secant | _Fixed | _Optimised  # (x, v, length, moving (B,)) -> (direction, eta (B,)), in VE units


def precondition(
    b: Tensor, z0_hat: Tensor, *, prior: Prior, measurement: Measurement, noise: float, cg_steps: int
) -> Tensor:
    """``N^-1 b`` with ``N = H^T H / sigma_y^2 + I / noise^2``, the Gauss-Newton matrix of b in z0_hat; b's shape.

    Pulled back through the denoiser it is the step, ``x -= J^T N^-1 b`` in VE units, that is

        x += J^T (H^T H + rho I)^-1 [H^T (y - H z0_hat) + rho (z0_hat - x)],    rho = sigma_y^2 / noise^2

    for a linear operator; for any other, and through a decoder, H is the derivative of ``A o Dec`` at z0_hat. (Derived.
    The paper preconditions with a singular value decomposition, in a form not known to us.) N is positive definite, so
    the points at rest stay those where b = 0. Length 1 is right: it minimises the quadratic model along N^-1 b, and for
    a Gaussian prior (J in VE units) the error of x is multiplied by I - J M, or by I - M without J, in which
    ``M = (I + (I - 2P)(2J - I)) / 2``, ``P = N^-1 / noise^2``: half of identity plus contraction, so that no eigenvalue
    of the product leaves the unit disc.

    Args:
        b: (B, c, h, w), the bracket.
        noise: ``sigma / alpha``, the level's noise in VE units.
        cg_steps: conjugate-gradient steps; unused where prior and operator have the closed form.
    """
    operator, variance = measurement.operator, measurement.sigma_y**2
    rho, scale = variance / noise**2, getattr(prior, "pixel_scale", None)
    if scale is not None and solves(operator):  # H = scale A
        return column(variance / scale**2, b) * operator.solve(b, rho / scale**2)
    normal = _normal_matrix(z0_hat, prior, measurement)
    solved = conjugate_gradients(lambda p: normal(p) + column(rho, p) * p, b, iterations=cg_steps, tolerance=0.0)
    return column(variance, b) * solved


def _normal_matrix(z: Tensor, prior: Prior, measurement: Measurement) -> Callable[[Tensor], Tensor]:
    """``p -> H^T H p``, H the derivative of ``A o Dec`` at z. A linear operator is its own derivative.

    The decoder sees p at unit rms, so that in half precision it neither under- nor overflows.
    """
    operator = measurement.operator
    image, push, pull = decode_linear(prior, z)
    if is_linear(operator):
        seen_normal = normal_of(operator)
    else:
        _, push_seen, pull_seen = linearise(operator, image)
        seen_normal = lambda v: pull_seen(push_seen(v))  # noqa: E731

    def normal(p: Tensor) -> Tensor:
        size = column((squares(p) / p[0].numel()).sqrt().clamp(min=torch.finfo(p.dtype).tiny), p)
        pixels = push(p / size)
        with uncast(p):
            seen = seen_normal(pixels)
        return size * pull(seen)

    return normal


def conjugate(v: Tensor, v_last: Tensor, d_last: Tensor) -> Tensor:
    """The next direction of conjugate gradients (Polak-Ribiere, restarted where it turns uphill).

    ``d = v + beta d_last``, ``beta = max(0, <v, v - v_last> / |v_last|^2)`` image by image.
    """
    beta = dot(v, v - v_last) / squares(v_last).clamp(min=torch.finfo(v.dtype).tiny)
    d = v + column(beta.clamp(min=0), v) * d_last
    return torch.where(column(dot(v, d) > 0, v), d, v)


def secant_length(v: Tensor, v_trial: Tensor, d: Tensor, trial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The length of a step along d, from v at its beginning and at a trial point; v where it ends; if it is believed.

    For a quadratic loss v is affine along d: ``v(eta) = v - eta (v - v_trial) / trial``, and the minimiser is at
    ``eta = trial <v, d> / <v - v_trial, d>``. That is believed between half and three times of the trial's length.
    Nearer, the step goes back, to no less than a fifth. Further, or where v does not fall along d, the step ends at the
    trial point, where v is known; so too where it would foretell a v of more than twice the length of both. (That is
    seldom, but without it a state may end in a basin far from y. That y's nll rose on the way is no reason to go back:
    the prior may draw the state away from y.)

    Args:
        v, v_trial: (B, c, h, w), minus the gradients, <v, d> > 0.
        d: (B, c, h, w), the direction.
        trial: (B,), how far along d the trial point is.

    Returns:
        (B,) eta; (B, c, h, w) v at eta; (B,) whether eta is believed to be the minimiser. Otherwise the loss is not as
        it was thought to be, and eta says little of the next step.
    """
    fall, (least, most) = dot(v - v_trial, d), _TRUST
    share = torch.where(fall > 0, dot(v, d) / fall.clamp(min=torch.finfo(v.dtype).tiny), torch.inf)
    at = lambda share: v_trial - column(share - 1, v) * (v - v_trial)  # noqa: E731
    grows = squares(at(share.clamp(1, most))) > _GROWTH**2 * torch.maximum(squares(v), squares(v_trial))
    believed = (share > least) & (share < most) & ~grows
    share = torch.where(believed, share, share.clamp(_BACK, 1))
    return share * trial, at(share), believed


def step_length(
    d: Tensor,
    v: Tensor,
    z0_hat: Tensor,
    data: DataTerm,
    *,
    prior: Prior,
    measurement: Measurement,
    noise: float,
    jacobian: str,
) -> Tensor:
    """(B,): the minimiser along d of the loss's quadratic model, with one forward pass of the decoder.

    ``eta = <v, d> / (|H d|^2 / sigma_y^2 + c |d|^2 / noise^2)``, H the derivative of ``A o Dec`` at z0_hat (a finite
    difference). The change of z0_hat is taken to be the step itself, an upper bound where 0 <= J <= I. Then
    ``J (I - J) <= 1/4`` bounds the prior's curvature in the exact form (c = 1/4), ``I - J <= 1`` in the free (c = 1).

    Args:
        d: (B, c, h, w), the direction, VE units.
        v: minus the gradient, or minus the bracket, VE units.
        noise: ``sigma / alpha``, the level's noise in VE units.
    """
    tiny = torch.finfo(d.dtype).tiny
    h = length_of_rms(d, _PROBE)
    ahead = measurement.residual(prior.decode(z0_hat + column(h, d) * d))
    data_curvature = squares(data.residual - ahead) / (h * measurement.sigma_y) ** 2
    prior_curvature = (0.25 if jacobian == "exact" else 1.0) * squares(d) / noise**2
    return dot(v, d) / (data_curvature + prior_curvature).clamp(min=tiny)


def _push(prior: Prior, x_t: Tensor, z0_hat: Tensor, alpha: float, sigma: float) -> Tensor | float:
    """What guidance adds to the estimate at x_t; 0 without any."""
    push = getattr(prior, "push", None)
    return 0.0 if push is None else push(x_t, z0_hat, alpha, sigma)


def _estimate(prior: Prior, x_t: Tensor, alpha: float, sigma: float, jacobian: str) -> tuple[Tensor, PullBack]:
    """z0_hat and the map of the bracket to the direction's units: J^T, or none of it."""
    if jacobian == "exact":
        return denoise_pullback(prior, x_t, alpha, sigma)
    return prior.denoise(x_t, alpha, sigma), lambda b: b / alpha
