"""A batch is what its images are alone, also where they want different settings."""

import numpy as np
import pytest
import torch

from vml_ldm import VMLInpaintPipeline, VMLRestorePipeline, bundled_model
from vml_ldm.measuring import groups_of
from vml_ldm.operators import Mask
from vml_ldm.report import Report, join_reports

SIZE = 128
CALL = {"num_inference_steps": 8, "preset": "fast", "output_type": "pt", "return_report": True}


@pytest.fixture(scope="module")
def inpaint() -> VMLInpaintPipeline:
    pipe = VMLInpaintPipeline.from_pretrained(bundled_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def restore(inpaint) -> VMLRestorePipeline:
    pipe = VMLRestorePipeline.from_pipe(inpaint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


def pictures(count: int) -> torch.Tensor:
    """Smooth ones."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False).clamp(0, 1)


def masks() -> torch.Tensor:
    """(3, 1, H, W): a tenth scattered, half missing, a tenth scattered; 1 = known."""
    known = (torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) > 0.1).float()
    known[1] = 0
    known[1, :, :, : SIZE // 2] = 1
    return known


def test_groups_keep_their_order():
    assert groups_of(["a", "b", "a", "c", "b"]) == [[0, 2], [1, 4], [3]]


@pytest.mark.parametrize("foreign", [False, True], ids=["Mask", "a function"])
def test_a_restored_batch_is_what_its_images_are_alone(restore, foreign):
    """Scattered holes start from the measurement and are corrected at the end; a missing half starts from noise."""
    truth, known = pictures(3), masks()
    call = {**CALL, "num_inference_steps": 16}
    operator = (lambda image: known * image) if foreign else Mask(known)
    together = restore(["a", "b", "c"], y=known * truth, operator=operator, generator=seeds(0, 1, 2), **call)
    only = (lambda own: lambda image: own * image) if foreign else Mask
    alone = [
        restore(name, y=known[i, None] * truth[i, None], operator=only(known[i, None]), generator=seeds(i), **call)
        for i, name in enumerate("abc")
    ]
    assert len({(one.report.levels, one.report.correct_steps) for one in alone}) == 2
    for i, one in enumerate(alone):
        assert (together.images[i] - one.images[0]).abs().max() < 1e-3
        assert together.report.residual[i] == pytest.approx(one.report.residual[0], rel=1e-2)
    assert together.report.levels == max(one.report.levels for one in alone)
    assert len(together.report.trace) == alone[0].report.levels + alone[1].report.levels
    together.report.plot()


@pytest.mark.parametrize("output_type", ["pil", "np", "latent"])
def test_one_painted_all_over_is_levels_alone_and_the_others_are_solved(inpaint, output_type):
    truth, painted = pictures(3), 1 - masks()
    painted[1] = 1
    call = {**CALL, "output_type": output_type, "guidance_scale": 1.0}
    together = inpaint(["a", "b", "c"], image=truth, mask_image=painted, generator=seeds(0, 1, 2), **call).images
    for i, name in enumerate("abc"):
        alone = inpaint(name, image=truth[i, None], mask_image=painted[i, None], generator=seeds(i), **call).images[0]
        both = [np.asarray(image, dtype=np.float32) for image in (together[i], alone)]
        assert np.abs(both[0] - both[1]).max() < (1.5 if output_type == "pil" else 5e-3)


def test_several_images_of_a_prompt_go_with_their_picture(restore):
    truth, known = pictures(2), masks()[:2]
    call = {**CALL, "num_inference_steps": 16, "num_images_per_prompt": 2}
    y, operator = known * truth, Mask(known.repeat_interleave(2, dim=0))
    images = restore(["a", "b"], y=y, operator=operator, generator=seeds(0, 1, 2, 3), **call).images
    last = restore(
        "b", y=y[1:], operator=Mask(known[1:]), generator=seeds(3), **{**call, "num_images_per_prompt": 1}
    ).images
    assert (images[3] - last[0]).abs().max() < 1e-3


def test_a_stop_in_one_group_ends_those_after_it(restore):
    truth, known = pictures(3), masks()
    steps = []

    def stop(pipe, step, t, tensors):
        steps.append(len(tensors["latents"]))
        pipe._interrupt = True
        return {}

    out = restore(
        ["a", "b", "c"], y=known * truth, operator=Mask(known), callback_on_step_end=stop,
        **{**CALL, "num_inference_steps": 16},
    )  # fmt: skip
    assert steps == [2] and out.report.interrupted and out.images.isfinite().all() and len(out.images) == 3


def test_joined_reports_are_in_the_batch_s_order():
    def report(residual: list[float], levels: int, calls: int) -> Report:
        trace = [{"alpha": 1.0, "sigma": 1.0, "residual": residual, "steps": [1] * len(residual)}] * levels
        lists = {"sigma_y": residual, "vae_error": residual, "effective_sigma_y": residual, "residual": residual}
        return Report(**lists, levels=levels, inner_steps=1, jacobian="exact", trace=trace, calls={"denoise": calls})

    joined = join_reports([report([0.1, 0.3], 1, 2), report([0.2], 2, 5)], [[0, 2], [1]])
    assert joined.residual == joined.sigma_y == [0.1, 0.2, 0.3] and joined.drawn == []
    assert joined.levels == 2 and joined.calls == {"denoise": 7}
    assert [level["residual"] for level in joined.trace] == [[0.1, None, 0.3], *[[None, 0.2, None]] * 2]
