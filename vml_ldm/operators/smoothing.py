"""The smoothest image that agrees with a linear measurement: its normal equations, and their preconditioners."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LinearOperator, conjugate_gradients, normal_of

_COLOUR = 10.0  # how much more roughness of colour counts than that of lightness
_SCALES = (1, 1 + _COLOUR)  # of the Laplacian in R: lightness, colour
_STEPS = 100
_UNSEEN = 1e-5  # of what A sees of the best seen tint or wave, is rounding

Map = Callable[[Tensor], Tensor]  # (B, C, H, W) -> (B, C, H, W), linear


def roughness_gradient(image: Tensor) -> Tensor:
    """Half the gradient of ``R(v) = |grad v|^2 + 10 |grad (v - mean of its channels)|^2``; the image's edges are free.

    R sums squared differences of neighbouring pixels: a picture's colour is smoother than its lightness.
    """
    x = _by_colour(_SCALES, image)
    down, right = x.diff(dim=2), x.diff(dim=3)
    return -F.pad(down, (0, 0, 1, 1)).diff(dim=2) - F.pad(right, (1, 1)).diff(dim=3)


def solve_smooth(operator: LinearOperator, b: Tensor, weight: Tensor, tolerance: float) -> Tensor:
    """``(A^T A + weight R)^-1 b``, (B, C, H, W), R as in `roughness_gradient`.

    At most 100 conjugate gradients. Where the operator is `shift_invariant` they are preconditioned in the Fourier
    domain, as if the image went on at its other side, but near its edges by the diagonal; elsewhere by the
    preconditioner of Bramble, Pasciak and Xu (1990) for R and for the row sums of A^T A, tint by tint: how many it
    takes depends little on the size of what the operator does not see, or on how it mixes colours.

    Args:
        b: (B, C, H, W).
        weight: (B or 1, 1, 1, 1), > 0.
        tolerance: of the energy's root, for what R alone determines.
    """
    normal = normal_of(operator)
    prepare = _on_waves if getattr(operator, "shift_invariant", False) else _on_grids
    return conjugate_gradients(
        lambda v: normal(v) + weight * roughness_gradient(v),
        b,
        iterations=_STEPS,
        tolerance=tolerance * weight.flatten().sqrt().clamp(max=1),
        precondition=prepare(normal, b, weight),
    )


def _on_waves(normal: Map, b: Tensor, weight: Tensor) -> Map:
    """``S W^-1 S + (1 - S^2) / d``, W as ``A^T A + weight R`` of an image without edges, where both act wave by wave.

    The response of A^T A to one pixel tells how much of each wave it leaves; of R, lightness and colour have a multiple
    of the Laplacian's each. Waves that A does not see within the image it may see at its edges: there S is less than
    one (`_inside`), and d, the diagonal, stands for W.
    """
    height, width = b.shape[2:]
    response, corner = (_response(normal, b, *place) for place in ((height // 2, width // 2), (0, 0)))
    seen, own = torch.fft.rfft2(response).abs().mean(1, keepdim=True), response[..., :1, :1].mean(1, keepdim=True)
    down, right = (2 - 2 * torch.cos(2 * math.pi * torch.arange(n, device=b.device) / n) for n in (height, width))
    laplacian = (down[:, None] + right[: width // 2 + 1]).to(b)
    lost = (laplacian == 0) & (seen <= _UNSEEN * _largest(seen))  # a mean that A does not see stays: nor does R
    waves = [torch.where(lost, 0, 1 / (seen + weight * scale * laplacian)) for scale in _SCALES]
    alike = 1 / (own + weight * laplacian)  # W^-1 if A saw all waves alike, which edges are nearer to
    edge = (alike.mean(dim=(2, 3), keepdim=True) / waves[0].mean(dim=(2, 3), keepdim=True)).clamp(max=1).sqrt()
    edgeless = _largest(response - corner) <= 1e-3 * _largest(response)
    inside = _inside(response, torch.where(edgeless | lost[..., :1, :1], 1, edge))
    diagonal = [(1 - inside**2) / (own + 4 * weight * scale) for scale in _SCALES]

    def precondition(r: Tensor) -> Tensor:
        drawn = torch.fft.irfft2(_by_colour(waves, torch.fft.rfft2(inside * r)), s=(height, width))
        return inside * drawn + _by_colour(diagonal, r)

    return precondition


def _response(normal: Map, image: Tensor, row: int, column: int) -> Tensor:
    """(B, C, H, W): what A^T A makes of one bright pixel, that pixel rolled to the origin."""
    pixel = torch.zeros_like(image)
    pixel[..., row, column] = 1
    return normal(pixel).roll((-row, -column), dims=(2, 3))


def _inside(response: Tensor, edge: Tensor) -> Tensor:
    """(B, 1, H, W): rises from a value at the edges to 1 as far from them as the response spreads (rms)."""
    y, x = (torch.arange(n, device=response.device) for n in response.shape[2:])
    power = response.abs()
    far = torch.minimum(y, len(y) - y)[:, None] ** 2 + torch.minimum(x, len(x) - x) ** 2
    total = power.mean(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(response.dtype).tiny)
    spread = ((power * far).mean(dim=(1, 2, 3), keepdim=True) / total).sqrt()
    down, right = (((0.5 + torch.minimum(i, len(i) - 1 - i)) / spread).clamp(max=1) for i in (y[:, None], x))
    return edge + (1 - edge) * down * right


def _largest(image: Tensor) -> Tensor:
    """(B, 1, 1, 1)."""
    return image.abs().amax(dim=(1, 2, 3), keepdim=True)


def _by_colour(factors: Sequence[float | Tensor], image: Tensor) -> Tensor:
    """(B, C, H, W), an image or its spectrum: lightness (the channels' mean) and colour (the rest) times a factor."""
    lightness, colour = factors
    return colour * image + (lightness - colour) * image.mean(1, keepdim=True)


def _on_grids(normal: Map, b: Tensor, weight: Tensor) -> Map:
    """On each of ever coarser grids, r divided by the diagonal of ``A^T A``'s row sums and of ``weight R`` there.

    In tints t of which neither A^T A, in the mean over the picture, nor R connects any two; R has ``t^T R t = 1`` of a
    unit gradient in each.
    """
    seen = torch.stack([normal(plain.expand_as(b)) for plain in _plain_colours(b)], 2)  # (B, C, C, H, W)
    tints = _tints(seen.mean(dim=(3, 4)))
    seen = torch.einsum("bik,bijhw,bjk->bkhw", tints, seen, tints).abs()
    stiffness = 4 * weight  # the diagonal of R, the same at every level
    grids = list(zip(_interpolations(b, 2), _interpolations(b, 3), strict=True))
    from_finest = zip(*(accumulate(axis, torch.matmul) for axis in zip(*grids, strict=True)), strict=True)
    diagonals = [seen + stiffness]
    diagonals += [(rows**2).mT @ seen @ columns**2 + stiffness for rows, columns in from_finest]
    whole = seen.mean(dim=(2, 3), keepdim=True)
    unseen = (whole <= _UNSEEN * whole.amax(dim=1, keepdim=True)).to(b)

    def keep(r: Tensor) -> Tensor:
        """The mean of a tint that A does not see stays what it is: R does not see it either."""
        return r - unseen * r.mean(dim=(2, 3), keepdim=True)

    return lambda r: _mix(tints, keep(_on_all_grids(keep(_mix(tints.mT, r)), grids, diagonals)))


def _plain_colours(image: Tensor) -> Tensor:
    """(C, 1, C, 1, 1): for each channel, a picture of it alone."""
    return torch.eye(image.shape[1]).to(image)[:, None, :, None, None]


def _tints(seen: Tensor) -> Tensor:
    """(B, C, C): columns t with ``t_i^T seen t_j = 0``, and ``t_i^T (1 + 10 (1 - mean)) t_j`` = 1 if i = j, else 0.

    Args:
        seen: (B, C, C), symmetric: what of one channel's brightness A^T A gives to another, in the mean.
    """
    channels = seen.shape[1]
    grey = torch.full((channels, channels), 1 / channels, dtype=torch.float64)
    root = grey + (torch.eye(channels, dtype=torch.float64) - grey) / math.sqrt(1 + _COLOUR)
    return (root @ torch.linalg.eigh(root @ seen.cpu().double() @ root).eigenvectors).to(seen)


def _mix(matrix: Tensor, image: Tensor) -> Tensor:
    """(B, C, H, W), the matrix times each pixel's channels."""
    return (matrix @ image.flatten(2)).unflatten(2, image.shape[2:])


def _on_all_grids(r: Tensor, grids: list[tuple[Tensor, Tensor]], diagonals: list[Tensor]) -> Tensor:
    """``sum_l P_l D_l^-1 P_l^T r``: on each grid l, r divided by the diagonal there.

    P_l is a product of interpolations: what r is on a grid is made from the finer one, and the sum the other way round.
    """
    here = r / diagonals[0]
    if not grids:
        return here
    (rows, columns), *coarser = grids
    return here + rows @ _on_all_grids(rows.mT @ r @ columns, coarser, diagonals[1:]) @ columns.mT


def _interpolations(image: Tensor, axis: int) -> list[Tensor]:
    """From ever coarser grids to the next finer one, (n_l, n_(l+1)), n_0 = n; each has half as many points."""
    n, longest = image.shape[axis], max(image.shape[2:])
    found = []
    while 2 ** (len(found) + 1) <= longest:
        found.append(_interpolation(n).to(image))
        n = found[-1].shape[1]
    return found


def _interpolation(n: int) -> Tensor:
    """(n, ceil(n / 2)) float64: linear interpolation from points in the middle of each two."""
    coarse = -(-n // 2)
    place = ((torch.arange(n, dtype=torch.float64) - 0.5) / 2).clamp(0, coarse - 1)
    hats = 1 - (place[:, None] - torch.arange(coarse)).abs()
    return hats.clamp(min=0)
