"""Operators made elsewhere: another library's physics, and functions that torch cannot differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import LinearOperator, NoStartError, Operator, check_size, own


class Custom(Operator):
    """An operator given by two functions, for what torch cannot differentiate: ``y = forward(x)`` and its pull-back.

    Args:
        forward: image (B, 3, H, W) -> y, run without a graph.
        vjp: (image, cotangent) -> ``J^T cotangent``, shaped like the image; J is forward's Jacobian at the image, the
            cotangent is shaped like y.

    It can be differentiated once, in reverse mode: preconditioned steps and the traces of the loss ask for more.

    Raises:
        TypeError: an argument that cannot be called; at the call, a result that is no tensor; a second derivative.
        ValueError: in the backward pass, a result of vjp that is not shaped like the image.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], vjp: Callable[[Tensor, Tensor], Tensor]):
        for name, function in (("forward", forward), ("vjp", vjp)):
            if not callable(function):
                raise TypeError(f"{name} is {function!r}; expected a function.")
        self.forward, self.vjp = forward, vjp

    def __call__(self, image: Tensor) -> Tensor:
        return _PulledBack.apply(image, self.forward, self.vjp, None)


class LinearCustom(LinearOperator):
    """A linear operator given by functions: ``y = A x``, and ``A^T y`` unless torch is to find that.

    pinv and solve take conjugate gradients.

    Args:
        forward: image (B, 3, H, W) -> y. With an adjoint it is run without a graph, and may leave torch.
        adjoint: y -> image (B, 3, H, W), with ``Re <A x, y> = <x, A^T y>``. None: by differentiating forward.
        size: (H, W) of the images, which y does not tell; asked for where there is no adjoint.

    Raises:
        TypeError: an argument that cannot be called, or neither an adjoint nor a size; at the call, a result that is no
            tensor.
        ValueError: in the backward pass, a result of adjoint that is not shaped like the image.

    Example:
        >>> rows = LinearCustom(lambda image: image[:, :, ::2], size=(4, 4))
        >>> rows.adjoint(torch.ones(1, 3, 2, 4))[0, 0, :, 0]
        tensor([1., 0., 1., 0.])
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor] | None = None,
        *,
        size: Sequence[int] | None = None,
    ):
        if not callable(forward):
            raise TypeError(f"forward is {forward!r}; expected a function.")
        if not callable(adjoint) and (adjoint is not None or size is None):
            raise TypeError(
                f"adjoint is {adjoint!r}; expected a function, or None with size=(height, width) of the images, and "
                "torch finds it."
            )
        self._forward, self._adjoint = forward, adjoint
        self.size = None if size is None else check_size(size)

    def __call__(self, image: Tensor) -> Tensor:
        if self._adjoint is None:
            return self._forward(image)
        return _PulledBack.apply(image, self._forward, lambda _, cotangent: self._adjoint(cotangent), self._forward)

    def adjoint(self, y: Tensor) -> Tensor:
        return _transposed(self._forward, y, self.size) if self._adjoint is None else self._adjoint(y)


def _transposed(forward: Callable[[Tensor], Tensor], y: Tensor, size: tuple[int, int]) -> Tensor:
    """``A^T y`` (B, 3, H, W) of a linear function, by its derivative at a black image."""
    with torch.inference_mode(False), torch.enable_grad():
        image = torch.zeros(len(y), 3, *size, dtype=y.real.dtype, device=y.device, requires_grad=True)
        (found,) = torch.autograd.grad(forward(image), image, own(y))
    return found


class _PulledBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, forward: Callable, vjp: Callable, push: Callable | None) -> Tensor:
        ctx.save_for_backward(image)
        ctx.vjp, ctx.push = vjp, push
        y = forward(image.detach())
        if not isinstance(y, Tensor):
            raise TypeError(
                f"forward returned {type(y).__name__}; expected a tensor. Convert it, on the image's device."
            )
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None, None]:
        (image,) = ctx.saved_tensors
        return _Pull.apply(cotangent, image, ctx.vjp, ctx.push), None, None, None


class _Pull(torch.autograd.Function):
    """``J^T cotangent``, which goes back to the cotangent by J where that is known and the same for all images."""

    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, image: Tensor, vjp: Callable, push: Callable | None) -> Tensor:
        ctx.push = push
        gradient = vjp(image, cotangent.detach())
        if not isinstance(gradient, Tensor):
            raise TypeError(f"vjp returned {type(gradient).__name__}; expected a tensor shaped like the image.")
        if gradient.shape != image.shape:
            raise ValueError(
                f"vjp returned shape {tuple(gradient.shape)}; expected the image's, {tuple(image.shape)}: "
                "the transposed Jacobian at the image times the cotangent."
            )
        return gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, change: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.push is None:
            raise TypeError(
                "Custom(forward, vjp) can be differentiated once, and its second derivative was asked for; expected an "
                "operator that torch differentiates twice, or LinearCustom(forward, adjoint) if it is linear. Or take "
                "precondition='none', and a loss without its traces."
            )
        return ctx.push(change.detach()), None, None, None


def from_physics(physics: Any, *, linear: bool | None = None) -> Operator:
    """A deepinv ``Physics`` as an operator; its noise model is left out, for `Measurement` has its own.

    Args:
        physics: an object with ``A(x)``. A linear one needs ``A_adjoint(y)``. ``A_dagger(y)``, where there is one,
            becomes pinv and start of a linear operator and start of a nonlinear one. Move it to the images' device.
        linear: None goes by deepinv's class, ``LinearPhysics``; pass it for an object of another library.

    Raises:
        TypeError: there is no ``A``, or a linear one has no ``A_adjoint``.
    """
    if linear is None:  # by name: deepinv is not imported, and some of its nonlinear classes have an A_adjoint too
        linear = any(kind.__name__ == "LinearPhysics" for kind in type(physics).__mro__)
    for name in ("A", "A_adjoint") if linear else ("A",):
        if not callable(getattr(physics, name, None)):
            raise TypeError(f"{type(physics).__name__} has no method {name}; expected a deepinv Physics or its like.")
    return _LinearPhysics(physics) if linear else _Physics(physics)


class _Physics(Operator):
    def __init__(self, physics: Any):
        self.physics = physics

    def __call__(self, image: Tensor) -> Tensor:
        return self.physics.A(image)

    def start(self, y: Tensor) -> Tensor:
        if not hasattr(self.physics, "A_dagger"):
            raise NoStartError(f"{type(self.physics).__name__} has no A_dagger to begin from. Begin from noise.")
        image = self.physics.A_dagger(y)
        if image.is_complex():
            raise NoStartError(f"{type(self.physics).__name__}.A_dagger gives complex values. Begin from noise.")
        return image.clamp(0, 1)


class _LinearPhysics(LinearOperator):
    def __init__(self, physics: Any):
        self.physics = physics

    def __call__(self, image: Tensor) -> Tensor:
        return self.physics.A(image)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.physics.A_adjoint(y)

    def pinv(self, y: Tensor) -> Tensor:
        return self.physics.A_dagger(y) if hasattr(self.physics, "A_dagger") else super().pinv(y)
