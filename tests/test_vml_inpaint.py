"""VMLInpaintPipeline on the bundled checkpoint: the stock call, the known pixels, batches, masks, callbacks, errors."""

import inspect
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPImageProcessor

from vml_ldm import Proximal, VMLInpaintPipeline, bundled_model
from vml_ldm.adapters.diffusers import NonFiniteError
from vml_ldm.assets import example_images
from vml_ldm.images import from_pil, load_image, seamless
from vml_ldm.presets import settings
from vml_ldm.report import Report

SIZE = 64
QUICK = {"height": SIZE, "width": SIZE, "num_inference_steps": 6, "inner_steps": 1}
EXAMPLES = example_images("validation")


@pytest.fixture(scope="module")
def pipe():
    pipe = VMLInpaintPipeline.from_pretrained(bundled_model(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def fresh(pipe):
    """The same weights in a pipeline whose scheduler, UNet and settings a test may change."""
    fresh = VMLInpaintPipeline(**pipe.components, requires_safety_checker=False)
    fresh.set_progress_bar_config(disable=True)
    return fresh


def picture(index=0, size=(SIZE, SIZE)):
    return load_image(EXAMPLES[index][0]).resize(size)


def right_half(size=(SIZE, SIZE)):
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((size[0] // 2, 0, *size), fill=255)
    return mask


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def call(pipe, **arguments):
    return pipe(
        **{
            "prompt": "a hat",
            "image": picture(),
            "mask_image": right_half(),
            "generator": seeds(0),
            **QUICK,
            **arguments,
        }
    )


def test_the_call_is_the_stock_call_and_ours_come_after_it_by_name():
    stock = inspect.signature(StableDiffusionInpaintPipeline.__call__).parameters
    ours = inspect.signature(VMLInpaintPipeline.__call__).parameters
    shared = [name for name in stock if name != "kwargs"]
    assert list(ours)[: len(shared)] == shared
    assert all(ours[name].default == stock[name].default for name in shared)
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(shared) : -1])


@pytest.mark.parametrize("in_channels", [4, 9])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_solver_none_is_stock_bit_for_bit(fresh, in_channels, scheduler):
    if in_channels == 9:
        fresh.register_modules(unet=tiny.unet(9))
    fresh.scheduler = scheduler.from_config(fresh.scheduler.config)
    stock = StableDiffusionInpaintPipeline(**fresh.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    arguments = {**QUICK, "prompt": "a hat", "image": picture(), "mask_image": right_half(), "output_type": "np"}
    del arguments["inner_steps"]
    expected = stock(**arguments, generator=torch.Generator().manual_seed(1)).images
    assert np.array_equal(
        fresh(**arguments, generator=torch.Generator().manual_seed(1), solver="none").images, expected
    )


@pytest.mark.parametrize(
    "scheduler", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler]
)
def test_other_schedulers_solve_it_too(fresh, scheduler):
    fresh.scheduler = scheduler.from_config(fresh.scheduler.config)
    report = call(fresh, return_report=True, num_inference_steps=12, inner_steps=2).report
    assert report.levels == 4 and report.trace[-1]["residual"][0] < report.trace[0]["residual"][0]


def test_a_9_channel_unet_is_fed_its_mask(fresh):
    fresh.register_modules(unet=tiny.unet(9))
    assert call(fresh, guidance_scale=3.0).images[0].size == (SIZE, SIZE)


def test_known_pixels_are_bit_identical_in_every_output_type(pipe):
    image, mask = picture(), right_half()
    known = np.asarray(mask) == 0
    pixels = np.asarray(image)
    assert np.array_equal(np.asarray(call(pipe).images[0])[known], pixels[known])
    unit = pixels.astype(np.float32) / 255
    assert np.array_equal(call(pipe, output_type="np").images[0][known], unit[known])
    tensor = call(pipe, output_type="pt").images[0]
    assert np.array_equal(tensor.permute(1, 2, 0).numpy()[known], unit[known])
    assert not np.array_equal(np.asarray(call(pipe, paste=False).images[0])[known], pixels[known])


def test_the_mask_is_one_of_pixels_not_of_cells(pipe):
    """A hole within two cells of the latent: what is repainted is the hole, to the pixel, and all else is measured."""
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).rectangle((13, 21, 18, 30), fill=255)  # cells are 8 pixels wide
    known = np.asarray(mask) == 0
    out = call(pipe, mask_image=mask, return_report=True)
    changed = (np.asarray(out.images[0]) != np.asarray(picture())).any(-1)
    assert changed[~known].mean() > 0.9 and not changed[known].any()
    raw = call(pipe, mask_image=mask, paste=False, output_type="pt").images
    apart = (raw - from_pil(picture()))[0].square().mean(0)[torch.from_numpy(known)].mean().sqrt()
    assert out.report.residual[0] == pytest.approx(apart.item(), rel=0.05)


def test_ten_edits_in_a_row_leave_the_known_pixels_alone(pipe):
    image, mask = picture(), right_half()
    known, edited = np.asarray(mask) == 0, picture()
    for _ in range(10):
        edited = call(pipe, image=edited, num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(edited)[known], np.asarray(image)[known])


def test_same_seed_same_result_other_seed_another(pipe):
    one, same, other = (np.asarray(call(pipe, generator=seeds(s)).images[0]) for s in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.fixture(scope="module")
def double():
    """In float64, where rounding stays below what is compared."""
    pipe = VMLInpaintPipeline.from_pretrained(bundled_model(), safety_checker=None, torch_dtype=torch.float64)
    pipe.gradient_vae.to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("jacobian", ["exact", "free"])
def test_a_batch_of_four_is_four_calls(double, jacobian):
    """To the last digits: in float32 the conjugate directions make up to two 8-bit values of them."""
    prompts = [EXAMPLES[i][1] for i in range(4)]
    images, masks = [picture(i) for i in range(4)], [right_half()] * 3 + [right_half().transpose(Image.ROTATE_90)]
    common = {"output_type": "np", "jacobian": jacobian, "inner_steps": 3, "num_inference_steps": 12}
    batch = call(double, prompt=prompts, image=images, mask_image=masks, generator=seeds(0, 1, 2, 3), **common).images
    alone = [
        call(double, prompt=p, image=i, mask_image=m, generator=seeds(s), **common).images[0]
        for s, (p, i, m) in enumerate(zip(prompts, images, masks, strict=True))
    ]
    assert np.abs(batch - np.stack(alone)).max() <= 1e-6


def test_one_prompt_serves_several_images_and_each_may_come_in_copies(pipe):
    out = call(
        pipe, image=[picture(0), picture(1)], num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), output_type="np"
    )
    known = np.asarray(right_half()) == 0
    for result, source in zip(out.images, (0, 0, 1, 1), strict=True):
        assert np.array_equal(result[known], np.asarray(picture(source), dtype=np.float32)[known] / 255)
    assert not np.array_equal(out.images[0], out.images[1])


def test_a_soft_mask_keeps_its_values(pipe):
    """A pixel painted p is (1 - p) original and p of the solver's own image, freed of the error that is known there."""
    mask = right_half().point(lambda value: value // 2)
    raw = call(pipe, mask_image=mask, paste=False, output_type="pt").images
    pasted = call(pipe, mask_image=mask, output_type="pt").images
    p = from_pil(mask)[:, :1]
    assert torch.allclose(pasted, seamless(from_pil(picture()), raw, 1 - p), atol=1e-6)
    inside = (p > 0)[0, 0]
    farther = (raw - from_pil(picture()))[0, :, inside].abs().mean()
    assert (pasted - from_pil(picture()))[0, :, inside].abs().mean() < 0.51 * farther


def test_a_black_mask_returns_the_image_and_a_white_one_samples_the_prior(pipe):
    black, white = Image.new("L", (SIZE, SIZE)), Image.new("L", (SIZE, SIZE), 255)
    assert np.array_equal(np.asarray(call(pipe, mask_image=black).images[0]), np.asarray(picture()))
    out = call(pipe, mask_image=white, return_report=True)
    assert out.report.inner_steps == 0 and out.report.levels == QUICK["num_inference_steps"]
    assert "decode_vjp" not in out.report.calls


def test_alpha_grey_and_exif_are_upright_rgb_on_white(pipe):
    turned = picture().transpose(Image.ROTATE_270)
    exif = turned.getexif()
    exif[0x0112] = 8  # shown turned by 90 degrees
    turned.info["exif"] = exif.tobytes()
    clear = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    known = np.asarray(right_half()) == 0
    assert (np.asarray(call(pipe, image=clear).images[0])[known] == 255).all()
    grey = picture().convert("L")
    result = np.asarray(call(pipe, image=grey).images[0])[known]
    assert np.array_equal(result, np.asarray(grey.convert("RGB"))[known])


def test_strength_below_one_starts_from_the_image(pipe):
    report = call(pipe, strength=0.5, num_inference_steps=20, return_report=True).report
    assert report.levels == 5 and pipe.num_timesteps == 5
    assert report.calls["encode"] == 2
    whole = call(pipe, num_inference_steps=20, return_report=True).report
    assert report.trace[0]["sigma"] < whole.trace[0]["sigma"]
    assert call(pipe, strength=0.1, num_inference_steps=50, inner_steps=None, return_report=True).report.levels >= 1
    with pytest.raises(ValueError, match=r"strength 0.0 of 6 steps leaves none"):
        call(pipe, strength=0.0)


def test_a_start_from_the_measurement_is_nearer_to_it(fresh):
    """Without inner steps one level's estimate shows where it started."""
    fresh.scheduler = EulerDiscreteScheduler.from_config(fresh.scheduler.config, timestep_spacing="trailing")
    known = np.asarray(right_half()) == 0

    def miss(start):
        out = call(
            fresh, start=start, timesteps=[500], inner_steps=0, paste=False, output_type="np", guidance_scale=1.0
        )
        return np.abs(out.images[0][known] - np.asarray(picture(), dtype=np.float32)[known] / 255).mean()

    assert miss("measurement") < 0.5 * miss("noise")


@pytest.mark.parametrize(
    "preset, steps, levels, inner_steps",
    [("balanced", 50, 5, 7), ("fast", 50, 4, 4), ("best", 50, 5, 15), ("balanced", 20, 4, 3), ("balanced", 4, 2, 1)],
)
def test_the_budget_is_split_by_the_documented_rule(preset, steps, levels, inner_steps):
    assert settings(preset).split(steps) == (levels, inner_steps)
    assert settings(preset, inner_steps=1).split(50)[1] == 1
    more = inner_steps if inner_steps > 1 else 0  # at the last level
    assert levels * (inner_steps + 1) + more <= settings(preset).budget * steps


def test_padding_mask_crop_solves_the_crop_and_leaves_the_rest(pipe):
    image, mask = picture(size=(160, 120)), Image.new("L", (160, 120))
    ImageDraw.Draw(mask).rectangle((60, 40, 90, 70), fill=255)
    out = np.asarray(call(pipe, image=image, mask_image=mask, padding_mask_crop=8).images[0])
    known = np.asarray(mask) == 0
    assert out.shape == (120, 160, 3) and np.array_equal(out[known], np.asarray(image)[known])
    assert not np.array_equal(out[~known], np.asarray(image)[~known])


def test_sizes_follow_the_stride(pipe):
    assert call(pipe, height=56, width=88).images[0].size == (88, 56)
    with pytest.raises(ValueError, match="divisible by 8"):
        call(pipe, height=60)


def test_explicit_timesteps_are_the_levels(fresh):
    fresh.scheduler = EulerDiscreteScheduler.from_config(fresh.scheduler.config, timestep_spacing="trailing")
    report = call(fresh, timesteps=[900, 500, 100], return_report=True).report
    assert report.levels == 3
    report = call(fresh, sigmas=[10.0, 3.0, 1.0, 0.2, 0.0], return_report=True).report
    assert [level["sigma"] for level in report.trace] == pytest.approx([10.0, 3.0, 1.0, 0.2])


@pytest.mark.parametrize(
    "levels, steps, inner_steps", [(10, 50, 3), (3, 50, 7), (1, 50, 7), (6, 6, 1), (6, 0.5, 1), (3, 12, 2)]
)
def test_explicit_levels_share_the_budget_by_the_documented_rule(levels, steps, inner_steps):
    assert settings("balanced").inner_steps_of(levels, steps) == inner_steps
    assert settings("balanced", inner_steps=9).inner_steps_of(levels, steps) == 9


def test_explicit_levels_share_the_budget(fresh):
    fresh.scheduler = EulerDiscreteScheduler.from_config(fresh.scheduler.config, timestep_spacing="trailing")
    given = {"timesteps": [900, 700, 500, 300], "num_inference_steps": 16, "guidance_scale": 1.0, "proximal": False}
    for strength, levels in ((1.0, 4), (0.5, 2)):
        report = call(fresh, **given, strength=strength, inner_steps=None, return_report=True).report
        assert (report.levels, report.inner_steps) == (levels, 2)
        assert report.calls["denoise"] <= 16 * strength


def test_latents_in_and_out(pipe):
    noise = torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0))
    common = {"latents": noise, "output_type": "latent", "generator": seeds(7)}
    one, same = call(pipe, **common).images, call(pipe, **{**common, "generator": seeds(7)}).images
    assert one.shape == noise.shape and torch.equal(one, same)
    with pytest.raises(ValueError, match=r"`latents` has shape \(1, 4, 4, 4\); expected \(1, 4, 8, 8\)"):
        call(pipe, latents=noise[..., :4, :4])


