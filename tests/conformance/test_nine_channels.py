"""9-channel inpainting checkpoints: mask and masked image are fed to the UNet, with the solver on too."""

import numpy as np
import pytest
import tiny
import torch
from subjects import SIZE, SUBJECTS, mask, picture, same


@pytest.fixture
def nine(subject, parts):
    parts["unet"] = tiny.unet(9)
    return subject.make(parts)


def extra_channels(subject, pipe, **arguments):
    """What the UNet is fed beside the latents, at each of its calls."""
    fed = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args: fed.append(args[0][:, 4:].detach()))
    subject.call(pipe, **arguments)
    handle.remove()
    return fed


def test_fed(subject, nine):
    """the UNet is fed the mask and the masked image's latents at every step"""
    fed = extra_channels(subject, nine)
    painted = torch.zeros(SIZE // 8, SIZE // 8)
    painted[:, SIZE // 16 :] = 1
    assert len(fed) >= 4 and all(torch.equal(x[0, 0], painted) for x in fed)
    assert all(torch.equal(x[0], fed[0][0]) for x in fed)
    other = extra_channels(subject, nine, image=picture(1))
    assert torch.equal(other[0][:, :1], fed[0][:, :1]) and not torch.allclose(other[0][:, 1:], fed[0][:, 1:])


def test_known_pixels(subject, nine):
    """the masked latents do not see what is painted over"""
    white = np.asarray(picture()).copy()
    white[:, SIZE // 2 :] = 255
    fed, again = extra_channels(subject, nine), extra_channels(subject, nine, image=white[None] / 255)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(fed, again, strict=True))


def test_batch(subject, nine):
    """a batch is what its images are alone"""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    batch = {"prompt": ["a hat", "a cat"], "image": [picture(0), picture(1)], "mask_image": [mask()] * 2}
    images = subject.images(nine, **batch, generator=generators)
    alone = subject.images(nine, prompt="a cat", image=picture(1), generator=torch.Generator().manual_seed(1))
    assert same(images[1:], alone, 1 / 255)


def test_callback(subject, nine):
    """callbacks change the mask that the UNet is fed"""

    def paint_all(pipe, step, timestep, tensors):
        return {"mask": torch.ones_like(tensors["mask"])}

    fed = extra_channels(
        subject, nine, callback_on_step_end=paint_all, callback_on_step_end_tensor_inputs=["latents", "mask"]
    )
    assert not fed[0][:, 0].all() and fed[-1][:, 0].all()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_solve(parts, guidance_scale):
    """The solver on: the measurement is met and the known pixels are the image's."""
    vml = SUBJECTS[2]
    parts["unet"] = tiny.unet(9)
    out = vml.call(vml.make(parts), guidance_scale=guidance_scale, return_report=True, num_inference_steps=8)
    known = np.asarray(picture(), dtype=np.float32)[:, : SIZE // 2] / 255
    assert np.array_equal(out.images[0][:, : SIZE // 2], known)
    assert out.report.trace[-1]["residual"][0] < out.report.trace[0]["residual"][0]


def test_other_channels_are_refused(parts):
    """An 8-channel UNet (of another task) is refused before any network runs."""
    vml = SUBJECTS[2]
    parts["unet"] = tiny.unet(8)
    with pytest.raises(ValueError, match=r"the UNet takes 8 channels; expected 4, or 9 \(inpainting\)"):
        vml.call(vml.make(parts))
