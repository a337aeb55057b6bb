"""Operators and measurements: laws over one table of all operators, known answers, and error texts."""

from __future__ import annotations

import copy
import io
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vml_ldm import operators
from vml_ldm.assets import example_images
from vml_ldm.images import from_pil, load_image, to_pil
from vml_ldm.objective import data_term, linearise
from vml_ldm.operators import (
    HDR,
    JPEG,
    Blur,
    Compose,
    CompressedSensing,
    Crop,
    Custom,
    Downsample,
    FourierLines,
    Gamma,
    GaussianBlur,
    Grayscale,
    LinearCustom,
    LinearOperator,
    Mask,
    Measurement,
    MotionBlur,
    NonlinearBlur,
    PhaseRetrieval,
    Subsample,
    from_physics,
    is_linear,
    motion_kernel,
    smoothing,
    squares,
)
from vml_ldm.operators.base import normal_of
from vml_ldm.operators.blur import BOUNDARIES, fast_length
from vml_ldm.operators.rows import Rows
from vml_ldm.operators.smoothing import roughness_gradient
from vml_ldm.operators.spectral import coarsen

SIZE = (16, 8)
DEVICES = ["cpu", "meta", *(["cuda"] if torch.cuda.is_available() else [])]


def images(batch=2, seed=0, size=SIZE, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, *size, generator=generator, dtype=torch.float64)


def kernels(batch=1, channels=1):
    drawn = images(batch, seed=5, size=(4, 3), channels=channels)
    return drawn / drawn.sum((2, 3), keepdim=True)


WIDE = (images(1)[0, 0] ** 9).repeat(1, 3) / 30
MASK = Mask(images(1, seed=3)[:, :1].round())
SOFT = Mask((images(1, seed=4)[:, :1] - 0.2).clamp(min=0))

LINEAR = {  # name: operator, shape of y after the batch
    "mask": (MASK, (3, 16, 8)),
    "soft mask": (SOFT, (3, 16, 8)),
    "crop": (Crop(SIZE, 2, 1, 9, 5), (3, 9, 5)),
    "subsample, every third column": (Subsample(SIZE, columns=3), (3, 16, 3)),
    "subsample, rows by number": (Subsample(SIZE, rows=[15, 0, 7]), (3, 3, 8)),
    "downsample, average": (Downsample(4), (3, 4, 2)),
    "downsample, average, rounded up": (Downsample(3, size=SIZE), (3, 6, 3)),
    "downsample, bicubic": (Downsample(2, "bicubic"), (3, 8, 4)),
    "downsample, bicubic, rounded up": (Downsample(3, "bicubic", size=SIZE), (3, 6, 3)),
    "gaussian blur": (GaussianBlur(1.3), (3, 16, 8)),
    "gaussian blur, zero": (GaussianBlur(0.8, "zero"), (3, 16, 8)),
    "gaussian blur, circular": (GaussianBlur(1.3, "circular"), (3, 16, 8)),
    "motion blur": (MotionBlur(5, seed=1), (3, 16, 8)),
    "blur, circular": (Blur(kernels()[0, 0], "circular"), (3, 16, 8)),
    "blur, zero": (Blur(kernels(), "zero"), (3, 16, 8)),
    "blur, reflect, a kernel larger than the image": (Blur(WIDE), (3, 16, 8)),
    "blur, circular, a kernel larger than the image": (Blur(WIDE, "circular"), (3, 16, 8)),
    "blur, a kernel for each channel": (Blur(kernels(channels=3)), (3, 16, 8)),
    "grayscale": (Grayscale(), (1, 16, 8)),
    "grayscale, mean": (Grayscale((1 / 3, 1 / 3, 1 / 3)), (1, 16, 8)),
    "compressed sensing": (CompressedSensing(SIZE, 0.4), (3, 51)),
    "fourier lines": (FourierLines(SIZE, 0.5, seed=2), (3, 8, 8)),
    "composition": (Compose(MASK, GaussianBlur(0.7), Downsample(2), Grayscale()), (1, 8, 4)),
}
NONLINEAR = {
    "jpeg": (JPEG(30), (3, 16, 8)),
    "jpeg, 4:4:4": (JPEG(80, subsample=False), (3, 16, 8)),
    "hdr": (HDR(), (3, 16, 8)),
    "gamma": (Gamma(2.2), (3, 16, 8)),
    "gamma below one": (Gamma(0.4), (3, 16, 8)),
    "nonlinear blur": (NonlinearBlur(GaussianBlur(1.0)), (3, 16, 8)),
    "phase retrieval": (PhaseRetrieval(1.6), (3, 26, 13)),
    "composition, nonlinear": (Compose(MASK, MotionBlur(3), JPEG(40)), (3, 16, 8)),
}
BOTH = LINEAR | NONLINEAR
EXACT = [name for name in LINEAR if "blur" not in name and name != "composition"]
CLOSED = [name for name, (operator, _) in LINEAR.items() if operator.closed_form]


def each(table):
    return pytest.mark.parametrize(("operator", "shape"), list(table.values()), ids=list(table))


def over(names):
    return pytest.mark.parametrize("operator", [LINEAR[name][0] for name in names], ids=names)


def dense(operator):
    """The operator's matrix (m, 384) over three channels of 16 x 8 pixels; complex rows as two real ones."""
    basis = torch.eye(3 * math.prod(SIZE), dtype=torch.float64)
    columns = operator(basis.reshape(-1, 3, *SIZE)).flatten(1)
    return (torch.view_as_real(columns).flatten(1) if columns.is_complex() else columns).T


def vector(y):
    return (torch.view_as_real(y) if y.is_complex() else y).flatten(1)


# Laws, for every operator.


@each(BOTH)
def test_shape_and_dtype_follow_the_image(operator, shape):
    x = images()
    assert operator(x).shape == (2, *shape)
    assert operator(x).real.dtype == torch.float64
    assert operator(x.float()).real.dtype == torch.float32
    assert torch.allclose(vector(operator(x.float())).double(), vector(operator(x)), atol=2e-3)


@each(BOTH)
@pytest.mark.parametrize("device", DEVICES)
def test_held_tensors_follow_the_image_to_its_device(operator, shape, device):
    y = operator(images().float().to(device))
    assert y.device.type == device and y.shape == (2, *shape)
    if operator.linear:
        x = operator.adjoint(y)
        assert x.device.type == device and x.shape == (2, 3, *SIZE) and x.dtype == torch.float32


@each(BOTH)
def test_images_of_a_batch_are_seen_alone(operator, shape):
    x = images(3)
    assert torch.allclose(vector(operator(x))[1:2], vector(operator(x[1:2])), atol=1e-12)


@each(BOTH)
def test_composition(operator, shape):
    x, bent = images(), Gamma(1.5)
    for chain in (Compose(SOFT, bent, operator), operator @ bent @ SOFT, operator @ Compose(SOFT, bent)):
        assert torch.equal(chain(x), operator(bent(SOFT(x)))) and not chain.linear
    assert (operator @ SOFT).linear == operator.linear
    assert torch.equal((torch.sin @ operator)(x), torch.sin(operator(x)))


@each(BOTH)
def test_start_is_an_image(operator, shape):
    y = operator(images().float())
    start = operator.start(y)
    assert start.shape == (2, 3, *SIZE) and start.dtype == torch.float32
    assert start.min() >= 0 and start.max() <= 1
    assert torch.equal(start, Measurement(operator, y, 0.1).start())