def test_callbacks_count_levels_and_change_tensors(pipe):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds", "mask", "masked_image_latents"]
    out = call(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, output_type="latent")
    assert [step for step, *_ in seen] == [0, 1, 2] and seen[0][2] == sorted(names)
    assert not out.images.any()


def test_a_callback_s_mask_is_measured_and_pasted_from_there_on(pipe):
    """Where it changed the mask, in blocks of the latents; the other pixels' mask stays as fine as it was."""
    image, fine = np.asarray(picture()), right_half().crop((3, 0, SIZE + 3, SIZE))
    fine.paste(255, (SIZE - 3, 0, SIZE, SIZE))
    known = np.asarray(fine) == 0
    rows = np.indices((SIZE, SIZE))[0] < SIZE // 2
    blocks = rows & (np.indices((SIZE, SIZE))[1] >= SIZE // 2)  # those of the latents that are painted

    def edit(value, at=0):
        def upper(pipe, step, timestep, tensors):
            if step == at:
                tensors["mask"][..., : SIZE // 16, :] = value
            return tensors

        names = ["mask"]
        return {"callback_on_step_end": upper, "callback_on_step_end_tensor_inputs": names, "mask_image": fine}

    kept, opened = (np.asarray(call(pipe, **edit(value)).images[0]) for value in (0, 1))
    assert np.array_equal(kept[known | blocks], image[known | blocks])
    assert not np.array_equal(kept[~known & rows], image[~known & rows])
    assert np.array_equal(opened[known & ~rows], image[known & ~rows])
    assert not np.array_equal(opened[known & rows], image[known & rows])
    after_the_last = np.asarray(call(pipe, **edit(1, at=2)).images[0])
    assert np.array_equal(after_the_last, np.asarray(call(pipe, mask_image=fine).images[0]))


def test_the_official_cutoff_takes_guidance_away(pipe):
    """`SDCFGCutoffCallback` sets the scale to 0 and leaves one row: what comes after has no negative prompt."""
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    guided = call(pipe, return_report=True).report
    out = call(pipe, callback_on_step_end=cutoff, return_report=True)
    assert pipe.guidance_scale == 0 and out.report.levels == guided.levels == 3
    assert guided.calls["denoise"] - out.report.calls["denoise"] == 2  # the levels after the first
    with pytest.raises(ValueError, match=r"`prompt_embeds` has 1 rows after the callback, for 2 images; expected 2"):
        call(pipe, callback_on_step_end=cutoff, num_images_per_prompt=2, generator=None)
    assert pipe.unet.conv_in.weight.requires_grad

    def guide(pipe, step, timestep, tensors):
        pipe._guidance_scale = 3.0

    with pytest.raises(ValueError, match=r"guidance_scale is 3\.0 after the callback, and `prompt_embeds` has no rows"):
        call(pipe, guidance_scale=1.0, callback_on_step_end=guide)


def test_an_interrupted_call_returns_its_last_clean_estimate(pipe):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return tensors

    report = call(pipe, callback_on_step_end=stop, return_report=True).report
    assert len(report.trace) == 2
    assert report.interrupted and f"stopped after 2 of {report.levels} levels" in report.text()


@pytest.mark.parametrize("last", [1, 4, 11])
def test_a_stop_within_a_level_lets_no_call_of_the_denoiser_follow(pipe, last):
    """The picture is that of the last level that ended (none: the smooth filling), and its known pixels are there."""
    made = []

    def stop(network, inputs, output):
        made.append(1)
        pipe._interrupt |= len(made) == last

    hook = pipe.unet.register_forward_hook(stop)
    try:
        out = call(pipe, return_report=True, guidance_scale=1.0, num_inference_steps=16)
    finally:
        hook.remove()
    assert len(made) == last and out.report.interrupted
    assert len(out.report.trace) == last // 2 < out.report.levels  # a level takes two
    assert np.array_equal(*(np.asarray(image)[np.asarray(right_half()) == 0] for image in (out.images[0], picture())))
    assert not call(pipe, return_report=True, guidance_scale=1.0).report.interrupted


def test_the_report_measures_before_the_paste(pipe):
    out = call(pipe, return_report=True, paste=False, output_type="np")
    report, known = out.report, np.asarray(right_half()) == 0
    error = out.images[0][known] - np.asarray(picture(), dtype=np.float32)[known] / 255
    assert isinstance(report, Report) and report.residual[0] == pytest.approx(np.sqrt((error**2).mean()), rel=0.05)
    assert len(report.text().splitlines()) == 5 and report.to_dict()["calls"] == report.calls
    _, flags, same = call(pipe, return_report=True, return_dict=False)
    assert flags is None and isinstance(same, Report) and len(call(pipe, return_dict=False)) == 2


def test_a_named_noise_adds_to_the_vae_s_own(pipe):
    report = call(pipe, sigma_y=0.1, return_report=True).report
    assert report.effective_sigma_y[0] == pytest.approx(np.hypot(0.1, report.vae_error[0] / 2), rel=1e-5)


def test_no_guidance_no_negative_prompt_and_embeddings_instead_of_a_prompt(pipe):
    embeds, negative = pipe.encode_prompt("a hat", "cpu", 1, True)
    by_text = call(pipe, output_type="np").images
    by_embeds = call(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, output_type="np").images
    assert np.array_equal(by_text, by_embeds)
    assert call(pipe, guidance_scale=1.0, return_report=True).report.calls["denoise"] == 3 * 2


def test_inside_inference_mode(pipe):
    expected = call(pipe, output_type="np").images
    with torch.inference_mode():
        assert np.array_equal(call(pipe, output_type="np").images, expected)


def test_the_file_is_a_custom_pipeline():
    file = Path(inspect.getfile(VMLInpaintPipeline))
    pipe = DiffusionPipeline.from_pretrained(
        bundled_model(), custom_pipeline=str(file), trust_remote_code=True, safety_checker=None
    )
    assert type(pipe).__name__ == "VMLInpaintPipeline"


def test_weights_keep_their_gradient_flags(pipe):
    before = [p.requires_grad for p in pipe.unet.parameters()]
    call(pipe)
    assert [p.requires_grad for p in pipe.unet.parameters()] == before


def test_half_precision_networks_keep_a_float32_state(fresh):
    halves = {"unet": tiny.unet().to(torch.bfloat16), "vae": tiny.vae().to(torch.bfloat16)}
    fresh.register_modules(**halves)
    image = call(fresh, output_type="pt").images
    assert image.dtype == torch.float32 and fresh.unet.dtype == torch.bfloat16


def test_a_vae_that_overflows_in_float16_still_gives_an_image_and_the_report_counts_it(fresh, caplog):
    vae = tiny.vae()
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2e5)  # what it gives is beyond float16; the next norm takes it off again
    fresh.register_modules(vae=torch.nn.Module.to(vae, torch.float16))
    with pytest.warns(UserWarning, match=r"the VAE decoder gave non-finite values in torch.float16"):
        out = call(fresh, output_type="pt", return_report=True)
    assert out.images.isfinite().all() and fresh.vae.dtype == torch.float16
    assert out.report.retries["the VAE decoder"] >= 1
    assert f"{out.report.retries['the VAE decoder']} x the VAE decoder" in out.report.text()
    assert "should be kept in float32" not in caplog.text  # diffusers' warning, which is about nothing here


def test_non_finite_weights_are_named(fresh):
    unet = tiny.unet()
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    fresh.register_modules(unet=unet)
    with pytest.raises(NonFiniteError, match="the UNet gave NaN or infinity"):
        call(fresh)


def safety_checker(threshold):
    """The genuine checker on a tiny CLIP: it flags every image whose cosine with a concept exceeds the threshold."""
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 224, "patch_size": 32}, text_config=tower, projection_dim=8
    )
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    return checker


