"""Tools around a mask: laws of growing, feathering and filling, margins, and what the commands make of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vml_ldm import edit_mask
from vml_ldm.cli import main
from vml_ldm.images import MaskEdit, widen
from vml_ldm.posing import Inpaint


def box(size=40, low=12, high=28):
    painted = torch.zeros(1, 1, size, size)
    painted[..., low:high, low:high] = 1
    return painted


@pytest.mark.parametrize("pixels", [1, 3, 7])
def test_a_mask_grows_by_what_is_near_enough(pixels):
    """To a pixel: by distance from each painted one, found by looking at all of them."""
    painted = box(24, 8, 12)
    painted[..., 20, 3] = 1
    where = painted[0, 0].nonzero().double()
    every = torch.cartesian_prod(torch.arange(24), torch.arange(24)).double()
    near = (torch.cdist(every, where).min(1).values <= pixels).reshape(24, 24)
    assert torch.equal(MaskEdit(grow=pixels).apply(painted)[0, 0] > 0, near)


def test_shrinking_is_growing_of_what_is_not_painted_and_keeps_to_the_edge():
    painted = box()
    assert torch.equal(MaskEdit(grow=-3).apply(painted), 1 - MaskEdit(grow=3).apply(1 - painted))
    half = torch.zeros(1, 1, 16, 16)
    half[..., 8:] = 1
    assert MaskEdit(grow=-2).apply(half)[0, 0].sum() == 16 * 6  # the picture's edge is none of the mask's


def test_a_feathered_mask_falls_beyond_its_edge_and_stays_whole_inside():
    painted = box()
    found = MaskEdit(feather=8).apply(painted)
    assert torch.equal(found[painted == 1], painted[painted == 1])
    beside = found[0, 0, 20, 28:36]
    assert (beside.diff() < 0).all() and 0.8 < beside[0] < 1 and found[0, 0, 20, 36] == 0


@pytest.mark.parametrize("gap", [False, True])
def test_what_paint_encloses_is_filled_and_what_it_does_not_is_not(gap):
    ring = box()
    ring[..., 14:26, 14:26] = 0
    ring[..., 0:10, 0:10] = torch.linspace(0, 0.4, 10)  # too faint to enclose anything
    if gap:
        ring[..., 20, 12:14] = 0
    found = MaskEdit(fill=True).apply(ring)
    assert (found[..., 12:28, 12:28].mean() == 1) is not gap
    assert torch.equal(found[..., :12, :12], ring[..., :12, :12])


def test_soft_values_are_cut_off_first():
    painted = torch.tensor([0.0, 0.2, 0.5, 0.51, 1.0]).reshape(1, 1, 1, 5)
    assert MaskEdit(cutoff=0.5).apply(painted).flatten().tolist() == [0, 0, 0, 1, 1]
    assert torch.equal(MaskEdit().apply(painted), painted)


def test_pil_and_tensors_are_edited_alike():
    picture = Image.fromarray((255 * box()[0, 0]).byte().numpy())
    found = edit_mask(picture, grow=4, feather=3, fill=True)
    expected = edit_mask(box(), grow=4, feather=3, fill=True)
    assert found.mode == "L" and np.array_equal(np.asarray(found), (255 * expected[0, 0]).round().byte().numpy())


def test_margins_are_painted_and_the_picture_stays():
    image = torch.rand(1, 3, 8, 10)
    wide, painted = widen(image, torch.zeros(1, 1, 8, 10), (1, 2, 3, 4))
    assert wide.shape == (1, 3, 14, 14) and torch.equal(wide[..., 2:10, 1:11], image)
    assert painted.sum() == 14 * 14 - 80 and painted[..., 2:10, 1:11].sum() == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MaskEdit(cutoff=1.0), r"cutoff is 1.0; expected a number in \[0, 1\)"),
        (lambda: MaskEdit(grow=1.5), "grow is 1.5; expected a whole number of pixels from -512"),
        (lambda: MaskEdit(feather=-1), "feather is -1; expected a whole number of pixels from 0"),
        (lambda: edit_mask(torch.zeros(4, 4)), r"`mask` has shape \(4, 4\); expected \(B, 1, H, W\)"),
        (lambda: Inpaint(None), "neither a mask nor a margin"),
        (lambda: Inpaint("mask.png", margins=(1, 2)), "expected four whole numbers of pixels >= 0"),
    ],
    ids=["cutoff", "grow", "feather", "shape", "nothing", "margins"],
)
def test_bad_numbers_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_settings_tell_what_was_edited_and_nothing_else():
    assert Inpaint("mask.png").settings() == {"task": "inpaint", "size": None}
    edited = Inpaint("mask.png", edit=MaskEdit(grow=4), margins=(0, 8, 0, 0)).settings()
    assert json.dumps(edited) == '{"task": "inpaint", "size": null, "grow": 4, "margins": [0, 8, 0, 0]}'


def test_the_command_line_outpaints_and_edits(tmp_path, capsys):
    picture = Image.effect_noise((96, 64), 40).convert("RGB")
    picture.save(tmp_path / "in.png")
    out, steps = tmp_path / "out.png", ["--steps", "4", "--preset", "fast"]
    assert main(["inpaint", str(tmp_path / "in.png"), "-o", str(out), "--outpaint", "16,0,32,64", *steps]) == 0
    with Image.open(out) as wide:
        assert wide.size == (144, 128)
        assert np.array_equal(np.asarray(wide.crop((16, 0, 112, 64))), np.asarray(picture))
    mask = Image.new("L", picture.size)
    mask.paste(255, (40, 20, 56, 36))
    mask.save(tmp_path / "mask.png")
    command = [
        "inpaint",
        str(tmp_path / "in.png"),
        str(tmp_path / "mask.png"),
        "-o",
        str(out),
        "--force",
        "--grow",
        "8",
    ]
    assert main([*command, *steps]) == 0
    changed = (np.asarray(Image.open(out)) != np.asarray(picture)).any(-1)
    assert changed[28, 34:62].mean() > 0.9 and not changed[:, :31].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "there is neither a mask nor a margin"),
        (["--outpaint", "1,2"], "are no margins; expected left,top,right,bottom"),
        (["--outpaint", "8", "--feather", "-2"], "feather is -2"),
    ],
)
def test_the_command_line_refuses_before_any_work(options, said, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    try:
        status = main(["inpaint", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png"), *options])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and said in capsys.readouterr().err


def test_a_folder_is_outpainted_without_masks(tmp_path):
    (tmp_path / "in").mkdir()
    pictures = {name: Image.effect_noise((64, 64), 40).convert("RGB") for name in ("a", "b")}
    for name, picture in pictures.items():
        picture.save(tmp_path / "in" / f"{name}.png")
    command = [
        "batch",
        str(tmp_path / "in"),
        "-o",
        str(tmp_path / "out"),
        "--task",
        "inpaint",
        "--outpaint",
        "0,0,32,0",
    ]
    assert main([*command, "--steps", "4", "--preset", "fast"]) == 0
    for name, picture in pictures.items():
        with Image.open(tmp_path / "out" / f"{name}.png") as wide:
            assert wide.size == (96, 64)
            assert np.array_equal(np.asarray(wide.crop((0, 0, 64, 64))), np.asarray(picture))
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert "margins" in json.dumps(line)
