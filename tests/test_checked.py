"""A level's network calls are looked at together when it ends, and made again in float32 where one overflowed."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from test_solve import Reads
from torch import nn

from vml_ldm.adapters.diffusers import NonFiniteError, StableDiffusionPrior
from vml_ldm.closeup import CloseUp, parts_near
from vml_ldm.metering import Metered
from vml_ldm.operators import Mask, Measurement
from vml_ldm.proximal import Proximal
from vml_ldm.solve import Levels, vml_levels

LEVELS = Levels([(0.3, 0.95), (0.7, 0.7), (0.95, 0.3)])
PICTURE, KNOWN = tiny.HALF_PAINTED["image"], tiny.KNOWN


def make_prior(dtype=torch.float32, overflows=()):
    """Networks in a precision; those named overflow in float16, and are as they were in float32."""
    unet, vae = (nn.Module.to(network, dtype) for network in (tiny.unet(), tiny.vae()))
    words = {"encoder_hidden_states": torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))}
    for name, layer in (("unet", unet.conv_out), ("vae", vae.decoder.conv_out)):
        if name in overflows:
            layer.register_forward_hook(lambda _, __, out: out * 1e4 * 1e4 / 1e8)
    prior = StableDiffusionPrior(unet=unet, vae=vae, scheduler=tiny.scheduler(), condition=words)
    prior.negative, prior.guidance_scale = {name: 0.5 * value for name, value in words.items()}, 3.0
    return prior


def solve(prior, view=lambda prior: prior, watch=None):
    with prior:
        levels = vml_levels(
            torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), prior=view(Metered(prior)),
            measurement=Measurement(Mask(KNOWN), PICTURE * KNOWN, 0.02), schedule=LEVELS, inner_steps=0,
            proximal=Proximal(), settle=lambda image: KNOWN * PICTURE + (1 - KNOWN) * image,
            generator=torch.Generator().manual_seed(2),
        )  # fmt: skip
        with watch or nullcontext():
            return list(levels)


def test_a_guided_level_waits_for_the_device_once():
    reads = Reads()
    levels = solve(make_prior(), watch=reads)
    assert reads.count == len(levels) == 3


@pytest.mark.parametrize("overflows", [("vae",), ("unet",), ("unet", "vae")])
def test_what_overflows_goes_on_in_float32_and_the_level_is_made_again(overflows):
    prior = make_prior(torch.float16, overflows)
    with pytest.warns(UserWarning, match="gave non-finite values in torch.float16"):
        found = solve(prior)
    names = {"unet": "the UNet", "vae": "the VAE decoder"}
    assert prior.retries == {names[name]: 1 for name in overflows}
    assert prior.unet.dtype == prior.vae.dtype == torch.float16
    expected = solve(make_prior())
    assert all((a.z0_hat - b.z0_hat).abs().max() < 0.05 for a, b in zip(found, expected, strict=True))


def test_the_noise_of_the_next_state_is_drawn_once_all_the_same():
    with pytest.warns(UserWarning):
        half = solve(make_prior(torch.float16, ("vae",)))
    for i, (found, expected) in enumerate(zip(half[:-1], solve(make_prior())[:-1], strict=True)):
        alpha, sigma = LEVELS.scales(i + 1)
        noise = [(level.x_next - alpha * level.z0_hat) / sigma for level in (found, expected)]
        assert torch.allclose(*noise, atol=1e-5)


def test_a_close_up_draws_the_whole_again():
    known = torch.ones(1, 1, 64, 64)
    known[..., 24:32, 24:32] = 0
    view = lambda prior: CloseUp(prior, parts_near(known, 2), PICTURE, torch.zeros(1, 4, 8, 8))  # noqa: E731
    prior = make_prior(torch.float16, ("vae",))
    with pytest.warns(UserWarning):
        levels = solve(prior, view)
    assert all(level.z0_hat.isfinite().all() and level.image.isfinite().all() for level in levels)


def test_what_is_not_finite_in_float32_is_an_error_that_names_the_network():
    prior = make_prior()
    prior.vae.decoder.conv_out.register_forward_hook(lambda _, __, out: out / 0)
    with pytest.raises(NonFiniteError, match="the VAE decoder gave NaN or infinity in float32"):
        solve(prior)
    with prior:
        assert prior.checked(lambda: prior.denoise(torch.zeros(1, 4, 8, 8), 0.7, 0.7)).isfinite().all()
