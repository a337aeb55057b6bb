"""A small hole in a large picture: the part around it is drawn, and the latent elsewhere is the encoder's."""

import pytest
import tiny
import torch
from torch import nn

from vml_ldm import VMLInpaintPipeline, VMLInpaintXLPipeline
from vml_ldm.closeup import CloseUp, drawn_shares, drawn_size, near, parts_near
from vml_ldm.images import fill_holes
from vml_ldm.objective import data_term
from vml_ldm.operators import Mask, Measurement

WHOLE = (slice(0, 32), slice(0, 32))


def known_but(*windows):
    """(B, 1, 64, 64): one hole for each image, rows and columns in pixels."""
    known = torch.ones(len(windows), 1, 64, 64)
    for rows, window in zip(known, windows, strict=True):
        rows[0][window] = 0
    return known


def test_a_part_has_four_cells_that_move_around_the_hole_and_four_around_those():
    """At a stride of 2: a hole in cells 15 to 16, one at a corner, one too large, and none."""
    holes = [(slice(30, 33), slice(31, 32)), (slice(0, 1), slice(63, 64)), (slice(8, 56), slice(20, 40))]
    parts = parts_near(known_but(*holes, (slice(0, 0), slice(0, 0))), 2)
    centre, corner, large, none = parts
    assert centre.moved == (slice(11, 21), slice(11, 20)) and centre.drawn == (slice(7, 25), slice(7, 24))
    assert corner.moved == (slice(0, 5), slice(27, 32)) and corner.drawn == (slice(0, 9), slice(23, 32))
    assert large.drawn == large.moved == none.drawn == WHOLE
    assert drawn_size(parts[:2]) == (18, 17) and drawn_size(parts) == (32, 32)
    assert drawn_shares(parts, (32, 32))[1:] == [81 / 1024, 1.0, 1.0]
    assert near(parts, torch.zeros(4, 4, 32, 32))[0].sum() == 10 * 9
    assert near(parts, torch.zeros(4, 1, 64, 64), 2)[0].sum() == 4 * 10 * 9
    assert parts_near(known_but((slice(8, 56), slice(20, 40))), 2) is None


class Convolving:
    """A latent prior of three convolutions that upsamples by 2: an output pixel sees 3 cells around its own."""

    def __init__(self):
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
        self.layers = nn.Sequential(*layers, nn.Tanh(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 1)).double()
        self.cells = []

    def decode(self, z):
        self.cells.append(tuple(z.shape))
        return self.layers(z)

    def denoise(self, x_t, alpha, sigma):
        return torch.tanh(x_t) + 0.1 * x_t.flip(-1)

    def push(self, x_t, z0_hat, alpha, sigma):
        return torch.ones_like(z0_hat)

    def guided(self, x_t, alpha, sigma):
        return self.denoise(x_t, alpha, sigma) + 1


