"""What all operators share: composition, the linear ones' pseudo-inverse, solve and start, and their checks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_RHO = 0.01  # of a regularised pseudo-inverse: singular values under 0.1 are damped, noise grows by at most 5
_GREY = 0.5
_LAW = 1e-3  # relative, to which a linear operator keeps its laws in float32


class Operator(ABC):
    """What the camera did: images (B, C, H, W) in [0, 1] -> y, differentiable. Any callable will do in its place.

    This class adds what the package can use if it is there: ``b @ a`` (first a, then b) and `count`. Operators that
    know an image to begin from have ``start(y)``, (B, C, H, W) in [0, 1]; `Measurement.start` asks for it.
    """

    linear = False

    def __setattr__(self, name: str, value) -> None:
        """Tensors that an operator holds may meet autograd later, also if it is made in inference mode."""
        super().__setattr__(name, own(value))

    @abstractmethod
    def __call__(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> y; the first axis stays the batch."""

    def count(self, y: Tensor) -> Tensor:
        """(B,): how many values of y were measured; a complex value is two."""
        return count_values(y)

    def measured(self, y: Tensor) -> Tensor:
        """y, or a residual, with zero in place of what tells nothing of the image: noise where a mask has nothing."""
        return y

    def __matmul__(self, first: Callable[[Tensor], Tensor]) -> Compose:
        return Compose(first, self)

    def __rmatmul__(self, last: Callable[[Tensor], Tensor]) -> Compose:
        return Compose(self, last)


