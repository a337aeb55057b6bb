"""Operators that keep some pixels, or averages of them: masks, crops, rows and columns, lower resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LinearOperator, OrthonormalRows, check_rho, check_size, expect
from .separable import Separable


class Mask(LinearOperator):
    """Known pixels of an image: ``A(x) = m * x``, its own adjoint.

    Args:
        mask: (B, 1, H, W) or (1, 1, H, W), values in [0, 1]. 1 = known, 0 = missing. A value between them scales
            the pixel and therefore weighs its squared residual by m^2.

    Raises:
        ValueError: another shape, or a value outside [0, 1].
    """

    closed_form = True

    def __init__(self, mask: Tensor):
        if mask.ndim != 4 or mask.shape[1] != 1:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; expected (B, 1, H, W). Pass one channel, 1 = known.")
        if not ((mask >= 0) & (mask <= 1)).all():
            low, high = mask.min().item(), mask.max().item()
            raise ValueError(f"mask has values from {low:.3g} to {high:.3g}; expected [0, 1]. Scale it, 1 = known.")
        self.mask = mask

    def __call__(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return image * self._mask(image, "image")

    def adjoint(self, y: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W): ``A^T y = m * y``."""
        return y * self._mask(y, "y")

    def pinv(self, y: Tensor) -> Tensor:
        """``A^+ y``, exact: ``y / m``, and zero where m = 0."""
        mask = self._mask(y, "y")
        return torch.where(mask > 0, y / mask, 0)

    def solve(self, b: Tensor, rho: float | Tensor) -> Tensor:
        """``b / (m^2 + rho)``. Arguments as in `LinearOperator.solve`."""
        return b / (self._mask(b, "b").square() + check_rho(rho, b))

    def count(self, y: Tensor) -> Tensor:
        """(B,): how many values were measured, ``C sum m^2``: E|m * e|^2 for an error e of unit variance."""
        squares = self.mask.square().sum(dim=(1, 2, 3)) * y.shape[1] * (1 + y.is_complex())
        return squares.expand(len(y)).to(y.real)

    def measured(self, y: Tensor) -> Tensor:
        """y, zero where m = 0: there it is noise alone."""
        return torch.where(self._mask(y, "y") > 0, y, 0)

    def _mask(self, x: Tensor, name: str) -> Tensor:
        mask = self.mask
        if x.ndim != 4 or x.shape[2:] != mask.shape[2:] or len(mask) not in (1, len(x)):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)} and the mask {tuple(mask.shape)}; expected {name} (B, C, H, W) and "
                "a mask (B, 1, H, W) or (1, 1, H, W). Resize one of them."
            )
        return mask.to(x)


