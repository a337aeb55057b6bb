"""Linear operators that act on rows and columns one after the other."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from .base import LinearOperator, check_rho, expect

_CUTOFF = 1e-6  # singular values below this share of the largest are taken to be zero


class Separable(LinearOperator):
    """``A(x) = L x R^T`` on each channel: every closed form follows from the small matrices' SVDs.

    A subclass gives the matrix of one axis as a function of the image's length along it. Matrices and SVDs are made
    in float64 when first needed and kept, in the image's dtype and on its device.
    """

    closed_form = True

    def __init__(self) -> None:
        self._kept: dict[tuple, tuple[Tensor, ...]] = {}

    @abstractmethod
    def _matrix(self, n: int) -> Tensor:
        """(m, n) float64: what is done along an axis of n pixels."""

    @abstractmethod
    def _lengths(self, y: Tensor) -> tuple[int, int]:
        """(H, W) of the image that y, (B, C, h, w), comes from."""

    def __call__(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, h, w)."""
        expect(image, "image", ("B", "C", "H", "W"), "Add the axes that are missing.")
        rows, columns = (self._keep(n, image, "matrix")[0] for n in image.shape[2:])
        return rows @ image @ columns.mT

    def adjoint(self, y: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W): ``L^T y R``."""
        rows, columns = (self._keep(n, y, "matrix")[0] for n in self._image_size(y))
        return rows.mT @ y @ columns

    def pinv(self, y: Tensor) -> Tensor:
        """``A^+ y = L^+ y R^+^T``, exact: the image of least norm among those that agree best with y."""
        (u, s, v), (u_, s_, v_) = (self._keep(n, y, "svd") for n in self._image_size(y))
        singular = s[:, None] * s_
        inverse = torch.where(singular > _CUTOFF * singular.max(), 1 / singular, 0)
        return v @ (inverse * (u.mT @ y @ u_)) @ v_.mT

    def solve(self, b: Tensor, rho: float | Tensor) -> Tensor:
        """``V (S^2 + rho)^-1 V^T b`` in the span of V, ``b / rho`` outside. Arguments as in `LinearOperator.solve`."""
        expect(b, "b", ("B", "C", "H", "W"), "Pass an image.")
        rho = check_rho(rho, b)
        (_, s, v), (_, s_, v_) = (self._keep(n, b, "svd") for n in b.shape[2:])
        inside = v.mT @ b @ v_
        solved = v @ (inside / ((s[:, None] * s_).square() + rho)) @ v_.mT
        spans = v.shape[0] == v.shape[1] and v_.shape[0] == v_.shape[1]  # nothing is outside but rounding errors
        return solved if spans else solved + (b - v @ inside @ v_.mT) / rho

    def _image_size(self, y: Tensor) -> tuple[int, int]:
        expect(y, "y", ("B", "C", "h", "w"), "Pass what this operator returned.")
        size = self._lengths(y)
        shape = [self._keep(n, y, "matrix")[0].shape[0] for n in size]
        expect(y, "y", ("B", "C", *shape), "Pass what this operator returned.")
        return size

    def _keep(self, n: int, like: Tensor, what: str) -> tuple[Tensor, ...]:
        """The matrix M of n pixels, M^T M ("normal"), or the thin SVD (U, s, V), as ``like`` wants it."""
        key = (what, n, like.dtype, like.device)
        if key not in self._kept:
            with torch.inference_mode(False):  # what is kept may meet autograd later
                self._kept[key] = tuple(part.to(like) for part in _MADE[what](self._matrix(n)))
        return self._kept[key]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh.mT


_MADE = {"matrix": lambda matrix: (matrix,), "normal": lambda matrix: (matrix.mT @ matrix,), "svd": _svd}
