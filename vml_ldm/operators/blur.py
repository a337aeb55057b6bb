"""Blur: by a Gaussian, by motion, by any kernel, and in linear light."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Compose, LinearOperator, check_rho, expect, own
from .pointwise import Gamma
from .separable import Separable

BOUNDARIES = ("reflect", "circular", "zero")
_TOE = 1 / 255


class Blur(LinearOperator):
    """Convolution of every channel with a kernel: ``y = k * x``, so that a single bright pixel shows the kernel.

    Args:
        kernel: (h, w), or (B or 1, C or 1, h, w) with one for each image or channel. Pixel (h // 2, w // 2) is its
            centre. It is used as it is: a camera's kernel is >= 0 and sums to one.
        boundary: what lies outside the image. "reflect" mirrors it about its outermost pixels (the usual choice for
            photographs, and the default); "circular" goes on at the other side; "zero" is black.

    y has the image's shape. "circular" has a closed-form `solve`, in the Fourier domain; the others use conjugate
    gradients. pinv is regularised as in `LinearOperator.pinv`; with "circular" it is the Wiener filter
    ``conj(K) / (|K|^2 + 0.01)``.

    Raises:
        ValueError: a kernel of another shape or with values that are not finite; an unknown boundary.
    """

    shift_invariant = True

    def __init__(self, kernel: Tensor, boundary: str = "reflect"):
        if kernel.ndim not in (2, 4) or kernel.numel() == 0:
            raise ValueError(f"kernel has shape {tuple(kernel.shape)}; expected (h, w) or (B, C, h, w), not empty.")
        if not torch.isfinite(kernel).all():
            raise ValueError("kernel has values that are not finite; expected finite ones. Check how it was made.")
        self.kernel = kernel if kernel.ndim == 4 else kernel[None, None]
        self.boundary = _check_boundary(boundary)
        self.closed_form = boundary == "circular"
        self._spectra: dict[tuple, tuple[Tensor, Tensor]] = {}  # with the kernel, whose id is then no other's
        height, width = kernel.shape[-2:]
        self._after = (0, 0) if self.closed_form else (height // 2, width // 2)
        self._before = (0, 0) if self.closed_form else ((height - 1) // 2, (width - 1) // 2)

    def __call__(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        self._check(image, "image")
        seen = image
        for axis, sides in self._surroundings():
            seen = _extend(seen, axis, *sides, self.boundary)
        top, left = self._before
        spread = self._filter(seen, lambda spectrum: spectrum)
        return spread[..., top : top + image.shape[2], left : left + image.shape[3]]

    def adjoint(self, y: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W): correlation with the kernel, what left the image folded back into it."""
        self._check(y, "y")
        (top, left), (below, right) = self._before, self._after
        spread = self._filter(F.pad(y, (left, right, top, below)), torch.conj)
        for axis, sides in self._surroundings():
            spread = _fold(spread, axis, *sides, self.boundary)
        return spread

    def solve(self, b: Tensor, rho: float | Tensor) -> Tensor:
        """``F^-1 [F b / (|K|^2 + rho)]`` with a circular boundary, otherwise as in `LinearOperator.solve`."""
        if not self.closed_form:
            return super().solve(b, rho)
        self._check(b, "b")
        rho = check_rho(rho, b)
        return self._filter(b, lambda spectrum: 1 / (spectrum.abs().square() + rho))

    def _check(self, x: Tensor, name: str) -> None:
        kernels, channels = self.kernel.shape[:2]
        wanted = ("B" if kernels == 1 else kernels, "C" if channels == 1 else channels, "H", "W")
        expect(x, name, wanted, f"The kernel has shape {tuple(self.kernel.shape)}.")

    def _surroundings(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """The axes on which the blur sees something outside the image, and how many pixels before and after it."""
        if not self.closed_form:
            yield from zip((2, 3), zip(self._before, self._after, strict=True), strict=True)

    def _filter(self, x: Tensor, response: Callable[[Tensor], Tensor]) -> Tensor:
        """x with its half spectrum multiplied by a response to the kernel's.

        Unless the boundary is circular, x is extended by all that the kernel reaches: zeros may follow it, up to a
        length whose Fourier transform is fast.
        """
        size = x.shape[2:] if self.closed_form else [fast_length(n) for n in x.shape[2:]]
        filtered = torch.fft.irfft2(torch.fft.rfft2(x, s=size) * response(self._transfer(x, *size)), s=size)
        return filtered[..., : x.shape[2], : x.shape[3]]

    def _transfer(self, x: Tensor, height: int, width: int) -> Tensor:
        """The kernel's half spectrum for a size, its centre at the origin; a larger kernel wraps around. It is kept,
        unless someone learns the kernel."""
        if self.kernel.requires_grad:
            return _transform(self.kernel.to(x), height, width)
        version = None if self.kernel.is_inference() else self.kernel._version  # it may be changed, or another one
        key = height, width, x.dtype, x.device, id(self.kernel), version
        if key not in self._spectra:
            with torch.inference_mode(False):  # autograd may save it later
                spectrum = _transform(own(self.kernel).to(x.device, x.dtype), height, width)
            self._spectra[key] = self.kernel, spectrum
        return self._spectra[key][1]


class GaussianBlur(Separable):
    """Convolution with a Gaussian, cut at four standard deviations and of sum one.

    Args:
        std: standard deviation in pixels, > 0.
        boundary: "reflect" (default), "circular" or "zero", as in `Blur`.

    y has the image's shape. `solve` is exact for every boundary; pinv is ``(A^T A + 0.01 I)^-1 A^T y``.

    Raises:
        ValueError: std is not positive and finite; an unknown boundary.
    """

    shift_invariant = True

    def __init__(self, std: float, boundary: str = "reflect"):
        super().__init__()
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"std is {std}; expected > 0, in pixels.")
        self.std, self.boundary = float(std), _check_boundary(boundary)

    def normal(self, image: Tensor) -> Tensor:
        """``A^T A x = (L^T L) x (R^T R)``, (B, C, H, W)."""
        expect(image, "image", ("B", "C", "H", "W"), "Add the axes that are missing.")
        rows, columns = (self._keep(n, image, "normal")[0] for n in image.shape[2:])
        return rows @ image @ columns

    def pinv(self, y: Tensor) -> Tensor:
        """``(A^T A + 0.01 I)^-1 A^T y``: the exact pseudo-inverse of a Gaussian returns nothing but noise."""
        return LinearOperator.pinv(self, y)

    def _matrix(self, n: int) -> Tensor:
        radius = math.ceil(4 * self.std)
        kernel = torch.softmax(-0.5 * (torch.arange(-radius, radius + 1).double() / self.std).square(), 0)
        index, weight = _places(n, radius, radius, self.boundary)
        seen, shares = (values.unfold(0, 2 * radius + 1, 1) for values in (index, weight))
        return torch.zeros(n, n, dtype=torch.float64).scatter_add(1, seen, kernel * shares)

    def _lengths(self, y: Tensor) -> tuple[int, int]:
        return y.shape[2], y.shape[3]


class MotionBlur(Blur):
    """Blur by a camera that moved during the exposure, along a path drawn by `motion_kernel`.

    Args:
        length: of the path, in pixels, > 0.
        intensity: in [0, 1]: 0 is a straight line, 1 a shaking hand.
        seed: the same seed draws the same kernel.
        boundary: as in `Blur`.

    For a kernel of your own use `Blur`. Attribute ``kernel`` (1, 1, k, k) is the one in use.
    """

    def __init__(self, length: float = 15.0, intensity: float = 0.5, *, seed: int = 0, boundary: str = "reflect"):
        super().__init__(motion_kernel(length, intensity, seed=seed), boundary)


class NonlinearBlur(Compose):
    """Blur as a sensor sees it, in linear light, shown through a tone curve: ``y = (A x^gamma)^(1 / gamma)``.

    Light adds up before the tone curve, so that bright spots spread over dark surroundings more than a linear blur of
    pixel values has it. Below 1/255 the curves are straight, see `Gamma`.

    Args:
        blur: the linear blur A, for example ``MotionBlur(25)``; any linear operator with values >= 0.
        gamma: exponent from pixel values to light, > 0; displays have about 2.2.
    """

    def __init__(self, blur: LinearOperator, gamma: float = 2.2):
        if not getattr(blur, "linear", False):
            raise TypeError(f"blur is {blur!r}; expected a linear operator, such as MotionBlur(25).")
        super().__init__(Gamma(gamma, toe=_TOE), blur, Gamma(1 / gamma, toe=_TOE**gamma))


def motion_kernel(length: float, intensity: float = 0.5, *, seed: int = 0) -> Tensor:
    """The path of a moving camera as a kernel: (k, k) float32, >= 0, sum one, k odd and about the length.

    The camera moves at constant speed. Its direction drifts, and now and then it jerks back; both grow with
    intensity. Points of the path, eight for each pixel, are shared among the four pixels around them, and the path's
    centre of mass is the kernel's centre.

    Args:
        length: of the path, in pixels, > 0.
        intensity: in [0, 1]: 0 is a straight line, 1 a shaking hand.
        seed: the same seed draws the same kernel.

    Raises:
        ValueError: an argument out of its range.
    """
    if not (math.isfinite(length) and length > 0):
        raise ValueError(f"length is {length}; expected > 0, in pixels.")
    if not 0 <= intensity <= 1:
        raise ValueError(f"intensity is {intensity}; expected a number in [0, 1]: 0 = straight, 1 = shaking.")
    path = _draw_path(length, intensity, torch.Generator().manual_seed(seed))
    radius = math.ceil(length / 2) + 1  # no point of a path is farther from its centre of mass than half its length
    corner = path.floor()
    share = path - corner
    row, column = (corner + radius).long().unbind(1)
    kernel = torch.zeros(2 * radius + 1, 2 * radius + 1, dtype=torch.float64)
    for down in (0, 1):
        for right in (0, 1):
            weight = (share[:, 0] if down else 1 - share[:, 0]) * (share[:, 1] if right else 1 - share[:, 1])
            kernel.index_put_((row + down, column + right), weight, accumulate=True)
    return (kernel / kernel.sum()).float()


def _draw_path(length: float, intensity: float, generator: torch.Generator) -> Tensor:
    """(N, 2) float64: points (row, column) along the path, about their mean."""
    steps = max(2, math.ceil(8 * length))
    first = torch.rand((), generator=generator, dtype=torch.float64)
    drift = torch.randn(steps, generator=generator, dtype=torch.float64) * math.sqrt(6 / steps)
    jerks = torch.rand(steps, generator=generator, dtype=torch.float64) < 3 * intensity / steps
    turns = intensity * drift + math.pi * jerks * (0.5 + torch.rand(steps, generator=generator, dtype=torch.float64))
    angle = 2 * math.pi * first + turns.cumsum(0)
    path = torch.stack([angle.sin(), angle.cos()], 1).cumsum(0) * (length / steps)
    return path - path.mean(0)


def _transform(kernel: Tensor, height: int, width: int) -> Tensor:
    """The half spectrum of a kernel on a canvas of a size, its centre at the origin."""
    down = (torch.arange(kernel.shape[2], device=kernel.device) - kernel.shape[2] // 2) % height
    across = (torch.arange(kernel.shape[3], device=kernel.device) - kernel.shape[3] // 2) % width
    canvas = kernel.new_zeros(*kernel.shape[:2], height, kernel.shape[3]).index_add(2, down, kernel)
    return torch.fft.rfft2(canvas.new_zeros(*canvas.shape[:3], width).index_add(3, across, canvas))


def fast_length(n: int) -> int:
    """The least length >= n without a prime factor above 5."""
    while _rest(n) > 1:
        n += 1
    return n


def _rest(n: int) -> int:
    """n without its factors 2, 3 and 5."""
    for factor in (2, 3, 5):
        while n % factor == 0:
            n //= factor
    return n


def _extend(x: Tensor, axis: int, before: int, after: int, boundary: str) -> Tensor:
    """x with so many more pixels on both sides of an axis, 2 or 3."""
    n = x.shape[axis]
    if boundary == "zero":
        return F.pad(x, (0, 0) * (3 - axis) + (before, after))
    if max(before, after) < n:  # slices, for an index takes ten times as long
        left, right = x.narrow(axis, 1, before), x.narrow(axis, n - 1 - after, after)
        return torch.cat([left.flip(axis), x, right.flip(axis)], axis)
    return x.index_select(axis, _places(n, before, after, boundary)[0].to(x.device))


def _fold(x: Tensor, axis: int, before: int, after: int, boundary: str) -> Tensor:
    """The adjoint of `_extend`: the pixels outside are added to those that they came from."""
    n = x.shape[axis] - before - after
    inside = x.narrow(axis, before, n)
    if boundary == "zero":
        return inside
    if max(before, after) < n:
        left, right = x.narrow(axis, 0, before), x.narrow(axis, before + n, after)
        folded = inside.clone()
        folded.narrow(axis, 1, before).add_(left.flip(axis))
        folded.narrow(axis, n - 1 - after, after).add_(right.flip(axis))
        return folded
    return torch.zeros_like(inside).index_add(axis, _places(n, before, after, boundary)[0].to(x.device), x)


def _places(n: int, before: int, after: int, boundary: str) -> tuple[Tensor, Tensor]:
    """Where an axis of n pixels, extended on both sides, takes its values, and their weights: (index, weight)."""
    place = torch.arange(-before, n + after)
    weight = torch.ones(len(place), dtype=torch.float64)
    if boundary == "circular":
        return place % n, weight
    if boundary == "zero":
        return place.clamp(0, n - 1), weight * (place >= 0) * (place < n)
    period = max(2 * (n - 1), 1)
    return torch.minimum(place % period, period - place % period), weight


def _check_boundary(boundary: str) -> str:
    if boundary not in BOUNDARIES:
        raise ValueError(f"boundary is {boundary!r}; expected one of {', '.join(map(repr, BOUNDARIES))}.")
    return boundary