class Subsample(OrthonormalRows):
    """Some rows and columns of an image, as they are: ``A(x) = x[..., rows, columns]``.

    Args:
        size: (height, width) of the image, in pixels.
        rows, columns: a whole number n keeps every n-th from the first on (1: all of them); a sequence names those
            that are kept, each once, in the order of y.

    y is (B, C, number of rows, number of columns).

    Raises:
        ValueError: a step below 1; an empty sequence, a place outside the image, or one named twice.
    """

    def __init__(self, size: tuple[int, int], rows: int | Sequence[int] = 1, columns: int | Sequence[int] = 1):
        self.size = check_size(size)
        self.rows, self.columns = _places(rows, self.size[0], "rows"), _places(columns, self.size[1], "columns")

    def __call__(self, image: Tensor) -> Tensor:
        expect(image, "image", ("B", "C", *self.size), "Resize it, or make the operator for its size.")
        rows, columns = self.rows.to(image.device), self.columns.to(image.device)
        return image.index_select(2, rows).index_select(3, columns)

    def adjoint(self, y: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, H, W): y in its places, zero elsewhere."""
        expect(y, "y", ("B", "C", len(self.rows), len(self.columns)), "Pass what this operator returned.")
        rows, columns = self.rows.to(y.device), self.columns.to(y.device)
        tall = y.new_zeros(*y.shape[:2], self.size[0], y.shape[3]).index_add(2, rows, y)
        return y.new_zeros(*y.shape[:2], *self.size).index_add(3, columns, tall)


class Crop(Subsample):
    """A rectangle of a larger image, which outpainting completes: ``A(x) = x[..., top:top+h, left:left+w]``.

    Args:
        size: (height, width) of the whole image, in pixels.
        top, left: the rectangle's first row and column.
        height, width: the rectangle's, and y's, size.

    Raises:
        ValueError: the rectangle is empty or does not lie within the image.
    """

    def __init__(self, size: tuple[int, int], top: int, left: int, height: int, width: int):
        whole = check_size(size)
        if min(top, left) < 0 or min(height, width) < 1 or top + height > whole[0] or left + width > whole[1]:
            raise ValueError(
                f"the crop has rows {top} to {top + height} and columns {left} to {left + width}; expected a rectangle "
                f"within 0 to {whole[0]} and 0 to {whole[1]}. Make it smaller, or move it."
            )
        super().__init__(whole, range(top, top + height), range(left, left + width))


class Downsample(Separable):
    """An image at lower resolution; super-resolution inverts it.

    Args:
        factor: a whole number >= 1; y is (B, C, H / factor, W / factor).
        mode: "average" takes the mean of each factor x factor block. "bicubic" is the antialiased bicubic filter of
            ``torch.nn.functional.interpolate`` (a = -1/2, widened by the factor).
        size: (height, width) of the image, needed only where the factor does not divide it. y is then rounded up:
            the last blocks are smaller, or the bicubic filter's factor is H / h.

    pinv is exact; for "average" it repeats each value over its block.

    Raises:
        ValueError: another mode or factor; at the call, an image that the factor does not divide, without ``size``.
    """

    def __init__(self, factor: int, mode: str = "average", size: tuple[int, int] | None = None):
        super().__init__()
        if int(factor) != factor or factor < 1:
            raise ValueError(f"factor is {factor}; expected a whole number >= 1, for example 4.")
        if mode not in ("average", "bicubic"):
            raise ValueError(f"mode is {mode!r}; expected 'average' or 'bicubic'.")
        self.factor, self.mode = int(factor), mode
        self.size = None if size is None else check_size(size)

    def __call__(self, image: Tensor) -> Tensor:
        if self.size is not None:
            expect(image, "image", ("B", "C", *self.size), "Resize it, or make the operator for its size.")
        elif any(n % self.factor for n in image.shape[2:]):
            raise ValueError(
                f"image has shape {tuple(image.shape)}; expected sides that are multiples of {self.factor}. "
                "Crop it, or pass size=(H, W) to the operator: y is then rounded up."
            )
        return super().__call__(image)

    def _matrix(self, n: int) -> Tensor:
        m = math.ceil(n / self.factor)
        if self.mode == "bicubic":
            pixels = torch.eye(n, dtype=torch.float64)[None, None]
            return F.interpolate(pixels, size=(m, n), mode="bicubic", antialias=True)[0, 0]
        blocks = F.one_hot(torch.arange(n) // self.factor, m).double().T
        return blocks / blocks.sum(1, keepdim=True)

    def _lengths(self, y: Tensor) -> tuple[int, int]:
        return self.size or (self.factor * y.shape[2], self.factor * y.shape[3])


def _places(which: int | Sequence[int], length: int, name: str) -> Tensor:
    """The places kept along an axis, as a tensor of whole numbers."""
    if isinstance(which, Integral):
        if which < 1:
            raise ValueError(f"{name} is {which}; expected a step >= 1, or the places to keep.")
        return torch.arange(0, length, which)
    places = torch.as_tensor(list(which))
    whole = places.ndim == 1 and len(places) > 0 and not places.is_floating_point()
    if not whole or places.min() < 0 or places.max() >= length or len(places.unique()) < len(places):
        raise ValueError(
            f"{name} are {list(which)}; expected whole numbers from 0 to {length - 1}, each once and at least one."
        )
    return places.long()