@each(BOTH)
@pytest.mark.parametrize("x", [images(), torch.zeros(2, 3, *SIZE), torch.ones(2, 3, *SIZE), images() - 0.5])
def test_gradient_is_finite(operator, shape, x):
    x = x.clone().requires_grad_()
    y = vector(operator(x))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.isfinite(y).all() and torch.isfinite(gradient).all()


@each({name: row for name, row in BOTH.items() if "jpeg" not in name and "composition, n" not in name})
def test_gradient_is_the_derivative(operator, shape):
    x, d, h = images().requires_grad_(), images(seed=1) - 0.5, 1e-6
    y = vector(operator(x))
    c = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape)
    (gradient,) = torch.autograd.grad(y, x, c)
    numeric = ((vector(operator(x + h * d)) - vector(operator(x - h * d))) * c).sum() / (2 * h)
    assert torch.allclose((gradient * d).sum(), numeric, rtol=1e-5, atol=1e-6)


@each(BOTH)
def test_forward_mode(operator, shape):
    x, d = images(), images(seed=1) - 0.5
    y, tangent = torch.func.jvp(operator, (x,), (d,))
    c = torch.cos(torch.arange(vector(y).numel(), dtype=torch.float64)).reshape(vector(y).shape)
    (gradient,) = torch.autograd.grad(vector(operator(x.requires_grad_())), x, c)
    assert torch.allclose((vector(tangent) * c).sum(), (gradient * d).sum())


@each(BOTH)
def test_wrong_image_is_named(operator, shape):
    with pytest.raises(ValueError, match=r"image has shape \(3, 16, 8\).*expected"):
        operator(images()[0])
    with pytest.raises(ValueError, match=r"16 x 8 pixels, the model's size; y has shape \(2, 5\).*expected"):
        Measurement(operator, torch.zeros(2, 5), 0.1).check(SIZE)


def test_y_without_the_batch_s_axis_is_named():
    with pytest.raises(ValueError, match=r"y has shape \(3, 4, 2\), without the batch's axis; expected \(B, 3, 4, 2\)"):
        Measurement(Downsample(4), torch.rand(3, 4, 2), 0.1).check(SIZE)


@each(BOTH)
def test_measurement_counts_and_checks(operator, shape):
    x = images()
    measurement = Measurement(operator, operator(x), torch.tensor([0.1, 0.5]))
    measurement.check(SIZE)
    assert measurement.count().shape == (2,) and measurement.count().dtype == torch.float64
    assert torch.equal(measurement.nll(x), torch.zeros(2).double())


# Laws of linear operators.


@each(LINEAR)
def test_linear_and_adjoint(operator, shape):
    x, z = images(), images(seed=1)
    y = operator(images(seed=2)) - operator(images(seed=6))
    assert operator.linear
    assert torch.allclose(operator(2 * x + z), 2 * operator(x) + operator(z))
    inner = (vector(operator(x)) * vector(y)).sum()
    assert torch.allclose(inner, (x * operator.adjoint(y)).sum(), rtol=1e-12, atol=1e-12)
    assert torch.allclose(operator.normal(x), operator.adjoint(operator(x)), rtol=1e-12, atol=1e-12)


@each(NONLINEAR)
def test_nonlinear(operator, shape):
    x, z = 0.5 * images(), 0.5 * images(seed=1)
    assert not operator.linear
    assert not torch.allclose(operator(x + z), operator(x) + operator(z), rtol=0.01)


@each(LINEAR)
def test_solve_is_the_dense_solve(operator, shape):
    a, b, rho = dense(operator), images(seed=7), torch.tensor([0.3, 0.02]).double()
    for i in range(2):
        matrix = a.T @ a + rho[i] * torch.eye(a.shape[1], dtype=torch.float64)
        expected = torch.linalg.solve(matrix, b[i].flatten())
        tolerance = 1e-10 if operator.closed_form else 1e-5
        assert (operator.solve(b, rho)[i].flatten() - expected).norm() <= tolerance * expected.norm()
        assert (operator.solve(b, rho[i].item())[i].flatten() - expected).norm() <= tolerance * expected.norm()


def test_closed_forms_are_where_they_are_said_to_be():
    assert set(LINEAR) - set(CLOSED) == {name for name in LINEAR if "motion" in name or "composition" in name} | {
        "blur, zero",
        "blur, reflect, a kernel larger than the image",
        "blur, a kernel for each channel",
    }


@over(EXACT)
def test_pinv_is_the_pseudo_inverse(operator):
    a, y = dense(operator), operator(images(seed=8)) + 0.1 * operator(images(seed=9)).flip(2)
    expected = torch.linalg.pinv(a, rtol=1e-9) @ vector(y).T
    assert torch.allclose(operator.pinv(y).flatten(1), expected.T, atol=1e-8)
    x = images()
    assert torch.allclose(operator(operator.pinv(operator(x))), operator(x))


@over([name for name in LINEAR if name not in EXACT])
def test_pinv_is_the_regularised_inverse(operator):
    a, y = dense(operator), operator(images(seed=8))
    matrix = a.T @ a + 0.01 * torch.eye(a.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(matrix, a.T @ vector(y).T).T
    assert torch.allclose(operator.pinv(y).flatten(1), expected, atol=1e-4)


@over(["mask", "crop", "downsample, average", "grayscale"])
def test_start_agrees_with_y(operator):
    y = operator(images())
    assert torch.allclose(operator(operator.start(y)), y)


def test_start_is_grey_where_y_says_nothing():
    x = images()
    assert torch.allclose(MASK.start(MASK(x)), torch.where(MASK.mask > 0, x, 0.5))
    assert (Crop(SIZE, 2, 1, 9, 5).start(x[..., 2:11, 1:6])[:, :, :2] == 0.5).all()


@pytest.mark.parametrize("rho", [0, -1, float("nan"), torch.ones(3), torch.ones(2, 1)])
def test_rho_must_be_positive_and_fit(rho):
    with pytest.raises(ValueError, match=r"(?s)rho is .*expected > 0, a number or \(2,\)"):
        MASK.solve(images(), rho)


@over([name for name in LINEAR if name != "composition"])
def test_wrong_y_is_named(operator):
    y = operator(images())
    with pytest.raises(ValueError, match=r"y has shape .*expected"):
        operator.adjoint(y[0])
    with pytest.raises(ValueError, match=r"has shape .*expected"):
        operator.pinv(y[0])


# Known answers.


@pytest.mark.parametrize(("quality", "subsample"), [(10, True), (50, True), (10, False), (90, False)])
def test_jpeg_is_what_pillow_decodes(quality, subsample):
    image = load_image(example_images("held_out")[0][0]).crop((60, 40, 150, 117))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=2 if subsample else 0)
    ours, theirs = JPEG(quality, subsample)(from_pil(image)), from_pil(Image.open(file))
    assert -10 * (ours - theirs).square().mean().log10() > 38  # PSNR, dB
    assert (ours - theirs).square().mean() < 0.1 * (from_pil(image) - theirs).square().mean() or quality == 90


def test_jpeg_passes_gradients_straight_through():
    x, c = images().requires_grad_(), images(seed=1)
    (gradient,) = torch.autograd.grad(JPEG(10, subsample=False)(x), x, c)
    assert torch.allclose(gradient, c, atol=1e-5)


