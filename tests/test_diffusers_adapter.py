"""diffusers' models and schedulers as prior and schedule: their numbers are diffusers' own."""

from itertools import product

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from gaussian import Linear, random_problem

from vml_ldm.adapters.diffusers import NonFiniteError, StableDiffusionPrior, check_scheduler, scheduler_levels
from vml_ldm.operators import Measurement
from vml_ldm.solve import noise_like, vml_levels, vml_map

ACCEPTED = tiny.schedulers()


def levels(cls, count, renoise=1.0, **options):
    scheduler = tiny.scheduler(cls=cls, **options)
    scheduler.set_timesteps(count)
    return scheduler, scheduler_levels(scheduler, scheduler.timesteps, renoise)


def prior(scheduler=None, guidance_scale=None):
    prompt = lambda seed: {"encoder_hidden_states": noise(2, 5, 128, seed=seed)}  # noqa: E731
    return StableDiffusionPrior(
        unet=tiny.unet(),
        vae=tiny.vae(),
        scheduler=scheduler or tiny.scheduler(),
        condition=prompt(0),
        negative=None if guidance_scale is None else prompt(1),
        guidance_scale=guidance_scale or 1.0,
    )


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cls", ACCEPTED)
def test_levels_are_the_scheduler_s_own_noise(cls):
    """alpha z0 + sigma e is what the scheduler's add_noise gives at each of its time steps."""
    scheduler, schedule = levels(cls, 9)
    z0, e = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    for i, t in enumerate(schedule.timesteps):
        alpha, sigma = schedule.scales(i)
        assert torch.allclose(alpha * z0 + sigma * e, scheduler.add_noise(z0, e, t[None]), atol=1e-4 * max(1, sigma))
    assert len(schedule) == 9 and schedule.scales(9) == (1.0, 0.0)


@pytest.mark.parametrize(
    "cls, seed", [*((cls, 0) for cls in ACCEPTED), *product((DDIMScheduler, EulerDiscreteScheduler), (1, 2))]
)
def test_vml_map_reaches_the_map_of_a_gaussian(cls, seed):
    """50 levels, 20 inner steps, deterministic next state: within 1 % of |MAP - mean|."""
    scheduler, schedule = levels(cls, 50, renoise=0.0)
    gaussian, h, y = random_problem(seed)
    generator = torch.Generator().manual_seed(0)
    x_T = noise_like(gaussian.mean.reshape(1, 1, 1, -1), generator) * float(scheduler.init_noise_sigma)
    solution = vml_map(
        x_T,
        prior=gaussian,
        measurement=Measurement(Linear(h), y, 0.1),
        schedule=schedule,
        inner_steps=20,
        stop_at=0,
        generator=generator,
    )
    goal, _ = gaussian.measured(h, y, 0.1)
    assert (solution.latent - goal).norm() < 0.01 * (goal - gaussian.mean).norm()


@pytest.mark.parametrize("cls", ACCEPTED)
@pytest.mark.parametrize("renoise", [0.0, 1.0])
def test_inner_steps_act(cls, renoise):
    """Moving x_t inside a level changes the next state."""
    schedule = levels(cls, 4, renoise)[1].last(3)
    gaussian, h, y = random_problem()

    def first_state(inner_steps):
        solving = vml_levels(
            torch.ones(1, 1, 1, 6, dtype=torch.float64),
            prior=gaussian,
            measurement=Measurement(Linear(h), y, 0.1),
            schedule=schedule,
            inner_steps=inner_steps,
            generator=torch.Generator().manual_seed(0),
        )
        return next(solving).x_next

    assert (first_state(20) - first_state(0)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler, of flow matching"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "UniPCMultistepScheduler, of flow matching"),
        (EDMEulerScheduler(), "EDMEulerScheduler, which has no alphas_cumprod"),
        (IPNDMScheduler(), "IPNDMScheduler, which has no alphas_cumprod"),
    ],
)
def test_a_scheduler_that_is_not_served_is_refused(scheduler, message):
    with pytest.raises(ValueError, match=message):
        check_scheduler(scheduler)


