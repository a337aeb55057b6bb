"""Operators and measurements: laws and error texts."""

import pytest
import torch

from vml_ldm.operators import Mask, Measurement


def images(batch=2, seed=0):
    return torch.rand(batch, 3, 8, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mask", [images()[:, :1].round(), images()[:1, :1]], ids=["binary", "soft, one for all"])
def test_mask_is_linear_and_its_own_adjoint(mask):
    operator, x, y = Mask(mask), images(seed=1), images(seed=2)
    assert torch.allclose((operator(x) * y).sum(), (x * operator.adjoint(y)).sum(), rtol=1e-12)
    assert torch.allclose(operator(2 * x + y), 2 * operator(x) + operator(y))
    assert operator(x.float()).dtype == torch.float32


def test_nll_and_residual_are_their_formulas():
    operator, x = Mask(images()[:, :1].round()), images(seed=1)
    measurement = Measurement(operator, operator(images(seed=2)), torch.tensor([0.1, 0.5]))
    expected = (measurement.y - operator(x)).square().sum((1, 2, 3)) / (2 * torch.tensor([0.1, 0.5]).double() ** 2)
    assert torch.allclose(measurement.nll(x), expected)


def test_rms_is_over_the_measured_values():
    mask = torch.zeros(1, 1, 8, 6, dtype=torch.float64)
    mask[..., :2] = 1
    measurement = Measurement(Mask(mask), mask * images(), 0.1)
    error = torch.full((2, 3, 8, 6), 0.25, dtype=torch.float64)
    assert torch.allclose(measurement.rms(mask * error), torch.tensor([0.25, 0.25]).double())


def test_any_callable_is_an_operator():
    measurement = Measurement(lambda x: x.mean(1), torch.zeros(2, 8, 6).double(), 0.1)
    assert measurement.nll(images()).shape == (2,) and measurement.count().tolist() == [48, 48]


@pytest.mark.parametrize("sigma_y", [0, -1, float("nan"), torch.ones(3), torch.ones(2, 2)])
def test_sigma_y_must_be_positive_and_fit(sigma_y):
    with pytest.raises(ValueError, match=r"sigma_y .*expected"):
        Measurement(Mask(torch.ones(1, 1, 8, 6)), images(), sigma_y)


@pytest.mark.parametrize("mask", [torch.ones(1, 3, 8, 6), torch.ones(8, 6), 255 * torch.ones(1, 1, 8, 6)])
def test_a_mask_must_have_one_channel_and_unit_range(mask):
    with pytest.raises(ValueError, match="expected"):
        Mask(mask)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 6\).*\(1, 1, 8, 8\)"):
        Mask(torch.ones(1, 1, 8, 8))(images())
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 6\).*y has shape \(2, 3, 4, 3\)"):
        Measurement(Mask(torch.ones(1, 1, 8, 6)), torch.zeros(2, 3, 4, 3), 0.1).residual(images())
