"""diffusers' unconditional pixel and latent models as priors: their numbers are diffusers' own, both solvers run."""

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from vml_ldm import CallablePrior, InnerStep, Levels, Measurement, karras_scales, red_diff, vml_map
from vml_ldm.adapters.diffusers import LDMPrior, PixelPrior, scheduler_levels
from vml_ldm.solve import noise_like


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pixel(scheduler=None, **unet):
    return PixelPrior(unet=tiny.unet2d(**unet), scheduler=scheduler or tiny.scheduler())


def latent(scheduler=None):
    return LDMPrior(unet=tiny.unet2d(), vqvae=tiny.vqvae(), scheduler=scheduler or tiny.scheduler())


def callable_prior():
    return CallablePrior(lambda x, sigma: x / (1 + sigma**2))


def levels(prior, count=3):
    if isinstance(prior, CallablePrior):
        return Levels(karras_scales(count, 10.0, 0.1))
    prior.scheduler.set_timesteps(count)
    return scheduler_levels(prior.scheduler, prior.scheduler.timesteps)


@torch.no_grad()
@pytest.mark.parametrize("make", [pixel, latent])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scaling", [1.0, 7.0], ids=["variance preserving", "any scaling"])
def test_denoise_is_the_scheduler_s_clean_estimate(make, prediction_type, scaling):
    scheduler = tiny.scheduler(prediction_type, clip_sample=False)
    scheduler.set_timesteps(10)
    prior, t, x_t = make(scheduler), scheduler.timesteps[4], noise(2, 3, 16, 16)
    expected = scheduler.step(prior.unet(x_t, t).sample, t, x_t).pred_original_sample
    abar = scheduler.alphas_cumprod[t].double()
    alpha, sigma = scaling * abar.sqrt().item(), scaling * (1 - abar).sqrt().item()
    assert torch.allclose(prior.denoise(scaling * x_t, alpha, sigma), expected, atol=1e-4)


@torch.no_grad()
def test_a_predicted_variance_is_left_out():
    prior = pixel(out_channels=6)
    x_t, t = noise(2, 3, 16, 16), prior.timestep(0.8, 0.6)
    epsilon = prior.unet(x_t, torch.tensor(t)).sample[:, :3]
    assert torch.allclose(prior.denoise(x_t, 0.8, 0.6), (x_t - 0.6 * epsilon) / 0.8, atol=1e-5)


def test_a_unet_of_another_time_is_refused():
    with pytest.raises(ValueError, match="time_embedding_type is 'fourier'; expected 'positional'"):
        pixel(time_embedding_type="fourier")


def test_an_unknown_prediction_type_is_refused():
    scheduler = tiny.scheduler()
    scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="flow_prediction"):
        pixel(scheduler)


@torch.no_grad()
def test_pixels_are_mapped_as_the_pipelines_map_them():
    """diffusers' pixel pipelines show a sample as ``sample / 2 + 0.5``."""
    prior, sample = pixel(), noise(2, 3, 16, 16)
    assert torch.allclose(prior.decode(sample), sample / 2 + 0.5)
    assert torch.allclose(prior.encode(prior.decode(sample)), sample, atol=1e-6)


@torch.no_grad()
def test_latents_are_scaled_as_configured_and_not_quantised():
    prior, image = latent(), torch.rand(1, 3, 64, 64)
    z = prior.vae.encode(2 * image - 1).latents
    assert torch.allclose(prior.encode(image), 0.5 * z, atol=1e-6)
    expected = prior.vae.decode(z, force_not_quantize=True).sample / 2 + 0.5
    quantised = prior.vae.decode(z).sample / 2 + 0.5
    assert torch.allclose(prior.decode(0.5 * z), expected, atol=1e-5)
    assert not torch.allclose(quantised, expected, atol=1e-3)


def test_the_decoder_s_pull_back_is_autograd_s_and_weights_are_left_as_they_were():
    prior, z, cotangent = latent(), noise(2, 3, 16, 16), noise(2, 3, 64, 64)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(prior.decode(leaf), leaf, cotangent)
    with prior:
        image, pull = prior.decode_pullback(z)
        assert not any(p.requires_grad for p in [*prior.unet.parameters(), *prior.vae.parameters()])
        assert torch.allclose(pull(cotangent), expected, atol=1e-5) and not image.requires_grad
    assert all(p.requires_grad for p in [*prior.unet.parameters(), *prior.vae.parameters()])


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
def test_levels_are_those_of_the_pixel_pipelines(cls):
    """The scheduler's own noise, at time steps that the prior finds back from the scales."""
    scheduler = tiny.scheduler(cls=cls)
    scheduler.set_timesteps(5)
    schedule, prior = scheduler_levels(scheduler, scheduler.timesteps), pixel(scheduler)
    assert [prior.timestep(*schedule.scales(i)) for i in range(5)] == scheduler.timesteps.tolist()


def run_vml(prior, measurement, start, schedule, generator):
    alpha, sigma = schedule.scales(0)
    x_T = alpha * start + sigma * noise_like(start, generator)
    options = {"prior": prior, "measurement": measurement, "schedule": schedule, "generator": generator}
    return vml_map(x_T, inner_steps=2, stop_at=0, step=InnerStep("analytic"), **options)


def run_red(prior, measurement, start, schedule, generator):
    options = {"prior": prior, "measurement": measurement, "schedule": schedule, "generator": generator}
    return red_diff(start, lr=0.01, **options)


CALLS = {
    run_vml: {"denoise": 9, "denoise_vjp": 6, "decode": 13, "decode_vjp": 6},
    run_red: {"denoise": 3, "decode": 4, "decode_vjp": 3},
}


@pytest.mark.parametrize("make, size", [(pixel, 16), (latent, 64), (callable_prior, 16)])
@pytest.mark.parametrize("run", [run_vml, run_red])
def test_both_solvers_run_on_every_prior(make, size, run):
    """Random weights: shapes, counts and finite values; a batch of two under an average of 2 x 2."""
    prior, image = make(), torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    average = torch.nn.AvgPool2d(2)
    measurement = Measurement(average, average(image), 0.05)
    with torch.no_grad():
        start = prior.encode(torch.full_like(image, 0.5))
    solution = run(prior, measurement, start, levels(prior), torch.Generator().manual_seed(1))
    assert solution.image.shape == image.shape and solution.latent.shape == start.shape
    assert solution.calls == CALLS[run] and torch.isfinite(solution.residual).all()


@torch.no_grad()
def test_half_precision_networks_take_and_give_float32():
    half, full = latent(), latent()
    half.unet.to(torch.bfloat16)
    half.vae.to(torch.bfloat16)
    z, image = noise(1, 3, 16, 16), torch.rand(1, 3, 64, 64)
    for a, b in (
        (half.denoise(z, 0.8, 0.6), full.denoise(z, 0.8, 0.6)),
        (half.decode(z), full.decode(z)),
        (half.encode(image), full.encode(image)),
    ):
        assert a.dtype == torch.float32 and torch.allclose(a, b, atol=0.05 * b.abs().max().item())
    assert half.retries == {}
