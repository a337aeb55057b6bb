"""An operator made for a batch, as it acts on some of the batch's images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import LinearOperator, Operator, count_values, is_linear, start_of


class Rows(Operator):
    """Any operator on some of the images that it was made for, linear if that is.

    What an operator holds for each image of its batch (masks; a function's own variables) nobody else can pick from. So
    it sees a whole batch, in which images that were not picked are copies of the first that was.

    Args:
        operator: of this package, or any callable.
        rows: (n,) whole numbers, rising: the places of those images in the batch.
        batch: how many images the operator was made for.
    """

    def __new__(cls, operator: Callable[[Tensor], Tensor], rows: Tensor, batch: int):
        return super().__new__(_LinearRows if is_linear(operator) else cls)

    def __init__(self, operator: Callable[[Tensor], Tensor], rows: Tensor, batch: int):
        if isinstance(operator, Rows):
            operator, rows, batch = operator.operator, operator.rows[rows], len(operator._places)
        self.operator, self.rows = operator, rows
        self._places = torch.zeros(batch, dtype=torch.long, device=rows.device)
        self._places[rows] = torch.arange(len(rows), device=rows.device)

    def __call__(self, image: Tensor) -> Tensor:
        return self._pick(self.operator, image)

    def __repr__(self) -> str:
        return f"{self.operator!r} of some images"

    def start(self, y: Tensor) -> Tensor:
        return self._pick(lambda y: start_of(self.operator, y), y)

    def count(self, y: Tensor) -> Tensor:
        return self._pick(getattr(self.operator, "count", count_values), y)

    def measured(self, y: Tensor) -> Tensor:
        return self._pick(self.operator.measured, y) if hasattr(self.operator, "measured") else y

    def _pick(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Of a function of the whole batch, what it gives for these rows x (n, ...)."""
        found = function(self._spread(x))
        return found.index_select(0, self.rows.to(found.device))

    def _spread(self, x: Tensor) -> Tensor:
        """(n, ...) -> (batch, ...)."""
        return x.index_select(0, self._places.to(x.device))


class _LinearRows(Rows, LinearOperator):
    """What `Rows` makes of a linear operator; what that does not have, as `LinearOperator` has it."""

    def __init__(self, operator: Callable[[Tensor], Tensor], rows: Tensor, batch: int):
        super().__init__(operator, rows, batch)
        self.closed_form = getattr(self.operator, "closed_form", False)
        self.shift_invariant = getattr(self.operator, "shift_invariant", False)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._pick(self.operator.adjoint, y)

    def normal(self, image: Tensor) -> Tensor:
        own = getattr(self.operator, "normal", None)
        return LinearOperator.normal(self, image) if own is None else self._pick(own, image)

    def pinv(self, y: Tensor) -> Tensor:
        own = getattr(self.operator, "pinv", None)
        return LinearOperator.pinv(self, y) if own is None else self._pick(own, y)

    def solve(self, b: Tensor, rho: float | Tensor) -> Tensor:
        own = getattr(self.operator, "solve", None)
        if own is None:
            return LinearOperator.solve(self, b, rho)
        if isinstance(rho, Tensor) and rho.numel() > 1:
            rho = self._spread(rho)
        return self._pick(lambda b: own(b, rho), b)

    def start(self, y: Tensor) -> Tensor:
        return super().start(y) if hasattr(self.operator, "start") else LinearOperator.start(self, y)
