"""Pixels at the edges: orientation, transparency, compositing, filling, the way back to bytes."""

import numpy as np
import pytest
import torch
from PIL import Image

from vml_ldm.images import composite, fill_holes, from_pil, load_image, seamless, to_pil, upright_mask, upright_rgb


def gradient(size=(6, 4)):
    red = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    return Image.fromarray(np.stack([red, 255 - red, red / 2], axis=-1).astype(np.uint8))


def test_bytes_come_back_as_they_were():
    assert np.array_equal(np.asarray(to_pil(from_pil(gradient()))[0]), np.asarray(gradient()))


def test_exif_orientation_is_applied(tmp_path):
    turned, exif = gradient().transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.asarray(load_image(tmp_path / "turned.png")), np.asarray(gradient()))


def test_transparency_is_white_in_an_image_and_black_in_a_mask():
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert (np.asarray(upright_rgb(clear)) == 255).all() and (np.asarray(upright_mask(clear)) == 0).all()


def test_one_channel_becomes_three_equal_ones():
    grey = np.asarray(upright_rgb(gradient().convert("L")))
    assert (grey == grey[..., :1]).all()


def test_composite_is_bit_equal_at_both_ends_and_ignores_what_it_does_not_take():
    known, image = torch.rand(1, 3, 2, 3), torch.full((1, 3, 2, 3), torch.nan)
    mask = torch.ones(1, 1, 2, 3)
    assert torch.equal(composite(known, image, mask), known)
    assert torch.equal(composite(image, known, 1 - mask), known)
    half = composite(torch.zeros(1, 3, 2, 3), torch.ones(1, 3, 2, 3), 0.25 * mask)
    assert torch.allclose(half, torch.tensor(0.75))


def test_seamless_keeps_known_pixels_and_takes_a_constant_error_off_beside_them():
    known, mask = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, 16, 16)
    mask[..., 8:] = 0
    pasted = seamless(known, (known + 0.1) / 1.2, mask)
    assert torch.equal(pasted * mask, known * mask)
    off = torch.full_like(known, 0.6)
    pasted = seamless(torch.full_like(known, 0.5), off, mask)
    assert (pasted[..., 8] - 0.5).abs().max() < 0.01 and torch.allclose(pasted[..., 13:], off[..., 13:], atol=1e-3)
    assert torch.equal(seamless(known, off, torch.zeros_like(mask)), off)


@pytest.mark.parametrize("size", [(16, 16), (13, 7), (1, 5)])
def test_filling_keeps_what_is_known_and_continues_a_constant(size):
    mask = (torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    mask[..., 0, 0] = 1
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    filled = fill_holes(image, mask)
    assert torch.equal(filled * mask, image * mask)
    assert filled.min() >= image.min() and filled.max() <= image.max()
    assert torch.allclose(fill_holes(torch.full_like(image, 0.3), mask), torch.tensor(0.3), atol=1e-6)


def test_filling_nothing_known_gives_grey():
    assert torch.equal(fill_holes(torch.rand(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)), torch.full((1, 3, 8, 8), 0.5))
