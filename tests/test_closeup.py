"""A small hole in a large picture: the part around it is drawn, and the latent elsewhere is the encoder's."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import nn

from vml_ldm import VMLInpaintPipeline, VMLInpaintXLPipeline
from vml_ldm.adapters.diffusers import StableDiffusionPrior, draws_parts
from vml_ldm.adapters.diffusers.memory import Plan
from vml_ldm.closeup import CloseUp, drawn_shares, drawn_size, near, parts_near
from vml_ldm.images import fill_holes
from vml_ldm.metering import Metered
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


WHOLE_GRAPH = Plan()


def mattering_vae(attention):
    """A VAE of stride 2 whose norms and attention matter: norms have weights of their own, attention prefers cells."""
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "mid_block_add_attention": attention}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**shape, **kinds, sample_size=64).eval().double()
    with torch.no_grad():
        for module in vae.decoder.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.copy_(1 + 0.3 * torch.randn(module.weight.shape))
                module.bias.copy_(0.5 * torch.randn(module.bias.shape))
            if isinstance(module, Attention):
                for layer in (module.to_q, module.to_k, module.to_v, module.to_out[0]):
                    layer.weight.copy_(2 * torch.randn(layer.weight.shape) / layer.weight.shape[1] ** 0.5)
    return vae


@pytest.fixture(params=[True, False], ids=["attention", "norms alone"])
def held(request):
    """A VAE with norms, three latents that change across the picture, and their parts."""
    vae, generator = mattering_vae(request.param), torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 32, 32, generator=generator, dtype=torch.float64)
    z = z * torch.linspace(0.3, 2, 32) + torch.linspace(-2, 2, 32)[:, None]
    hole = (slice(25, 30), slice(32, 35))
    known = known_but(hole, hole, (slice(2, 5), slice(60, 62))).double()
    return vae, z, parts_near(known, 2), torch.zeros(3, 3, 64, 64, dtype=torch.float64)


def prior_of(vae, plan=WHOLE_GRAPH):
    prior = StableDiffusionPrior(unet=tiny.unet().to(vae.dtype), vae=vae, scheduler=tiny.scheduler(), condition={})
    prior.plan = plan
    return prior


def rms(x):
    return x.square().mean().sqrt().item()


def test_a_decoder_with_norms_and_attention_draws_a_part_as_in_the_whole(held):
    """Where the latent moves; all images at once as one by one. Without the whole's norms it is another picture."""
    vae, z, parts, image = held
    with prior_of(vae) as prior, torch.no_grad():
        whole, drawn = prior.decode(z), CloseUp(prior, parts, image, z).decode(z)
        alone = [CloseUp(prior, parts[i : i + 1], image[:1], z[i : i + 1]).decode(z[i : i + 1]) for i in range(3)]
        cut = CloseUp(SimpleNamespace(decode=prior.decode), parts, image, z).decode(z)
    moved = near(parts, image, 2).expand_as(image) > 0
    assert rms((drawn - whole)[moved]) < 2e-3 < 0.04 < rms((cut - whole)[moved])
    assert (drawn - torch.cat(alone)).abs().max() < 1e-11


def test_the_whole_is_drawn_once_a_level(held):
    """What was noted stays through a level, so that its steps descend one loss, and follows the latent to the next."""
    vae, z, parts, image = held
    other = torch.where(near(parts, z) > 0, z.roll(1, 0), z)
    with prior_of(vae) as prior, torch.no_grad():
        networks = {"decode": prior.decode, "decode_whole": prior.decode_whole, "denoise": lambda x, *_: x}
        metered = Metered(SimpleNamespace(**networks))
        view = CloseUp(metered, parts, image, z)
        view.denoise(z, 0.8, 0.6)
        first, second = view.decode(z), view.decode(other)
        assert metered.calls["decode"] == 1 + 2 * 2  # the whole; then twice a part of two images and one of one
        assert torch.equal(view.decode(z), first)
        view.denoise(z, 0.9, 0.4)
        anew = view.decode(other)
        assert metered.calls["decode"] == 2 + 4 * 2 and rms(anew - second) > 0
        assert torch.equal(anew, CloseUp(prior, parts, image, z).decode(other))