def test_jpeg_of_a_decoded_image_at_the_best_quality_changes_little():
    image = from_pil(to_pil(images(1).float())[0])
    assert (JPEG(100, subsample=False)(image) - image).abs().max() < 3 / 255


@pytest.mark.parametrize("factor", [2, 4])
def test_downsample_is_torchs(factor):
    x = images()
    small = (SIZE[0] // factor, SIZE[1] // factor)
    assert torch.allclose(Downsample(factor)(x), F.avg_pool2d(x, factor))
    expected = F.interpolate(x, small, mode="bicubic", antialias=True)
    assert torch.allclose(Downsample(factor, "bicubic")(x), expected)


def test_downsample_rounds_up():
    expected = F.avg_pool2d(images(), 3, ceil_mode=True)
    assert torch.allclose(Downsample(3, size=SIZE)(images()), expected)
    assert torch.allclose(Downsample(4).pinv(expected), F.interpolate(expected, scale_factor=4, mode="nearest"))


@pytest.mark.parametrize("boundary", ["reflect", "circular", "zero"])
def test_blur_is_a_convolution(boundary):
    x, kernel = images(size=(9, 12)), images(1, seed=5, size=(4, 3), channels=1)
    mode = "constant" if boundary == "zero" else boundary
    padded = F.pad(x, (1, 1, 1, 2), mode=mode)
    expected = F.conv2d(padded, kernel.flip(2, 3).expand(3, 1, -1, -1), groups=3)
    assert torch.allclose(Blur(kernel, boundary)(x), expected)


@pytest.mark.parametrize("boundary", ["reflect", "circular", "zero"])
def test_gaussian_blur_is_the_blur_of_its_kernel(boundary):
    place = torch.arange(-6, 7).double()
    line = torch.exp(-place.square() / (2 * 1.5**2))
    line = line / line.sum()
    kernel = line[:, None] * line
    assert torch.allclose(GaussianBlur(1.5, boundary)(images()), Blur(kernel, boundary)(images()))
    assert GaussianBlur(30)(images()).std((2, 3)).max() < 0.01  # wider than the image


def test_a_bright_pixel_shows_the_kernel():
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = 1
    kernel = kernels()[0, 0].float()
    assert torch.allclose(Blur(kernel)(x)[0, 0, 2:6, 3:6], kernel, atol=1e-6)


def test_a_blur_keeps_its_spectrum_for_autograd_and_for_a_kernel_that_is_learnt():
    """Made in inference mode it serves autograd later; a kernel with a gradient is transformed anew each time."""
    blur, x = Blur(kernels()), images().requires_grad_()
    with torch.inference_mode():
        seen = blur(x)
    (gradient,) = torch.autograd.grad(blur(x), x, seen.clone())
    assert torch.allclose(gradient, blur.adjoint(seen.clone()))
    blur.kernel.mul_(2)
    assert torch.allclose(blur(images()), 2 * seen)
    learnt = kernels().requires_grad_()
    moving = Blur(learnt)
    for _ in range(2):  # a kept graph would be gone the second time
        (slope,) = torch.autograd.grad(moving(images()).square().sum(), learnt)
    ahead = Blur(learnt.detach() + 1e-8 * slope)(images()).square().sum() - moving(images()).square().sum()
    assert torch.allclose(ahead, 1e-8 * slope.square().sum(), rtol=1e-3)


@pytest.mark.parametrize("n, fast", [(1, 1), (128, 128), (146, 150), (7, 8), (11, 12), (241, 243)])
def test_a_fast_length_has_small_prime_factors(n, fast):
    assert fast_length(n) == fast


def test_each_image_may_have_its_kernel():
    pair = torch.stack([motion_kernel(5, seed=seed) for seed in (0, 1)])[:, None]
    together = Blur(pair)(images())
    assert torch.allclose(together[1:], Blur(pair[1, 0])(images()[1:]))
    with pytest.raises(ValueError, match=r"image has shape \(3, 3, 16, 8\); expected \(2, C, H, W\)"):
        Blur(pair)(images(3))


@pytest.mark.parametrize("intensity", [0, 0.5, 1])
@pytest.mark.parametrize("length", [0.5, 4, 25])
def test_motion_kernel(length, intensity):
    kernel = motion_kernel(length, intensity, seed=3).double()
    place = torch.arange(len(kernel)).double() - len(kernel) // 2
    assert kernel.min() >= 0 and abs(kernel.sum() - 1) < 1e-6 and len(kernel) % 2 == 1
    assert abs((kernel.sum(0) * place).sum()) < 1e-4 and abs((kernel.sum(1) * place).sum()) < 1e-4
    if intensity == 0:  # the variance of a straight line, and up to 1/4 on each axis for the shared points
        variance = (kernel.sum(0) * place**2).sum() + (kernel.sum(1) * place**2).sum()
        assert length**2 / 12 * 0.99 < variance < length**2 / 12 + 0.5


def test_hdr_is_clipped_contrast():
    x = images()
    assert torch.allclose(2 * HDR()(x) - 1, (2 * (2 * x - 1)).clamp(-1, 1))
    assert torch.allclose(HDR(2, pivot=0)(x), (2 * x).clamp(0, 1))
    assert torch.allclose(HDR()(HDR().start(HDR()(x))), HDR()(x))


@pytest.mark.parametrize("gamma", [0.4, 2.2])
def test_gamma_is_a_power_on_8_bit_values(gamma):
    levels = (torch.arange(256).double() / 255).reshape(1, 1, 16, 16)
    assert torch.allclose(Gamma(gamma)(levels), levels**gamma)
    assert torch.allclose(Gamma(gamma).start(Gamma(gamma)(levels)), levels)


@each(BOTH)
def test_those_that_are_linear_are_linear_operators(operator, shape):
    assert isinstance(operator, LinearOperator) == operator.linear == is_linear(operator)
    for chain in (Compose(operator, Gamma(2.0)), NonlinearBlur(GaussianBlur(1.0))):
        assert not isinstance(chain, LinearOperator) and isinstance(copy.deepcopy(chain), Compose)
    if operator.linear:
        chain = pickle.loads(pickle.dumps(Compose(MASK, operator)))
        assert isinstance(chain, LinearOperator) and isinstance(chain, Compose)
        assert torch.equal(chain(images()), operator(MASK(images())))


def test_nonlinear_blur_spreads_light():
    x, blur = images(), GaussianBlur(1.0)
    assert torch.allclose(NonlinearBlur(blur)(x), blur(x**2.2) ** (1 / 2.2), atol=1e-3)
    flat = torch.full_like(x, 0.3)
    assert torch.allclose(NonlinearBlur(blur)(flat), flat)


def test_phase_retrieval_is_the_magnitude_of_the_padded_transform():
    x = images(1, size=(4, 3), channels=1)
    rows, columns = (torch.arange(n).double() for n in (8, 6))
    waves = (
        torch.exp(-2j * torch.pi * (rows[:, None] * rows / 8)),
        torch.exp(-2j * torch.pi * (columns[:, None] * columns / 6)),
    )
    expected = (waves[0][:, :4] @ x[0, 0].cdouble() @ waves[1][:, :3].T).abs() / math.sqrt(48)
    assert torch.allclose(PhaseRetrieval()(x)[0, 0], expected)
    assert torch.allclose(PhaseRetrieval()(x), PhaseRetrieval()(x.flip(2, 3)))


@pytest.mark.parametrize(("size", "oversample"), [((4, 3), 1), ((3, 4), 1.5), ((2, 3), 2)])
def test_phase_retrieval_has_the_derivatives_of_the_magnitude(size, oversample):
    x, operator = images(1, size=size, channels=1), PhaseRetrieval(oversample)
    shape = operator(x).shape[2:]

    def magnitude(x):
        return torch.fft.fft2(x, s=shape, norm="ortho").abs()

    for derivative in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(derivative(operator)(x), derivative(magnitude)(x))
    assert torch.autograd.gradgradcheck(operator, x.requires_grad_())


def test_phase_retrieval_has_no_gradient_where_nothing_is():
    black = torch.zeros(1, 1, 6, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(PhaseRetrieval()(black), black, torch.full((1, 1, 12, 12), 1e9))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_phase_retrieval_starts_near_the_image():
    image = F.interpolate(from_pil(load_image(example_images("held_out")[0][0])), (32, 32), mode="area")
    y = PhaseRetrieval()(image)
    start = PhaseRetrieval().start(y)
    assert (PhaseRetrieval()(start) - y).square().mean().sqrt() < 0.01
    assert min((start - turned).square().mean().sqrt() for turned in (image, image.flip(2, 3))) < 0.02


@pytest.mark.parametrize("size", [(16, 10), (9, 14)])
def test_the_coarser_magnitudes_are_those_of_every_second_pixel(size):
    waves = torch.fft.fft2(images(1, size=tuple(math.ceil(n / 2) for n in size), channels=1))
    at = [torch.arange(n).double() * m / n for n, m in zip(size, waves.shape[2:], strict=True)]  # in coarse pixels
    rows, columns = (
        torch.exp(2j * torch.pi * place[:, None] * torch.fft.fftfreq(m).double())
        for place, m in zip(at, waves.shape[2:], strict=True)
    )
    smooth = rows @ waves.cdouble() @ columns.T / waves[0, 0].numel()  # what its waves are with twice the pixels
    fine, coarse = (torch.fft.fft2(x, norm="ortho").abs() for x in (smooth, torch.fft.ifft2(waves)))
    assert torch.allclose(coarsen(fine), coarse)


@pytest.mark.parametrize("oversample", [1, 1.25, 2, 3.3])
@pytest.mark.parametrize("size", [(16, 8), (7, 10)])
def test_phase_retrieval_finds_the_image_size(oversample, size):
    operator = PhaseRetrieval(oversample)
    assert operator.start(operator(images(size=size)), steps=1).shape == (2, 3, *size)


def test_compressed_sensing_has_signs_and_orthonormal_rows():
    operator = CompressedSensing(SIZE, 1)
    a, one = dense(operator), torch.tensor(1.0).double()
    assert torch.allclose(a @ a.T, torch.eye(len(a)).double())
    assert torch.allclose(a[a != 0].abs(), one / math.sqrt(128))
    first = operator(operator.signs.double().expand(1, 1, -1, -1))
    assert torch.allclose(first[0, 0], F.one_hot(torch.tensor(0), 128) * one * math.sqrt(128))


def test_fourier_lines_are_lines_of_the_transform():
    operator, x = FourierLines(SIZE, 0.5), images()
    assert torch.allclose(operator(x), torch.fft.fft2(x, norm="ortho")[:, :, operator.lines])
    assert 0 in operator.lines and torch.allclose(FourierLines(SIZE, 1).pinv(FourierLines(SIZE, 1)(x)), x)


@pytest.mark.parametrize(
    ("draw", "held"),
    [
        (lambda seed: CompressedSensing(SIZE, 0.4, seed=seed), "signs"),
        (lambda seed: CompressedSensing(SIZE, 0.4, seed=seed), "kept"),
        (lambda seed: FourierLines(SIZE, 0.5, seed=seed), "lines"),
        (lambda seed: MotionBlur(9, seed=seed), "kernel"),
    ],
)
def test_a_seed_draws_one_operator(draw, held):
    torch.manual_seed(0)
    first, state = getattr(draw(1), held), torch.random.get_rng_state()
    assert torch.equal(first, getattr(draw(1), held)) and not torch.equal(first, getattr(draw(2), held))
    assert torch.equal(state, torch.random.get_rng_state())


# Operators made elsewhere.


def test_custom_is_its_two_functions():
    blur = Blur(kernels())
    custom = Custom(lambda x: blur(x) ** 2, lambda x, c: blur.adjoint(2 * blur(x) * c))
    x, c = images().requires_grad_(), images(seed=1)
    assert torch.equal(custom(x), blur(x) ** 2)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, c) for y in (custom(x), blur(x) ** 2))
    assert torch.allclose(ours, theirs)
    chain = Compose(Gamma(2.0), custom)
    assert torch.autograd.gradcheck(lambda z: chain(z).sum((1, 2)), images(1).requires_grad_())
    Measurement(custom, images(), 0.1).check(SIZE)