class LinearOperator(Operator):
    """``y = A x``. A subclass gives ``__call__`` and `adjoint`, and better forms of the rest where it has them.

    Attributes:
        linear: True.
        closed_form: `solve` is exact and costs about as much as the operator; otherwise it is iterative.
        shift_invariant: but for the image's edges, what it does to a pixel is the same everywhere (a blur).
    """

    linear = True
    closed_form = False
    shift_invariant = False

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y`` (B, C, H, W), real: ``Re <A x, y> = <x, A^T y>``."""

    def check(self, size: Sequence[int], device: torch.device | str = "cpu") -> None:
        """See that it is linear and that `adjoint` is its transpose, on two images of noise.

        Args:
            size: (height, width) of the images.
            device: where they are.

        Raises:
            ValueError: ``A(x + z)`` is not ``A x + A z``, or ``<A x, A x>`` is not ``<x, A^T A x>``, to 1e-3.

        Example:
            >>> from vml_ldm import GaussianBlur
            >>> GaussianBlur(2.0).check((16, 16))
        """
        draw = torch.Generator().manual_seed(0)
        x, z = torch.rand(2, 1, 3, *check_size(size), generator=draw).to(device)
        seen, both = self(x), self(x) + self(z)
        apart = (squares(self(x + z) - both) / squares(both)).sqrt().item()
        if apart > _LAW:
            raise ValueError(
                f"A(x + z) is {apart:.2g} of itself away from A(x) + A(z); expected a linear operator. Where it adds "
                "something or clips, it is an operator without an adjoint: pass the function itself."
            )
        there, back = squares(seen).item(), dot(x, self.adjoint(seen)).item()
        if abs(there - back) > _LAW * there:
            raise ValueError(
                f"<A x, A x> is {there:.6g} and <x, adjoint(A x)> {back:.6g}; expected the same: adjoint is not the "
                "transpose. LinearCustom(forward, size=(height, width)) lets torch find it."
            )

    def normal(self, image: Tensor) -> Tensor:
        """``A^T A image``, (B, C, H, W)."""
        return self.adjoint(self(image))

    def pinv(self, y: Tensor) -> Tensor:
        """An image-shaped inverse (B, C, H, W), linear in y and not clamped.

        Here ``(A^T A + 0.01 I)^-1 A^T y``, the minimiser of ``|y - A x|^2 + 0.01 |x|^2``; for another weight call
        ``solve(adjoint(y), rho)``. Operators whose pseudo-inverse A^+ does not amplify noise without bound return it
        exactly, and say so.
        """
        return self.solve(self.adjoint(y), _RHO)

    def solve(self, b: Tensor, rho: float | Tensor) -> Tensor:
        """``(A^T A + rho I)^-1 b``, here by conjugate gradients; in closed form where `closed_form` says so.

        Args:
            b: (B, C, H, W).
            rho: > 0, a number or (B,).
        """
        rho = check_rho(rho, b)
        return conjugate_gradients(lambda x: self.normal(x) + rho * x, b)

    def start(self, y: Tensor) -> Tensor:
        """An image (B, C, H, W) in [0, 1] to begin from: the pseudo-inverse nearest to mid-grey, clamped.

        ``g + A^+ (y - A g)``, g = 1/2, A^+ as in `pinv`: what y does not determine stays grey.
        """
        grey = torch.full_like(self.adjoint(y), _GREY)
        return (grey + self.pinv(y - self(grey))).clamp(0, 1)


class OrthonormalRows(LinearOperator):
    """A linear operator with ``A A^T = I``: A^+ is the adjoint, and A^T A projects."""

    closed_form = True

    def pinv(self, y: Tensor) -> Tensor:
        """``A^+ y = A^T y``, exact: what was not measured is zero."""
        return self.adjoint(y)

    def solve(self, b: Tensor, rho: float | Tensor) -> Tensor:
        """``P b / (1 + rho) + (b - P b) / rho``, ``P = A^T A``. Arguments as in `LinearOperator.solve`."""
        rho, seen = check_rho(rho, b), self.normal(b)
        return seen / (1 + rho) + (b - seen) / rho


class Compose(Operator):
    """One operator after another: ``Compose(a, b, c)(x) = c(b(a(x)))``, also written ``c @ b @ a``.

    Args:
        operators: in the order in which the image meets them; operators of this package or any callables.

    If all of them are linear it is a `LinearOperator`, with `adjoint`, `pinv` and `solve` (by conjugate gradients).
    `start` of a nonlinear one goes back through the starts of its parts.

    Raises:
        ValueError: no operator.
        TypeError: something that cannot be called; `adjoint`, `pinv` or `solve` of a nonlinear composition; `start`
            where a part has none.
    """

    def __new__(cls, *operators: Callable[[Tensor], Tensor]):
        linear = cls is Compose and operators and all(map(is_linear, operators))
        return super().__new__(_LinearCompose if linear else cls)

    def __init__(self, *operators: Callable[[Tensor], Tensor]):
        if not operators:
            raise ValueError("Compose got no operator; expected at least one, in the order the image meets them.")
        for operator in operators:
            if not callable(operator):
                raise TypeError(f"Compose got {operator!r}; expected operators, or callables image -> y.")
        self.operators = operators

    def __call__(self, image: Tensor) -> Tensor:
        for operator in self.operators:
            image = operator(image)
        return image

    def adjoint(self, *_) -> Tensor:
        """Of a nonlinear composition there is none, nor a normal, pinv or solve."""
        bent = next(part for part in self.operators if not is_linear(part))
        raise TypeError(
            f"this composition is not linear, for {bent!r} is not; expected linear parts. "
            "Use start(y) for an image to begin from, and autograd for the derivative."
        )

    normal = pinv = solve = adjoint

    def start(self, y: Tensor) -> Tensor:
        for operator in reversed(self.operators):
            y = start_of(operator, y)
        return y

    def count(self, y: Tensor) -> Tensor:
        """(B,): as the last operator counts."""
        last = self.operators[-1]
        return last.count(y) if hasattr(last, "count") else count_values(y)

    def measured(self, y: Tensor) -> Tensor:
        """y as the last operator has measured it."""
        last = self.operators[-1]
        return last.measured(y) if hasattr(last, "measured") else y


class _LinearCompose(LinearOperator, Compose):
    """What `Compose` makes of linear operators."""

    __call__ = Compose.__call__

    def adjoint(self, y: Tensor) -> Tensor:
        """``A_1^T ... A_n^T y``."""
        for operator in reversed(self.operators):
            y = operator.adjoint(y)
        return y


class NoStartError(TypeError):
    """An operator, or a part of one, knows no image to begin from."""


def start_of(operator: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """``operator.start(y)``, or a NoStartError that names the operator."""
    if not hasattr(operator, "start"):
        raise NoStartError(
            f"{operator!r} has no start(y), an image (B, 3, H, W) in [0, 1] to begin from. "
            "Begin from noise, or pass an operator with this method."
        )
    return operator.start(y)


def is_linear(operator) -> bool:
    """Whether it says that it is linear, and has an adjoint."""
    return getattr(operator, "linear", False) and hasattr(operator, "adjoint")


def normal_of(operator: LinearOperator) -> Callable[[Tensor], Tensor]:
    """``A^T A`` of a linear operator, one of ours or its like."""
    return getattr(operator, "normal", lambda image: operator.adjoint(operator(image)))


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    iterations: int = 200,
    tolerance: float | Tensor = 1e-6,
    precondition: Callable[[Tensor], Tensor] = lambda r: r,
) -> Tensor:
    """x with ``apply(x) = b``, for a linear, symmetric and positive definite map; every item of the batch alone.

    Args:
        apply: (B, ...) -> (B, ...), which does not mix the batch.
        b: (B, ...), real.
        iterations: at most so many; `apply` is called once in each.
        tolerance: a number or (B,); an item rests once ``|b - apply(x)| <= tolerance |b|``, as the preconditioner
            measures it.
        precondition: an approximate inverse of `apply`, as linear, symmetric and positive definite as that.
    """
    x, residual, direction, tiny = torch.zeros_like(b), b, precondition(b), torch.finfo(b.dtype).tiny
    size = dot(residual, direction)
    goal = tolerance**2 * size
    for _ in range(iterations):
        moving = size > goal
        if not moving.any():
            break
        ahead = apply(direction)
        length = column(moving * size / dot(direction, ahead).clamp(min=tiny), b)
        x, residual = x + length * direction, residual - length * ahead
        towards = precondition(residual)
        size, last = dot(residual, towards), size
        direction = towards + column(size / last.clamp(min=tiny), b) * direction
    return x


def own(value):
    """A tensor made in inference mode as one that autograd may save; anything else as it is."""
    if not (isinstance(value, Tensor) and value.is_inference()):
        return value
    with torch.inference_mode(False):
        return value.clone()


def uncast(x: Tensor) -> torch.autocast:
    """No autocast of the caller's on x's device: what is measured keeps the precision of its tensors."""
    return torch.autocast(x.device.type, enabled=False)


def squares(x: Tensor) -> Tensor:
    """(B, ...) -> (B,): each item's sum of squares (of absolute values, for a complex x)."""
    return torch.view_as_real(x).square().flatten(1).sum(1) if x.is_complex() else x.square().flatten(1).sum(1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(B, ...), (B, ...) -> (B,): inner products of real tensors, item by item."""
    return (a * b).flatten(1).sum(1)


def length_of_rms(d: Tensor, rms: float) -> Tensor:
    """(B,): h for which each item's ``h d`` has that rms; finite where d is 0."""
    count = d[0].numel()
    return rms * (count / squares(d).clamp(min=count * torch.finfo(d.dtype).tiny)).sqrt()


def count_values(y: Tensor) -> Tensor:
    """(B,): how many real values each item of y has, in y's real dtype."""
    return torch.full((len(y),), math.prod(y.shape[1:]) * (1 + y.is_complex()), dtype=y.real.dtype, device=y.device)


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) or (1,) -> (B or 1, 1, ..., 1), to multiply ``like``."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def expect(x: Tensor, name: str, shape: Sequence[int | str], advice: str) -> None:
    """A ValueError with the name, the shape that came, the one expected and an advice, unless x has that shape.

    Args:
        shape: a number for each axis whose length matters, a letter for any length.
    """
    fits = len(x.shape) == len(shape) and all(
        isinstance(wanted, str) or length == wanted for length, wanted in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({wanted}). {advice}")


def check_rho(rho: float | Tensor, b: Tensor) -> Tensor:
    """rho as a column beside b.

    Raises:
        ValueError: not > 0, or neither a number nor (B,).
    """
    values = torch.as_tensor(rho, dtype=b.dtype, device=b.device)
    if values.ndim > 1 or values.numel() not in (1, len(b)) or not (torch.isfinite(values) & (values > 0)).all():
        raise ValueError(f"rho is {rho}; expected > 0, a number or ({len(b)},), one value for each image.")
    return column(values, b)


def is_whole(n, least: int = 0) -> bool:
    """Whether n is a whole number from `least` up. True and False are none."""
    return isinstance(n, int) and not isinstance(n, bool) and n >= least


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """An image's (H, W).

    Raises:
        ValueError: not two positive whole numbers.
    """
    if isinstance(size, int) or len(size) != 2 or any(int(side) != side or side < 1 for side in size):
        raise ValueError(f"size is {size!r}; expected the image's (height, width) in pixels.")
    return int(size[0]), int(size[1])