def test_an_unknown_prediction_type_is_refused():
    scheduler = tiny.scheduler(cls=DPMSolverMultistepScheduler, use_flow_sigmas=True)
    scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="flow_prediction"):
        check_scheduler(scheduler)


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scaling", [1.0, 7.0], ids=["variance preserving", "any scaling"])
def test_denoise_is_the_scheduler_s_clean_estimate(prediction_type, scaling):
    scheduler = tiny.scheduler(prediction_type, clip_sample=False)
    scheduler.set_timesteps(10)
    model, t, x_t = prior(scheduler=scheduler), scheduler.timesteps[4], torch.randn(2, 4, 8, 8)
    out = model.unet(x_t, t, **model.condition).sample
    expected = scheduler.step(out, t, x_t).pred_original_sample
    abar = scheduler.alphas_cumprod[t].double()
    alpha, sigma = scaling * abar.sqrt().item(), scaling * (1 - abar).sqrt().item()
    assert torch.allclose(model.denoise(scaling * x_t, alpha, sigma), expected, atol=1e-4)


def test_timestep_is_looked_up_between_whole_steps():
    model = prior()
    abar = model.scheduler.alphas_cumprod.double()
    sigma = lambda t: ((1 - abar[t]) / abar[t]).sqrt().item()  # noqa: E731
    assert model.timestep(1.0, sigma(321)) == 321
    assert model.timestep(2.0, 2 * sigma(7)) == 7
    assert 321 < model.timestep(1.0, (sigma(321) + sigma(322)) / 2) < 322
    assert model.timestep(0.0, 1.0) == 999


@torch.no_grad()
def test_guidance_is_that_of_stock_at_every_scale():
    """``D_n + w (D_c - D_n)``, in one batch or as a push of the conditional estimate; SDXL's rescaling in its noise."""
    x_t, (alpha, sigma) = noise(2, 4, 8, 8), (0.8, 0.6)
    model = prior(guidance_scale=7.5)
    conditional = model.denoise(x_t, alpha, sigma)
    other = prior(guidance_scale=7.5)
    other.condition = other.negative
    negative = other.denoise(x_t, alpha, sigma)
    expected = negative + 7.5 * (conditional - negative)
    assert torch.allclose(model.guided(x_t, alpha, sigma), expected, atol=1e-4)
    assert torch.allclose(conditional + model.push(x_t, conditional, alpha, sigma), expected, atol=1e-4)

    model.guidance_rescale = 0.7
    e = lambda z: (x_t - alpha * z) / sigma  # noqa: E731
    stock = rescale_noise_cfg(e(expected), e(conditional), guidance_rescale=0.7)
    assert torch.allclose(e(model.guided(x_t, alpha, sigma)), stock, atol=1e-4)
    assert prior().push is None
    assert torch.equal(prior().guided(x_t, alpha, sigma), prior().denoise(x_t, alpha, sigma))


def test_pull_backs_are_autograd_s_and_leave_the_weights_as_they_were():
    model = prior()
    x_t, b = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    leaf = x_t.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model.denoise(leaf, 0.8, 0.6), leaf, b)
    with model:
        z0_hat, pull = model.denoise_pullback(x_t, 0.8, 0.6)
        assert not any(p.requires_grad for p in model.unet.parameters())
        assert torch.allclose(pull(b), expected, atol=1e-5) and not z0_hat.requires_grad
    assert all(p.requires_grad for p in [*model.unet.parameters(), *model.vae.parameters()])


def test_encode_and_decode_use_the_configured_scale():
    model = prior()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        mode = model.vae.encode(2 * image - 1).latent_dist.mode()
        assert torch.allclose(model.encode(image), mode * 0.18215)
        assert torch.allclose(model.decode(mode * 0.18215), model.vae.decode(mode).sample / 2 + 0.5, atol=1e-4)