def test_custom_says_what_its_functions_return():
    x = images().requires_grad_()
    with pytest.raises(ValueError, match=r"vjp returned shape \(2, 1, 16, 8\); expected the image's, \(2, 3, 16, 8\)"):
        Custom(lambda z: z.sum(1), lambda z, c: c[:, None])(x).sum().backward()
    with pytest.raises(TypeError, match="forward returned list; expected a tensor"):
        Custom(lambda z: z.tolist(), lambda z, c: c)(x)
    with pytest.raises(TypeError, match="vjp returned float; expected a tensor"):
        Custom(torch.sin, lambda z, c: 1.0)(x).sum().backward()
    with pytest.raises(TypeError, match="vjp is None; expected a function"):
        Custom(torch.sin, None)


def test_a_linear_custom_is_an_operator_with_all_that_follows_from_its_adjoint():
    """Through NumPy, where torch has no derivative: adjoint, gradient, solve and start are the operator's it wraps."""
    blur = GaussianBlur(1.0)
    custom = LinearCustom(
        lambda x: torch.from_numpy(blur(x).numpy().copy()), lambda y: torch.from_numpy(blur.adjoint(y).numpy().copy())
    )
    x, c = images().requires_grad_(), images(seed=1)
    assert torch.allclose(torch.autograd.grad(custom(x), x, c)[0], blur.adjoint(c))
    assert torch.allclose(custom.solve(c, 0.1), blur.solve(c, 0.1), rtol=0, atol=1e-4)
    assert torch.allclose(custom.start(c), blur.start(c), rtol=0, atol=1e-4)
    measurement = Measurement(custom, blur(images()), 0.1)
    measurement.check(SIZE)
    assert torch.allclose(measurement.guess(SIZE), Measurement(blur, blur(images()), 0.1).guess(SIZE), atol=1e-4)
    with pytest.raises(TypeError, match="adjoint is None; expected a function, or None with size"):
        LinearCustom(torch.sin, None)
    _, push, pull = linearise(Compose(custom, torch.sin), images())  # its derivative is known at every order
    _, push_blur, pull_blur = linearise(Compose(blur, torch.sin), images())
    assert torch.allclose(push(c), push_blur(c)) and torch.allclose(pull(c), pull_blur(c))