@pytest.mark.parametrize("drawn", [True, False], ids=["after the whole was drawn", "before"])
def test_some_images_are_drawn_as_among_all(held, drawn):
    vae, z, parts, image = held
    other, rows = torch.where(near(parts, z) > 0, z.roll(1, 0), z), torch.tensor([1, 2])
    with prior_of(vae) as prior, torch.no_grad():
        metered = Metered(prior)
        view = CloseUp(metered, parts, image, z)
        if drawn:
            view.decode(z)
        else:
            other = z
        metered.calls.clear()
        part = view.select(rows, 3)
        found, pulled = part.decode(other[rows]), part.decode_pullback(other[rows])[1](image[rows] + 1)
        assert metered.calls["decode"] == (not drawn) + 2 * 2
        assert rms(found - view.decode(other)[rows]) < 1e-12
        assert rms(pulled - view.decode_pullback(other)[1](image + 1)[rows]) < 1e-12
    assert torch.equal(part.movable(z[rows]), view.movable(z)[rows])


PLANS = [
    WHOLE_GRAPH,
    Plan(checkpointed=1),
    Plan(checkpointed=2),
    Plan(checkpointed=2, decoder_again=True),
    Plan(decoder_again=True, by_image=True),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_its_gradient_is_that_of_what_it_draws(held, plan):
    """Against a finite difference; under every plan, an exception on the way, and with no trace in the VAE."""
    vae, z, parts, image = held
    generator = torch.Generator().manual_seed(2)
    draw = lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)  # noqa: E731
    v, c, state = near(parts, z) * draw(z), near(parts, image, 2) * draw(image), traces(vae)
    with prior_of(vae, plan) as prior, torch.no_grad():
        view = CloseUp(prior, parts, image, z)
        drawn, pull = view.decode_pullback(z)
        ahead, back = view.decode(z + 1e-5 * v), view.decode(z - 1e-5 * v)
        assert torch.allclose(drawn, view.decode(z), atol=1e-12)
        assert torch.allclose((pull(c) * v).sum(), (c * (ahead - back)).sum() / 2e-5, rtol=1e-6)
        with pytest.raises(RuntimeError):
            view.decode(z[:, :3])
    assert traces(vae) == state


def traces(network):
    """What a module holds beside its weights, and its children's."""
    return [{name: repr(value) for name, value in vars(m).items() if name != "_parameters"} for m in network.modules()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_as_the_precision(held, dtype):
    vae, z, parts, image = held
    with prior_of(vae.to(dtype)) as prior, torch.no_grad():
        z, image = z.float(), image.float()
        whole, view = prior.decode(z), CloseUp(prior, parts, image, z)
        drawn, pull = view.decode_pullback(z)
        assert pull(torch.ones_like(image)).isfinite().all() and not prior.retries
    moved = near(parts, image, 2).expand_as(image) > 0
    assert rms((drawn - whole)[moved]) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("way", ["accelerate", "group offloading", "leaf offloading", "layerwise casting", "compiled"])
def test_hooks_of_hosts_are_heeded(held, way):
    """Where norms cannot be reached through them, a part is drawn with the whole around it; either way it is right."""
    vae, z, parts, image = held
    with prior_of(vae) as prior, torch.no_grad():
        expected = CloseUp(prior, parts, image, z).decode(z)
    if way == "accelerate":
        cpu_offload(vae, torch.device("cpu"), offload_buffers=True)
    elif way == "layerwise casting":
        vae.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float64)
    elif way == "compiled":
        vae.decoder = torch.compile(vae.decoder, backend="eager")
    else:
        kind = "leaf_level" if way.startswith("leaf") else "block_level"
        more = {} if way.startswith("leaf") else {"num_blocks_per_group": 1}
        vae.enable_group_offload(torch.device("cpu"), offload_type=kind, **more)
    assert draws_parts(vae, (32, 32)) == (way != "group offloading")
    with prior_of(vae) as prior, torch.no_grad():
        whole, (drawn, pull) = prior.decode(z), CloseUp(prior, parts, image, z).decode_pullback(z)
        assert pull(torch.ones_like(image)).isfinite().all()
    moved = near(parts, image, 2).expand_as(image) > 0
    assert rms((drawn - whole)[moved]) < 2e-3
    if way in ("accelerate", "leaf offloading", "compiled"):
        assert torch.allclose(drawn, expected, atol=1e-9)