@pytest.mark.parametrize("threshold, flagged", [(-2.0, True), (2.0, False)])
def test_flagged_images_are_black_and_the_others_keep_their_pixels(fresh, threshold, flagged):
    fresh.register_modules(safety_checker=safety_checker(threshold), feature_extractor=CLIPImageProcessor())
    out = call(fresh, output_type="np")
    known = np.asarray(right_half()) == 0
    assert out.nsfw_content_detected == [flagged]
    expected = np.asarray(picture(), dtype=np.float32) / 255 * (not flagged)
    assert np.array_equal(out.images[0][known], expected[known])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"solver": "ddnm"}, "solver is 'ddnm'; expected one of 'vml', 'none'"),
        ({"jacobian": "half"}, "jacobian is 'half'; expected"),
        ({"start": "here"}, "start is 'here'; expected one of 'noise', 'measurement'"),
        ({"preset": "turbo"}, "preset is 'turbo'; expected one of 'fast', 'balanced', 'best'"),
        ({"inner_steps": -1}, "inner_steps is -1; expected"),
        ({"sigma_y": -0.1}, "sigma_y is -0.1; expected >= 0"),
        ({"image": None}, "`image` is None"),
        ({"mask_image": None}, "`mask_image` is None"),
        ({"prompt": ["a", "b"], "image": [picture()] * 3}, "3 of `image` came for 2 prompts"),
        ({"generator": seeds(0, 1)}, "2 generators came for 1 images"),
        ({"solver": "none", "return_report": True}, "return_report=True came with solver='none'"),
        ({"solver": "none", "preset": "turbo"}, "preset is 'turbo'; expected one of 'fast', 'balanced', 'best'"),
        ({"solver": "none", "memory": "lots"}, "memory is 'lots'; expected"),
        ({"solver": "none", "renoise": 2.0}, r"renoise is 2.0; expected a number in \[0, 1\]"),
        ({"padding_mask_crop": 4, "mask_image": right_half((32, 32))}, "expected the same size"),
    ],
)
def test_bad_input_is_refused_in_one_clear_sentence(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, **arguments)


