"""A pipeline as deepinv's reconstructor: by objects of its kind, and by deepinv itself where that is installed."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from vml_ldm import Downsample, VMLReconstructor, VMLRestorePipeline
from vml_ldm.operators import Mask

SIZE, SHORT = 64, {"num_inference_steps": 8}


class GaussianNoise:
    def __init__(self, sigma):
        self.sigma = sigma


class LinearPhysics:
    """Named as deepinv's class, by which linear ones are told."""

    def __init__(self, operator, noise=None, img_size=None):
        self.A, self.A_adjoint, self.img_size = operator, operator.adjoint, img_size
        self.noise_model = noise


@pytest.fixture(scope="module")
def pipe():
    pipe = VMLRestorePipeline(**tiny.components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count=2, channels=3):
    return torch.rand(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def test_it_is_the_pipeline_s_answer_with_the_physics_operator_and_noise(pipe):
    operator = Downsample(4)
    physics, y = LinearPhysics(operator, GaussianNoise(torch.tensor(0.05))), operator(pictures())
    found = VMLReconstructor(pipe, "a hat", seed=3, **SHORT)(y, physics)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    call = {"height": SIZE, "width": SIZE, "generator": generators, "output_type": "pt", **SHORT}
    expected = pipe("a hat", y=y, operator=operator, sigma_y=0.05, **call).images
    assert isinstance(VMLReconstructor(pipe), nn.Module) and found.shape == (2, 3, SIZE, SIZE)
    assert torch.allclose(found, expected, atol=2e-2) and torch.equal(
        found, VMLReconstructor(pipe, "a hat", 3, **SHORT)(y, physics)
    )


def test_grey_images_are_seen_through_their_light(pipe):
    known = (pictures(1, 1) > 0.3).float()
    physics = LinearPhysics(Mask(known), GaussianNoise(0.02), img_size=(1, SIZE, SIZE))
    found = VMLReconstructor(pipe, **SHORT)(known * pictures(1, 1), physics)
    assert found.shape == (1, 1, SIZE, SIZE)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda y, p: ([y, y], p), TypeError, "y is list; expected a tensor"),
        (lambda y, p: (y, LinearPhysics(p.A, SimpleNamespace())), ValueError, "has no standard deviation `sigma`"),
        (lambda y, p: (y, LinearPhysics(p.A, None, (2, 8, 8))), ValueError, "images of 2 channels; expected 1 or 3"),
        (lambda y, p: (y, SimpleNamespace(A=p.A)), TypeError, "does not tell how large its images are"),
    ],
    ids=["several measurements", "another noise", "channels", "size"],
)
def test_what_it_cannot_take_is_said(pipe, change, error, said):
    operator = Downsample(4)
    y, physics = change(operator(pictures(1)), LinearPhysics(operator))
    with pytest.raises(error, match=said):
        VMLReconstructor(pipe, **SHORT)(y, physics)


@pytest.mark.parametrize("kind", ["inpainting", "blur", "downsampling", "grey denoising"])
def test_deepinv_s_own_physics(pipe, kind):
    deepinv = pytest.importorskip("deepinv")
    noise, size = deepinv.physics.GaussianNoise(0.05), (1 if kind.startswith("grey") else 3, SIZE, SIZE)
    physics = {
        "inpainting": lambda: deepinv.physics.Inpainting(size, mask=0.5, noise_model=noise),
        "blur": lambda: deepinv.physics.BlurFFT(size, deepinv.physics.blur.bicubic_filter(2), noise_model=noise),
        "downsampling": lambda: deepinv.physics.Downsampling(size, filter="bicubic", factor=2, noise_model=noise),
        "grey denoising": lambda: deepinv.physics.Denoising(noise, img_size=size),
    }[kind]()
    x = pictures(2, size[0])
    found = VMLReconstructor(pipe, **SHORT)(physics(x), physics)
    assert found.shape == x.shape and found.min() >= 0 and found.max() <= 1
