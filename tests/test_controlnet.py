"""ControlNets: stock's call bit for bit, stock's estimate, and what they change."""

import inspect

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel, MultiControlNetModel, StableDiffusionControlNetInpaintPipeline
from PIL import Image

from vml_ldm import VMLControlNetInpaintPipeline, VMLInpaintPipeline
from vml_ldm.adapters.diffusers import COND, SIDE, Control, ControlledPrior

SIZE = 64


def controlnet(seed: int = 0) -> ControlNetModel:
    """One whose outputs are not zero, as those of a new one are."""
    torch.manual_seed(seed)
    network = ControlNetModel.from_unet(tiny.unet(), conditioning_embedding_out_channels=(8, 8, 16, 16)).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.startswith(("controlnet_down", "controlnet_mid")):
                weight.normal_(std=0.05)
            elif name.startswith("controlnet_cond_embedding"):
                weight.normal_(std=0.5)
    return network


def build(cls=VMLControlNetInpaintPipeline, network=None):
    pipe = cls(**tiny.components(), controlnet=network or controlnet(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return build()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def mask() -> Image.Image:
    found = Image.new("L", (SIZE, SIZE))
    found.paste(255, (16, 16, 48, 64))
    return found


def call(pipe, **changes):
    given = {"prompt": "a hat", "image": picture(0), "mask_image": mask(), "control_image": picture(1)}
    given |= {"height": SIZE, "width": SIZE, "num_inference_steps": 8, "output_type": "np"}
    return pipe(**given | changes, generator=torch.Generator().manual_seed(0))


def test_solver_none_is_stock_bit_for_bit(pipe):
    stock = StableDiffusionControlNetInpaintPipeline(**pipe.components, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    assert np.array_equal(call(pipe, solver="none").images, call(stock).images)


def test_the_signature_is_stock_s():
    theirs, ours = (
        inspect.signature(cls.__call__).parameters
        for cls in (StableDiffusionControlNetInpaintPipeline, VMLControlNetInpaintPipeline)
    )
    named = [name for name, p in ours.items() if p.kind is not p.KEYWORD_ONLY]
    assert named == list(theirs) and all(ours[name].default == theirs[name].default for name in named)


@pytest.mark.parametrize("guess", [False, True])
def test_the_estimate_is_what_stock_s_networks_predict(guess):
    """With guidance: the residuals go to both prompts, or in guess mode to the prompt alone."""
    unet, network, scheduler = tiny.unet(), controlnet(), tiny.scheduler()
    draw = lambda *shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    words, image, x_t, t = draw(2, 5, 128, seed=0), draw(1, 3, SIZE, SIZE, seed=1), draw(1, 4, 8, 8, seed=2), 500
    sides = [{"encoder_hidden_states": w[None], COND: image, SIDE: torch.ones(1)} for w in words]
    sides[0][SIDE] *= not guess
    prior = ControlledPrior(
        unet=unet, vae=tiny.vae(), scheduler=scheduler, condition=sides[1], negative=sides[0], guidance_scale=3.0,
        control=Control(network, 0.7, guess, [0.0], [1.0]),
    )  # fmt: skip
    alpha = scheduler.alphas_cumprod[t].sqrt().item()
    sigma = (1 - alpha**2) ** 0.5
    with torch.no_grad():
        options = {"controlnet_cond": torch.cat([image] * 2), "conditioning_scale": 0.7, "guess_mode": guess}
        down, middle = network(torch.cat([x_t] * 2), t, encoder_hidden_states=words, return_dict=False, **options)
        if guess:
            down, middle = (
                [d * torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1) for d in down],
                middle * torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1),
            )
        added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        negative, positive = unet(torch.cat([x_t] * 2), t, encoder_hidden_states=words, **added).sample.chunk(2)
        expected = (x_t - sigma * (negative + 3.0 * (positive - negative))) / alpha
        with prior:
            found = prior.guided(x_t, alpha, sigma)
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_silent_controlnet_changes_nothing_and_another_changes_the_hole_alone(pipe):
    parts = {name: part for name, part in pipe.components.items() if name != "controlnet"}
    without = VMLInpaintPipeline(**parts, requires_safety_checker=False)
    given = {"image": picture(0), "mask_image": mask(), "height": SIZE, "width": SIZE, "num_inference_steps": 8}
    plain = without("a hat", **given, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert np.allclose(call(pipe, controlnet_conditioning_scale=0.0).images, plain, atol=1e-5)
    found, other = call(pipe).images, call(pipe, control_image=picture(2)).images
    assert np.abs(found - plain).max() > 0.01 < np.abs(found - other).max()
    known = np.asarray(mask()) == 0
    assert np.array_equal(found[0][known], np.asarray(picture(0), dtype=np.float32)[known] / 255)


@pytest.mark.parametrize("changes", [{"control_guidance_end": 0.5}, {"control_guidance_start": 0.5}])
def test_it_acts_on_a_part_of_the_way(pipe, changes):
    found = call(pipe, **changes).images
    for other in ({}, {"controlnet_conditioning_scale": 0.0}):
        assert np.abs(found - call(pipe, **other).images).max() > 1e-3


@pytest.mark.parametrize("way", ["exact", "checkpointed", "guess", "strength"])
def test_it_goes_with_steps_memory_and_modes(pipe, way):
    more = {
        "exact": {"guidance_scale": 1.0, "inner_steps": 1},
        "checkpointed": {"guidance_scale": 1.0, "inner_steps": 1, "memory": "low"},
        "guess": {"guess_mode": True},
        "strength": {"strength": 0.6},
    }[way]
    out = call(pipe, **more, return_report=True)
    assert np.isfinite(out.images).all() and ("denoise_vjp" in out.report.calls) is (way in ("exact", "checkpointed"))
    assert not any(p.grad is not None for p in pipe.controlnet.parameters())
    assert all(p.requires_grad for p in pipe.controlnet.parameters())


def test_several_controlnets_each_with_its_image():
    pipe = build(network=MultiControlNetModel([controlnet(), controlnet(1)]))
    two = {"control_image": [picture(1), picture(2)]}
    both = call(pipe, **two, controlnet_conditioning_scale=[0.5, 0.5]).images
    assert np.array_equal(both, call(pipe, **two).images)
    first = call(build(), controlnet_conditioning_scale=0.5).images
    assert np.allclose(call(pipe, **two, controlnet_conditioning_scale=[0.5, 0.0]).images, first, atol=1e-4)
    assert np.abs(both - first).max() > 1e-3


def test_a_batch_is_what_its_images_are_alone(pipe):
    two = {"prompt": ["a hat", "a cup"], "image": [picture(0), picture(3)], "control_image": [picture(1), picture(2)]}
    given = {**two, "mask_image": mask(), "height": SIZE, "width": SIZE, "num_inference_steps": 8, "output_type": "np"}
    seeds = lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]  # noqa: E731
    both = pipe(**given, generator=seeds(0, 1)).images
    alone = pipe(**given | {name: rows[1] for name, rows in two.items()}, generator=seeds(1)).images
    assert np.allclose(both[1:], alone, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"control_image": None}, TypeError),
        ({"control_guidance_start": 0.9, "control_guidance_end": 0.1}, ValueError),
        ({"controlnet_conditioning_scale": "much"}, TypeError),
    ],
)
def test_what_stock_refuses_is_refused_before_any_network_runs(pipe, changes, error):
    hook = pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("a network ran"))
    try:
        with pytest.raises(error):
            call(pipe, **changes)
    finally:
        hook.remove()


def test_it_is_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = VMLControlNetInpaintPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert np.allclose(call(again).images, call(pipe).images, atol=1e-5)
