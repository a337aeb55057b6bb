"""The mean and the spread over seeds."""

import pytest
import torch

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
