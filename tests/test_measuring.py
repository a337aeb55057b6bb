"""The last step in pixels: what a decoder could not draw of y."""

import pytest
import torch

from vml_ldm.measuring import put_in, settle
from vml_ldm.operators import HDR, Downsample, Grayscale, Mask, Measurement, squares

SIZE = (16, 16)


def pictures(seed=0, batch=1):
    return 0.3 + 0.4 * torch.rand(batch, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def smooth(seed, batch=1):
    coarse = torch.randn(batch, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    return 0.02 * torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic")


@pytest.mark.parametrize("operator", [Mask((pictures()[:, :1] > 0.5).float()), Downsample(4)])
def test_a_noiseless_measurement_is_all_but_met(operator):
    truth, drawn = pictures(), pictures() + smooth(1)
    image = settle(drawn, Measurement(operator, operator(truth), 0.05), torch.zeros(1))
    before, after = (squares(operator(truth) - operator(x)).sqrt() for x in (drawn, image))
    assert after < 0.1 * before and squares(truth - image) < 0.5 * squares(truth - drawn)


@pytest.mark.parametrize("noise_std", [0.02, 0.1])
def test_of_what_is_smooth_it_finds_more_than_any_share_of_the_residual(noise_std):
    """y = drawn + a smooth part + n: the error falls below that of the best multiple of the residual."""
    drawn, part, std = pictures(batch=32), smooth(2, batch=32), torch.full((32,), noise_std)
    y = drawn + part + noise_std * torch.randn(part.shape, generator=torch.Generator().manual_seed(3))
    image = settle(drawn, Measurement(Mask(torch.ones(1, 1, *SIZE)), y, noise_std), std)
    best = min(squares(drawn + share * (y - drawn) - drawn - part).mean() for share in torch.linspace(0, 1, 21))
    assert squares(image - drawn - part).mean() < 0.9 * best


def test_what_noise_hides_and_what_is_not_linear_stays():
    drawn, none = pictures(), torch.zeros(1)
    y = Downsample(4)(drawn) + 0.1 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    quiet, loud = (settle(drawn, Measurement(Downsample(4), y, 0.1), torch.tensor([s])) for s in (0.0, 100.0))
    assert squares(loud - drawn) < 0.1 * squares(quiet - drawn)
    assert settle(drawn, Measurement(HDR(), HDR()(pictures(1)), 0.1), none) is drawn


@pytest.mark.parametrize(("noise_std", "error"), [(0.0, 0.1), (0.1, 0.1), (0.1, 0.3)])
def test_known_pixels_are_put_in_as_far_as_their_noise_lets(noise_std, error):
    """Of noisy pixels and an image with an error of its own, the mean of least variance; clean ones as they are."""
    truth, draw = torch.full((8, 3, *SIZE), 0.5), torch.Generator().manual_seed(5)
    known = torch.ones(8, 1, *SIZE)
    known[..., 8:] = 0
    noise = lambda size: size * torch.randn(truth.shape, generator=draw)  # noqa: E731
    y, image = truth + noise(noise_std), truth + noise(error)
    put = put_in(image, y, known, torch.full((8,), noise_std))
    left = (put - truth)[..., :8]
    if noise_std == 0:
        assert torch.equal(put[..., :8], y[..., :8])
    else:
        least = (noise_std**-2 + error**-2) ** -0.5
        assert left.square().mean().sqrt() < 1.15 * least
    assert torch.allclose(put[..., 13:], image[..., 13:].clamp(0, 1), atol=1e-6)


def test_known_pixels_count_alone_and_each_image_by_its_own_noise():
    image, y, known = pictures(0, 2), pictures(1, 2), (pictures(2, 2)[:, :1] > 0.5).float()
    both = put_in(image, y, known, torch.tensor([0.0, 0.05]))
    alone = [put_in(image[i : i + 1], y[i : i + 1], known[i : i + 1], torch.tensor([0.05 * i])) for i in range(2)]
    assert torch.allclose(both, torch.cat(alone), atol=1e-6)
    other = torch.where(known > 0, y, torch.rand_like(y))
    assert torch.equal(both, put_in(image, other, known, torch.tensor([0.0, 0.05])))


def test_complex_values_of_a_real_operator_are_refused():
    observed = Measurement(Grayscale(), torch.ones(1, 1, 16, 16, dtype=torch.complex64), 0.1)
    with pytest.raises(ValueError, match="the operator gives real numbers, and y has complex ones"):
        observed.check((16, 16))
