"""What every prior on diffusers' networks shares, whatever they predict: gradients, precision, an autoencoder."""

from __future__ import annotations

from collections import Counter
from functools import partial

from torch import Tensor, nn

from ...objective import PullBack
from .memory import Plan
from .pieces import by_image, in_tiles, run_again
from .precision import Guard


class NetworkPrior:
    """A network as ``E[z0 | x_t]``; a subclass gives `_denoise`, encoder and decoder. Use it in `with`.

    The state is float32; the networks run in their own precision, and every cast between the two is in the subclasses.

    Args:
        network: the denoiser.
        name: what warnings and errors call it.

    Attributes:
        plan: how graphs are kept; to be set before `with`.
        draft_plan: how they are kept where a `Draft` draws; None: as elsewhere.
    """

    plan = Plan()
    draft_plan: Plan | None = None

    def __init__(self, network: nn.Module, name: str):
        self._network, self._name, self._guard = network, name, Guard()

    @property
    def retries(self) -> Counter:
        """How often a network was run once more in float32, by network."""
        return self._guard.retries

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[z0 | x_t]``, (B, c, h, w) float32, for ``x_t = alpha z0 + sigma e`` in any scaling."""
        return self._guard.run(self._name, self._network, lambda: self._denoise(x_t, alpha, sigma))

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        """z0_hat and ``b -> J^T b``."""
        return self._denoise_pullback(self.plan, x_t, alpha, sigma)

    def _denoise_pullback(self, plan: Plan, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        self._guard.checkpoint(plan.checkpointed, *self._networks())
        rerun = "whole" if plan.denoiser_again else ""
        return self._guard.pullback(self._name, self._network, lambda x: self._denoise(x, alpha, sigma), x_t, rerun)

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
        return self._guard.run("the VAE encoder", self.vae, lambda: self._encode(image, drawn(self.vae, self.plan)))

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image (B, 3, H, W) float32, about [0, 1] and not clamped."""
        return self._draw(self.plan, "the VAE decoder", self.vae, z)

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        """Image and the decoder's vector-Jacobian product."""
        return self._draw_pullback(self.plan, "the VAE decoder", self.vae, z)

    def draft(self, vae: nn.Module) -> Draft:
        """This prior with another decoder, for use within this one's `with`.

        Args:
            vae: of the same latents, scaled as the denoiser sees them by its own configuration: an `AutoencoderTiny`.
        """
        return Draft(self, vae)

    def _networks(self) -> tuple[nn.Module, ...]:
        return *super()._networks(), self.vae

    def _draw(self, plan: Plan, name: str, vae: nn.Module, z: Tensor) -> Tensor:
        return self._guard.run(name, vae, lambda: self._decode(z, drawn(vae, plan)))

    def _draw_pullback(self, plan: Plan, name: str, vae: nn.Module, z: Tensor) -> tuple[Tensor, PullBack]:
        self._guard.checkpoint(plan.checkpointed, *self._networks())
        rerun, twin = "", drawn(vae, plan)
        if plan.decoder_again:
            rerun, twin = "parts", run_again(twin, partial(self._guard.weights_kept, vae))
        return self._guard.pullback(name, vae, lambda z: self._decode(z, twin), z, rerun)


def drawn(vae: nn.Module, plan: Plan) -> nn.Module:
    """A VAE as a plan has it work: whole, image by image, in tiles."""
    vae = by_image(vae) if plan.by_image else vae
    return vae if plan.tiles is None else in_tiles(vae, plan.tiles)


class Draft:
    """A latent prior that draws with another decoder, under a plan of its own; all else, a change of its prompt too, is
    the prior's."""

    def __init__(self, prior: Autoencoded, vae: nn.Module):
        self._prior, self._plan, self.vae = prior, prior.draft_plan or prior.plan, vae
        self.denoise, self.encode = prior.denoise, prior.encode
        self.guided = getattr(prior, "guided", prior.denoise)
        prior._guard.freeze(vae)

    @property
    def push(self):
        return getattr(self._prior, "push", None)

    def denoise_pullback(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, PullBack]:
        """z0_hat and ``b -> J^T b``, the prior's."""
        return self._prior._denoise_pullback(self._plan, x_t, alpha, sigma)

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image, as the prior's."""
        return self._prior._draw(self._plan, "the gradient VAE", self.vae, z)

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        """Image and the decoder's vector-Jacobian product."""
        return self._prior._draw_pullback(self._plan, "the gradient VAE", self.vae, z)