def test_torch_finds_the_adjoint_of_a_linear_function():
    blur = GaussianBlur(1.0)
    custom, c = LinearCustom(lambda image: blur(image)[:, :, ::2], size=SIZE), images(seed=1)[:, :, ::2]
    by_hand = torch.zeros_like(images())
    by_hand[:, :, ::2] = c
    assert torch.allclose(custom.adjoint(c), blur.adjoint(by_hand), atol=1e-6)
    custom.check(SIZE)
    with torch.inference_mode():
        assert torch.allclose(custom.adjoint(c.clone()), blur.adjoint(by_hand), atol=1e-6)
    assert is_linear(Compose(blur, custom)) and custom.solve(by_hand, 0.1).isfinite().all()


@pytest.mark.parametrize(
    ("operator", "said"),
    [
        (LinearCustom(lambda x: x[:, :, ::2], lambda y: y.repeat_interleave(2, 2)), "adjoint is not the transpose"),
        (LinearCustom(lambda x: (2 * x).clamp(0, 1), lambda y: 2 * y), "expected a linear operator"),
        (LinearCustom(lambda x: x + 0.5, size=SIZE), "expected a linear operator"),
    ],
    ids=["another adjoint", "clipped", "affine"],
)
def test_a_custom_operator_that_is_not_what_it_says_is_refused_before_any_work(operator, said):
    with pytest.raises(ValueError, match=said):
        operator.check(SIZE)
    with pytest.raises(ValueError, match=said):
        Measurement(operator, operator(images()), 0.1).check(SIZE)


def test_any_object_with_a_and_its_adjoint_is_a_physics():
    blur, y = GaussianBlur(1.0), images()
    plain = from_physics(SimpleNamespace(A=blur, A_adjoint=blur.adjoint), linear=True)
    assert torch.equal(plain(y), blur(y)) and torch.equal(plain.adjoint(y), blur.adjoint(y))
    assert torch.allclose(plain.pinv(y), blur.pinv(y), atol=1e-4)
    better = from_physics(SimpleNamespace(A=blur, A_adjoint=blur.adjoint, A_dagger=lambda y: 2 * y), linear=True)
    assert torch.equal(better.pinv(y), 2 * y)
    bent = from_physics(SimpleNamespace(A=torch.sin, A_dagger=torch.asin))
    assert not bent.linear and torch.allclose(bent.start(bent(y)), y)
    with pytest.raises(TypeError, match="no A_dagger"):
        from_physics(SimpleNamespace(A=torch.sin)).start(y)
    with pytest.raises(TypeError, match="SimpleNamespace has no method A_adjoint; expected a deepinv Physics"):
        from_physics(SimpleNamespace(A=torch.sin), linear=True)
    with pytest.raises(TypeError, match="has no method A;"):
        from_physics(torch.sin)


def test_deepinv_physics():
    physics = pytest.importorskip("deepinv").physics
    x = images().float()
    inpainting = physics.Inpainting((3, *SIZE), mask=MASK.mask[0].float())
    operator = from_physics(inpainting)
    assert operator.linear and torch.equal(operator(x), inpainting.A(x))
    assert torch.allclose(operator.pinv(operator(x)), MASK.pinv(MASK(x)))
    blur = physics.BlurFFT((3, *SIZE), filter=kernels().float())
    y = from_physics(blur)(x)
    assert torch.allclose((y * y).sum(), (x * from_physics(blur).adjoint(y)).sum())
    assert from_physics(blur).start(y).shape == x.shape
    magnitudes = from_physics(physics.RandomPhaseRetrieval(m=50, img_size=(3, *SIZE)))  # it takes complex images
    nonlinear = Compose(lambda image: image.cfloat(), magnitudes)
    assert not magnitudes.linear and not nonlinear.linear
    Measurement(nonlinear, nonlinear(x), 0.1).check(SIZE)


def test_any_callable_is_an_operator():
    measurement = Measurement(lambda x: x.mean(1), torch.zeros(2, *SIZE).double(), 0.1)
    assert measurement.nll(images()).shape == (2,) and measurement.count().tolist() == [128, 128]
    measurement.check(SIZE)
    with pytest.raises(TypeError, match=r"has no start\(y\)"):
        measurement.start()
    chain = Compose(torch.sin, GaussianBlur(1))
    assert chain(images()).shape == images().shape and not chain.linear
    with pytest.raises(TypeError, match=r"sin.* has no start\(y\)"):
        chain.start(images())


# Measurements.


def seen_through(operator, x):
    return Measurement(operator, operator(x), 0.1)


@pytest.mark.parametrize("name", ["mask", "crop", "downsample", "hdr"])
def test_a_guess_for_an_operator_without_a_start_agrees_with_y(name):
    operator = {"mask": MASK, "crop": Crop(SIZE, 3, 1, 7, 5), "downsample": Downsample(4), "hdr": HDR()}[name]
    x = 0.2 + 0.6 * images()
    bare = seen_through(lambda image: operator(image), x)
    guess = bare.guess(SIZE)
    assert guess.shape == x.shape and bare.rms(bare.residual(guess)).max() < 1e-6
    assert torch.allclose(guess[:1], seen_through(lambda image: operator(image), x[:1]).guess(SIZE)) or name == "mask"


@pytest.mark.parametrize(
    "after",
    [MASK, Downsample(4), CompressedSensing(SIZE, 0.4), FourierLines(SIZE, 0.5), HDR(), PhaseRetrieval()],
)
def test_what_comes_after_grey_has_a_guess(after):
    """One channel is all that there is then."""
    assert seen_through(after @ Grayscale(), images()).guess(SIZE, steps=2).shape == images().shape


@pytest.mark.parametrize("name", ["mask", "downsample", "fourier", "grey"])
def test_a_linear_operator_s_guess_minimises_the_residual_and_the_roughness(name):
    operator = {"mask": MASK, "downsample": Downsample(4), "fourier": FourierLines(SIZE, 0.5), "grey": Grayscale()}[
        name
    ]
    x = F.interpolate(0.3 + 0.4 * images(size=(4, 2)), SIZE, mode="bilinear")  # nothing is clamped
    measurement, noise = Measurement(operator, operator(x), 1.0), torch.tensor([0.05, 0.2]).double()

    def cost(image):
        across = lambda x: sum(squares(x.diff(dim=dim)) for dim in (2, 3))  # noqa: E731
        rough = across(image) + 10 * across(image - image.mean(1, keepdim=True))
        return squares(measurement.residual(image)) / noise**2 + rough / 0.1**2

    guess = measurement.guess(SIZE, noise=noise).requires_grad_()
    (slope,) = torch.autograd.grad(cost(guess).sum(), guess)
    (before,) = torch.autograd.grad(cost(start := measurement.start().requires_grad_()).sum(), start)
    assert (cost(guess) <= cost(start)).all() and squares(slope).sqrt().max() < 0.02 * squares(before).sqrt().max()
    assert torch.equal(measurement.guess(SIZE, noise=1e-9), measurement.guess(SIZE, noise=0.01))


