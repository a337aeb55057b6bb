"""Networks in their own precision, on their own device, checked: what is not finite is run once more in float32."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...objective import PullBack, pullback

_HALF = (torch.float16, torch.bfloat16)


class NonFiniteError(FloatingPointError):
    """A network gave NaN or infinity, in float32 too."""


class Guard:
    """Runs networks and checks what they give. It owns their state while a prior is in use: gradient flags, precision.

    Attributes:
        retries: how often a network was run once more in float32, by name.
    """

    def __init__(self):
        self.retries = Counter()
        self._upcast: dict[nn.Module, torch.dtype] = {}
        self._thawed: list[nn.Parameter] = []

    def freeze(self, *networks: nn.Module) -> None:
        """Switch off the weights' gradients, so that graphs keep what the state's gradient needs and no more."""
        self._thawed = [p for network in networks for p in network.parameters() if p.requires_grad]
        for parameter in self._thawed:
            parameter.requires_grad_(False)

    def restore(self) -> None:
        """Leave the networks as they came: their gradients' flags, and their precision if it was lifted."""
        for parameter in self._thawed:
            parameter.requires_grad_(True)
        for network, dtype in self._upcast.items():
            network.to(dtype)
        self._upcast.clear()

    def dtype(self, network: nn.Module) -> torch.dtype:
        """The precision to hand the network its inputs in."""
        return torch.float32 if network in self._upcast else network.dtype

    def place(self, network: nn.Module, x: Tensor) -> Tensor:
        """x as the network takes it: in its precision and on its device."""
        return x.to(device_of(network, x), self.dtype(network))

    def run(self, name: str, network: nn.Module, function: Callable[[], Tensor]) -> Tensor:
        """``function()``, which calls `network`; `name` is what warnings and errors call it.

        Raises:
            NonFiniteError: NaN or infinity in float32.
        """
        return self._finite(name, network, lambda: (function(),))[0]

    def pullback(
        self, name: str, network: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor
    ) -> tuple[Tensor, PullBack]:
        """`pullback` with both passes checked; the cotangent goes in at unit size, image by image."""
        value, pull = self._finite(name, network, lambda: pullback(function, x))

        def checked(cotangent: Tensor) -> Tensor:
            scale = cotangent.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(cotangent.dtype).tiny)
            first = lambda: (pull(cotangent / scale) * scale,)  # noqa: E731
            again = lambda: (pullback(function, x)[1](cotangent / scale) * scale,)  # noqa: E731
            return self._finite(f"the backward pass of {name}", network, first, again)[0]

        return value, checked

    def _finite(self, name: str, network: nn.Module, run: Callable[[], tuple], again: Callable | None = None) -> tuple:
        """run(), a tuple whose first item must be finite; otherwise `again` (the same, if None) in float32."""
        result = run()
        if _is_finite(result[0]):
            return result
        self._lift(name, network)
        result = (again or run)()
        if not _is_finite(result[0]):
            raise NonFiniteError(_message(name))
        return result

    def _lift(self, name: str, network: nn.Module) -> None:
        """Move a half-precision network to float32 for the rest of the call, with a warning; otherwise raise."""
        if self.dtype(network) not in _HALF:
            raise NonFiniteError(_message(name))
        warnings.warn(f"{name} gave non-finite values in {network.dtype}; it goes on in float32.", stacklevel=2)
        self._upcast[network] = network.dtype
        self.retries[name] += 1
        network.to(torch.float32)


def device_of(network: nn.Module, x: Tensor) -> torch.device:
    """Where to hand the network its input x: parts of a pipeline may lie on different devices.

    A network that a host has hooked (offloading, ``device_map``) fetches inputs, or itself, to where it runs: x stays.
    """
    hooked = hasattr(network, "_hf_hook") or hasattr(network, "_diffusers_hook")
    return x.device if hooked else next(network.parameters(), x).device


def move(value, device: torch.device):
    """The tensors in a tensor, dict, list or tuple, on a device. Containers are copied."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: move(item, device) for name, item in value.items()}
    return type(value)(move(item, device) for item in value) if isinstance(value, (list, tuple)) else value


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _message(name: str) -> str:
    return (
        f"{name} gave NaN or infinity in float32; expected finite values. Check the weights, the image and the prompt "
        "embeddings, or take a smaller guidance_scale."
    )
