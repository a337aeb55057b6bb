"""What every prior on diffusers' networks shares, whatever they predict: gradients, precision, an autoencoder."""

from __future__ import annotations

from collections import Counter

from torch import Tensor, nn

from ...objective import PullBack
from .precision import Guard


class NetworkPrior:
    """A network as ``E[z0 | x_t]``; a subclass gives `_denoise`, encoder and decoder. Use it in `with`.

    The state is float32; the networks run in their own precision, and every cast between the two is in the subclasses.

    Args:
        network: the denoiser.
        name: what warnings and errors call it.
    """

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
        return self._guard.pullback(self._name, self._network, lambda x: self._denoise(x, alpha, sigma), x_t)

    def __enter__(self):
        """Freeze the weights, so that graphs keep what the state's gradient needs and no more."""
        self._guard.freeze(*self._networks())
        return self

    def __exit__(self, *error) -> None:
        """Leave the networks as they came: their gradients' flags, and their precision if it was lifted."""
        self._guard.restore()

    def _networks(self) -> tuple[nn.Module, ...]:
        return (self._network,)


class Autoencoded:
    """For a `NetworkPrior` whose z0 is the latent of an autoencoder `vae`. A subclass gives `_encode` and `_decode`."""

    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [0, 1] -> the mean latent, scaled and shifted as the denoiser expects it, float32."""
        return self._guard.run("the VAE encoder", self.vae, lambda: self._encode(image))

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image (B, 3, H, W) float32, about [0, 1] and not clamped."""
        return self._guard.run("the VAE decoder", self.vae, lambda: self._decode(z))

    def decode_pullback(self, z: Tensor) -> tuple[Tensor, PullBack]:
        """Image and the decoder's vector-Jacobian product."""
        return self._guard.pullback("the VAE decoder", self.vae, self._decode, z)

    def _networks(self) -> tuple[nn.Module, ...]:
        return *super()._networks(), self.vae
