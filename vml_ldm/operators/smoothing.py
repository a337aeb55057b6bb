"""The smoothest image that agrees with a linear measurement: its normal equations, and a multilevel preconditioner."""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LinearOperator, conjugate_gradients, normal_of

_COLOUR = 10.0  # how much more roughness of colour counts than that of lightness
_STEPS = 100


def roughness_gradient(image: Tensor) -> Tensor:
    """Half the gradient of ``R(v) = |grad v|^2 + 10 |grad (v - mean of its channels)|^2``; the image's edges are free.

    R sums squared differences of neighbouring pixels: a picture's colour is smoother than its lightness.
    """
    x = image + _COLOUR * (image - image.mean(1, keepdim=True))
    down, right = x.diff(dim=2), x.diff(dim=3)
    return -F.pad(down, (0, 0, 1, 1)).diff(dim=2) - F.pad(right, (1, 1)).diff(dim=3)


def solve_smooth(operator: LinearOperator, b: Tensor, weight: Tensor, tolerance: float) -> Tensor:
    """``(A^T A + weight R)^-1 b``, (B, C, H, W), R as in `roughness_gradient`.

    At most 100 conjugate gradients with the preconditioner of Bramble, Pasciak and Xu (1990) for R and for the row sums
    of A^T A: how many it takes depends little on the size of what the operator does not see.

    Args:
        b: (B, C, H, W).
        weight: (B or 1, 1, 1, 1), > 0.
        tolerance: of the energy's root, for what R alone determines.
    """
    channels = b.shape[1]
    stiffness = weight * 4 * (1 + _COLOUR * (channels - 1) / channels)  # the diagonal of R, the same at every level
    normal = normal_of(operator)
    seen = normal(torch.ones_like(b)).abs()
    grids = list(zip(_interpolations(b, 2), _interpolations(b, 3), strict=True))
    from_finest = zip(*(accumulate(axis, torch.matmul) for axis in zip(*grids, strict=True)), strict=True)
    diagonals = [seen + stiffness]
    diagonals += [(rows**2).mT @ seen @ columns**2 + stiffness for rows, columns in from_finest]
    return conjugate_gradients(
        lambda v: normal(v) + weight * roughness_gradient(v),
        b,
        iterations=_STEPS,
        tolerance=tolerance * weight.flatten().sqrt().clamp(max=1),
        precondition=partial(_on_all_grids, grids=grids, diagonals=diagonals),
    )


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
