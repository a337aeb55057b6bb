"""What values mean: the rule of `vml_ldm.images.ranges` at every door, with the right value beside what comes."""

import warnings

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from vml_ldm import VMLInpaintPipeline, VMLRestorePipeline
from vml_ldm.cli import main
from vml_ldm.images import from_pil, mask_of, read_numbers, read_pixels
from vml_ldm.operators import Downsample

SIZE = 64
RAMP = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).round()


@pytest.fixture(scope="module")
def pipe() -> VMLInpaintPipeline:
    made = VMLInpaintPipeline(**tiny.components(), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def restore(pipe) -> VMLRestorePipeline:
    made = VMLRestorePipeline(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def solve(pipe, image, mask=None, output_type="pt"):
    """The picture; by default its right half is painted."""
    if mask is None:
        mask = Image.fromarray(np.uint8(255 * (np.arange(SIZE) >= SIZE // 2)[None].repeat(SIZE, 0)))
    size = {"height": SIZE, "width": SIZE, "num_inference_steps": 1}
    return pipe("a", image=image, mask_image=mask, output_type=output_type, **size).images


def left(images) -> np.ndarray:
    """The known half of the first image, (H, W / 2, 3)."""
    first = images[0]
    array = first.movedim(0, 2).numpy() if isinstance(first, torch.Tensor) else np.asarray(first)
    return array[:, : SIZE // 2]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
@pytest.mark.parametrize("output_type", ["pt", "np"])
def test_sixteen_bits_are_scaled_by_what_they_hold_and_come_back_as_they_were(pipe, mode, output_type):
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    ramp = Image.frombytes(mode, (SIZE, SIZE), RAMP.astype(kind).tobytes())
    known = left(solve(pipe, ramp, output_type=output_type))
    assert np.array_equal((known * 65535).round(), RAMP[:, : SIZE // 2, None].repeat(3, 2))


def test_an_f_image_in_0_to_1_is_what_it_says_and_one_in_0_to_255_asks(pipe):
    ramp = (RAMP / 65535).astype(np.float32)
    known = left(solve(pipe, Image.fromarray(ramp)))
    assert np.allclose(known, ramp[:, : SIZE // 2, None], atol=1e-7)
    with pytest.raises(ValueError, match="255"):
        solve(pipe, Image.fromarray(255 * ramp))


def test_the_command_line_keeps_sixteen_bits_in_grey_and_in_colour(tmp_path):
    model = tiny.save(tmp_path / "model")
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "grey.png")
    painted = np.zeros((SIZE, SIZE), np.uint8)
    painted[:, SIZE // 2 :] = 255
    Image.fromarray(painted).save(tmp_path / "mask.png")
    out = tmp_path / "out.png"
    call = ["inpaint", tmp_path / "grey.png", tmp_path / "mask.png", "-o", out, "--model", model, "--steps", "1"]
    assert main([str(word) for word in call]) == 0
    with Image.open(out) as found:
        assert found.mode == "I;16"
        assert np.array_equal(np.asarray(found)[:, : SIZE // 2], RAMP[:, : SIZE // 2])


@pytest.mark.parametrize("bright", [255.0, 40.0, 1.2])
def test_floats_beyond_1_are_refused(pipe, bright):
    image = np.full((SIZE, SIZE, 3), bright)
    for given in (image, torch.from_numpy(image).movedim(2, 0)[None]):
        with pytest.raises(ValueError, match="image"):
            solve(pipe, given)


def test_a_y_in_0_to_255_is_refused_and_bytes_are_not(restore):
    y = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"operator": Downsample(4), "height": SIZE, "width": SIZE, "num_inference_steps": 1, "output_type": "pt"}
    with pytest.raises(ValueError, match="Divide 8-bit values by 255"):
        restore("", y=255 * y, **call)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    bytes_, floats = ((255 * y).round().byte(), (255 * y).round() / 255)
    images = [
        restore("", y=given, generator=g, **call).images for given, g in zip((bytes_, floats), seeds, strict=True)
    ]
    assert torch.equal(*images)


def test_a_rounding_error_below_0_moves_nothing(pipe):
    """As any bicubic resize of a tensor makes some."""
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    touched = image.clone()
    touched[0, 0, 0, 0] = -1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = left(solve(pipe, touched))
    assert known[0, 0, 0] == 0 and np.array_equal(known.ravel()[1:], left([image[0]]).ravel()[1:])


def test_signed_floats_are_taken_as_such_with_a_warning(pipe):
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"\[-1, 1\]"):
        known = left(solve(pipe, 2 * image - 1))
    assert np.allclose(known, left([image[0]]), atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.0, 255.0])
def test_what_is_painted_has_no_say(pipe, value):
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    odd = image.clone()
    odd[:, :, :, SIZE // 2 :] = value
    found = solve(pipe, odd)
    assert found.isfinite().all() and np.array_equal(left(found), left([image[0]]))


def test_a_value_that_is_not_finite_and_known_is_named_by_its_image(pipe):
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    image[1, :, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"3 .*image 1|image 1.* 3 "):
        pipe(["a", "b"], image=image, mask_image=torch.zeros(1, 1, SIZE, SIZE), height=SIZE, width=SIZE)


@pytest.mark.parametrize("kind", ["bool", "uint8", "uint16", "int64", "float64"])
@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_masks_of_any_type_are_masks(pipe, kind, make):
    painted = np.zeros((SIZE, SIZE))
    painted[:, SIZE // 2 :] = 1
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mask = make(painted.astype(kind))
    found = solve(pipe, image, mask if make is np.array else mask[None, None])
    assert np.array_equal(left(found), left([image[0]])) and not torch.equal(found, image)


def test_arrays_of_sixteen_bits_are_pictures(pipe):
    array = RAMP.astype(np.uint16)[:, :, None].repeat(3, 2)
    assert np.array_equal((left(solve(pipe, array)) * 65535).round(), array[:, : SIZE // 2])


def test_the_doors_agree(tmp_path):
    """A PIL image, an array, a tensor and a file of the same values are the same picture."""
    values = (np.random.default_rng(0).random((8, 8, 3)) * 255).astype(np.uint8)
    image = Image.fromarray(values)
    image.save(tmp_path / "a.png")
    expected = torch.from_numpy(values).movedim(2, 0)[None] / 255
    assert torch.equal(from_pil(image), expected)
    assert torch.equal(read_pixels(tmp_path / "a.png"), expected)
    assert torch.equal(read_numbers(values, "image").pixels.movedim(2, 0)[None], expected)
    assert torch.equal(mask_of(Image.fromarray(values[..., 0])), expected[:, :1])
