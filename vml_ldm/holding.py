"""A decoder that draws a part of an image as it draws that part in the whole. (Ours.)

Convolutions do so by themselves, away from the cut. A group norm does not: its mean and variance are the whole image's;
nor does attention, which looks at all of the latent. So one pass over the whole notes what they meet. In a pass over a
part the norms then have the mean and variance that were noted, and each attention sees the whole that was noted, with
the part in its place (but for the cells at the cut, which are the whole's), and gives the part of the result. What was
noted is constant: no gradient goes back to it.

Both passes go through twins of the decoder's modules, which share its weights, hooks and flags as they are at the time;
the decoder itself is left as it is, and its twins may be run again by a backward pass at any time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SPOILT = 3  # cells at a cut that the three convolutions before a mid-block's attention do not draw as in the whole

Window = tuple[slice, slice]  # rows and columns


class Holding:
    """What a decoder's norms and attentions meet in a pass over whole latents.

    Args:
        decoder: the module that holds them, which takes latents (B, c, h, w).
        size: (h, w) of the whole latents.
        attends: of a module, whether it is an attention over all of its input (B, C, h', w').
    """

    def __init__(self, decoder: nn.Module, size: tuple[int, int], attends: Callable[[nn.Module], bool]):
        self._decoder, self._size, self._attends = getattr(decoder, "_orig_mod", decoder), size, attends
        self._notes: dict[nn.Module, list] = {}

    def noting(self) -> nn.Module:
        """The decoder for the pass over the whole, of all images at once or of one after the other."""
        self._notes = {}
        return _twin(self._decoder, self._noted)

    def is_complete(self, batch: int) -> bool:
        """Whether the pass went through every norm and attention once for each image: not in tiles, not around them."""
        return all(sum(map(len, notes)) == batch for notes in self._notes.values())

    def part(self, images: list[int], window: Window) -> nn.Module:
        """The decoder for latents (n, c, window) of n images, by their places in the batch."""
        return _twin(self._decoder, partial(self._held, images, window))

    def _noted(self, module: nn.Module) -> nn.Module | None:
        if not (self._attends(module) or isinstance(module, nn.GroupNorm)):
            return None
        seen = torch.Tensor.detach if self._attends(module) else partial(_statistics, groups=module.num_groups)
        return _shadow(module, partial(_note, module.forward, self._notes.setdefault(module, []), seen))

    def _held(self, images: list[int], window: Window, module: nn.Module) -> nn.Module | None:
        if module not in self._notes:
            return None
        noted = torch.cat(self._notes[module])[images]
        if isinstance(module, nn.GroupNorm):
            return _shadow(module, partial(_normed, module.forward, noted))
        scales = [n // cells for n, cells in zip(noted.shape[2:], self._size, strict=True)]
        at = tuple(slice(scale * side.start, scale * side.stop) for side, scale in zip(window, scales, strict=True))
        spoilt = tuple(
            slice(scale * _SPOILT * (side.start > 0), scale * _SPOILT * (side.stop < cells))
            for side, scale, cells in zip(window, scales, self._size, strict=True)
        )
        return _shadow(module, partial(_attended, module.forward, noted, at, spoilt))


def is_local(decoder: nn.Module, attends: Callable[[nn.Module], bool]) -> bool:
    """Whether it has no such norm and no attention, so that it draws a part as in the whole by itself."""
    return not any(attends(module) or isinstance(module, nn.GroupNorm) for module in decoder.modules())


def _note(forward: Callable, notes: list, seen: Callable[[Tensor], Tensor], x: Tensor, *args, **kwargs) -> Tensor:
    notes.append(seen(x))
    return forward(x, *args, **kwargs)


def _normed(forward: Callable, statistics: Tensor, x: Tensor, *args, **kwargs) -> Tensor:
    with _Norms(statistics):
        return forward(x, *args, **kwargs)


def _attended(forward: Callable, whole: Tensor, at: Window, spoilt: Window, x: Tensor, *args, **kwargs) -> Tensor:
    """Of the whole with a part in its place: the part of what attention makes of it.

    Args:
        at: rows and columns of the part; spoilt: how many of them at its sides are wrong, and taken from the whole.
    """
    seen = whole.to(x, copy=True)
    inside = tuple(slice(cut.start, n - cut.stop) for cut, n in zip(spoilt, x.shape[2:], strict=True))
    seen[(..., *at)][(..., *inside)] = x[(..., *inside)]
    return forward(seen, *args, **kwargs)[(..., *at)]


class _Norms(TorchFunctionMode):
    """Group norms inside have these statistics, whatever casts or fetches their weights before they are asked."""

    def __init__(self, statistics: Tensor):
        super().__init__()
        self.statistics = statistics

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.group_norm:
            return _group_norm(self.statistics, *args, **kwargs or {})
        return func(*args, **kwargs or {})


def _statistics(x: Tensor, groups: int) -> Tensor:
    """(B, G, 2): mean and variance of each group of channels, float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    found = [
        torch.var_mean(group.to(wide).flatten(1), dim=1, correction=0) for group in x.detach().chunk(groups, dim=1)
    ]
    return torch.stack([torch.stack([mean, variance], dim=1) for variance, mean in found], dim=1)


def _group_norm(
    statistics: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` with mean and variance (B, G, 2), in x's precision."""
    mean, scale = statistics[..., 0], (statistics[..., 1] + eps).rsqrt()
    mean, scale = (by_group.repeat_interleave(x.shape[1] // num_groups, dim=1) for by_group in (mean, scale))
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (*x.shape[:2], *[1] * (x.ndim - 2))
    return torch.addcmul(shift.reshape(shape), x.to(scale.dtype), scale.reshape(shape)).to(x.dtype)


def _twin(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The module with others in place of what is to be replaced in it; itself where that is nothing."""
    if (other := replace(module)) is not None:
        return other
    children = {name: child and _twin(child, replace) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin.__dict__.update({name: _rebound(value, module, twin) for name, value in vars(twin).items()})
    twin.__dict__["_modules"] = children
    return twin


def _shadow(module: nn.Module, forward: Callable) -> nn.Module:
    """The module with another forward pass."""
    shadow = copy.copy(module)
    shadow.forward = forward
    return shadow


def _rebound(value, old: nn.Module, new: nn.Module):
    """A method of one module as that of another, also where a checkpoint or a host's hook has wrapped it."""
    if value is old:
        return new
    if isinstance(value, MethodType) and value.__self__ is old:
        return MethodType(value.__func__, new)
    if isinstance(value, partial):
        return partial(*(_rebound(part, old, new) for part in (value.func, *value.args)), **value.keywords)
    return value