def test_what_a_solver_does_not_look_at_is_named_once(pipe):
    stock = {"solver": "none", "inner_steps": None, "num_inference_steps": 2}
    given = {"paste": False, "use_gradient_vae": True, "sigma_y": 0.1, "preset": "best", "memory": "1GiB"}
    with pytest.warns(UserWarning, match="solver='none' does not look at") as told:
        call(pipe, **stock, **given)
    (text,) = [str(warning.message) for warning in told if "does not look" in str(warning.message)]
    assert all(f"{name}={value!r}" in text for name, value in given.items()) and text.count("=") == 1 + len(given)
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match=r"solver='vml' does not look at eta=0\.5"):
        call(pipe, eta=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        call(pipe, **stock)
        call(pipe, preset="best", paste=False)


def test_an_unknown_argument_is_not_swallowed(pipe):
    with pytest.raises(TypeError, match="jacobean"):
        call(pipe, jacobean="free")


def test_a_scheduler_that_is_not_served_is_refused_before_any_work(fresh):
    fresh.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="the scheduler is FlowMatchEulerDiscreteScheduler, of flow matching"):
        call(fresh)


@pytest.mark.parametrize("steps", [3.5, 0, -1, True, "4"])
def test_steps_are_a_whole_number(pipe, steps):
    with pytest.raises(ValueError, match=r"num_inference_steps is .*; expected a whole number >= 1"):
        call(pipe, num_inference_steps=steps)


