"""A measurement: an operator, what was observed through it, and the noise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import (
    NoStartError,
    column,
    count_values,
    expect,
    is_linear,
    length_of_rms,
    squares,
    start_of,
    uncast,
)
from .foreign import LinearCustom
from .rows import Rows
from .smoothing import roughness_gradient, solve_smooth

_PROBE = 0.05  # rms change of the image over which the operator's directional derivative is taken
_TONES = (0.1, 0.5, 0.9)  # of a dark, a grey and a bright picture
_SLOPE = 0.1  # rms difference of neighbouring pixels of a picture, about
_TOLERANCE = 1e-4
_LEAST_NOISE = 0.01  # a noiseless y weighs as one with so much noise against the smoothness of a guess


class Measurement:
    """``y = A(x0) + n``, ``n ~ N(0, sigma_y^2 I)``: an operator, what was observed, and the noise.

    Args:
        operator: image (B, 3, H, W) in [0, 1] -> y, differentiable.
        y: what was observed, floating or complex; its first axis is the batch.
        sigma_y: the noise's standard deviation in units of y, > 0; a number or (B,). Of a complex n it is that of the
            real part and of the imaginary part, each. For a noiseless measurement through a VAE pass the VAE's own
            error: no sample can agree better than the decoder can draw.

    Raises:
        ValueError: sigma_y is not positive and finite, or is neither a number nor (B,); y is of a whole-number type.
    """

    def __init__(self, operator: Callable[[Tensor], Tensor], y: Tensor, sigma_y: float | Tensor):
        if not (y.is_floating_point() or y.is_complex()):
            raise ValueError(f"y is of type {y.dtype}; expected floating or complex. Divide 8-bit values by 255.")
        sigma = torch.as_tensor(sigma_y, dtype=y.real.dtype, device=y.device)
        if sigma.ndim > 1 or (sigma.ndim == 1 and len(sigma) not in (1, len(y))):
            raise ValueError(
                f"sigma_y has shape {tuple(sigma.shape)}; expected a number or ({len(y)},), one value for each y."
            )
        if not (torch.isfinite(sigma) & (sigma > 0)).all():
            raise ValueError(
                f"sigma_y is {sigma_y}; expected > 0, in units of y. "
                "For a noiseless y pass the model's own error, for example 0.02."
            )
        self.operator, self.y = operator, y
        self.sigma_y = sigma.expand(len(y))

    def check(self, size: tuple[int, int]) -> None:
        """See that the operator takes images of a size and gives y's shape, by one call on grey; no network runs.

        Args:
            size: (height, width) in pixels, of the images that the model makes.

        Raises:
            ValueError: the operator refuses such an image, gives another shape than y's, or cannot be differentiated; a
                `LinearCustom` that does not keep the laws of linear ones (`LinearOperator.check`).
        """
        image = torch.full((len(self.y), 3, *size), 0.5, dtype=self.y.real.dtype, device=self.y.device)
        try:
            with torch.enable_grad():
                residual = self.residual(image.requires_grad_())
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"the operator and y do not fit images of {size[0]} x {size[1]} pixels, the model's size; "
                f"y has shape {tuple(self.y.shape)}: {error}"
            ) from error
        if not residual.requires_grad:
            raise ValueError(
                "the operator's result has no gradient in its image; expected a function that torch differentiates. "
                "Write it with torch, or pass Custom(forward, vjp)."
            )
        if isinstance(self.operator, LinearCustom):
            self.operator.check(size, self.y.device)

    def select(self, rows: Tensor) -> Measurement:
        """Of some images of the batch, by their places (n,), which rise; of all of them it is this one."""
        if len(rows) == len(self.y):
            return self
        part = copy.copy(self)
        part.operator = Rows(self.operator, rows, len(self.y))
        part.y, part.sigma_y = self.y[rows], self.sigma_y[rows]
        return part

    def residual(self, image: Tensor) -> Tensor:
        """``y - A(image)``, the shape of y; zero where y tells nothing (a mask's missing pixels).

        Raises:
            ValueError: ``A(image)`` has another shape than y, or one of the two is complex and the other real.
        """
        with uncast(image):
            seen = self.operator(image)
        if self.y.ndim == seen.ndim - 1:
            raise ValueError(
                f"y has shape {tuple(self.y.shape)}, without the batch's axis; expected "
                f"({', '.join(map(str, ('B', *seen.shape[1:])))}). Of one image pass y[None]."
            )
        if seen.shape != self.y.shape:
            raise ValueError(
                f"the operator maps an image {tuple(image.shape)} to {tuple(seen.shape)}, y has shape "
                f"{tuple(self.y.shape)}; expected the same. Make y with this operator from images of this size."
            )
        if seen.is_complex() != self.y.is_complex():
            kinds = ["complex" if x.is_complex() else "real" for x in (seen, self.y)]
            raise ValueError(f"the operator gives {kinds[0]} numbers, and y has {kinds[1]} ones; expected the same.")
        residual = self.y - seen
        return self.operator.measured(residual) if hasattr(self.operator, "measured") else residual

    def nll(self, image: Tensor) -> Tensor:
        """(B,): ``|y - A(image)|^2 / (2 sigma_y^2)``, the negative log-likelihood up to a constant."""
        return squares(self.residual(image)) / (2 * self.sigma_y**2)

    def told(self) -> Tensor:
        """Where y tells something of the image, of y's shape, bool: everywhere but in a mask's missing pixels."""
        ones = torch.ones_like(self.y)
        return self.operator.measured(ones) != 0 if hasattr(self.operator, "measured") else ones != 0

    def start(self) -> Tensor:
        """(B, 3, H, W) in [0, 1]: the operator's image to begin from, see `LinearOperator.start`.

        Raises:
            TypeError: the operator has none.
        """
        with uncast(self.y):
            return start_of(self.operator, self.y)

    @torch.no_grad()
    def guess(
        self, size: tuple[int, int], *, noise: float | Tensor = 0.0, steps: int = 20, tolerance: float = _TOLERANCE
    ) -> Tensor:
        """(B, 3, H, W) in [0, 1]: an image that agrees with y about as well as one can without a prior.

        Of a linear operator with an adjoint, the smooth one: `smooth` with a slope of 0.1, from the operator's `start`
        if that has a closed form, else from mid-grey, clamped. Of any other, its start; if there is none, least squares
        from mid-grey: steps down |y - A(x)|^2, each as long as the minimiser of the linearised residual, clamped to
        [0, 1], and taken by those images that agree better for it; the others try half of it next.

        Args:
            size: (height, width) in pixels.
            noise: standard deviation of the noise in y, a number or (B,); less than 0.01 counts as 0.01.
            steps: of least squares, each of three calls of the operator and one backward pass through it.
            tolerance: as in `smooth`.

        Raises:
            ValueError: the operator's start has another size.
        """
        grey = self._plain(size, 0.5)
        linear = is_linear(self.operator)
        image = grey if linear and not solves(self.operator) else self._begin(grey, steps)
        expect(image, "the operator's start(y)", tuple(grey.shape), "It is an image of the model's size.")
        if linear:
            noise = torch.as_tensor(noise, dtype=image.dtype, device=image.device).clamp(min=_LEAST_NOISE)
            image = self.smooth(image, noise=noise, slope=_SLOPE, tolerance=tolerance).clamp(0, 1)
        return image

    @torch.no_grad()
    def smooth(
        self,
        image: Tensor,
        *,
        noise: float | Tensor,
        slope: float,
        of: Tensor | None = None,
        tolerance: float = _TOLERANCE,
    ) -> Tensor:
        """The minimiser x of ``|y - A x|^2 / noise^2 + R(x - of) / slope^2``, searched for from an image, not clamped.

        ``R(v) = |grad v|^2 + 10 |grad (v - mean of its channels)|^2`` sums squared differences of neighbouring pixels
        (see `smoothing.solve_smooth`). What neither y nor R tells stays as it is in the image.

        Args:
            image: (B, 3, H, W).
            noise: > 0, a number or (B,), in units of y.
            slope: how much neighbouring pixels differ.
            of: (B, 3, H, W), the picture from which the answer is to differ smoothly; None: a constant one.
            tolerance: of its conjugate gradients, relative, for what R alone determines.

        Raises:
            TypeError: the operator is not linear or has no adjoint.
        """
        if not is_linear(self.operator):
            raise TypeError(f"{self.operator!r} is not linear with an adjoint; expected a LinearOperator or its like.")
        weight = column(torch.as_tensor(noise / slope, dtype=image.dtype, device=image.device), image) ** 2
        rough = image if of is None else image - of
        with uncast(image):
            b = self.operator.adjoint(self.residual(image)) - weight * roughness_gradient(rough)
            return image + solve_smooth(self.operator, b, weight, tolerance)

    def seen(self, size: tuple[int, int], cell: int) -> Tensor:
        """(N, B, height / cell, width / cell): of how many colours, 0 to 3, of each cell of an image y tells something.

        To first order: as many as the gradients of the residual in the cell span, for three random cotangents, of a
        backward pass through the operator each. N is 1 for a linear operator; another is asked in a dark, a grey and a
        bright picture, for what clips light does not see all. What y is plays no part, so that the images of a batch
        are judged as they are alone.

        Args:
            size: (height, width) in pixels.
            cell: side of a cell in pixels, a divisor of both.
        """
        tones = _TONES[:1] if is_linear(self.operator) else _TONES
        return torch.stack([self._sees(self._plain(size, tone), cell) for tone in tones])

    def _plain(self, size: tuple[int, int], tone: float) -> Tensor:
        """(B, 3, height, width): images of one grey, as many as there are in y."""
        return torch.full((len(self.y), 3, *size), tone, dtype=self.y.real.dtype, device=self.y.device)

    def _sees(self, image: Tensor, cell: int) -> Tensor:
        """(B, H / cell, W / cell): how many colours of each cell move y, beyond float32's rounding."""
        with torch.enable_grad(), uncast(image):
            source = image.detach().requires_grad_()
            residual, generator = self.residual(source), torch.Generator().manual_seed(0)
            draws = torch.randn(3, *residual.shape[1:], generator=generator, dtype=residual.dtype).to(residual.device)
            pull = partial(torch.autograd.grad, residual, source, retain_graph=True)
            gradients = torch.stack([pull(draw.expand_as(residual))[0] for draw in draws]).cpu().double()
        pairs = torch.einsum("nbihw,nbjhw->bijhw", gradients, gradients).flatten(1, 2)
        grams = F.avg_pool2d(pairs, cell).unflatten(1, (3, 3)).movedim((1, 2), (3, 4))
        power = torch.linalg.eigvalsh(grams)  # rising, of three colours
        eps = max(torch.finfo(dtype).eps for dtype in (image.dtype, torch.float32))
        least = eps * power[..., -1:] + eps**2 * power.amax(dim=(1, 2, 3), keepdim=True)
        return (power > least).sum(-1).to(image.device)

    def _begin(self, grey: Tensor, steps: int) -> Tensor:
        """The operator's start; if there is none, least squares from grey."""
        try:
            return self.start()
        except NoStartError:
            return self._search(grey, steps)

    def _search(self, image: Tensor, steps: int) -> Tensor:
        """Least squares from an image, see `guess`."""
        share = torch.ones_like(self.sigma_y)
        for _ in range(steps):
            image, better = self._improve(image, share)
            share = torch.where(better, (2 * share).clamp(max=1), share / 2)
        return image

    def _improve(self, image: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """The image after one step of `guess`, a share (B,) of its full length, and which images took it."""
        with torch.enable_grad(), uncast(image):
            source = image.detach().requires_grad_()
            residual = self.residual(source)
            (d,) = torch.autograd.grad(residual, source, -residual.detach())  # A'^T (y - A(x))
        residual = residual.detach()
        tiny = torch.finfo(d.dtype).tiny
        h = length_of_rms(d, _PROBE)
        change = residual - self.residual((image + column(h, d) * d).clamp(0, 1))  # about h A' d
        length = h * (change.conj() * residual).real.flatten(1).sum(1) / squares(change).clamp(min=tiny)
        ahead = (image + column(share * length, d) * d).clamp(0, 1)
        better = squares(self.residual(ahead)) < squares(residual)  # never where a value is not finite
        return torch.where(column(better, image), ahead, image), better

    def count(self) -> Tensor:
        """(B,): how many values were measured, so that ``E|n|^2 = count * sigma_y^2``."""
        return self.operator.count(self.y) if hasattr(self.operator, "count") else count_values(self.y)

    def rms(self, residual: Tensor) -> Tensor:
        """(B,): root mean square of a residual over the values that were measured, in units of y."""
        return (squares(residual) / self.count().clamp(min=1)).sqrt()


def solves(operator) -> bool:
    """Whether it is linear and says that its ``solve`` has a closed form."""
    return is_linear(operator) and getattr(operator, "closed_form", False)