class _Overflowing(torch.nn.Module):
    """A network that overflows in half precision, and in float32 too when asked to."""

    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor, self.config = network, factor, network.config

    @property
    def dtype(self):
        return self.network.dtype

    def decode(self, z, return_dict=False):
        return ((self.network.decode(z, return_dict=False)[0] * self.factor) / self.factor,)


@torch.no_grad()
def test_half_precision_that_overflows_is_repeated_in_float32_and_put_back():
    model = prior()
    model.vae = _Overflowing(tiny.vae().to(torch.bfloat16), 3e38)
    z = torch.randn(1, 4, 8, 8) * 50
    with model, pytest.warns(UserWarning, match="the VAE decoder gave non-finite values in torch.bfloat16"):
        model.vae.factor = 3e38
        model.vae.network.decoder.conv_out.bias.fill_(4.0)
        with pytest.raises(NonFiniteError, match="the VAE decoder gave NaN or infinity in float32"):
            model.decode(z)
    assert model.vae.dtype == torch.bfloat16 and model.retries == {"the VAE decoder": 1}


class _Steep(torch.nn.Module):
    """A half-precision decoder ``function(z)`` that is finite forwards and overflows in its backward pass."""

    def __init__(self, function):
        super().__init__()
        self.function, self.config = function, tiny.vae().config
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))

    @property
    def dtype(self):
        return self.weight.dtype

    def decode(self, z, return_dict=False):
        assert z.dtype == self.dtype
        return (self.function(z),)


def test_a_backward_pass_that_overflows_is_repeated_in_float32_and_put_back():
    """The cotangent is multiplied by 1e6 (past half precision's 65504), then by 1e-5."""
    model, cotangent = prior(), noise(2, 4, 8, 8, seed=4)
    model.vae = _Steep(lambda z: (z * 1e-5) * 1e6)
    with model, pytest.warns(UserWarning, match=r"the backward pass of the VAE decoder gave .* torch.float16"):
        image, pull = model.decode_pullback(noise(2, 4, 8, 8))
        assert torch.isfinite(image).all() and model.vae.dtype == torch.float16
        assert torch.allclose(pull(cotangent), cotangent * 10 / 0.18215 / 2, rtol=1e-5)
        assert model.vae.dtype == torch.float32
    assert model.vae.dtype == torch.float16 and model.retries == {"the backward pass of the VAE decoder": 1}


def test_a_backward_pass_that_overflows_in_float32_too_is_an_error():
    """The root has no finite slope at 0."""
    model = prior()
    model.vae = _Steep(torch.sqrt)
    with model, pytest.warns(UserWarning, match="goes on in float32"):
        _, pull = model.decode_pullback(torch.zeros(1, 4, 8, 8))
        with pytest.raises(NonFiniteError, match="the backward pass of the VAE decoder gave NaN or infinity in float"):
            pull(torch.ones(1, 4, 8, 8))
    assert model.vae.dtype == torch.float16


def test_a_draft_differs_in_its_decoder_alone():
    """With the full decoder in the draft's place nothing changes; a small one has its own scale."""
    z, x = noise(2, 4, 2, 2), noise(2, 4, 2, 2, seed=4)
    with prior(guidance_scale=7.5) as full:
        same, small = full.draft(full.vae), full.draft(tiny.gradient_vae())
        assert torch.equal(same.decode(z), full.decode(z)) and same.push == small.push == full.push
        image = tiny.gradient_vae().decode(z).sample / 2 + 0.5
        assert torch.equal(small.decode(z), image) and torch.equal(small.decode_pullback(z)[0], image)
        full.condition["encoder_hidden_states"] = noise(2, 5, 128, seed=9)  # a callback's
        assert torch.equal(small.denoise(x, 1.0, 2.0), full.denoise(x, 1.0, 2.0))
