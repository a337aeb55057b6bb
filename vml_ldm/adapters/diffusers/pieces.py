"""A VAE as twins of itself that share its weights: one that works in tiles, one whose decoder runs again when pulled,
one with the decoder of a part (`vml_ldm.holding`).

A twin leaves the VAE that it came from as it is, flags and hooks too. It goes through the VAE's own `encode` and
`decode`, so tiles are cut and blended by diffusers' own code, and offloading finds its weights.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...objective import pullback


def in_tiles(vae: nn.Module, divisor: int) -> nn.Module:
    """The VAE with its own tiling on, as after `enable_tiling()`, and tiles `divisor` times smaller than its own."""
    twin = copy.copy(vae)
    twin.use_tiling = True
    twin.tile_latent_min_size = vae.tile_latent_min_size // divisor
    twin.tile_sample_min_size = vae.tile_sample_min_size // divisor
    return twin


def by_image(vae: nn.Module) -> nn.Module:
    """The VAE with its own slicing on, as after `enable_slicing()`."""
    twin = copy.copy(vae)
    twin.use_slicing = True
    return twin


def run_again(vae: nn.Module, keep) -> nn.Module:
    """The VAE whose decoder makes no graph: the backward pass runs it again with one, call by call.

    A call is a whole latent, an image of a slicing VAE, or a tile of a tiling one, so no more than one of these has a
    graph at a time.

    Args:
        keep: a function without arguments; graphs are made in the context that it gives.
    """
    return with_decoder(vae, _RunAgain(vae.decoder, keep))


def with_decoder(vae: nn.Module, decoder: nn.Module) -> nn.Module:
    """The VAE with another decoder."""
    twin = copy.copy(vae)
    twin.__dict__["_modules"] = {**vae._modules, "decoder": decoder}
    return twin


class _RunAgain(nn.Module):
    def __init__(self, module: nn.Module, keep):
        super().__init__()
        self.module, self._keep = module, keep

    def forward(self, x: Tensor, *given: Tensor | None) -> Tensor:
        return _Again.apply(self, x, *given)

    def pullback(self, cotangent: Tensor, x: Tensor, *given: Tensor | None) -> Tensor:
        with self._keep():
            _, pull = pullback(lambda x: self.module(x, *given), x)
        return pull(cotangent)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, again: _RunAgain, *inputs: Tensor | None) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(*inputs)
        return again.module(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        pulled = ctx.again.pullback(cotangent, *ctx.saved_tensors)
        return None, pulled, *(None for _ in ctx.saved_tensors[1:])