def test_of_a_vae_in_tiles_all_is_drawn(held):
    """Each tile has norms of its own."""
    vae, z, parts, image = held
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 32
    vae.enable_tiling()
    assert not draws_parts(vae, (32, 32)) and draws_parts(vae, (16, 16)) and draws_parts(tiny.gradient_vae(), (64, 64))
    with prior_of(vae) as prior, torch.no_grad():
        whole, drawn = prior.decode(z), CloseUp(prior, parts, image, z).decode(z)
    moved = near(parts, image, 2).expand_as(image) > 0
    assert torch.allclose(drawn[moved], whole[moved])


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


@pytest.mark.parametrize("changes", [{}, {"jacobian": "free"}, {"guidance_scale": 1.0}])
def test_a_small_hole_is_solved_up_close(pipe, changes):
    image, painted = picture()
    out, whole = solve(pipe, image, painted, **changes), solve(pipe, image, painted, close_up=False, **changes)
    known = (painted == 0).expand_as(image)
    assert torch.equal(out.images[known], image[known])
    assert out.report.drawn == [10 * 20 / 1024] and whole.report.drawn == []
    lengths = {"decode", "draft"}  # a step's length may take a decode more, and the norms of a VAE one of the whole
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

    By the full decoder, which is smooth: at a kink of the small one's rectifiers, rounding turns a gradient. (Rounding
    is what is left, see `test_a_decoder_with_norms_and_attention_draws_a_part_as_in_the_whole`.)
    """
    image, painted = picture(3)
    painted[2, :, 64:192, 64:192] = 1
    draw = lambda *problem, **seed: solve(pipe, *problem, use_gradient_vae=False, **seed)  # noqa: E731
    together = draw(image, painted)
    alone = [draw(image[i : i + 1], painted[i : i + 1], seed=i).images for i in range(3)]
    assert (together.images - torch.cat(alone)).abs().max() < 1e-3
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


def test_what_lies_elsewhere_in_the_answer_is_drawn_too(pipe):
    """Unpasted, the picture is the decoder's of the answer's latent, all of it."""
    image, painted = picture()
    drawn, latent = (
        solve(pipe, image, painted, **kind).images for kind in ({"paste": False}, {"output_type": "latent"})
    )
    with pipe._new_prior([{}]) as prior, torch.no_grad():
        assert torch.allclose(drawn, prior.decode(latent).clamp(0, 1), atol=1e-5)


def test_it_is_left_where_the_vae_draws_in_tiles():
    pipe = load(requires_safety_checker=False)
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 16, 128
    pipe.vae.enable_tiling()
    assert not solve(pipe, *picture()).report.drawn
    pipe.vae.disable_tiling()
    out = solve(pipe, *picture(), memory="low")  # whose plan has tiles
    assert "tiles" in out.report.memory["plan"] and not out.report.drawn


def test_it_takes_less_memory(pipe):
    image, painted = picture()
    peak = lambda **changes: solve(pipe, image, painted, memory="fast", **changes).report.memory["predicted"]  # noqa: E731
    assert peak(use_gradient_vae=False) < 0.8 * peak(use_gradient_vae=False, close_up=False)


def test_xl_has_it_too():
    pipe = load(VMLInpaintXLPipeline, tiny.xl_components)
    image, painted = picture()
    out = solve(pipe, image, painted)
    assert out.report.drawn and torch.equal(out.images[0, :, 100:], image[0, :, 100:])
