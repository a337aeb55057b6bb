"""The mean and the spread over seeds."""

import pytest
import torch

from vml_ldm import CallablePrior, Levels, Mask, Measurement, vml_map
from vml_ldm.spread import over_seeds


def test_mean_and_standard_deviation_are_those_of_the_images():
    draw = lambda generator: torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)  # noqa: E731
    spread = over_seeds(draw, [3, 1, 4])
    images = [draw(torch.Generator().manual_seed(seed)) for seed in (3, 1, 4)]
    mean = sum(images) / 3
    assert torch.allclose(spread.mean, mean)
    assert torch.allclose(spread.std, (sum((image - mean) ** 2 for image in images) / 2).sqrt())


def test_what_no_seed_changes_has_no_spread():
    spread = over_seeds(lambda generator: torch.ones(1, 3, 2, 2), range(4))
    assert torch.equal(spread.mean, torch.ones(1, 3, 2, 2)) and spread.std.max() == 0


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 1]])
def test_too_few_or_equal_seeds_are_refused(seeds):
    with pytest.raises(ValueError, match="expected two or more, all different"):
        over_seeds(lambda generator: torch.zeros(1), seeds)


def test_vml_spreads_where_y_tells_nothing_and_agrees_where_it_does():
    """A standard normal prior, the left half measured almost without noise: the other half differs."""
    known = torch.zeros(1, 1, 4, 8)
    known[..., :4] = 1
    prior = CallablePrior(lambda x, sigma: x / (1 + sigma**2))
    y = known * torch.rand(1, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    measurement, levels = Measurement(Mask(known), y, 0.01), Levels([(1.0, 3.0), (1.0, 1.0), (1.0, 0.5)])

    def solve(generator):
        x_T = 3 * torch.randn(1, 3, 4, 8, generator=generator)
        given = {"prior": prior, "measurement": measurement, "schedule": levels, "generator": generator}
        return vml_map(x_T, **given, inner_steps=10, stop_at=0).latent

    spread = over_seeds(solve, range(8))
    assert spread.std[..., :4].max() < 0.05 < spread.std[..., 4:].mean()
