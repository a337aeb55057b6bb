"""SD 2.x, few-step checkpoints, SDXL and SD3 on tiny networks: what is their own, and what every pipeline promises."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.callbacks import MultiPipelineCallbacks, SD3CFGCutoffCallback, SDXLCFGCutoffCallback
from PIL import Image
from torch import nn

from vml_ldm import (
    RedDiff,
    VMLInpaintPipeline,
    VMLInpaintSD3Pipeline,
    VMLInpaintXLPipeline,
    VMLRestoreSD3Pipeline,
    VMLRestoreXLPipeline,
)
from vml_ldm.adapters.diffusers import FlowPrior, StableDiffusionPrior, StableDiffusionXLPrior, flow_levels
from vml_ldm.operators import Downsample, Mask, Measurement
from vml_ldm.solve import Levels, vml_map

SIZE = 64
FAMILIES = {
    "xl": (VMLInpaintXLPipeline, StableDiffusionXLInpaintPipeline, tiny.xl_components),
    "sd3": (VMLInpaintSD3Pipeline, StableDiffusion3InpaintPipeline, tiny.sd3_components),
}
MASK = Image.fromarray(np.repeat(np.arange(SIZE)[None] >= SIZE // 2, SIZE, axis=0).astype(np.uint8) * 255)
KNOWN = np.asarray(MASK) == 0
COMPONENTS = {name: make() for name, (*_, make) in FAMILIES.items()}


def build(cls, components, **options):
    marked = {"add_watermarker": False} if "XL" in cls.__name__ else {}
    pipe = cls(**components, **marked, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=FAMILIES)
def family(request):
    cls, stock, make = FAMILIES[request.param]
    components = COMPONENTS[request.param]
    scheduler = type(components["scheduler"]).from_config(components["scheduler"].config)
    return SimpleNamespace(
        name=request.param, cls=cls, stock=stock, make=make, components=components | {"scheduler": scheduler}
    )


@pytest.fixture
def pipe(family):
    return build(family.cls, family.components)


@pytest.fixture
def xl():
    return build(VMLInpaintXLPipeline, COMPONENTS["xl"] | {"scheduler": tiny.xl_components()["scheduler"]})


def picture(seed=0):
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    pixels = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bilinear")[0]
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy())


def noise(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def stock_arguments(**arguments):
    common = {"prompt": "a hat", "image": picture(), "mask_image": MASK, "height": SIZE, "width": SIZE}
    return {
        **common,
        "num_inference_steps": 6,
        "strength": 1.0,
        "output_type": "np",
        "generator": seeds(0),
        **arguments,
    }


def call(pipe, **arguments):
    return pipe(**stock_arguments(**{"inner_steps": 1, **arguments}))


def test_the_call_is_the_stock_call_and_ours_come_after_it_by_name(family):
    stock = inspect.signature(family.stock.__call__).parameters
    ours = inspect.signature(family.cls.__call__).parameters
    shared = [name for name in stock if name != "kwargs"]
    assert list(ours)[: len(shared)] == shared
    assert all(ours[name].default == stock[name].default for name in shared)
    rest = [ours[name].kind for name in list(ours)[len(shared) :] if name != "kwargs"]
    assert set(rest) == {inspect.Parameter.KEYWORD_ONLY} and ("kwargs" in ours) == ("kwargs" in stock)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_solver_none_is_stock_bit_for_bit(family, pipe, strength):
    stock = build(family.stock, family.components)
    arguments = {"strength": strength, "negative_prompt": "a shoe"}
    expected = stock(**stock_arguments(**arguments, generator=seeds(1))).images
    ours = pipe(**stock_arguments(**arguments, generator=seeds(1), solver="none")).images
    assert np.array_equal(ours, expected)


def test_known_pixels_are_bit_identical_and_the_measurement_is_followed(pipe):
    out = call(pipe, num_inference_steps=20, inner_steps=3, return_report=True)
    assert np.array_equal(out.images[0][KNOWN], np.asarray(picture(), dtype=np.float32)[KNOWN] / 255)
    measured = [level["residual"][0] for level in out.report.trace if level["steps"][0]]
    assert measured[-1] < measured[0] and out.nsfw_content_detected is None
    images, report = call(pipe, return_dict=False, return_report=True)
    assert images.shape == (1, SIZE, SIZE, 3) and report.levels == 3


def test_a_batch_is_what_its_images_are_alone(pipe):
    prompts, images = ["a hat", "a red shoe", "a cat"], [picture(0), picture(1), picture(2)]
    common = {"num_inference_steps": 8, "negative_prompt": "grey", "guidance_scale": 3.0}
    batch = call(pipe, prompt=prompts, image=images, generator=seeds(0, 1, 2), **common).images
    alone = [
        call(pipe, prompt=p, image=i, generator=seeds(s), **common).images[0]
        for s, (p, i) in enumerate(zip(prompts, images, strict=True))
    ]
    assert np.abs(batch - np.stack(alone)).max() <= 1 / 255


def test_one_prompt_serves_several_images_and_each_may_come_in_copies(pipe):
    options = {"image": [picture(0), picture(1)], "prompt_2": "a shoe", "num_images_per_prompt": 2}
    out = call(pipe, **options, generator=seeds(0, 1, 2, 3))
    for result, source in zip(out.images, (0, 0, 1, 1), strict=True):
        assert np.array_equal(result[KNOWN], np.asarray(picture(source), dtype=np.float32)[KNOWN] / 255)


def test_only_at_strength_one_what_is_painted_over_has_no_say(family, pipe):
    other = Image.composite(picture(5), picture(0), MASK)
    results = {
        s: [call(pipe, image=image, strength=s, return_report=True, generator=seeds(0)) for image in (picture(), other)]
        for s in (1.0, 0.9999, 0.5)
    }
    same = {s: np.array_equal(a.images, b.images) for s, (a, b) in results.items()}
    # flow matching starts where nothing of the image is left
    assert same == {1.0: True, 0.9999: family.name == "sd3", 0.5: False}
    levels = {s: [level["sigma"] for level in out[0].report.trace] for s, out in results.items()}
    assert levels[0.9999] == levels[1.0] and levels[0.5][0] < levels[1.0][0]
    assert results[0.5][0].report.calls["encode"] == 2


def test_every_prompt_and_guidance_matter_and_embeddings_stand_in_for_them(pipe):
    plain = call(pipe).images
    for change in ({"prompt_2": "a cat"}, {"negative_prompt": "a cat"}, {"guidance_scale": 1.0}, {"prompt": "a cat"}):
        assert np.abs(call(pipe, **change).images - plain).max() > 1e-4, change
    prompts = {"prompt_3": None} if "prompt_3" in inspect.signature(pipe.encode_prompt).parameters else {}
    with torch.no_grad():
        parts = pipe.encode_prompt("a hat", prompt_2=None, **prompts)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embedded = dict(zip(names, parts, strict=True))
    assert np.array_equal(call(pipe, prompt=None, **embedded).images, plain)


def test_callbacks_read_and_change_what_stock_names(pipe):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(sorted(tensors))
        changed = {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}
        if step == pipe.num_timesteps - 1:
            changed["latents"] = torch.zeros_like(tensors["latents"])
        return changed

    names = pipe._callback_tensor_inputs
    options = {"callback_on_step_end_tensor_inputs": names, "output_type": "latent"}
    out = call(pipe, callback_on_step_end=look, return_report=True, **options)
    assert seen == [sorted(names)] * out.report.levels and not out.images.any()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {} if step else {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    changed = call(pipe, callback_on_step_end=stop, **options, return_report=True)
    assert len(changed.report.trace) == 2
    stop_only = lambda pipe, step, t, tensors: setattr(pipe, "_interrupt", step == 1)  # noqa: E731
    assert not torch.equal(changed.images, call(pipe, callback_on_step_end=stop_only, **options).images)


def test_a_callback_takes_guidance_away(family, pipe):
    """diffusers' own for XL; its own for SD3 asks for what stock SD3 inpainting does not hand out."""

    def cut(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"][-1:]}

    names = ["prompt_embeds"]
    if family.name == "xl":
        cut = MultiPipelineCallbacks([SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)])
    else:
        with pytest.raises(ValueError, match=r"found \['pooled_prompt_embeds'\]"):
            call(pipe, callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=0.0))
    out = call(pipe, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=names, return_report=True)
    guided = call(pipe, return_report=True).report
    assert pipe.guidance_scale != 0 and guided.levels == out.report.levels == 3
    assert guided.calls["denoise"] - out.report.calls["denoise"] == 2


