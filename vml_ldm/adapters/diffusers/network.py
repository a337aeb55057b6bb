"""What every prior on diffusers' networks shares, whatever they predict: gradients, precision, an autoencoder."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ...holding import Holding, Window, is_local
from ...objective import PullBack, T, Whole
from .memory import Plan, StepDown
from .pieces import by_image, in_tiles, run_again, with_decoder
from .precision import Guard

Change = Callable[[nn.Module], nn.Module]  # of a VAE


def same(vae: nn.Module) -> nn.Module:
    """The VAE itself."""
    return vae


class NetworkPrior:
    """A network as ``E[z0 | x_t]``; a subclass gives `_denoise`, encoder and decoder. Use it in `with`.

    The state is float32; the networks run in their own precision, and every cast between the two is in the subclasses.

    Args:
        network: the denoiser.
        name: what warnings and errors call it.

    Attributes:
        plan: how graphs are kept; to be set before `with`.
        draft_plan: how they are kept where a `Draft` draws; None: as elsewhere.
        steps: what takes a plan's place when memory runs out.
    """

    plan = Plan()
    draft_plan: Plan | None = None

    def __init__(self, network: nn.Module, name: str):
        self._network, self._name, self._guard = network, name, Guard()
        self.steps = StepDown()

    @property
    def retries(self) -> Counter:
        """How often a network was run once more in float32, by network."""
        return self._guard.retries

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[z0 | x_t]``, (B, c, h, w) float32, for ``x_t = alpha z0 + sigma e`` in any scaling."""
        return self._guard.run(self._name, self._network, lambda: self._denoise(x_t, alpha, sigma))

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        """z0_hat and ``b -> J^T b``."""
        return self.steps.pullback(self.plan, lambda plan: self._denoise_pullback(plan, x_t, alpha, sigma))

    def _denoise_pullback(self, plan: Plan, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        self._guard.checkpoint(plan.checkpointed, *self._networks())
        rerun = "whole" if plan.denoiser_again else ""
        return self._guard.pullback(self._name, self._network, lambda x: self._denoise(x, alpha, sigma), x_t, rerun)

    def checked(self, work: Callable[[], T]) -> T:
        """A level's work, see `Guard.checked`."""
        return self._guard.checked(work)

    def select(self, rows: Tensor, batch: int) -> NetworkPrior:
        """The prior of some images of a batch, see `vml_ldm.objective.Prior`: here the same for all images."""
        return self

    def __enter__(self):
        """Freeze the weights, so that graphs keep what the state's gradient needs and no more."""
        plans = (self.plan, self.draft_plan or self.plan)
        self._guard.checkpoint(max(plan.checkpointed for plan in plans), *self._networks())
        self._guard.freeze(*self._networks())
        return self

    def __exit__(self, *error) -> None:
        """Leave the networks as they came, see `Guard.restore`."""
        self._guard.restore()

    def _networks(self) -> tuple[nn.Module, ...]:
        return (self._network,)


class Autoencoded:
    """For a `NetworkPrior` whose z0 is the latent of an autoencoder `vae`. A subclass gives `_encode(image, vae)`
    and `_decode(z, vae)`."""

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> the mean latent, scaled and shifted as the denoiser expects it, float32."""
        encode = lambda plan: lambda: self._encode(image, drawn(self.vae, plan))  # noqa: E731
        return self.steps.run(self.plan, lambda plan: self._guard.run("the VAE encoder", self.vae, encode(plan)))

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image (B, 3, H, W) float32, about [0, 1] and not clamped."""
        return self._draw(self.plan, "the VAE decoder", self.vae, z)

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        """Image and the decoder's vector-Jacobian product."""
        return self._draw_pullback(self.plan, "the VAE decoder", self.vae, z)

    @property
    def decode_whole(self) -> Callable[[Tensor], Whole] | None:
        """An image, and its parts with the norms and attention of the whole; None for a decoder without these."""
        return self._whole(self.plan, "the VAE decoder", self.vae)

    def draft(self, vae: nn.Module) -> Draft:
        """This prior with another decoder, for use within this one's `with`.

        Args:
            vae: of the same latents, scaled as the denoiser sees them by its own configuration: an `AutoencoderTiny`.
        """
        return Draft(self, vae)

    def _networks(self) -> tuple[nn.Module, ...]:
        return *super()._networks(), self.vae

    def _whole(self, plan: Plan, name: str, vae: nn.Module) -> Callable[[Tensor], Whole] | None:
        return None if is_local(vae.decoder, _attends) else lambda z: _Parts(self, plan, name, vae, z).told()

    def _draw(self, plan: Plan, name: str, vae: nn.Module, z: Tensor, change: Change = same) -> Tensor:
        decode = lambda plan: lambda: self._decode(z, change(drawn(vae, plan)))  # noqa: E731
        return self.steps.run(plan, lambda plan: self._guard.run(name, vae, decode(plan)))

    def _draw_pullback(
        self, plan: Plan, name: str, vae: nn.Module, z: Tensor, change: Change = same
    ) -> tuple[Tensor, PullBack]:
        return self.steps.pullback(plan, lambda plan: self._draw_pullback_by(plan, name, vae, z, change))

    def _draw_pullback_by(
        self, plan: Plan, name: str, vae: nn.Module, z: Tensor, change: Change
    ) -> tuple[Tensor, PullBack]:
        self._guard.checkpoint(plan.checkpointed, *self._networks())
        rerun, twin = "", change(drawn(vae, plan))
        if plan.decoder_again:
            rerun, twin = "parts", run_again(twin, partial(self._guard.weights_kept, vae))
        return self._guard.pullback(name, vae, lambda z: self._decode(z, twin), z, rerun)


class _Parts:
    """Images z that a prior has drawn whole, and how it draws parts of them.

    Where norms and attention of the whole could not be noted (it was drawn in tiles, or hooks lead around them), a part
    is drawn with the whole around it.
    """

    def __init__(self, prior: Autoencoded, plan: Plan, name: str, vae: nn.Module, z: Tensor):
        self._prior, self._how, self._z = prior, (plan, name, vae), z
        self._one_by_one = plan.by_image or getattr(vae, "use_slicing", False)
        self._held = Holding(vae.decoder, z.shape[2:], _attends)
        self._image = prior._draw(*self._how, z, lambda vae: with_decoder(vae, self._held.noting()))
        self._stride = self._image.shape[2] // z.shape[2]

    def told(self) -> Whole:
        if self._held.is_complete(len(self._z)):
            return Whole(self._image, self._part, self._part_pullback)
        return Whole(self._image, self._cut, self._cut_pullback)

    def _part(self, z: Tensor, images: list[int], window: Window) -> Tensor:
        return torch.cat([self._prior._draw(*self._how, *part) for part in self._together(z, images, window)])

    def _part_pullback(self, z: Tensor, images: list[int], window: Window) -> tuple[Tensor, PullBack]:
        parts = self._together(z, images, window)
        drawn, pulls = zip(*(self._prior._draw_pullback(*self._how, *part) for part in parts), strict=True)
        sizes = [len(image) for image in drawn]
        pull = lambda c: torch.cat([one(own) for one, own in zip(pulls, c.split(sizes), strict=True)])  # noqa: E731
        return torch.cat(drawn), pull

    def _together(self, z: Tensor, images: list[int], window: Window) -> list[tuple[Tensor, Change]]:
        """What the VAE takes at once, and what it is then."""
        groups = [[i] for i in images] if self._one_by_one else [images]
        as_part = lambda group: lambda vae: with_decoder(vae, self._held.part(group, window))  # noqa: E731
        return list(zip(z.split(len(groups[0])), map(as_part, groups), strict=True))

    def _cut(self, z: Tensor, images: list[int], window: Window) -> Tensor:
        return self._prior._draw(*self._how, self._around(z, images, window))[(..., *self._pixels(window))]

    def _cut_pullback(self, z: Tensor, images: list[int], window: Window) -> tuple[Tensor, PullBack]:
        image, pull = self._prior._draw_pullback(*self._how, self._around(z, images, window))
        pixels = self._pixels(window)

        def pull_part(cotangent: Tensor) -> Tensor:
            of_all = torch.zeros_like(image)
            of_all[(..., *pixels)] = cotangent
            return pull(of_all)[(..., *window)]

        return image[(..., *pixels)], pull_part

    def _around(self, z: Tensor, images: list[int], window: Window) -> Tensor:
        whole = self._z[images]
        whole[(..., *window)] = z
        return whole

    def _pixels(self, window: Window) -> Window:
        rows, columns = (slice(self._stride * side.start, self._stride * side.stop) for side in window)
        return rows, columns


def draws_parts(vae: nn.Module, size: tuple[int, int]) -> bool:
    """Whether a VAE draws parts of latents (h, w) by less than the whole each time: it has no norms and no attention,
    or these can be held (`vml_ldm.holding`): the whole is not drawn in tiles, and no block is reached through a hook of
    diffusers' group offloading.
    """
    if is_local(vae.decoder, _attends):
        return True
    tiled = getattr(vae, "use_tiling", False) and max(size) > vae.tile_latent_min_size
    return not tiled and not any(hasattr(m, "_diffusers_hook") and any(m.children()) for m in vae.decoder.modules())


def _attends(module: nn.Module) -> bool:
    return isinstance(module, Attention)


def drawn(vae: nn.Module, plan: Plan) -> nn.Module:
    """A VAE as a plan has it work: whole, image by image, in tiles."""
    vae = by_image(vae) if plan.by_image else vae
    return vae if plan.tiles is None else in_tiles(vae, plan.tiles)


class Draft:
    """A latent prior that draws with another decoder, under a plan of its own; all else, a change of its prompt too, is
    the prior's."""

    def __init__(self, prior: Autoencoded, vae: nn.Module):
        self._plan, self.vae = prior.draft_plan or prior.plan, vae
        self._serve(prior)
        prior._guard.freeze(vae)

    def _serve(self, prior: Autoencoded) -> None:
        self._prior = prior
        self.denoise, self.encode, self.checked = prior.denoise, prior.encode, prior.checked
        self.guided = getattr(prior, "guided", prior.denoise)

    @property
    def push(self):
        return getattr(self._prior, "push", None)

    def select(self, rows: Tensor, batch: int) -> Draft:
        """As the prior's."""
        part = copy.copy(self)
        part._serve(self._prior.select(rows, batch))
        return part

    @property
    def decode_whole(self) -> Callable[[Tensor], Whole] | None:
        """As the prior's."""
        return self._prior._whole(self._plan, "the gradient VAE", self.vae)

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        """z0_hat and ``b -> J^T b``, the prior's."""
        prior = self._prior
        return prior.steps.pullback(self._plan, lambda plan: prior._denoise_pullback(plan, x_t, alpha, sigma))

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image, as the prior's."""
        return self._prior._draw(self._plan, "the gradient VAE", self.vae, z)

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        """Image and the decoder's vector-Jacobian product."""
        return self._prior._draw_pullback(self._plan, "the gradient VAE", self.vae, z)
