"""Damages by name, alone and one after another: their sizes are those of their operators."""

import itertools

import pytest
import torch

from vml_ldm.damage import TASKS, damage
from vml_ldm.operators import Measurement

NAMES = sorted(set(TASKS) - {"kernel"})  # which has no default
LAST = ("colorize",)  # after it no damage to three channels


def chains(length):
    """Every one that ends in a crop or begins with one, and those of three kinds in every order."""
    every = itertools.permutations(("sr4", "crop", "rows", "gamma"), length)
    return sorted({*every, *((*NAMES[i : i + length - 1], "crop") for i in range(len(NAMES) - length + 1))})


@pytest.mark.parametrize("names", [(name,) for name in NAMES] + chains(2) + chains(3) + chains(4), ids="+".join)
def test_the_operator_takes_images_of_the_size_and_gives_y_s(names):
    if any(name in names[:-1] for name in LAST) and {"jpeg", "colorize"} & {*names[names.index("colorize") + 1 :]}:
        pytest.skip("colours are lost before a damage that needs them")
    chain, seen = damage("+".join(names)), (8, 16)
    size = chain.image_size(seen)
    operator = chain.make(1.0, size)
    y = operator(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)))
    assert y.shape == (1, chain.channels, *seen) and chain.seen_size(size) == seen
    Measurement(operator, y, 0.1).check(size)


def test_a_chain_is_its_damages_one_after_another():
    chain, size = damage("sr4+gamma+crop"), (192, 224)
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    by_hand = x
    for name in ("sr4", "gamma", "crop"):
        by_hand = damage(name).make(1.0, tuple(by_hand.shape[2:]))(by_hand)
    assert torch.equal(chain.make(1.0, size)(x), by_hand) and by_hand.shape[2:] == (16, 24)