def test_save_and_load_and_the_file_as_a_custom_pipeline(family, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = call(pipe).images
    loaded = family.cls.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.allclose(call(loaded).images, expected, atol=1e-5)
    file = Path(inspect.getfile(family.cls))
    custom = DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(file), trust_remote_code=True)
    assert type(custom).__name__ == family.cls.__name__
    assert type(family.stock.from_pipe(pipe)) is family.stock
    assert type(family.cls.from_pipe(build(family.stock, family.components))) is family.cls
    assert set(pipe.components) == set(build(family.stock, family.components).components)


def test_latents_come_in_and_go_out_in_the_network_s_scaling(pipe):
    channels = pipe.vae.config.latent_channels
    noise_in = noise(1, channels, SIZE // 8, SIZE // 8)
    latent = call(pipe, latents=noise_in, output_type="latent").images
    assert latent.shape == noise_in.shape
    shift = pipe.vae.config.shift_factor or 0.0
    with torch.no_grad():
        decoded = pipe.vae.decode(latent / pipe.vae.config.scaling_factor + shift).sample / 2 + 0.5
    image = call(pipe, latents=noise_in, paste=False, output_type="pt").images
    assert torch.allclose(image, decoded.clamp(0, 1), atol=1e-5)
    as_image = call(pipe, image=latent, paste=False, mask_image=Image.new("L", (SIZE, SIZE)), return_report=True)
    assert as_image.report.sigma_y == [0.0]


def test_a_small_decoder_draws_at_all_levels_but_the_last(family, tmp_path):
    channels = family.components["vae"].config.latent_channels
    pipe = build(family.cls, family.components)
    pipe.gradient_vae = tiny.gradient_vae(latent_channels=channels)
    calls = call(pipe, return_report=True, num_inference_steps=8, strength=0.9).report.calls
    assert calls["draft_vjp"] >= 1 and calls["decode_vjp"] == 1
    pipe.save_pretrained(tmp_path)
    assert family.cls.from_pretrained(tmp_path).gradient_vae.config.latent_channels == channels


def test_half_precision_networks_keep_a_float32_state(family):
    pipe = build(family.cls, family.make()).to(torch.bfloat16)
    image = call(pipe, output_type="pt").images
    assert image.dtype == torch.float32 and image.isfinite().all() and pipe.vae.dtype == torch.bfloat16
    assert np.array_equal(
        image[0].permute(1, 2, 0).numpy()[KNOWN], np.asarray(picture(), dtype=np.float32)[KNOWN] / 255
    )


def test_an_inpainting_checkpoint_is_fed_its_mask(family):
    channels = family.components["vae"].config.latent_channels
    network = family.make(2 * channels + 1)
    pipe = build(family.cls, {**family.components, **{k: network[k] for k in ("unet", "transformer") if k in network}})
    plain = call(pipe, guidance_scale=3.0).images
    grey = torch.zeros(1, channels, SIZE // 8, SIZE // 8)
    assert plain.shape == (1, SIZE, SIZE, 3)
    assert not np.array_equal(call(pipe, guidance_scale=3.0, masked_image_latents=grey).images, plain)


def test_a_crop_is_solved_and_laid_over_the_rest(pipe):
    image, mask = picture().resize((160, 120)), Image.new("L", (160, 120))
    mask.paste(255, (60, 40, 90, 70))
    out = call(pipe, image=image, mask_image=mask, padding_mask_crop=8, output_type="pil").images[0]
    known = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(out)[known], np.asarray(image)[known])
    with pytest.raises(ValueError, match="PIL image"):
        call(pipe, image=noise(1, 3, SIZE, SIZE), padding_mask_crop=8, output_type="pil")


@torch.no_grad()
@pytest.mark.parametrize("scores", [False, True], ids=["base", "refiner"])
def test_xl_denoises_as_its_unet_is_called_by_stock(scores):
    """The prior of a call against stock's first UNet call: its conditioning, and the scheduler's own estimate."""
    components = tiny.xl_components(scores=scores)
    components["scheduler"] = tiny.scheduler(clip_sample=False)
    options = {"requires_aesthetics_score": scores, "force_zeros_for_empty_prompt": not scores}
    stock = build(StableDiffusionXLInpaintPipeline, components, **options)
    ours = build(VMLInpaintXLPipeline, components, **options)
    sizes = {"original_size": (512, 384), "crops_coords_top_left": (8, 16), "target_size": (256, 128)}
    sizes |= {"negative_original_size": (100, 90), "negative_target_size": (80, 70), "aesthetic_score": 7.0}
    calls, priors = [], []
    stock.unet.register_forward_hook(
        lambda network, args, kwargs, out: calls.append((args[0], args[1], kwargs, out[0])), with_kwargs=True
    )
    stock(**stock_arguments(**sizes, num_inference_steps=2))
    (rows, t, kwargs, out), *_ = calls
    ours._condition = lambda prior, tensors: (
        VMLInpaintXLPipeline._condition(ours, prior, tensors),
        priors.append(prior),
    )
    call(ours, **sizes, num_inference_steps=2)
    prior = priors[0]
    assert isinstance(prior, StableDiffusionXLPrior)
    abar = stock.scheduler.alphas_cumprod[t].double()
    alpha, sigma = abar.sqrt().item(), (1 - abar).sqrt().item()
    stock.scheduler.set_timesteps(2)
    for side, own in enumerate((prior.negative, prior.condition)):
        for name in ("text_embeds", "time_ids"):
            assert torch.equal(own["added_cond_kwargs"][name], kwargs["added_cond_kwargs"][name][side : side + 1])
        expected = stock.scheduler.step(out[side : side + 1], t, rows[side : side + 1]).pred_original_sample
        assert torch.allclose(prior._denoise(rows[side : side + 1], alpha, sigma, own), expected, atol=1e-4)


def test_force_upcast_runs_a_float16_vae_in_float32_with_its_gradient(xl):
    vae = tiny.xl_components()["vae"].half()
    pipe = build(VMLInpaintXLPipeline, {**xl.components, "vae": vae})
    seen = []
    vae.decoder.register_forward_hook(lambda network, args, out: seen.append((args[0].dtype, out.requires_grad)))
    report = call(pipe, return_report=True).report
    assert {dtype for dtype, _ in seen} == {torch.float32} and any(gradient for _, gradient in seen)
    assert vae.dtype == torch.float16 and not report.retries
    assert all(p.requires_grad for p in vae.parameters())


def test_xl_latents_may_be_normalised_by_channel():
    mean, std = [0.1, -0.2, 0.3, 0.0], [5.0, 4.0, 3.0, 2.0]
    vae = tiny.vae(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    prior = StableDiffusionXLPrior(unet=tiny.unet(), vae=vae, scheduler=tiny.scheduler(), condition={})
    image, rows = noise(1, 3, SIZE, SIZE).sigmoid(), lambda values: torch.tensor(values).reshape(1, 4, 1, 1)
    with torch.no_grad():
        z, raw = prior.encode(image), vae.encode(2 * image - 1).latent_dist.mode()
        assert torch.allclose(z, (raw - rows(mean)) * 0.5 / rows(std), atol=1e-6)
        assert torch.allclose(prior.decode(z), vae.decode(raw).sample / 2 + 0.5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"denoising_start": 0.5}, "denoising_start is 0.5; expected None"),
        ({"denoising_end": 0.8}, "denoising_end is 0.8; expected None"),
        ({"prompt": None, "prompt_embeds": noise(1, 7, 64)}, "`prompt_embeds` came without `pooled_prompt_embeds`"),
        ({"solver": "none", "return_report": True}, "return_report=True came with solver='none'"),
        ({"strength": 0.01}, "strength 0.01 of 6 steps leaves none"),
    ],
)
def test_xl_refuses_what_cannot_work(xl, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(xl, **arguments)


def test_xl_schedulers_and_few_steps(xl):
    """Turbo and Lightning: one to four steps without guidance."""
    xl.scheduler = EulerDiscreteScheduler.from_config(xl.scheduler.config, timestep_spacing="trailing")
    for steps in (1, 4):
        report = call(xl, num_inference_steps=steps, guidance_scale=0.0, return_report=True).report
        assert report.levels == max(1, steps // 2)
    assert call(xl, timesteps=[900, 500, 100], strength=0.9999, return_report=True).report.levels == 3
    xl.scheduler = DDIMScheduler.from_config(xl.scheduler.config)
    assert call(xl, return_report=True).report.levels == 3


RESTORING = {
    "xl": (VMLRestoreXLPipeline, StableDiffusionXLPipeline, tiny.xl_components),
    "sd3": (VMLRestoreSD3Pipeline, StableDiffusion3Pipeline, tiny.sd3_components),
}


@pytest.mark.parametrize("family", RESTORING)
@pytest.mark.parametrize("solver", ["vml", "red-diff"])
def test_other_families_restore(family, solver, tmp_path):
    cls, _, make = RESTORING[family]
    pipe, operator = build(cls, COMPONENTS[family] | {"scheduler": make()["scheduler"]}), Downsample(4)
    y = operator(torch.from_numpy(np.asarray(picture(), dtype=np.float32)).permute(2, 0, 1)[None] / 255)
    more = {"red": RedDiff(lr=0.1), "num_inference_steps": 4} if solver == "red-diff" else {"num_inference_steps": 16}
    if (family, solver) == ("sd3", "red-diff"):
        more["sigmas"] = [0.9, 0.6, 0.3, 0.1]  # it has no use for a level of noise alone
    own = {"negative_original_size": (9, 9)} if family == "xl" else {"joint_attention_kwargs": {}}
    common = {"height": SIZE, "width": SIZE, "solver": solver, "output_type": "pt", "return_report": True, **more}
    out = pipe("a hat", y=y, operator=operator, generator=seeds(0), **common, **own)
    first, *_, last = (level["residual"][0] for level in out.report.trace)
    assert out.report.residual[0] < first and last < first and out.images.shape == (1, 3, SIZE, SIZE)
    pipe.save_pretrained(tmp_path)
    assert type(cls.from_pretrained(tmp_path).vae) is type(pipe.vae)


@pytest.mark.parametrize("start", ["noise", "measurement"])
def test_sd3_restores_from_noise_and_from_the_measurement(start):
    """A batch is what its images are alone; networks in float64, for their rounding grows along the way."""
    parts = tiny.sd3_components()
    for name in ("transformer", "vae"):
        nn.Module.to(parts[name], torch.float64)
    pipe, operator = build(VMLRestoreSD3Pipeline, parts), Downsample(4)
    y = torch.rand(2, 3, SIZE // 4, SIZE // 4, generator=seeds(3)[0])
    call = {"y": y, "operator": operator, "height": SIZE, "width": SIZE, "num_inference_steps": 12, "start": start}
    out = pipe(["a hat", "a cup"], **call, generator=seeds(0, 1), output_type="pt", return_report=True)
    alone = pipe("a cup", **call | {"y": y[1:]}, generator=seeds(1), output_type="pt")
    assert torch.allclose(out.images[1:], alone.images, atol=2e-3)
    noises = [level["sigma"] / max(level["alpha"], 1e-9) for level in out.report.trace]
    assert (noises[0] > 5) is (start == "noise")


def test_restoring_pipelines_have_the_names_and_defaults_of_stock():
    left_out = ("denoising_end", "eta", "guidance_rescale", "kwargs")
    for cls, stock, _ in RESTORING.values():
        theirs, ours = (inspect.signature(c.__call__).parameters for c in (stock, cls))
        named = [name for name in ours if ours[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert named == [name for name in theirs if name not in left_out and not name.startswith("skip_")]
        assert {name for name in named if ours[name].default != theirs[name].default} <= {"guidance_scale", "prompt"}


def flow_prior(**flow):
    parts = {name: COMPONENTS["sd3"][name] for name in ("transformer", "vae")}
    prompt = lambda seed: {"encoder_hidden_states": noise(2, 5, 48, seed=seed), "pooled_projections": noise(2, 32)}  # noqa: E731
    scheduler = tiny.sd3_components(**flow)["scheduler"]
    return FlowPrior(**parts, scheduler=scheduler, condition=prompt(0), negative=prompt(1), guidance_scale=3.0)


@torch.no_grad()
@pytest.mark.parametrize("scaling", [1.0, 7.0], ids=["flow", "any scaling"])
@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.01])
def test_the_flow_estimate_is_the_scheduler_s_own(sigma, scaling):
    prior, x_t = flow_prior(shift=1.0), noise(2, 16, 8, 8)
    prior_scheduler = tiny.sd3_components(shift=1.0)["scheduler"]
    prior_scheduler.set_timesteps(sigmas=[sigma])  # its only step ends at x0
    t = prior_scheduler.timesteps[0]
    velocity = prior.transformer(hidden_states=x_t, timestep=t.expand(2), **prior.condition).sample
    expected = prior_scheduler.step(velocity, t, x_t).prev_sample
    estimate = prior.denoise(scaling * x_t, scaling * (1 - sigma), scaling * sigma)
    assert torch.allclose(estimate, expected, atol=1e-4)


@pytest.mark.parametrize("flow", [{}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}])
def test_flow_levels_are_the_scheduler_s_own_noise(flow):
    scheduler = tiny.sd3_components(**flow)["scheduler"]
    scheduler.set_timesteps(6, **({"mu": 0.8} if flow.get("use_dynamic_shifting") else {}))
    scheduler.set_begin_index(0)
    levels, z0, e = flow_levels(scheduler, scheduler.timesteps), noise(1, 16, 2, 2), noise(1, 16, 2, 2, seed=4)
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = levels.scales(i)
        scheduler.set_begin_index(i)
        assert torch.allclose(alpha * z0 + sigma * e, scheduler.scale_noise(z0, t[None], e), atol=1e-5)
    assert levels.scales(6) == (1.0, 0.0) and levels.scales(0)[0] == pytest.approx(0, abs=1e-6)
    assert flow_levels(scheduler, scheduler.timesteps[2:]).scales(0) == levels.scales(2)


def test_a_level_of_noise_alone_takes_an_estimate_and_no_step():
    prior, mask = flow_prior(), Mask(torch.ones(1, 1, SIZE, SIZE))
    measurement = Measurement(mask, torch.full((2, 3, SIZE, SIZE), 0.5), 0.01)
    schedule = Levels([(0.0, 1.0), (0.5, 0.5)])
    with prior:
        solved = vml_map(noise(2, 16, 8, 8), prior=prior, measurement=measurement, schedule=schedule, inner_steps=2)
    assert [level["steps"] for level in solved.trace] == [[0, 0], [2, 2]]
    assert solved.latent.isfinite().all() and solved.calls["denoise_vjp"] == 2


def test_sd3_without_t5_with_dynamic_shifting_and_with_explicit_sigmas():
    pipe = build(VMLInpaintSD3Pipeline, COMPONENTS["sd3"] | {"text_encoder_3": None, "tokenizer_3": None})
    report = call(pipe, sigmas=[0.9, 0.5, 0.1], return_report=True).report
    expected = [3 * s / (1 + 2 * s) for s in (0.9, 0.5, 0.1)]  # shift 3
    assert [level["sigma"] for level in report.trace] == pytest.approx(expected)
    pipe.scheduler = tiny.sd3_components(use_dynamic_shifting=True)["scheduler"]
    by_size, given = call(pipe, return_report=True).report, call(pipe, mu=2.0, return_report=True).report
    assert by_size.trace[1]["sigma"] < given.trace[1]["sigma"]


def test_sd3_refuses_a_scheduler_without_its_levels():
    pipe = build(VMLInpaintSD3Pipeline, COMPONENTS["sd3"] | {"scheduler": FlowMatchHeunDiscreteScheduler()})
    with pytest.raises(ValueError, match="the scheduler is FlowMatchHeunDiscreteScheduler; expected one of"):
        call(pipe)
    pipe.scheduler = tiny.sd3_components(invert_sigmas=True)["scheduler"]
    with pytest.raises(ValueError, match="invert_sigmas=True; expected noise that falls"):
        call(pipe)


def sd2(scheduler, **unet):
    """Stable Diffusion 2.x: linear projections, heads by channel, attention in float32, OpenCLIP's activation."""
    shape = {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True, **unet}
    own = {"unet": tiny.unet(**shape), "text_encoder": tiny.text_encoder(layers=2, hidden_act="gelu")}
    return build(
        VMLInpaintPipeline, {**tiny.components(), **own, "scheduler": scheduler}, requires_safety_checker=False
    )


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("zero_snr", [False, True], ids=["", "zero terminal SNR"])
def test_sd2_predicts_v_also_from_noise_alone(cls, zero_snr):
    options = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True} if zero_snr else {}
    pipe = sd2(tiny.scheduler("v_prediction", cls, **options))
    report = call(pipe, num_inference_steps=16, inner_steps=3, return_report=True).report
    first, *rest = report.trace
    assert rest[-1]["residual"][0] < rest[0]["residual"][0] and np.isfinite(report.residual).all()
    signal = first["alpha"] / first["sigma"]
    assert (signal < 1e-3) == zero_snr and (first["steps"] == [0]) == (first["alpha"] == 0)
    assert first["alpha"] == 0 or not (zero_snr and cls is DDIMScheduler)


@torch.no_grad()
def test_an_lcm_unet_takes_its_guidance_as_a_condition():
    """One evaluation a level for the next state, none of a negative prompt; the estimate is the scheduler's own."""
    unet = tiny.unet(time_cond_proj_dim=16)
    pipe = build(
        VMLInpaintPipeline,
        {**tiny.components(), "unet": unet, "scheduler": tiny.scheduler(cls=LCMScheduler)},
        requires_safety_checker=False,
    )
    outs = [call(pipe, num_inference_steps=4, guidance_scale=w, return_report=True) for w in (8.5, 1.0)]
    assert outs[0].report.calls["denoise"] == 2 * outs[0].report.levels == 4
    assert np.abs(outs[0].images - outs[1].images).max() > 1e-4
    scheduler, x_t = pipe.scheduler, noise(1, 4, 8, 8)
    scheduler.set_timesteps(4)
    t, w = scheduler.timesteps[1], pipe.get_guidance_scale_embedding(torch.tensor([7.5]), 16)
    condition = {"encoder_hidden_states": noise(1, 5, 128), "timestep_cond": w}
    expected = scheduler.step(unet(x_t, t, **condition).sample, t, x_t).denoised
    abar = scheduler.alphas_cumprod[t].double()
    prior = StableDiffusionPrior(unet=unet, vae=pipe.vae, scheduler=scheduler, condition=condition)
    assert torch.allclose(prior.denoise(x_t, abar.sqrt().item(), (1 - abar).sqrt().item()), expected, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_turbo_needs_one_to_four_steps_and_no_guidance(steps, guidance_scale):
    pipe = sd2(tiny.scheduler(cls=EulerDiscreteScheduler, timestep_spacing="trailing"))
    out = call(pipe, num_inference_steps=steps, guidance_scale=guidance_scale, inner_steps=None, return_report=True)
    assert out.report.levels == steps and out.report.inner_steps == 0
    assert out.report.trace[0]["sigma"] == pytest.approx(float(pipe.scheduler.sigmas[0]))
    assert np.array_equal(out.images[0][KNOWN], np.asarray(picture(), dtype=np.float32)[KNOWN] / 255)