def test_fast_asks_no_network_for_a_gradient_nor_does_any_preset_that_is_guided(pipe, monkeypatch):
    """Autograd is not called, nor is grad mode on in any network."""

    def never(*args, **kwargs):
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.autograd, "grad", never)
    modes = []
    networks = (pipe.unet, pipe.vae.decoder, pipe.gradient_vae.decoder)
    hooks = [network.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled())) for network in networks]
    try:
        for preset, scale in (("fast", 1.0), ("fast", 7.5), ("balanced", 7.5), ("best", 7.5)):
            call(pipe, preset=preset, inner_steps=None, guidance_scale=scale)
    finally:
        for hook in hooks:
            hook.remove()
    assert modes and not any(modes)
    with pytest.raises(AssertionError, match="a gradient was asked for"):
        call(pipe, preset="balanced", inner_steps=None, guidance_scale=1.0)


def test_proximal_levels_are_the_default_and_can_be_chosen(pipe):
    report = lambda **given: call(pipe, return_report=True, num_inference_steps=50, **given).report  # noqa: E731
    plain = {"inner_steps": None, "jacobian": None}
    guided, unguided = report(**plain), report(**plain, guidance_scale=1.0)
    assert (guided.levels, unguided.levels) == (12, 8)
    assert guided.calls["denoise"] == 24 and not any(name.endswith("_vjp") for name in guided.calls)
    assert unguided.calls["denoise_vjp"] == 6  # at levels of noise 1 and above
    alone = report(**plain, guidance_scale=1.0, proximal=Proximal())
    assert "denoise_vjp" not in alone.calls and alone.calls["denoise"] == 8
    assert report(**plain, guidance_scale=1.0, proximal=False).inner_steps == 7
    with pytest.raises(TypeError, match=r"proximal is 'yes'; expected True, False or a vml_ldm.Proximal"):
        call(pipe, proximal="yes")


def test_the_scale_of_guidance_means_what_it_means_in_stock(pipe):
    """Each scale gives a picture of its own; in stock too, 1 and below are none."""
    images = [np.asarray(call(pipe, inner_steps=None, guidance_scale=scale).images[0]) for scale in (0, 1, 3, 7.5)]
    assert np.array_equal(images[0], images[1])
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(images[1:]))