def test_a_guess_is_the_start_where_there_is_one_and_never_worse_than_grey():
    x = images()
    assert torch.equal(seen_through(JPEG(20), x).guess(SIZE), JPEG(20).start(JPEG(20)(x)))
    for bare in (lambda image: image**0.2, lambda image: image.log(), lambda image: torch.fft.fft2(image)):
        measurement = seen_through(bare, x)
        error, grey = (measurement.nll(guess) for guess in (measurement.guess(SIZE), torch.full_like(x, 0.5)))
        assert (error < 0.8 * grey).all()
    with pytest.raises(ValueError, match=r"start\(y\) has shape \(2, 3, 16, 8\); expected \(2, 3, 8, 8\)"):
        seen_through(JPEG(20), x).guess((8, 8))
    with pytest.raises(TypeError, match="not for you"):
        seen_through(Unwilling(0.5), x).guess(SIZE)


def test_of_each_cell_as_many_colours_are_seen_as_y_tells_something_of():
    x = images()
    hole, speck = torch.ones(1, 1, *SIZE), torch.ones(1, 1, *SIZE)
    hole[..., :8, :8], speck[..., 1:8, :8] = 0, 0
    everywhere = torch.ones(len(x), SIZE[0] // 8, SIZE[1] // 8, dtype=torch.long)
    around = everywhere.clone()
    around[:, 0, 0] = 0
    for operator, expected in [
        (Mask(hole), 3 * around), (Mask(speck), 3 * everywhere), (GaussianBlur(1.0) @ Mask(hole), 3 * around),
        (Downsample(4), 3 * everywhere), (Grayscale(), everywhere), (Grayscale() @ Downsample(4), everywhere),
        (Grayscale() @ Mask(hole), around), (JPEG(20), 3 * everywhere), (FourierLines(SIZE, 0.5), 3 * everywhere),
        (PhaseRetrieval(), 3 * everywhere),
    ]:  # fmt: skip
        for pixels in (x, x.float()):
            colours = seen_through(operator, pixels).seen(SIZE, 8)
            assert len(colours) and all(torch.equal(found, expected) for found in colours), operator


def test_what_clips_light_does_not_see_all_and_a_batch_is_judged_as_its_images_are():
    x = images()
    clipped = seen_through(HDR(2.0), x).seen(SIZE, 8)  # in a dark, a grey and a bright picture
    assert [picture.unique().tolist() for picture in clipped] == [[0], [3], [0]]
    assert (seen_through(Gamma(2.2), x).seen(SIZE, 8) == 3).all()
    holes = torch.ones(len(x), 1, *SIZE)
    holes[1:, :, :8, :8] = 0
    together = seen_through(Mask(holes), x).seen(SIZE, 8)
    alone = [seen_through(Mask(holes[i : i + 1]), x[i : i + 1]).seen(SIZE, 8) for i in range(len(x))]
    assert torch.equal(together, torch.cat(alone, 1)) and (together[:, 0] == 3).all() and together[:, 1].min() == 0


class Unwilling(HDR):
    def start(self, y):
        raise TypeError("not for you")


def test_nll_and_residual_are_their_formulas():
    x = images(seed=1)
    measurement = Measurement(MASK, MASK(images(seed=2)), torch.tensor([0.1, 0.5]))
    expected = (measurement.y - MASK(x)).square().sum((1, 2, 3)) / (2 * torch.tensor([0.1, 0.5]).double() ** 2)
    assert torch.allclose(measurement.nll(x), expected)


def test_rms_is_over_the_measured_values():
    mask = torch.zeros(1, 1, *SIZE, dtype=torch.float64)
    mask[..., :2] = 1
    measurement = Measurement(Mask(mask), mask * images(), 0.1)
    error = torch.full((2, 3, *SIZE), 0.25, dtype=torch.float64)
    assert torch.allclose(measurement.rms(mask * error), torch.tensor([0.25, 0.25]).double())
    blurred = Measurement(Compose(GaussianBlur(1), Mask(mask)), mask * images(), 0.1)
    assert torch.equal(blurred.count(), measurement.count())


def test_a_complex_measurement_is_like_its_two_real_parts():
    lines, prior = FourierLines(SIZE, 0.5), SimpleNamespace(decode=lambda z: z)
    parts = Compose(lines, torch.view_as_real)
    y, x = lines(images(seed=2)), images().requires_grad_()
    complex_, real = Measurement(lines, y, 0.1), Measurement(parts, torch.view_as_real(y), 0.1)
    data = data_term(x, prior=prior, measurement=complex_)
    assert torch.allclose(complex_.nll(x), real.nll(x)) and torch.allclose(data.nll, real.nll(x))
    assert torch.allclose(data.gradient, torch.autograd.grad(real.nll(x).sum(), x)[0])
    assert complex_.count().tolist() == real.count().tolist() == [384, 384]
    assert torch.allclose(complex_.rms(data.residual), real.rms(real.residual(x)))


@pytest.mark.parametrize("sigma_y", [0, -1, float("nan"), torch.ones(3), torch.ones(2, 2)])
def test_sigma_y_must_be_positive_and_fit(sigma_y):
    with pytest.raises(ValueError, match=r"sigma_y .*expected"):
        Measurement(MASK, images(), sigma_y)


def test_y_must_not_be_8_bit():
    with pytest.raises(ValueError, match=r"y is of type torch.uint8; expected floating.*255"):
        Measurement(MASK, images().byte(), 0.1)


def test_check_names_what_does_not_fit():
    measurement = Measurement(Downsample(4), torch.zeros(2, 3, 4, 2), 0.1)
    measurement.check(SIZE)
    with pytest.raises(ValueError, match=r"image \(2, 3, 32, 32\) to \(2, 3, 8, 8\), y has shape \(2, 3, 4, 2\)"):
        measurement.check((32, 32))
    with pytest.raises(ValueError, match=r"16 x 9 pixels, the model's size; y has shape.*multiples of 4"):
        measurement.check((16, 9))
    with pytest.raises(ValueError, match=r"no gradient in its image.*Custom\(forward, vjp\)"):
        Measurement(lambda x: x.detach(), images(), 0.1).check(SIZE)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 8\).*\(1, 1, 8, 8\)"):
        Mask(torch.ones(1, 1, 8, 8))(images())
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 8\).*y has shape \(2, 3, 4, 3\)"):
        Measurement(MASK, torch.zeros(2, 3, 4, 3), 0.1).residual(images())
    with pytest.raises(ValueError, match=r"image has shape \(2, 3, 4, 4\); expected \(B, C, 16, 8\)"):
        Crop(SIZE, 0, 0, 2, 2)(images(size=(4, 4)))
    with pytest.raises(ValueError, match=r"image has shape \(2, 1, 16, 8\); expected \(B, 3, H, W\)"):
        JPEG(50)(images(channels=1))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Mask(torch.ones(1, 3, 8, 6)), ValueError, "one channel"),
        (lambda: Mask(torch.ones(8, 6)), ValueError, "expected"),
        (lambda: Mask(255 * torch.ones(1, 1, 8, 6)), ValueError, "expected"),
        (lambda: Crop(SIZE, 8, 0, 9, 8), ValueError, "rows 8 to 17 .*within 0 to 16"),
        (lambda: Crop(SIZE, 0, 0, 0, 8), ValueError, "expected a rectangle"),
        (lambda: Subsample(16, 2), ValueError, "size is 16; expected"),
        (lambda: Subsample(SIZE, 0), ValueError, "rows is 0; expected a step"),
        (lambda: Subsample(SIZE, 1, [8]), ValueError, "columns are .*from 0 to 7"),
        (lambda: Subsample(SIZE, [1, 1]), ValueError, "each once"),
        (lambda: Subsample(SIZE, []), ValueError, "at least one"),
        (lambda: Downsample(2.5), ValueError, "factor is 2.5; expected a whole"),
        (lambda: Downsample(2, "lanczos"), ValueError, "'lanczos'; expected 'average' or 'bicubic'"),
        (lambda: GaussianBlur(0), ValueError, "std is 0; expected > 0"),
        (lambda: GaussianBlur(1, "mirror"), ValueError, "boundary is 'mirror'; expected one of 'reflect'"),
        (lambda: Blur(torch.ones(3)), ValueError, r"kernel has shape \(3,\); expected"),
        (lambda: Blur(torch.full((3, 3), math.inf)), ValueError, "not finite"),
        (lambda: MotionBlur(0), ValueError, "length is 0; expected > 0"),
        (lambda: MotionBlur(5, 2), ValueError, "intensity is 2; expected"),
        (lambda: Grayscale((1, 0)), ValueError, "expected three"),
        (lambda: NonlinearBlur(Gamma(2)), TypeError, "expected a linear operator"),
        (lambda: HDR(0), ValueError, "scale is 0"),
        (lambda: HDR(2, 2), ValueError, "pivot is 2"),
        (lambda: Gamma(-1), ValueError, "gamma is -1"),
        (lambda: Gamma(2, toe=0), ValueError, "toe is 0"),
        (lambda: JPEG(0), ValueError, "quality is 0; expected a whole number from 1 to 100"),
        (lambda: PhaseRetrieval(0.5), ValueError, "oversample is 0.5; expected >= 1"),
        (lambda: CompressedSensing((12, 16), 0.5), ValueError, r"size is \(12, 16\); expected powers of two"),
        (lambda: CompressedSensing(SIZE, 0), ValueError, "ratio is 0; expected"),
        (lambda: FourierLines(SIZE, 0.05, centre=0.1), ValueError, "centre is 0.1; expected .* 0.05"),
        (lambda: FourierLines(SIZE, 0.01), ValueError, "at least one of 16"),
        (lambda: Compose(), ValueError, "no operator"),
        (lambda: Compose(MASK, 3), TypeError, "3; expected operators"),
        (lambda: Compose(MASK, JPEG(50)).pinv(images()), TypeError, "JPEG .*expected linear parts"),
        (lambda: Downsample(3)(images()), ValueError, r"\(2, 3, 16, 8\); expected .*multiples of 3.*size="),
        (lambda: Downsample(3, size=SIZE).adjoint(images()), ValueError, r"expected \(B, C, 6, 3\)"),
    ],
)
def test_bad_arguments_are_named(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_every_public_operator_is_in_the_table():
    seen = {type(operator) for operator, _ in BOTH.values()} - {type(BOTH["composition"][0])}  # a linear Compose
    bases = {operators.Operator, operators.LinearOperator, Custom, operators.LinearCustom}
    public = {getattr(operators, name) for name in operators.__all__}
    assert {kind for kind in public if isinstance(kind, type) and issubclass(kind, operators.Operator)} == seen | bases


MAKERS = {
    "mask": lambda: Mask(MASK.mask.clone()),
    "blur": lambda: Blur(kernels()),
    "motion": lambda: MotionBlur(5),
    "grayscale": Grayscale,
    "gaussian": lambda: GaussianBlur(1.0),
    "downsample": lambda: Downsample(2),
    "sensing": lambda: CompressedSensing(SIZE, 0.4),
    "fourier": lambda: FourierLines(SIZE, 0.5),
    "subsample": lambda: Subsample(SIZE, columns=3),
    "jpeg": lambda: JPEG(30),
    "phase": PhaseRetrieval,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_was_made_and_used_in_inference_mode_is_differentiated_later(make):
    with torch.inference_mode():
        operator = make()
        operator(images())
    x = images().requires_grad_()
    squares(operator(x)).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_noise_where_a_mask_has_nothing_is_no_residual():
    """Of y = A(x) + n with noise everywhere, only what was measured counts; y itself stays as it came."""
    noise = 0.1 * torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for operator in (MASK, Compose(GaussianBlur(1.0), MASK)):
        y = operator(images()) + noise
        measurement = Measurement(operator, y, 0.1)
        assert torch.allclose(measurement.residual(images()), torch.where(MASK.mask > 0, noise, 0), atol=1e-12)
        assert measurement.y is y and (measurement.rms(measurement.residual(images())) < 0.13).all()


def test_a_residual_is_of_the_operator_and_y_as_they_are_now():
    """A callback may edit the mask of a solve on the way."""
    measurement = Measurement(MASK, MASK(images()), 0.1)
    measurement.residual(images())
    everything = Mask(torch.ones_like(MASK.mask))
    measurement.operator, measurement.y = everything, images(seed=1)
    assert torch.equal(measurement.residual(images()), images(seed=1) - images())


@pytest.mark.parametrize("noise", [0.001, 0.05])
@pytest.mark.parametrize("hole", ["box", "half"])
def test_smooth_is_the_minimiser_also_far_inside_a_hole(hole, noise):
    """Against a dense solve on 32 x 32 pixels, to a hundredth of what is to be found; all but a rim is missing."""
    size, generator = (32, 32), torch.Generator().manual_seed(1)
    known = torch.ones(1, 1, *size, dtype=torch.float64)
    known[(..., slice(3, 29), slice(3, 29)) if hole == "box" else (..., slice(0, 24))] = 0
    x = F.interpolate(torch.rand(1, 1, 4, 4, generator=generator, dtype=torch.float64), size, mode="bicubic")
    x = x.expand(-1, 3, -1, -1)
    measurement = Measurement(Mask(known), x * known, 1.0)
    found = measurement.smooth(torch.full_like(x, 0.5), noise=noise, slope=0.1)
    basis = torch.eye(32 * 32, dtype=torch.float64).reshape(-1, 1, *size)
    rough = roughness_gradient(basis).flatten(1)  # of grey images, colour has no say
    matrix = torch.diag(known.flatten()) + (noise / 0.1) ** 2 * rough
    exact = torch.linalg.solve(matrix, (x[:, 0] * known[:, 0]).flatten()).reshape(1, 1, *size)
    assert (found - exact).square().mean().sqrt() < 1e-2 * (exact - 0.5).square().mean().sqrt()


@pytest.mark.parametrize(
    "operator",
    [
        *(GaussianBlur(1.5, boundary) for boundary in BOUNDARIES),
        *(Blur(motion_kernel(9, seed=1).double(), boundary) for boundary in BOUNDARIES),
        Blur(kernels(2, 3)),
    ],
    ids=lambda operator: f"{type(operator).__name__}-{operator.boundary}",
)
def test_smooth_is_the_minimiser_behind_a_blur_and_fourier_takes_fewer_steps_to_it(operator, monkeypatch):
    size, calls, normal = (64, 49), [], operator.normal
    monkeypatch.setattr(operator, "normal", lambda image: calls.append(image) or normal(image), raising=False)
    x = F.interpolate(images(size=(16, 12)), size, mode="bilinear")
    grey, y = torch.full_like(x, 0.5), operator(x) + 0.01 * images(size=size, seed=1)
    slope = lambda image: operator.adjoint(y - operator(image)) - 0.2**2 * roughness_gradient(image)  # noqa: E731

    def count_steps():
        calls.clear()
        found = Measurement(operator, y, 0.01).smooth(grey, noise=0.01, slope=0.05)
        assert squares(slope(found)).max() < 1e-5 * squares(slope(grey)).min()
        return len(calls)

    steps = count_steps()
    monkeypatch.setattr(operator, "shift_invariant", False)
    assert steps < 0.7 * count_steps()


HALF = torch.ones(1, 1, 64, 48)
HALF[..., 24:] = 0
RARE = (torch.rand(1, 1, 64, 48, generator=torch.Generator().manual_seed(3)) < 0.2).double()


@pytest.mark.parametrize(
    "operator",
    [Mask(HALF), Mask(RARE), Grayscale(), Compose(Mask(HALF), Grayscale()), Downsample(4)],
    ids=["half", "random", "grey", "grey half", "small"],
)
def test_smooth_takes_few_steps_whichever_colours_are_seen(operator, monkeypatch):
    """R weighs colours eleven times, and A may mix them or lose some: that is no reason to take more steps."""
    size, calls, normal = (64, 48), [], normal_of(operator)
    monkeypatch.setattr(operator, "normal", lambda image: calls.append(image) or normal(image), raising=False)
    x = F.interpolate(images(size=(16, 12)), size, mode="bilinear")
    grey, y = torch.full_like(x, 0.5), operator(x)
    slope = lambda image: operator.adjoint(y - operator(image)) - 0.1**2 * roughness_gradient(image)  # noqa: E731
    found = Measurement(operator, y, 0.01).smooth(grey, noise=0.01, slope=0.1)
    assert squares(slope(found)).max() < 1e-5 * squares(slope(grey)).min()
    assert len(calls) < 45


def test_smooth_is_the_minimiser_behind_a_kernel_that_loses_the_mean():
    """Against a dense solve on 32 x 32 grey pixels; the mean, of which neither A nor R tells, stays what it was."""
    size, operator = (32, 32), Blur(torch.tensor([[-1.0, 0.0, 1.0]], dtype=torch.float64))
    x = F.interpolate(images(size=(4, 4)), size, mode="bicubic").mean(1, keepdim=True)
    found = Measurement(operator, operator(x).expand(-1, 3, -1, -1), 0.01).smooth(
        torch.full((*x.shape[:1], 3, *size), 0.5, dtype=x.dtype), noise=0.01, slope=0.1
    )
    basis = torch.eye(32 * 32, dtype=torch.float64).reshape(-1, 1, *size)
    matrix = operator.adjoint(operator(basis)).flatten(1) + 0.1**2 * roughness_gradient(basis).flatten(1)
    told = operator.adjoint(operator(x - 0.5)).flatten(1).T
    exact = 0.5 + torch.linalg.lstsq(matrix, told, driver="gelsd").solution.T.reshape(x.shape)
    assert torch.allclose(found.mean(dim=(1, 2, 3)), torch.full((len(x),), 0.5, dtype=x.dtype), atol=1e-6)
    assert ((found - exact).square().mean().sqrt() < 1e-2 * (exact - 0.5).square().mean().sqrt()).all()


def test_smooth_takes_fewer_steps_for_what_it_knows_of_a_blur_s_edges(monkeypatch):
    size, calls = (96, 80), []
    operator = Blur(motion_kernel(15, seed=1).double())
    normal = normal_of(operator)
    monkeypatch.setattr(operator, "normal", lambda image: calls.append(image) or normal(image), raising=False)
    x = F.interpolate(images(size=(24, 20)), size, mode="bilinear")
    measurement = Measurement(operator, operator(x) + 0.01 * images(size=size, seed=1), 0.01)

    def count_steps():
        calls.clear()
        measurement.smooth(torch.full_like(x, 0.5), noise=0.01, slope=0.1)
        return len(calls)

    steps = count_steps()
    monkeypatch.setattr(smoothing, "_inside", lambda response, edge: torch.ones_like(edge))
    assert steps < 0.85 * count_steps()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smooth_leaves_the_colour_that_nothing_tells(dtype):
    """Luma and smoothness tell nothing of two tints over the whole picture: only the third, ``(1 + 10 (1 - mean))^-1``
    times luma, which is nearly grey, may move, however many steps are taken."""
    x = images(size=(64, 49)).to(dtype)
    start = x.new_tensor([0.7, 0.4, 0.2])[:, None, None].expand_as(x)
    found = Measurement(Grayscale(), Grayscale()(x), 0.01).smooth(start, noise=0.01, slope=0.1, tolerance=1e-9)
    luma = x.new_tensor([0.299, 0.587, 0.114])
    tint = luma.mean() + (luma - luma.mean()) / 11
    change = (found - start).mean(dim=(2, 3))
    assert torch.allclose(change, (change @ luma)[:, None] * tint / (luma @ tint), atol=1e-4)


def of_some(operator):
    """An operator with a mask for each image of a batch of four, and the same with two of the masks."""
    masks = images(4, seed=8)[:, :1].round()
    rows = torch.tensor([1, 3])
    return (operator @ Mask(masks)), (operator @ Mask(masks[rows])), rows


@each(BOTH)
def test_an_operator_for_some_images_of_its_batch(operator, shape):
    whole, expected, rows = of_some(operator)
    part, x = Rows(whole, rows, 4), images()
    assert torch.allclose(vector(part(x)), vector(expected(x)), atol=1e-12)
    y = operator(images(seed=2))
    assert torch.equal(part.count(y), expected.count(y)) and torch.equal(part.measured(y), expected.measured(y))
    assert torch.allclose(part.start(y), expected.start(y), atol=1e-5)
    assert part.linear == whole.linear == is_linear(part)
    again = Rows(part, torch.tensor([1]), 2)
    assert torch.allclose(vector(again(x[1:])), vector(expected(x))[1:], atol=1e-12)
    source = x.clone().requires_grad_()
    cotangent = torch.randn_like(part(x))
    ours, theirs = (torch.autograd.grad(a(source), source, cotangent)[0] for a in (part, expected))
    assert torch.allclose(ours, theirs, atol=1e-10)


@each(LINEAR)
def test_a_linear_operator_for_some_images_has_all_that_linear_ones_have(operator, shape):
    whole, expected, rows = of_some(operator)
    rho, y = torch.tensor([0.3, 0.7], dtype=torch.float64), operator(images(seed=2))
    for part, of in ((Rows(whole, rows, 4), expected), (Rows(operator, rows, 4), operator)):
        assert part.closed_form == of.closed_form and part.shift_invariant == of.shift_invariant
        for ours, theirs in (
            (part.adjoint(y), of.adjoint(y)),
            (part.normal(images()), of.normal(images())),
            (part.solve(images(), rho), of.solve(images(), rho)),
            (part.solve(images(), 0.3), of.solve(images(), 0.3)),
            (part.pinv(y), of.pinv(y)),
        ):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_measurement_of_some_images():
    mask, y = images(3, seed=8)[:, :1].round(), images(3)
    measurement = Measurement(lambda image: image * mask, y, [0.1, 0.2, 0.3])
    rows = torch.tensor([0, 2])
    part = measurement.select(rows)
    assert torch.allclose(part.nll(0.9 * y[rows]), measurement.nll(0.9 * y)[rows])
    assert measurement.select(torch.arange(3)) is measurement
    with pytest.raises(TypeError, match="no start"):
        part.start()