@pytest.fixture
def problem():
    """Three images, two of them with the same part."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hole, other = (slice(30, 33), slice(31, 32)), (slice(2, 9), slice(40, 44))
    known = known_but(hole, other, hole).double()
    parts, prior = parts_near(known, 2), Convolving()
    image, latent, z = draw(3, 3, 64, 64), draw(3, 4, 32, 32), draw(3, 4, 32, 32)
    return prior, CloseUp(prior, parts, image, latent), parts, image, latent, z


def test_what_moves_is_drawn_as_in_the_whole_and_the_rest_is_the_picture(problem):
    prior, view, parts, image, latent, z = problem
    z = torch.where(near(parts, z) > 0, z, latent)
    drawn, whole, moved = view.decode(z), prior.decode(z), near(parts, image, 2).expand_as(image) > 0
    assert (drawn - whole)[moved].abs().max() < 1e-12
    rows, columns = (slice(2 * side.start, 2 * side.stop) for side in parts[0].drawn)
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[rows, columns] = False
    assert torch.equal(drawn[0][:, outside], image[0][:, outside])
    assert sorted(prior.cells[:2]) == [(1, 4, 13, 18), (2, 4, 18, 17)]  # those with the same part at once


def test_the_data_term_is_that_of_the_whole_where_the_latent_moves(problem):
    prior, view, parts, image, latent, z = problem
    z = torch.where(near(parts, z) > 0, z, latent)
    measurement = Measurement(Mask(near(parts, image, 2)), 0.5 * near(parts, image, 2) * image, 0.1)
    part = data_term(z, prior=view, measurement=measurement)
    whole = data_term(z, prior=prior, measurement=measurement)
    assert torch.allclose(part.nll, whole.nll) and torch.allclose(part.residual, whole.residual)
    moved = near(parts, z).expand_as(z) > 0
    assert torch.allclose(part.gradient[moved], whole.gradient[moved])


def test_the_rest_of_the_latent_is_known(problem):
    """The estimate is the encoder's there, guided or not; the Jacobian is the estimate's own; no step moves it."""
    _, view, parts, _, latent, z = problem
    moved = near(parts, z).expand_as(z) > 0
    z0_hat, pull = view.denoise_pullback(z, 0.8, 0.6)
    assert torch.equal(z0_hat, view.denoise(z, 0.8, 0.6)) and torch.equal(z0_hat[~moved], latent[~moved])
    assert torch.equal(view.guided(z, 0.8, 0.6)[~moved], latent[~moved])
    assert torch.allclose(view.guided(z, 0.8, 0.6)[moved], z0_hat[moved] + 1)
    push = view.push(z, z0_hat, 0.8, 0.6)
    assert torch.allclose(push[moved], torch.ones_like(push[moved])) and not push[~moved].any()
    b = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(view.denoise(x, 0.8, 0.6), x, b)
    assert torch.allclose(pull(b), expected)
    assert torch.equal(view.movable(b)[moved], b[moved]) and not view.movable(b)[~moved].any()


def load(cls=VMLInpaintPipeline, components=tiny.components, **more):
    pipe = cls(**components(), **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    pipe = load(requires_safety_checker=False)
    pipe.gradient_vae = tiny.gradient_vae()
    return pipe


SIZE = 256


def picture(batch=1):
    image = torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    painted = torch.zeros(batch, 1, SIZE, SIZE)
    for i, rows in enumerate(painted):
        rows[0, 8 + 80 * i : 16 + 80 * i, 60:90] = 1
    return image, painted


def solve(pipe, image, painted, seed=0, **changes):
    call = {
        "prompt": ["a"] * len(image),
        "image": image,
        "mask_image": painted,
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": 9,
        "inner_steps": 2,
        "output_type": "pt",
        "return_report": True,
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(len(image))],
    }
    return pipe(**{**call, **changes})


@pytest.mark.parametrize("changes", [{}, {"jacobian": "free"}, {"guidance_scale": 1.0, "memory": "low"}])
def test_a_small_hole_is_solved_up_close(pipe, changes):
    image, painted = picture()
    out, whole = solve(pipe, image, painted, **changes), solve(pipe, image, painted, close_up=False, **changes)
    known = (painted == 0).expand_as(image)
    assert torch.equal(out.images[known], image[known])
    assert out.report.drawn == [10 * 20 / 1024] and whole.report.drawn == []
    lengths = {"decode", "draft"}  # a step's length may take a decode more
    assert {k: v for k, v in out.report.calls.items() - whole.report.calls.items() if k not in lengths} == {}
    assert out.images.isfinite().all() and not torch.equal(out.images, whole.images)
    assert "drawn around the hole: 20% of the picture" in out.report.text()


def test_elsewhere_the_latent_is_the_encoder_s(pipe):
    image, painted = picture()
    latent = solve(pipe, image, painted, output_type="latent").images
    with pipe._new_prior([{}]) as prior:
        encoded = prior.encode(fill_holes(image, 1 - painted))
    assert (latent - encoded)[..., 16:, 20:].abs().max() < 1e-5
    assert (latent - encoded)[..., :3, 7:11].abs().max() > 1e-2


def test_each_image_has_a_part_of_its_own(pipe):
    """A batch gives what its images give alone, an image with a large hole among them.

    By the full decoder, which is smooth: at a kink of the small one's rectifiers, rounding turns a gradient.
    """
    image, painted = picture(3)
    painted[2, :, 64:192, 64:192] = 1
    draw = lambda *problem, **seed: solve(pipe, *problem, use_gradient_vae=False, **seed)  # noqa: E731
    together = draw(image, painted)
    alone = [draw(image[i : i + 1], painted[i : i + 1], seed=i).images for i in range(3)]
    assert (together.images - torch.cat(alone)).abs().max() < 1e-4
    assert together.report.drawn == [10 * 20 / 1024, 17 * 20 / 1024, 1.0]


def test_it_is_left_where_a_callback_may_change_the_mask(pipe):
    image, painted = picture()
    changes = {"callback_on_step_end": lambda pipe, step, t, tensors: tensors}
    asked = lambda *names: solve(pipe, image, painted, **changes, callback_on_step_end_tensor_inputs=[*names])  # noqa: E731
    assert asked("latents").report.drawn and not asked("latents", "mask").report.drawn


def test_it_is_left_where_the_decoder_is_told_the_whole_picture():
    pipe = load(requires_safety_checker=False)
    pipe.vae = tiny.asymmetric_vae()
    assert not solve(pipe, *picture()).report.drawn


def test_it_takes_less_memory(pipe):
    image, painted = picture()
    peak = lambda **changes: solve(pipe, image, painted, memory="fast", **changes).report.memory["predicted"]  # noqa: E731
    assert peak(use_gradient_vae=False) < 0.8 * peak(use_gradient_vae=False, close_up=False)


def test_xl_has_it_too():
    pipe = load(VMLInpaintXLPipeline, tiny.xl_components)
    image, painted = picture()
    out = solve(pipe, image, painted)
    assert out.report.drawn and torch.equal(out.images[0, :, 100:], image[0, :, 100:])
