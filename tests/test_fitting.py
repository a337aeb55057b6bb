"""Bringing any size to the solver and back: what is to be repainted stays out, what is known comes back."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Generator, Tensor

from vml_ldm.evaluation.tasks import draw_mask
from vml_ldm.fitting import Fit, Window
from vml_ldm.images import to_pil
from vml_ldm.operators import Downsample, Mask, Measurement
from vml_ldm.posing import Restore, jpeg_quality

SIZES = [(128, 128), (131, 150), (300, 200), (60, 90), (256, 256), (97, 400)]


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """Random bytes as an image (1, 3, H, W) in [0, 1]."""
    return torch.randint(0, 256, (1, 3, height, width), generator=Generator().manual_seed(seed)) / 255


def mask_of(name: str, size: tuple[int, int]) -> Tensor:
    return draw_mask(name, *size, Generator().manual_seed(0))


@pytest.mark.parametrize("size", SIZES)
def test_sizes_fit_the_model(size: tuple[int, int]) -> None:
    fit = Fit.choose(size, native=128, stride=8)
    assert all(
        padded % 8 == 0 and 0 <= padded - scaled < 8 for padded, scaled in zip(fit.padded, fit.scaled, strict=True)
    )
    assert 128 <= min(fit.scaled) <= 192
    assert fit.scaled[0] / fit.scaled[1] == pytest.approx(size[0] / size[1], rel=0.01)


def test_asked_size_wins() -> None:
    assert Fit.choose((300, 200), native=128, stride=8, shorter=100) == Fit((300, 200), (150, 100), (152, 104))
    assert Fit.choose((150, 150), native=128, stride=8, shorter=128).scaled == (128, 128)


def test_text_says_what_is_done() -> None:
    assert Fit.choose((128, 136), 128, 8).text().endswith("136 x 128, solved as it is")
    text = Fit.choose((131, 150), 128, 8).text()
    assert "150 x 131, padded to 152 x 136 and cropped again" in text and "scaled" not in text
    text = Fit.choose((300, 200), 128, 8).text()
    assert "scaled to 128 x 192" in text and text.endswith("the result is 200 x 300")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["half", "random", "text"])
def test_nothing_of_the_hole_reaches_the_solver(size: tuple[int, int], name: str) -> None:
    fit, mask = Fit.choose(size, 128, 8), mask_of(name, size)
    image, other = picture(*size), mask * picture(*size) + (1 - mask) * picture(*size, seed=1)
    brought, known = fit.bring(image, mask)
    brought_other, _ = fit.bring(other, mask)
    assert brought.shape[2:] == known.shape[2:] == fit.padded
    inside = known > 0
    assert torch.equal(brought * inside, brought_other * inside)
    assert brought.min() >= 0 and brought.max() <= 1 and known.min() >= 0 and known.max() <= 1


def test_a_plain_colour_stays_plain_beside_a_hole() -> None:
    size = (300, 200)
    mask = mask_of("random", size)
    image = mask * 0.25 + (1 - mask) * torch.ones(1, 3, *size)
    brought, known = Fit.choose(size, 128, 8).bring(image, mask)
    torch.testing.assert_close(brought[(known > 0).expand_as(brought)], torch.full(((known > 0).sum() * 3,), 0.25))


def test_padding_is_unknown() -> None:
    fit = Fit.choose((131, 150), 128, 8)
    _, known = fit.bring(picture(131, 150), torch.ones(1, 1, 131, 150))
    assert known[..., :131, :150].all() and not known[..., 131:, :].any() and not known[..., 150:].any()


@pytest.mark.parametrize("size", SIZES)
def test_known_pixels_come_back_unchanged(size: tuple[int, int]) -> None:
    fit, mask, image = Fit.choose(size, 128, 8), mask_of("text", size), picture(*size)
    result = fit.take_back(torch.rand(1, 3, *fit.padded), image, mask)
    assert result.shape == image.shape
    known = mask.bool().expand_as(image)
    assert torch.equal(result[known], image[known])
    assert not torch.equal(result[~known], image[~known])


def test_no_size_to_change_changes_nothing() -> None:
    image, mask = picture(128, 128), mask_of("scribble", (128, 128))
    fit = Fit.choose((128, 128), 128, 8)
    brought, known = fit.bring(image, mask)
    assert torch.equal(brought, image) and torch.equal(known, mask)
    assert torch.equal(fit.take_back(image, image, mask), image)


def times(factor: int):
    """Size of a measurement -> size of the image, as `Damage.image_size` gives it."""
    return lambda size, scale: (factor * size[0], factor * size[1])


@pytest.mark.parametrize("found", [(32, 32), (33, 47), (10, 200), (300, 200), (128, 128)])
@pytest.mark.parametrize("factor", [1, 4, 8])
def test_a_window_shows_the_whole_measurement_at_the_model_s_size(found: tuple[int, int], factor: int) -> None:
    window = Window.choose(found, native=128, stride=8, grow=times(factor), oversize="resize")
    assert window.used == window.scaled and 128 <= min(window.image) <= 192
    assert window.image == tuple(factor * n for n in window.used)
    assert all(c % 8 == 0 and 0 <= c - n < 8 for c, n in zip(window.canvas, window.image, strict=True))
    assert window.scaled[0] / window.scaled[1] == pytest.approx(found[0] / found[1], rel=0.05)
    brought = window.bring(picture(*found))
    assert brought.shape[2:] == window.used and brought.min() >= 0 and brought.max() <= 1
    if window.scale == 1:
        assert torch.equal(brought, picture(*found))


def test_what_is_tied_to_its_pixels_is_cropped_at_corners_of_blocks() -> None:
    window = Window.choose((300, 130), native=128, stride=8, scales=False, oversize="crop")
    y = torch.arange(300.0 * 130).reshape(1, 1, 300, 130)
    brought = window.bring(y)
    assert window.scale == 1 and brought.shape[2:] == (192, 130) and window.canvas == (192, 136)
    top, left = divmod(int(brought[0, 0, 0, 0]), 130)
    assert (top, left) == (48, 0) and torch.equal(brought, y[..., top : top + 192, :])
    assert Window.choose((60, 50), native=128, stride=8, scales=False).image == (60, 50)


def test_the_rim_of_the_canvas_is_not_measured() -> None:
    window = Window.choose((131, 150), native=128, stride=8)
    assert window.canvas == (136, 152)
    operator = window.see(Mask(torch.ones(1, 1, 131, 150)))
    canvas = picture(*window.canvas)
    assert torch.equal(operator(canvas), window.take_back(canvas)) and operator(canvas).shape[2:] == (131, 150)
    whole = Downsample(4)
    assert Window.choose((32, 34), native=128, stride=8, grow=times(4)).see(whole) is whole


def test_a_window_says_what_is_done() -> None:
    text = Window.choose((32, 40), 128, 8, grow=times(4)).text()
    assert text.endswith("40 x 32, solved at 160 x 128; the result is 160 x 128")
    text = Window.choose((100, 200), 128, 8, grow=times(4), oversize="resize").text()
    assert "scaled to 64 x 32, solved at 256 x 128" in text
    text = Window.choose((131, 300), 128, 8, scales=False, oversize="crop").text()
    assert "of which the middle 192 x 131 is used, solved at 192 x 136 and cropped; the result is 192 x 131" in text


@pytest.mark.parametrize(
    ("found", "factor", "scales"), [((50, 60), 4, True), ((193, 400), 1, True), ((200, 193), 1, False)]
)
def test_what_is_too_large_is_refused_by_both_sizes_unless_it_is_said_what_to_do(found, factor, scales) -> None:
    choose = partial(Window.choose, found, 128, 8, grow=times(factor), scales=scales)
    whole = tuple(factor * n for n in found)
    with pytest.raises(ValueError, match=rf"{found[1]} x {found[0]} pixels.* at most 192.*128 x 128.*--crop.*--whole"):
        choose()
    assert choose(oversize="whole").image == whole and choose(oversize="whole").used == found
    assert max(choose(oversize="crop").image) <= 192 and choose(oversize="crop").scale == 1
    assert choose(oversize="fit") == choose(oversize="resize" if scales else "crop")
    if scales:
        assert min(choose(oversize="resize").image) == 128
    else:
        with pytest.raises(ValueError, match="tied to its pixels, and cannot be shrunk"):
            choose(oversize="resize")
    with pytest.raises(ValueError, match="oversize is 'shrink'; expected one of refuse, resize"):
        choose(oversize="shrink")


def test_the_result_has_the_size_that_was_asked_for() -> None:
    window = Window.choose((20, 25), native=128, stride=8, grow=times(4))
    assert min(window.image) == 128 and window.result == (80, 100)
    assert window.take_back(picture(*window.canvas)).shape[2:] == (80, 100)
    assert "scaled to 40 x 32, solved at 160 x 128; the result is 100 x 80" in window.text()
    near = Window.choose((48, 40), native=128, stride=8, grow=times(4))
    assert near.used == near.found == (48, 40) and near.image == (192, 160)


SEEN = [
    ("sr4", {}),
    ("jpeg", {"quality": 40}),
    ("colorize", {}),
    ("crop", {"margin": 8}),
    ("crop", {"margin": (0, 8, 16, 24)}),
    ("gamma", {"gamma": 0.5}),
    ("nonlinear", {"std": 1.0}),
    ("rows", {}),
    ("rows", {"rows": 1, "columns": 4}),
    ("sr4+jpeg", {"mode": "average"}),
    ("jpeg+sr4", {}),
    ("sr4+crop+jpeg", {"margin": 2}),
    ("crop+rows", {"margin": 4}),
    ("gamma+colorize", {}),
]


@pytest.mark.parametrize(("task", "values"), SEEN)
@pytest.mark.parametrize("size", [(64, 64), (100, 150)])
def test_what_a_task_makes_of_a_picture_is_posed_at_that_picture_s_size(task, values, size) -> None:
    restore = Restore(task, **values)
    y = restore.simulate(picture(*size), 0, native=64, stride=8)
    posed = restore.pose(y, native=64, stride=8)
    canvas = picture(posed.arguments["height"], posed.arguments["width"])
    assert posed.take_back(canvas).shape[2:] == restore.damage.image_size(tuple(y.shape[2:]))
    if min(restore.damage.image_size(tuple(y.shape[2:]))) >= 64:
        assert torch.equal(posed.arguments["y"], y)
    Measurement(posed.arguments["operator"], posed.arguments["y"], 1.0).check((canvas.shape[2], canvas.shape[3]))


def test_margins_and_tone_grow_with_the_picture() -> None:
    """A small crop is scaled up, its margins with it; the result has the size that was asked for."""
    posed = Restore("crop", margin=(2, 4, 6, 8)).pose(picture(24, 20), native=64, stride=8)
    assert "the result is 32 x 32" in posed.text
    window = posed.arguments["operator"]
    assert window(picture(posed.arguments["height"], posed.arguments["width"])).shape[2:] == (48, 40)


@pytest.mark.parametrize(
    ("task", "values", "error", "message"),
    [
        ("sr5", {}, ValueError, "task is 'sr5'; expected one of sr4, sr8"),
        ("sr4+nothing", {}, ValueError, "task is 'nothing'"),
        ("colorize+jpeg", {}, ValueError, "comes after its colours were lost"),
        ("crop", {"margin": -1}, ValueError, "margin is -1; expected pixels >= 0"),
        ("sr4+jpeg", {"std": 2.0}, TypeError, "std is no parameter of sr4\\+jpeg; expected mode, quality"),
        ("rows", {"rows": 0}, ValueError, "rows and columns are 0 and 1; expected whole numbers >= 1"),
    ],
)
def test_tasks_that_cannot_be_are_refused(task, values, error, message) -> None:
    with pytest.raises(error, match=message):
        Restore(task, **values)


@pytest.mark.parametrize("quality", [5, 30, 75, 100])
def test_a_jpeg_file_s_quality_is_read_from_it(quality: int) -> None:
    file = BytesIO()
    to_pil(picture(16, 16))[0].save(file, "JPEG", quality=quality)
    assert jpeg_quality(Image.open(file)) == (quality, True)
    steps = Image.open(file).quantization[0]
    assert jpeg_quality(SimpleNamespace(quantization={0: [min(255, n + (n > 20)) for n in steps]}))[0] in range(
        quality - 4, quality + 5
    )
    assert jpeg_quality(to_pil(picture(16, 16))[0]) is None
