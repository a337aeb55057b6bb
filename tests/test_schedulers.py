"""Every scheduler for Stable Diffusion: its levels fall, its clean estimate is ours, the pipelines solve with it."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw

from vml_ldm import Downsample, VMLInpaintPipeline, VMLRestorePipeline
from vml_ldm.adapters.diffusers import SchedulerLevels, scheduler_levels
from vml_ldm.adapters.diffusers.unet import UNetPrior

SIZE = 32
SPACINGS = ("leading", "linspace", "trailing")
SERVED = tiny.schedulers()
VARIANTS = [
    *((cls, {}) for cls in SERVED),
    *((cls, {"use_karras_sigmas": True}) for cls in SERVED if "use_karras_sigmas" in tiny.options(cls)),
    (PNDMScheduler, {"skip_prk_steps": True}),
    (DDIMScheduler, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    (EulerDiscreteScheduler, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "algorithm_type": "sde-dpmsolver++"}),
]
# What these give as their clean estimate is none, or one mixed with the state.
WITHOUT_ESTIMATE = ("PNDMScheduler", "DEISMultistepScheduler", "DPMSolverSDEScheduler", "LCMScheduler", "TCDScheduler")
names = lambda value: value.__name__ if isinstance(value, type) else ",".join(map(str, value.values()))  # noqa: E731


def levels(cls, count, prediction_type="v_prediction", **options) -> tuple[object, SchedulerLevels]:
    scheduler = tiny.scheduler(prediction_type, cls=cls, **options)
    scheduler.set_timesteps(count)
    return scheduler, scheduler_levels(scheduler, scheduler.timesteps)


def noise_of(schedule):
    return [sigma / alpha if alpha else np.inf for alpha, sigma in map(schedule.scales, range(len(schedule)))]


@pytest.mark.parametrize("cls, options", VARIANTS, ids=names)
@pytest.mark.parametrize("count", [1, 6])
def test_there_are_as_many_levels_as_asked_for_and_they_fall(cls, options, count):
    if cls is PNDMScheduler and not options:
        count = max(count, 4)
    if options.get("use_karras_sigmas") and count == 1:
        pytest.skip("Karras' spacing divides by the number of levels - 1")
    _, schedule = levels(cls, count, **options)
    noise = noise_of(schedule)
    assert len(schedule) == len(schedule.timesteps) == count
    assert all(a > b > 0 for a, b in pairwise(noise))


@pytest.mark.parametrize("cls, options", VARIANTS, ids=names)
def test_the_unet_is_asked_at_the_scheduler_s_own_time(cls, options):
    """To within one training step: some schedulers round, or interpolate along another curve."""
    scheduler, schedule = levels(cls, 8, **options)
    prior = UNetPrior(unet=tiny.unet2d(4), scheduler=scheduler)
    for i, t in enumerate(schedule.timesteps):
        assert prior.timestep(*schedule.scales(i)) == pytest.approx(float(t), abs=1)


class _Told(UNetPrior):
    """A prior whose UNet gives what it is told."""

    def _predict(self, x, t):
        return self.out


def their_estimate(scheduler, out, t, x_t):
    """The scheduler's own clean estimate of a first call at t; None if it gives none."""
    scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, "convert_model_output"):
        scheduler._init_step_index(t)
        return scheduler.convert_model_output(out, sample=x_t)
    return getattr(scheduler.step(out, t, x_t), "pred_original_sample", None)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("cls, options", [v for v in VARIANTS if v[0].__name__ not in WITHOUT_ESTIMATE], ids=names)
def test_the_clean_estimate_is_the_scheduler_s(cls, options, prediction_type):
    if prediction_type == "epsilon" and options.get("rescale_betas_zero_snr"):
        pytest.skip("a level without signal needs v")
    if cls is DDIMScheduler or cls.__name__ == "DDPMScheduler":
        options = {**options, "clip_sample": False}
    scheduler, schedule = levels(cls, 6, prediction_type, **options)
    prior, generator = _Told(unet=tiny.unet2d(4), scheduler=scheduler), torch.Generator().manual_seed(0)
    for i, t in enumerate(schedule.timesteps):
        alpha, sigma = schedule.scales(i)
        z0, e, prior.out = torch.randn(3, 1, 4, 2, 2, generator=generator, dtype=torch.float64)
        x_t = alpha * z0 + sigma * e
        theirs = their_estimate(scheduler, prior.out, t, x_t)
        assert (prior.denoise(x_t, alpha, sigma) - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_stages_within_a_step_are_no_levels(spacing):
    """Runge-Kutta midpoints and second-order doubles are left out: Heun's levels are Euler's, PNDM's are DDIM's."""
    euler, heun = (levels(cls, 7, timestep_spacing=spacing) for cls in (EulerDiscreteScheduler, HeunDiscreteScheduler))
    assert len(heun[0].timesteps) == 13 and noise_of(heun[1]) == pytest.approx(noise_of(euler[1]), rel=1e-6)
    ddim, pndm = (levels(cls, 7, timestep_spacing=spacing) for cls in (DDIMScheduler, PNDMScheduler))
    assert len(pndm[0].timesteps) > 7 and torch.equal(pndm[1].timesteps, ddim[1].timesteps)


def test_reading_levels_leaves_the_scheduler_as_it_was():
    for cls in (EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler, LCMScheduler):
        scheduler = tiny.scheduler(cls=cls)
        scheduler.set_timesteps(5)
        before = {name: str(value) for name, value in vars(scheduler).items()}
        scheduler_levels(scheduler, scheduler.timesteps)
        assert {name: str(value) for name, value in vars(scheduler).items()} == before


def test_a_tail_is_the_end_of_the_whole():
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        scheduler, whole = levels(cls, 8)
        tails = whole.last(3), scheduler_levels(scheduler, scheduler.timesteps[5:])
        for tail in tails:
            assert noise_of(tail) == noise_of(whole)[5:] and torch.equal(tail.timesteps, whole.timesteps[5:])


def test_no_signal_needs_a_prediction_that_says_something_there():
    options = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    assert levels(DDIMScheduler, 4, **options)[1].scales(0) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"a level without signal \(alpha = 0\) and predicts 'epsilon'"):
        levels(DDIMScheduler, 4, "epsilon", **options)


@pytest.fixture(scope="module")
def parts():
    return tiny.components()


def pipeline(cls, parts, scheduler):
    pipe = cls(**parts, requires_safety_checker=False)
    pipe.scheduler = scheduler  # as users exchange it: the constructor may change its configuration
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def right_half():
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).rectangle((SIZE // 2, 0, SIZE, SIZE), fill=255)
    return mask


def inpaint(parts, scheduler, **arguments):
    arguments = {
        "height": SIZE,
        "width": SIZE,
        "guidance_scale": 1.0,
        "num_inference_steps": 8,
        "inner_steps": 1,
        "return_report": True,
        **arguments,
    }
    generator = torch.Generator().manual_seed(0)
    pipe = pipeline(VMLInpaintPipeline, parts, scheduler)
    return pipe("a hat", picture(), right_half(), generator=generator, **arguments)


@pytest.mark.parametrize(
    "cls, options, strength",
    [*((*variant, 1.0) for variant in VARIANTS), *((cls, {}, 0.5) for cls in SERVED)],
    ids=lambda value: names(value) if isinstance(value, type | dict) else str(value),
)
def test_a_solve_runs_and_keeps_the_known_pixels(parts, cls, options, strength):
    out = inpaint(parts, tiny.scheduler("v_prediction", cls=cls, **options), strength=strength)
    known = np.asarray(right_half()) == 0
    assert np.array_equal(np.asarray(out.images[0])[known], np.asarray(picture())[known])
    assert out.report.levels == 4 * strength and out.report.calls["decode_vjp"] >= 1


@pytest.mark.parametrize("cls", SERVED, ids=names)
def test_restoration_runs(parts, cls):
    pipe = pipeline(VMLRestorePipeline, parts, tiny.scheduler(cls=cls))
    y = torch.rand(1, 3, 8, 8)
    out = pipe(
        "", SIZE, SIZE, 4, guidance_scale=1.0, y=y, operator=Downsample(4), solver="red-diff", return_report=True
    )
    assert out.report.levels == 4


def test_restoration_s_explicit_levels_share_the_budget(parts):
    pipe = pipeline(VMLRestorePipeline, parts, tiny.scheduler(cls=EulerDiscreteScheduler))
    given = {"y": torch.rand(1, 3, 8, 8), "operator": Downsample(4), "timesteps": [900, 500, 100]}
    report = pipe("", SIZE, SIZE, 10, guidance_scale=1.0, **given, return_report=True).report
    assert (report.levels, report.inner_steps) == (3, 1) and report.calls["denoise"] <= 10


@pytest.mark.parametrize("cls", SERVED, ids=names)
@pytest.mark.parametrize(
    "name, given, count", [("timesteps", [900, 500, 100], 3), ("sigmas", [10.0, 3.0, 1.0, 0.2, 0.0], 4)]
)
def test_explicit_levels_are_taken_or_refused_before_any_work(parts, cls, name, given, count):
    scheduler = tiny.scheduler(cls=cls)
    if name in tiny.options(cls.set_timesteps) and (cls, name) != (UniPCMultistepScheduler, "sigmas"):  # flow's only
        if cls is LCMScheduler:
            given = [979, 499, 99]  # on its own grid
        report = inpaint(parts, scheduler, **{name: given}).report
        assert report.levels == count
        if name == "sigmas":
            assert [level["sigma"] / level["alpha"] for level in report.trace] == pytest.approx(given[:count], rel=1e-4)
        return
    parts = {**parts, "vae": tiny.vae().to("meta")}  # no network can run
    with pytest.raises(ValueError, match=name):
        inpaint(parts, scheduler, **{name: given})


def test_a_short_runge_kutta_start_is_refused(parts):
    with pytest.raises(ValueError, match="skip_prk_steps=False and is asked for 3 levels; expected 4 at least"):
        inpaint(parts, tiny.scheduler(cls=PNDMScheduler), num_inference_steps=6)
    report = inpaint(parts, tiny.scheduler(cls=PNDMScheduler, skip_prk_steps=True), num_inference_steps=6).report
    assert report.levels == 3
